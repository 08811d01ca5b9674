"""What several figures draw: names of speakers that do not overlap; recordings, and sequences of features."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager, mlab
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from kdlib.corpus import audio, features
from kdlib.corpus.utterances import Utterance

ROW_IN = 0.2  # height of a row whose name has one line
ROW_NAMES = 0.42  # of a figure's width, at most, for the names of its rows
SHORT_LABEL = 24  # characters that fit below any axes
TOP_HZ = 6000  # of spectrograms
SILENT = "a sequence of features: there is nothing to hear"


def speaker_ticks(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Name the speakers on the horizontal axis; upright where names would touch, and smaller where there are many."""
    names, space = [short(str(name)) for name in names], tick_space(axes.figure, len(names))
    widest = max(text_width(name, 8, "bold") for name in names)
    turned, size = widest > 0.9 * space, min(8.0, 0.75 * space)  # points; a line of text is 1.2 of its size
    axes.set_xticks(places, names, rotation=90 if turned else 0, fontsize=size if turned else 8)
    added = widest * size / 8 / 72 if turned else 0.0
    _add_height(axes.figure, added - getattr(axes, "ticked", (places, names, 0.0))[2])
    axes.ticked = places, names, added


def tick_space(figure: Figure, count: int) -> float:
    """Points between two ticks of an axis that has the width of a figure, less its labels."""
    return 72 * (figure.get_figwidth() - 1) / count


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a text in points."""
    return TextPath((0, 0), text, size=size, prop={"weight": weight}).get_extents().width


def row_names(axes: Axes, names: Sequence[str], size: float | None = None) -> None:
    """Name the rows of an axis, from the lowest; long names are broken, so that the plot keeps half of the width."""
    figure, size = axes.figure, size or plt.rcParams["ytick.labelsize"]
    size = font_manager.FontProperties(size=size).get_size_in_points()
    room = max(12, int(ROW_NAMES * 72 * figure.get_figwidth() / (0.55 * size)))  # characters
    broken = ["\n".join(broken_name(name, room)) for name in names]
    axes.set_yticks(range(len(names)), broken, fontsize=size)
    lines = max((name.count("\n") + 1 for name in broken), default=1)
    added = len(names) * max(0.0, lines * 1.3 * size / 72 - ROW_IN)
    _add_height(figure, added - getattr(axes, "named", (names, size, 0.0))[2])
    axes.named = names, size, added


def _add_height(figure: Figure, inches: float) -> None:
    """Make a figure higher, and what is known of its height without the legend."""
    figure.set_figheight(figure.get_figheight() + inches)
    if hasattr(figure, "outside"):
        figure.outside = (*figure.outside[:4], figure.outside[4] + inches)


def broken_name(name: str, room: int) -> list[str]:
    """A name in lines of so many characters, broken where its parts meet.

    >>> broken_name("ctc_kd+encoder.two_stage - hard+encoder.two_stage", 26)
    ['ctc_kd+encoder.two_stage -', 'hard+encoder.two_stage']
    """
    if len(name) <= room:
        return [name]
    lines: list[str] = []
    for side in re.split(r"(?<= - )", name):  # what is compared with what
        lines.append("")
        for part in re.split(r"(?<=[+.])|(?<= x )|(?<=: )|(?<=, )", side):
            if lines[-1] and len((lines[-1] + part).rstrip()) > room:
                lines.append("")
            lines[-1] += part
    return [short(line.rstrip(), max(room, 12)) for line in lines]


def outside_legend(figure: Figure, handles: Sequence, labels: Sequence[str], *, below: bool = False) -> None:
    """A legend above or below the axes, in as many columns as fit into the figure's width; its rows add height."""
    for old in list(figure.legends):
        old.remove()
    known = getattr(figure, "outside", (None, None, None, plt.rcParams["legend.fontsize"], figure.get_figheight()))
    size, height = known[3:]
    width, all_labels = 72 * figure.get_figwidth(), labels
    labels = [
        label if text_width(label, size) < width - 5 * size else short(label, int(width / size)) for label in labels
    ]
    column = max((text_width(label, size) for label in labels), default=0.0) + 5 * size  # with its handle and gap
    columns = max(1, min(len(labels), int(width // column)))
    place = f"outside {'lower' if below else 'upper'} center"
    figure.legend(handles, labels, ncols=columns, frameon=False, loc=place, fontsize=size)
    figure.set_figheight(height + (-(-len(labels) // columns) - 1) * 1.5 * size / 72)
    figure.outside = handles, all_labels, below, size, height


def fit_texts(figure: Figure) -> None:
    """Fit the legend outside of the axes to a figure's width, and break the lines of its axes' labels."""
    if hasattr(figure, "outside"):
        handles, labels, below, *_ = figure.outside
        outside_legend(figure, handles, labels, below=below)
    for axes in figure.axes:
        if hasattr(axes, "named"):
            row_names(axes, *axes.named[:2])
        if hasattr(axes, "ticked"):
            speaker_ticks(axes, *axes.ticked[:2])
    if any(len(axes.get_xlabel()) > SHORT_LABEL for axes in figure.axes):
        figure.draw_without_rendering()  # where the axes are
    for axes in figure.axes:
        label, place = axes.xaxis.label, axes.get_position()
        middle = (place.x0 + place.x1) / 2
        share = 2 * min(middle, 1 - middle)  # of the figure's width, about the middle of the axes
        if len(figure.axes) > 1:  # there are neighbours
            share = min(share, 1.15 * place.width)
        room = max(20, int(72 * figure.get_figwidth() * share / (0.55 * label.get_fontsize())))  # characters
        text = "\n".join(textwrap.fill(line, room) for line in label.get_text().splitlines())
        lines = text.count("\n") - label.get_text().count("\n")
        label.set_text(text)
        if len(figure.axes) == 1 and lines:
            _add_height(figure, lines * 1.2 * label.get_fontsize() / 72)


def short(name: str, length: int = 18) -> str:
    """A long name without its middle."""
    return name if len(name) <= length else f"{name[: length - length // 3 - 1]}…{name[-(length // 3) :]}"


@dataclass(frozen=True)
class Signal:
    """What an utterance can be shown by: samples, or frames of features where there is no sound."""

    values: np.ndarray  # [N] samples, or [T, F] features
    seconds: float

    @classmethod
    def of(cls, utt: Utterance) -> "Signal":
        """The signal of an utterance; a UserError where it cannot be read."""
        if features.is_file(utt.wav):
            return cls(features.load(utt), utt.duration_s)
        samples = audio.load(utt)
        return cls(samples, len(samples) / audio.RATE_HZ)

    @property
    def has_sound(self) -> bool:
        """True if it is a recording."""
        return self.values.ndim == 1

    def draw(self, axes: Axes, start: float = 0.0) -> float:
        """Draw it from a start time: a spectrogram, or a heat map of the features; return its end time."""
        if self.has_sound:
            return spectrogram(axes, self.values, start)
        return heat_map(axes, self.values, start, start + self.seconds)


def heat_map(axes: Axes, frames: np.ndarray, start: float, end: float) -> float:
    """Draw features [T, F] by time, each less its mean, over its deviation; drawn up to 6 as a spectrogram is."""
    deviation = np.maximum(frames.std(0), 1e-9)
    axes.imshow(
        ((frames - frames.mean(0)) / deviation).T,
        aspect="auto",
        origin="lower",
        cmap="magma",
        vmin=-2.5,
        vmax=2.5,
        extent=(start, end, 0, TOP_HZ / 1000),
        interpolation="nearest",
    )
    axes.set_yticks([0, TOP_HZ / 1000], ["1", f"{frames.shape[1]} features"])
    return end


def spectrogram(axes: Axes, samples: np.ndarray, start: float = 0.0) -> float:
    """Draw a recording's spectrogram, up to 6 kHz, from a start time; return its end time."""
    power, frequencies, _ = mlab.specgram(samples, NFFT=400, noverlap=240, Fs=audio.RATE_HZ)
    kept = frequencies <= TOP_HZ
    end = start + len(samples) / audio.RATE_HZ
    axes.imshow(
        10 * np.log10(power[kept] + 1e-20),  # digital silence has no logarithm
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
