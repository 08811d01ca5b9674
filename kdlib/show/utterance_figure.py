"""Figures of utterances: the recording, and the frame posteriors of each system, on one time axis."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.corpus import audio
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.evaluate.posteriors import Posteriors
from kdlib.show.drawing import SILENT, TOP_HZ, Signal, short, text_width
from kdlib.show.explorer_data import ExplorerData
from kdlib.show.figures import LEVEL_COLOURS, WIDTH_IN, style

CAPTION = 1.5  # height of a system's hypothesis above its tokens, in rows
GAP_S = 0.12  # between two recordings
KEY_IN = 1.7  # width of the key of the strips' colours
MAX_SYSTEMS = 4  # in a figure, without the teachers
MAX_TOKENS, MIN_PROBABILITY = 8, 0.15  # tokens shown per utterance, and the peak that a token has to reach
RIGHT, WRONG = "#029e73", "#d55e00"
STRIP_COLOURS = "magma_r"


def utterance_figure(
    data: ExplorerData,
    utt_id: str,
    names: Sequence[str] = (),
    *,
    decoder: str = "",
    at_s: float | None = None,
    width_in: float = WIDTH_IN,
) -> Figure:
    """Waveform, spectrogram, frame posteriors per system, KL from the teachers, and the same word by other speakers.

    `names` are the systems to show, by default the two that are compared, two others, and the teachers; `at_s` is
    marked. A system without saved posteriors is shown by its hypothesis alone.
    """
    row = data.row(utt_id, decoder)
    frames, distance = data.frames(utt_id), data.divergence(utt_id)
    first = dict.fromkeys([data.after, data.before, *data.systems])
    names = list(names) or [name for name in data.systems if name in list(first)[:MAX_SYSTEMS]]
    names += ["teachers"] * ("teachers" in frames and "teachers" not in names)
    nothing = 1.0, np.zeros((0, 0)), []
    shown = {
        name: (frames[name][0].stride_ms, *_tracks(*frames[name])) if name in frames else nothing for name in names
    }
    distance = {name: curve for name, curve in distance.items() if name in shown}
    signal, missing = _signal(data.utterance(utt_id))
    repetitions = data.same_word(utt_id)
    ends = [stride_ms * tracks.shape[1] / 1000 for stride_ms, tracks, _ in shown.values()]
    end = signal.seconds if signal else max(ends, default=1.0)
    rows = sum(len(labels) + CAPTION for _, _, labels in shown.values())
    panels = {
        "wave": (0.32, 0.3),
        "spectrogram": (0.85, 0.05) if signal else None,
        "tracks": (0.125 * rows, 0.05) if shown else None,
        "distance": (0.5, 0.22) if distance else None,
        "repetitions": (0.6, 0.5) if repetitions else None,
    }
    with plt.rc_context(style() | {"figure.constrained_layout.use": False}):
        figure, axes = _stacked({name: size for name, size in panels.items() if size}, width_in)
        timed, wave = [name for name in axes if name != "repetitions"], axes["wave"]
        for name in timed:
            axes[name].set_xlim(0, end)
            axes[name].xaxis.set_visible(name == timed[-1])
        title = f"{utt_id}: {row['reference']}"
        wave.set_title(_short(title, int(13 * (width_in - KEY_IN * bool(shown)))), loc="left", fontweight="bold")
        if signal and signal.has_sound:
            _wave(wave, signal.values)
        else:
            wave.yaxis.set_visible(False)
            why, colour = (SILENT, "0.4") if signal else (missing, WRONG)
            wave.text(0.01, 0.5, why, transform=wave.transAxes, va="center", fontsize=8, color=colour)
        if signal:
            signal.draw(axes["spectrogram"])
        if shown:
            _strips(axes["tracks"], shown, row, data.marks(row), end)
            _colour_key(figure, "token probability")
        if distance:
            _distances(axes["distance"], distance)
        axes[timed[-1]].set_xlabel("time (s)", labelpad=1)
        if at_s is not None:
            for name in timed:
                axes[name].axvline(at_s, color="C0", linewidth=0.9)
        if repetitions:
            _repetitions(axes["repetitions"], repetitions)
        return figure


def failures_figure(data: ExplorerData, table: pd.DataFrame | None = None, count: int = 10) -> Figure:
    """The most informative failures, each with its spectrogram and the system's frame posteriors."""
    rows = data.top_failures(count, table)
    with plt.rc_context(style()):
        if rows.empty:
            figure = plt.figure(figsize=(WIDTH_IN, 0.6))
            figure.text(0.5, 0.5, f"{data.after}: no errors in this selection", ha="center", va="center")
            plt.close(figure)
            return figure
        lines = -(-len(rows) // 2)
        figure = plt.figure(figsize=(WIDTH_IN, 0.35 + 1.6 * lines))
        for part, (utt_id, row) in zip(figure.subfigures(lines, 2, squeeze=False).flat, rows.iterrows(), strict=False):
            upper, lower = part.subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.02, "height_ratios": [1, 1.1]})
            signal, _ = _signal(data.utterance(utt_id))
            if signal:
                signal.draw(upper)
                upper.set_yticks([])
                upper.set_ylabel("")
                upper.set_xlim(0, signal.seconds)
            else:
                upper.set_axis_off()
                upper.text(0, 0.3, "no recording", transform=upper.transAxes, fontsize=7)
            frames = data.frames(utt_id)
            if data.after in frames:
                kept, logprobs = frames[data.after]
                tracks, labels = _tracks(kept, logprobs, max_tokens=4)
                _strip(lower, tracks, kept.stride_ms)
                _label_rows(lower, range(len(labels)), labels)
                lower.set_xlim(0, tracks.shape[1] * kept.stride_ms / 1000)
            else:
                lower.set_axis_off()
            lower.tick_params(axis="x", labelsize=6)
            teachers = row.get("teachers")
            hint = f"  teachers: {_short(teachers, 10)}" if isinstance(teachers, str) else ""
            hypothesis = _short(row[data.after] or "(empty)", 12)
            upper.set_title(f"{_short(row.reference, 12)} → {hypothesis}{hint}", loc="left", fontsize=7)
        title = f"{_short(data.after, 20)}: the {len(rows)} most informative failures"
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        _colour_key(figure, "below: tokens by time (s), probability")
        plt.close(figure)
        return figure


def confusion_figure(table: pd.DataFrame, name: str) -> Figure:
    """Counts of references (rows) by wrong hypotheses (columns)."""
    import seaborn as sns

    with plt.rc_context(style()):
        if table.empty:
            figure = plt.figure(figsize=(WIDTH_IN, 0.6))
            figure.text(0.5, 0.5, f"{name}: no confusions in this selection", ha="center", va="center")
            plt.close(figure)
            return figure
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 1.4 + 0.21 * len(table)))
        sns.heatmap(
            table.to_numpy(),
            ax=axes,
            cmap="Blues",
            annot=table.map(lambda count: str(count) if count else "").to_numpy(),
            fmt="",
            annot_kws={"size": 7},
            cbar=False,
            linewidths=0.3,
            xticklabels=[_short(text, 16) for text in table.columns],
            yticklabels=[_short(text, 16) for text in table.index],
        )
        axes.tick_params(left=False, bottom=False, labelsize=7)
        axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=50, ha="right", rotation_mode="anchor")
        axes.set_xlabel(f"hypothesis of {name}")
        axes.set_ylabel("reference")
        plt.close(figure)
        return figure


def top_tokens(kept: Posteriors, logprobs: np.ndarray, at_s: float, count: int = 5) -> list[tuple[str, float]]:
    """The most probable tokens of the frame at a time, with their probabilities."""
    if not len(logprobs):
        return []
    frame = logprobs[min(len(logprobs) - 1, int(1000 * at_s / kept.stride_ms))]
    return [(_piece(kept, index), float(np.exp(frame[index]))) for index in np.argsort(-frame)[:count]]


def _signal(utt: Utterance | None) -> tuple[Signal | None, str]:
    """A recording or its features, or the reason why there are none."""
    if utt is None:
        return None, "the corpus has no recording of this id"
    try:
        return Signal.of(utt), ""
    except UserError:
        return None, f"the recording is missing: {utt.wav}"


def _stacked(panels: Mapping[str, tuple[float, float]], width_in: float) -> tuple[Figure, dict[str, Axes]]:
    """Panels by name from top to bottom; each has a height and the gap above it (inches)."""
    total = sum(height + gap for height, gap in panels.values()) + 0.4
    figure = Figure(figsize=(width_in, total))
    axes, bottom, left = {}, total, 0.55 / width_in
    for name, (height, gap) in panels.items():
        bottom -= gap + height
        axes[name] = figure.add_axes([left, bottom / total, 0.985 - left, height / total])
    return figure, axes


def _piece(kept: Posteriors, index: int) -> str:
    if index == kept.blank:
        return "blank"
    return (kept.pieces[index] or f"id {index}").replace("▁", "_")


def _tracks(kept: Posteriors, logprobs: np.ndarray, max_tokens: int = MAX_TOKENS) -> tuple[np.ndarray, list[str]]:
    """Probabilities by token (row) and frame: the most probable ones in the order of their peaks, then the blank."""
    probs = np.exp(logprobs)
    if not len(probs):
        return np.zeros((1, 1)), ["blank"]
    peaks = probs.max(0)
    likely = [index for index in np.argsort(-peaks) if index != kept.blank and peaks[index] > MIN_PROBABILITY]
    more, likely = len(likely) - max_tokens, likely[:max_tokens]
    order = sorted(likely, key=lambda index: int(probs[:, index].argmax()))
    names = [_piece(kept, index) for index in [*order, kept.blank]]
    if more > 0:
        names[-1] += f" (+{more})"  # probable tokens that are not shown
    return probs[:, [*order, kept.blank]].T, names


def _wave(axes: Axes, samples: np.ndarray, points: int = 1500) -> None:
    """Draw the envelope of a recording, at the resolution of the figure."""
    step = max(1, len(samples) // points)
    cut = samples[: len(samples) // step * step].reshape(-1, step)
    time = np.arange(len(cut)) * step / audio.RATE_HZ
    axes.fill_between(time, cut.min(1), cut.max(1), color="0.35", linewidth=0.3)
    axes.set_yticks([])
    axes.set_xticks([])


def _strip(axes: Axes, tracks: np.ndarray, stride_ms: float, top_row: float = 0.0) -> None:
    """Draw probabilities by token and time, from a row of the axes downwards."""
    end = tracks.shape[1] * stride_ms / 1000
    axes.imshow(
        tracks,
        aspect="auto",
        cmap=STRIP_COLOURS,
        vmin=0,
        vmax=1,
        extent=(0, end, top_row + len(tracks) - 0.5, top_row - 0.5),
        interpolation="nearest",
    )


def _colour_key(figure: Figure, text: str) -> None:
    """What the colours of token strips mean, in the upper right corner."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes([1 - 0.62 / width, 1 - 0.18 / height, 0.5 / width, 0.09 / height])
    axes.imshow(np.linspace(0, 1, 64)[None], aspect="auto", cmap=STRIP_COLOURS, vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(visible=True, linewidth=0.4)
    axes.text(-0.1, 0.4, f"{text}  0", transform=axes.transAxes, ha="right", va="center", fontsize=7.5)
    axes.text(1.08, 0.4, "1", transform=axes.transAxes, va="center", fontsize=7.5)


def _strips(axes: Axes, shown: Mapping[str, tuple], row: Mapping, marks: Mapping[str, bool], end: float) -> None:
    """Draw the frame posteriors of each system, one below the other, each with its hypothesis."""
    at, places, names = 0.0, [], []
    for name, (stride_ms, tracks, labels) in shown.items():
        hypothesis, correct = row[name], marks[name]
        text = "no hypothesis" if not isinstance(hypothesis, str) else _short(hypothesis or "(empty)", 60)
        mark = "" if not isinstance(hypothesis, str) else "  ✓" if correct else "  ✗"
        colour = RIGHT if correct else WRONG
        axes.text(0, at + CAPTION - 0.75, f"{name}: {text}{mark}", fontsize=8, color=colour, va="bottom")
        at += CAPTION
        if labels:
            _strip(axes, tracks, stride_ms, at)
        places += list(at + np.arange(len(labels)))
        names += labels
        at += len(labels)
    _label_rows(axes, places, names)
    axes.set_ylim(at - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.spines[["left", "bottom"]].set_visible(False)


def _label_rows(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    axes.set_yticks(places, names, fontsize=6.5)
    axes.tick_params(axis="y", length=0)


def _distances(axes: Axes, distance: Mapping[str, tuple[float, np.ndarray]]) -> None:
    colours = [LEVEL_COLOURS["VERY_LOW"], LEVEL_COLOURS["LOW"], LEVEL_COLOURS["MID"], LEVEL_COLOURS["CONTROL"]]
    for (name, (stride_ms, values)), colour in zip(distance.items(), colours, strict=False):
        edges = np.arange(len(values) + 1) * stride_ms / 1000
        axes.stairs(values, edges, color=colour, linewidth=1.2, label=f"{name} {values.mean():.2f}")
    axes.set_ylim(bottom=0)
    axes.set_title("KL from the teachers by frame (nats); mean:", loc="left", pad=2, fontsize=8)
    legend = {"loc": "lower right", "bbox_to_anchor": (1, 0.9), "borderaxespad": 0, "handlelength": 1.2}
    axes.legend(frameon=False, ncols=4, fontsize=7.5, columnspacing=1.2, **legend)


def _repetitions(axes: Axes, repetitions: Mapping[str, Utterance]) -> None:
    """Draw the same word by other speakers, side by side on one time scale; no two labels overlap."""
    shown = {short(label, 36): _signal(utt)[0] for label, utt in repetitions.items()}
    shown = {label if signal else f"{label}: no recording": signal for label, signal in shown.items()}
    width = 72 * axes.figure.get_figwidth() * axes.get_position().width
    width = max(width, sum(text_width(label, 7.5) for label in shown) / 0.9)  # longer labels cannot all have room
    shares = {label: text_width(label, 7.5) / width for label in shown}
    lasts = {label: signal.seconds if signal else 0.0 for label, signal in shown.items()}
    end = 1.5  # seconds that the axis shows
    for _ in range(20):  # a label takes the longer, in seconds, the more seconds there are
        end = max(end, sum(max(lasts[label], shares[label] * end) + GAP_S for label in shown) - GAP_S)
    start = 0.0
    for label, signal in shown.items():
        axes.text(start, TOP_HZ / 1000 + 0.3, label, fontsize=7.5)
        if signal:
            signal.draw(axes, start)
        start += max(lasts[label], shares[label] * end) + GAP_S
    axes.set_xlim(0, end)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
