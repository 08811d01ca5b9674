"""What several figures draw: names of speakers that do not overlap, and spectrograms."""

from collections.abc import Sequence

import numpy as np
from matplotlib import mlab
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from kdlib.corpus import audio

TOP_HZ = 6000  # of spectrograms


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
