"""Pictures of utterances: what was recorded, and what each system said of every frame of it, on one time axis."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import mlab
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.corpus import audio
from kdlib.corpus.manifest import Utterance
from kdlib.errors import UserError
from kdlib.evaluate.posteriors import Posteriors
from kdlib.show.explorer_data import ExplorerData
from kdlib.show.figures import LEVEL_COLOURS, WIDTH_IN, style

TOP_HZ = 6000
CAPTION = 1.5  # rows of a system's answer above its tokens
MOST = 4  # systems in a picture, beside the teachers
TRACKS, LEAST = 8, 0.15  # tokens shown of an utterance, and the probability that one has to reach
RIGHT, WRONG = "#029e73", "#d55e00"


def utterance_figure(
    failures: ExplorerData,
    utt_id: str,
    names: Sequence[str] = (),
    *,
    decoder: str = "",
    at_s: float | None = None,
    width_in: float = WIDTH_IN,
) -> Figure:
    """Waveform, spectrogram, what each system says of every frame, how far from the teachers, and who else says it.

    `names` are the systems to show, by default the two that are compared, two others, and the teachers; `at_s` is
    marked. A system of whose frames nothing was kept shows its answer alone.
    """
    row = failures.row(utt_id, decoder)
    frames, distance = failures.frames(utt_id), failures.divergence(utt_id)
    first = dict.fromkeys([failures.after, failures.before, *failures.systems])
    names = list(names) or [name for name in failures.systems if name in list(first)[:MOST]]
    names += ["teachers"] * ("teachers" in frames and "teachers" not in names)
    nothing = 1.0, np.zeros((0, 0)), []
    shown = {
        name: (frames[name][0].stride_ms, *_tracks(*frames[name])) if name in frames else nothing for name in names
    }
    distance = {name: one for name, one in distance.items() if name in shown}
    samples, missing = _samples(failures.utterance(utt_id))
    others = failures.alike(utt_id)
    ends = [stride_ms * tracks.shape[1] / 1000 for stride_ms, tracks, _ in shown.values()]
    end = len(samples) / audio.RATE_HZ if samples is not None else max(ends, default=1.0)
    rows = sum(len(labels) + CAPTION for _, _, labels in shown.values())
    panels = {
        "wave": (0.32, 0.3),
        "spectrogram": (0.85, 0.05) if samples is not None else None,
        "tracks": (0.125 * rows, 0.05) if shown else None,
        "distance": (0.5, 0.22) if distance else None,
        "others": (0.6, 0.5) if others else None,
    }
    with plt.rc_context(style() | {"figure.constrained_layout.use": False}):
        figure, axes = _stacked({name: one for name, one in panels.items() if one}, width_in)
        timed = [name for name in axes if name != "others"]
        for name in timed:
            axes[name].set_xlim(0, end)
            axes[name].xaxis.set_visible(name == timed[-1])
        axes["wave"].set_title(
            _short(f"{utt_id}: {row['reference']}", int(13 * width_in)), loc="left", fontweight="bold"
        )
        if samples is None:
            axes["wave"].yaxis.set_visible(False)
            axes["wave"].text(
                0.01, 0.5, missing, transform=axes["wave"].transAxes, va="center", fontsize=8, color=WRONG
            )
        else:
            _wave(axes["wave"], samples)
            spectrogram(axes["spectrogram"], samples)
        if shown:
            _strips(axes["tracks"], shown, row, failures.marks(row), end)
        if distance:
            _distances(axes["distance"], distance)
        axes[timed[-1]].set_xlabel("time (s)", labelpad=1)
        if at_s is not None:
            for name in timed:
                axes[name].axvline(at_s, color="C0", linewidth=0.9)
        if others:
            _others(axes["others"], others)
        return figure


def telling_failures(failures: ExplorerData, table: pd.DataFrame | None = None, count: int = 10) -> Figure:
    """The failures that tell most, each with its spectrogram and what the system says of every frame."""
    rows = failures.telling(count, table)
    with plt.rc_context(style()):
        if rows.empty:
            figure = plt.figure(figsize=(WIDTH_IN, 0.6))
            figure.text(0.5, 0.5, f"{failures.after} is never wrong here", ha="center", va="center")
            plt.close(figure)
            return figure
        lines = -(-len(rows) // 2)
        figure = plt.figure(figsize=(WIDTH_IN, 0.35 + 1.6 * lines))
        for part, (utt_id, row) in zip(figure.subfigures(lines, 2, squeeze=False).flat, rows.iterrows(), strict=False):
            upper, lower = part.subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.02, "height_ratios": [1, 1.1]})
            samples, _ = _samples(failures.utterance(utt_id))
            if samples is not None:
                spectrogram(upper, samples)
                upper.set_yticks([])
                upper.set_ylabel("")
                upper.set_xlim(0, len(samples) / audio.RATE_HZ)
            else:
                upper.set_axis_off()
                upper.text(0, 0.3, "no recording", transform=upper.transAxes, fontsize=7)
            frames = failures.frames(utt_id)
            if failures.after in frames:
                kept, logprobs = frames[failures.after]
                tracks, labels = _tracks(kept, logprobs, most=4)
                _strip(lower, tracks, kept.stride_ms)
                _named(lower, range(len(labels)), labels)
                lower.set_xlim(0, tracks.shape[1] * kept.stride_ms / 1000)
            else:
                lower.set_axis_off()
            lower.tick_params(axis="x", labelsize=6)
            knew = row.get("teachers")
            hint = f"  teachers: {_short(knew, 14)}" if isinstance(knew, str) else ""
            answer = _short(row[failures.after] or "(nothing)", 16)
            upper.set_title(f"{_short(row.reference, 16)} → {answer}{hint}", loc="left", fontsize=7.5)
        figure.suptitle(
            f"{failures.after}: the {len(rows)} most telling failures; below: tokens by time (s)", fontsize=9
        )
        plt.close(figure)
        return figure


def confusion_figure(table: pd.DataFrame, name: str) -> Figure:
    """Which reference (row) was written as which other text (column), how often."""
    import seaborn as sns

    with plt.rc_context(style()):
        if table.empty:
            figure = plt.figure(figsize=(WIDTH_IN, 0.6))
            figure.text(0.5, 0.5, f"{name} confuses nothing here", ha="center", va="center")
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
        axes.set_xlabel(f"written by {name}")
        axes.set_ylabel("said")
        plt.close(figure)
        return figure


def top_tokens(kept: Posteriors, logprobs: np.ndarray, at_s: float, count: int = 5) -> list[tuple[str, float]]:
    """The likeliest tokens of the frame at a time, with their probabilities."""
    if not len(logprobs):
        return []
    frame = logprobs[min(len(logprobs) - 1, int(1000 * at_s / kept.stride_ms))]
    return [(_piece(kept, index), float(np.exp(frame[index]))) for index in np.argsort(-frame)[:count]]


def spectrogram(axes: Axes, samples: np.ndarray, start: float = 0.0) -> float:
    """One recording's spectrogram, up to 6 kHz, from a time on; returns when it ends."""
    power, frequencies, _ = mlab.specgram(samples, NFFT=400, noverlap=240, Fs=audio.RATE_HZ)
    kept = frequencies <= TOP_HZ
    end = start + len(samples) / audio.RATE_HZ
    axes.imshow(
        10 * np.log10(power[kept] + 1e-20),
        aspect="auto",
        origin="lower",
        cmap="magma",
        vmin=-140,
        vmax=-50,
        extent=(start, end, 0, TOP_HZ / 1000),
        interpolation="nearest",
    )
    axes.set_yticks([0, 3, 6], ["0", "3", "6 kHz"])
    return end


def _samples(utt: Utterance | None) -> tuple[np.ndarray | None, str]:
    """A recording, or why there is none."""
    if utt is None:
        return None, "the corpus has no recording of this id"
    try:
        return audio.load(utt), ""
    except UserError:
        return None, f"the recording is missing: {utt.wav}"


def _stacked(panels: Mapping[str, tuple[float, float]], width_in: float) -> tuple[Figure, dict[str, Axes]]:
    """Panels from the top down by name, each so high below a gap so high (inches)."""
    height = sum(tall + gap for tall, gap in panels.values()) + 0.4
    figure = Figure(figsize=(width_in, height))
    found, at = {}, height
    left = 0.55 / width_in
    for name, (tall, gap) in panels.items():
        at -= gap + tall
        found[name] = figure.add_axes([left, at / height, 0.985 - left, tall / height])
    return figure, found


def _piece(kept: Posteriors, index: int) -> str:
    if index == kept.blank:
        return "blank"
    return (kept.pieces[index] or f"id {index}").replace("▁", "_")


def _tracks(kept: Posteriors, logprobs: np.ndarray, most: int = TRACKS) -> tuple[np.ndarray, list[str]]:
    """Probabilities by token (row) and frame: the likeliest, by the time of their peak; last the blank."""
    probs = np.exp(logprobs)
    if not len(probs):
        return np.zeros((1, 1)), ["blank"]
    peaks = probs.max(0)
    likely = [index for index in np.argsort(-peaks) if index != kept.blank and peaks[index] > LEAST]
    more, likely = len(likely) - most, likely[:most]
    order = sorted(likely, key=lambda index: int(probs[:, index].argmax()))
    names = [_piece(kept, index) for index in [*order, kept.blank]]
    if more > 0:
        names[-1] += f" (+{more})"  # tokens that are likely too, and have no row
    return probs[:, [*order, kept.blank]].T, names


def _wave(axes: Axes, samples: np.ndarray, points: int = 1500) -> None:
    """The envelope of a recording: as much as the picture can show."""
    step = max(1, len(samples) // points)
    cut = samples[: len(samples) // step * step].reshape(-1, step)
    time = np.arange(len(cut)) * step / audio.RATE_HZ
    axes.fill_between(time, cut.min(1), cut.max(1), color="0.35", linewidth=0.3)
    axes.set_yticks([])
    axes.set_xticks([])


def _strip(axes: Axes, tracks: np.ndarray, stride_ms: float, top_row: float = 0.0) -> None:
    """Probabilities by token and time, from a row of the axes downwards."""
    end = tracks.shape[1] * stride_ms / 1000
    axes.imshow(
        tracks,
        aspect="auto",
        cmap="magma_r",
        vmin=0,
        vmax=1,
        extent=(0, end, top_row + len(tracks) - 0.5, top_row - 0.5),
        interpolation="nearest",
    )


def _strips(axes: Axes, shown: Mapping[str, tuple], row: Mapping, marks: Mapping[str, bool], end: float) -> None:
    """What each system says of every frame, one below the other, each with its answer."""
    at, places, names = 0.0, [], []
    for name, (stride_ms, tracks, labels) in shown.items():
        said, good = row[name], marks[name]
        text = "did not hear it" if not isinstance(said, str) else _short(said or "(nothing)", 60)
        mark = "" if not isinstance(said, str) else "  ✓" if good else "  ✗"
        colour = RIGHT if good else WRONG
        axes.text(0, at + CAPTION - 0.75, f"{name}: {text}{mark}", fontsize=8, color=colour, va="bottom")
        at += CAPTION
        if labels:
            _strip(axes, tracks, stride_ms, at)
        places += list(at + np.arange(len(labels)))
        names += labels
        at += len(labels)
    _named(axes, places, names)
    axes.set_ylim(at - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.spines[["left", "bottom"]].set_visible(False)


def _named(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
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


def _others(axes: Axes, others: Mapping[str, Utterance]) -> None:
    """The same word by others, side by side on one time scale."""
    end = 0.0
    for label, utt in others.items():
        samples, _ = _samples(utt)
        if samples is None:
            axes.text(end, TOP_HZ / 1000 + 0.3, f"{label}: no recording", fontsize=7.5)
            end += 0.8
        else:
            axes.text(end, TOP_HZ / 1000 + 0.3, label, fontsize=7.5)
            end = spectrogram(axes, samples, end)
        end += 0.12
    axes.set_xlim(0, max(end - 0.12, 1.5))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
