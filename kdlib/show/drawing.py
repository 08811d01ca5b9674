"""What several figures draw: names of speakers that do not overlap; recordings, and sequences of features."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import mlab
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from kdlib.corpus import audio, features
from kdlib.corpus.manifest import Utterance

TOP_HZ = 6000  # of spectrograms
SILENT = "a sequence of features: there is nothing to hear"


def speaker_ticks(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Name the speakers on the horizontal axis; upright where names would touch, and smaller where there are many."""
    names, space = [short(str(name)) for name in names], tick_space(axes.figure, len(names))
    widest = max(text_width(name, 8, "bold") for name in names)
    turned, size = widest > 0.9 * space, min(8.0, 0.75 * space)  # points; a line of text is 1.2 of its size
    axes.set_xticks(places, names, rotation=90 if turned else 0, fontsize=size if turned else 8)
    if turned:
        axes.figure.set_figheight(axes.figure.get_figheight() + widest * size / 8 / 72)


def tick_space(figure: Figure, count: int) -> float:
    """Points between two ticks of an axis that has the width of a figure, less its labels."""
    return 72 * (figure.get_figwidth() - 1) / count


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a text in points."""
    return TextPath((0, 0), text, size=size, prop={"weight": weight}).get_extents().width


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
        """True if it can be heard."""
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
