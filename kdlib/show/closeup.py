"""Pictures of utterances: what was recorded, and what each system said of every frame of it, on one time axis."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.corpus import audio
from kdlib.corpus.manifest import Utterance
from kdlib.errors import UserError
from kdlib.evaluate.posteriors import Posteriors
from kdlib.show.failures import Failures
from kdlib.show.figures import COLOURS, WIDTH_IN, style

TRACKS, LEAST = 8, 0.15  # tokens shown of an utterance, and the probability that one has to reach
RIGHT, WRONG = "#029e73", "#d55e00"


def picture(
    failures: Failures,
    utt_id: str,
    names: Sequence[str] = (),
    *,
    decoder: str = "",
    at_s: float | None = None,
    width_in: float = WIDTH_IN,
) -> Figure:
    """Waveform, spectrogram, what each system says of every frame, how far from the teachers, and who else says it.

    `names` are the systems to show, by default four and the teachers; `at_s` is marked.
    """
    row = failures.table(decoder).loc[utt_id]
    frames, distance = failures.frames(utt_id), failures.divergence(utt_id)
    names = list(names) or [name for name in failures.everybody if name in frames][:4]
    names += ["teachers"] * ("teachers" in frames and "teachers" not in names)
    shown = {name: _tracks(*frames[name]) for name in names if name in frames}
    distance = {name: one for name, one in distance.items() if name in shown}
    samples, missing = _samples(failures.utterance(utt_id))
    others = failures.alike(utt_id)
    heights = [0.5, 1.1] if samples is not None else [0.3]
    heights += [0.22 + 0.13 * len(tracks) for tracks, _ in shown.values()]
    heights += [0.6] * bool(distance) + [0.75] * bool(others)
    gaps = 0.36 * len(heights) + 0.15
    with plt.rc_context(style() | {"figure.constrained_layout.use": False}):
        height = sum(heights) + gaps
        figure = Figure(figsize=(width_in, height))
        edges = _stacked(heights, height)
        place = iter(edges)
        end = len(samples) / audio.RATE_HZ if samples is not None else _end(shown, frames)
        left, right = 0.11, 0.985

        def below() -> Axes:
            bottom, tall = next(place)
            return figure.add_axes([left, bottom, right - left, tall])

        title = f"{utt_id}: {row.reference}"
        if samples is None:
            axes = below()
            axes.set_axis_off()
            axes.text(0, 0.2, missing, transform=axes.transAxes, fontsize=8, color=WRONG)
            axes.set_title(title, loc="left", fontweight="bold")
        else:
            axes = below()
            _wave(axes, samples)
            axes.set_title(title, loc="left", fontweight="bold")
            spectrogram(below(), samples)
        for name, (tracks, labels) in shown.items():
            axes = below()
            _strip(axes, tracks, labels, frames[name][0].stride_ms)
            said, good = row[name], row[name] == row.reference
            _said(axes, name, said, good)
        for axes in figure.axes:
            axes.set_xlim(0, end)
            if at_s is not None and axes.axison:
                axes.axvline(at_s, color="C0", linewidth=0.9)
        if distance:
            _distances(below(), distance, end, at_s)
        if others:
            bottom, tall = next(place)
            _others(figure, others, left, right, bottom, tall)
        return figure


def telling(failures: Failures, table: pd.DataFrame | None = None, count: int = 10) -> Figure:
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
                _strip(lower, *_tracks(kept, logprobs, most=4), kept.stride_ms)
                lower.tick_params(axis="y", labelsize=6)
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


def confusions(table: pd.DataFrame, name: str) -> Figure:
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


def top(kept: Posteriors, logprobs: np.ndarray, at_s: float, count: int = 5) -> list[tuple[str, float]]:
    """The likeliest tokens of the frame at a time, with their probabilities."""
    if not len(logprobs):
        return []
    frame = logprobs[min(len(logprobs) - 1, int(1000 * at_s / kept.stride_ms))]
    return [(_piece(kept, index), float(np.exp(frame[index]))) for index in np.argsort(-frame)[:count]]


def spectrogram(axes: Axes, samples: np.ndarray) -> None:
    """One recording's spectrogram, up to 6 kHz."""
    axes.specgram(samples, NFFT=400, noverlap=240, Fs=audio.RATE_HZ, cmap="magma", vmin=-140, vmax=-50)
    axes.set_ylim(0, 6000)
    axes.set_yticks([0, 2000, 4000, 6000], ["0", "2", "4", "6 kHz"])


def _samples(utt: Utterance | None) -> tuple[np.ndarray | None, str]:
    """A recording, or why there is none."""
    if utt is None:
        return None, "the corpus has no recording of this id"
    try:
        return audio.load(utt), ""
    except UserError:
        return None, f"the recording is missing: {utt.wav}"


def _stacked(heights: Sequence[float], height: float, gap: float = 0.36) -> list[tuple[float, float]]:
    """Bottom and height of panels from the top down, as shares of the figure; above each one a gap for its title."""
    found, at = [], height
    for tall in heights:
        at -= gap + tall
        found.append((at / height, tall / height))
    return found


def _end(shown: Mapping, frames: Mapping) -> float:
    ends = [len(frames[name][1]) * frames[name][0].stride_ms / 1000 for name in shown]
    return max(ends, default=1.0)


def _piece(kept: Posteriors, index: int) -> str:
    if index == kept.blank:
        return "blank"
    return (kept.pieces[index] or f"id {index}").replace("▁", "_")


def _tracks(kept: Posteriors, logprobs: np.ndarray, most: int = TRACKS) -> tuple[np.ndarray, list[str]]:
    """Probabilities by token (row) and frame: those that are ever likely, by the time of their peak; last the blank."""
    probs = np.exp(logprobs)
    if not len(probs):
        return np.zeros((1, 1)), ["blank"]
    peaks = probs.max(0)
    likely = [index for index in np.argsort(-peaks)[: most + 1] if index != kept.blank and peaks[index] > LEAST][:most]
    order = sorted(likely, key=lambda index: int(probs[:, index].argmax()))
    return probs[:, [*order, kept.blank]].T, [_piece(kept, index) for index in [*order, kept.blank]]


def _wave(axes: Axes, samples: np.ndarray, points: int = 1500) -> None:
    """The envelope of a recording: as much as the picture can show."""
    step = max(1, len(samples) // points)
    cut = samples[: len(samples) // step * step].reshape(-1, step)
    time = np.arange(len(cut)) * step / audio.RATE_HZ
    axes.fill_between(time, cut.min(1), cut.max(1), color="0.35", linewidth=0.3)
    axes.set_yticks([])
    axes.set_xticks([])


def _strip(axes: Axes, tracks: np.ndarray, labels: Sequence[str], stride_ms: float) -> None:
    end = tracks.shape[1] * stride_ms / 1000
    axes.imshow(
        tracks,
        aspect="auto",
        cmap="magma_r",
        vmin=0,
        vmax=1,
        extent=(0, end, len(labels) - 0.5, -0.5),
        interpolation="nearest",
    )
    axes.set_yticks(range(len(labels)), labels, fontsize=6.5)
    axes.tick_params(left=False, length=2)
    axes.set_xlim(0, end)


def _said(axes: Axes, name: str, said: object, good: bool) -> None:
    text = "did not hear it" if not isinstance(said, str) else _short(said or "(nothing)", 40)
    mark = "" if not isinstance(said, str) else "  ✓" if good else "  ✗"
    axes.set_title(f"{name}: {text}{mark}", loc="left", color=RIGHT if good else WRONG, pad=2)


def _distances(axes: Axes, distance: Mapping[str, tuple[float, np.ndarray]], end: float, at_s: float | None) -> None:
    colours = [COLOURS["VERY_LOW"], COLOURS["LOW"], COLOURS["MID"], COLOURS["CONTROL"]]
    for (name, (stride_ms, values)), colour in zip(distance.items(), colours, strict=False):
        edges = np.arange(len(values) + 1) * stride_ms / 1000
        axes.stairs(values, edges, color=colour, linewidth=1.2, label=f"{name} {values.mean():.2f}")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, end)
    axes.set_title("KL from the teachers by frame (nats), and its mean", loc="left", pad=2)
    axes.legend(frameon=False, loc="upper right", ncols=4, fontsize=7)
    if at_s is not None:
        axes.axvline(at_s, color="C0", linewidth=0.9)


def _others(
    figure: Figure, others: Mapping[str, Utterance], left: float, right: float, bottom: float, tall: float
) -> None:
    """The same word by others, side by side."""
    wide = (right - left) / 3
    for place, (label, utt) in enumerate(others.items()):
        axes = figure.add_axes([left + place * wide, bottom, 0.94 * wide, tall])
        samples, missing = _samples(utt)
        if samples is None:
            axes.set_axis_off()
            axes.text(0, 0.5, _short(missing, 44), transform=axes.transAxes, fontsize=6.5)
        else:
            spectrogram(axes, samples)
        if place:
            axes.set_yticks([])
        axes.set_title(label, loc="left", fontsize=7.5, pad=2)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
