"""Figures for a thesis: every function takes tables and returns a figure; `save` writes it as PDF and PNG.

Widths follow a text column; fonts are embedded; speakers stand in the order of their published intelligibility.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from kdlib.corpus import audio
from kdlib.corpus.manifest import Utterance

LEVELS = ("VERY_LOW", "LOW", "MID", "HIGH", "CONTROL")
COLOURS = dict(zip(LEVELS, sns.color_palette("colorblind", len(LEVELS)), strict=True))
WIDTH_IN = 6.3  # of a thesis page's text


def style() -> dict:
    """Matplotlib settings for print; use as `with plt.rc_context(style())`."""
    return {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "legend.fontsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "figure.dpi": 110,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write `name`.pdf and `name`.png into a folder; return the PNG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("pdf", "png"):
        figure.savefig(folder / f"{name}.{kind}")
    return folder / f"{name}.png"


def durations(speakers: pd.DataFrame) -> Figure:
    """Word duration relative to controls, measured and published, by intelligibility. One row a speaker.

    Where a corpus has no controls that say the same words: the median duration of a recording.
    """
    with plt.rc_context(style()):
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 2.8))
        people = speakers[speakers.level != "CONTROL"]
        relative = people.duration_ratio.notna().any()
        height = people.duration_ratio if relative else people.median_s
        place = np.arange(len(people))
        axes.bar(place, height, color=[COLOURS.get(level, "grey") for level in people.level], width=0.7)
        known = people.published_ratio.notna().to_numpy()
        if known.any():
            axes.plot(place[known], people.published_ratio[known], "kD", markersize=4, label="published for UA-Speech")
        if relative:
            axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xticks(place, people.speaker, rotation=0 if len(people) < 17 else 60)
        axes.set_ylabel(
            "median word duration\nrelative to controls" if relative else "median duration\nof a recording (s)"
        )
        axes.set_xlabel(_order(people.level))
        _level_legend(axes, people.level)
        return figure


def spectrograms(utterances: Sequence[Utterance], labels: Sequence[str]) -> Figure:
    """The same word by several speakers, on one time axis."""
    with plt.rc_context(style()):
        if not utterances:
            figure = plt.figure(figsize=(WIDTH_IN, 1))
            figure.text(0.5, 0.5, "no word is said by all of these speakers", ha="center")
            return figure
        figure, grid = plt.subplots(2, -(-len(utterances) // 2), figsize=(WIDTH_IN, 3.8), sharex=True, sharey=True)
        for axes, utt, label in zip(grid.flat, utterances, labels, strict=False):
            samples = audio.load(utt)
            axes.specgram(samples, NFFT=400, noverlap=240, Fs=audio.RATE_HZ, cmap="magma", vmin=-140, vmax=-50)
            axes.set_title(label)
            axes.set_ylim(0, 6000)
        figure.supxlabel("time (s)", fontsize=9)
        figure.supylabel("frequency (Hz)", fontsize=9)
        return figure


def wra_by_speaker(scores: pd.DataFrame, held_out: str) -> Figure:
    """WRA of every speaker, from least to most intelligible, with intervals.

    Columns: speaker, level, decoder, wra, low, high.
    """
    with plt.rc_context(style()):
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 3.0))
        names = list(dict.fromkeys(scores.speaker))
        decoders = list(dict.fromkeys(scores.decoder))
        for index, decoder in enumerate(decoders):
            part = scores[scores.decoder == decoder].set_index("speaker").loc[names]
            place = np.arange(len(names)) + 0.38 * (index - (len(decoders) - 1) / 2)
            colours = [COLOURS.get(level, "grey") for level in part.level]
            spread = np.abs(100 * np.array([part.wra - part.low, part.high - part.wra]))
            axes.bar(
                place,
                100 * part.wra,
                0.36,
                yerr=spread,
                color=colours,
                alpha=1 if index == 0 else 0.45,
                error_kw={"linewidth": 0.7},
            )
        axes.set_xticks(np.arange(len(names)), names, rotation=0 if len(names) < 17 else 60)
        for tick in axes.get_xticklabels():
            tick.set_fontweight("bold" if tick.get_text() == held_out else "normal")
        axes.set_ylim(0, 105)
        axes.set_ylabel("word recognition accuracy (%)")
        axes.set_xlabel(
            f"{_order(scores.level)}; held out: {held_out}; solid: {decoders[0]}, light: {', '.join(decoders[1:])}"
        )
        _level_legend(axes, scores.level)
        return figure


def _order(levels: pd.Series) -> str:
    return "speaker, from least to most intelligible" if set(levels) - {"?"} else "speaker"


def _level_legend(axes, levels) -> None:
    there = [level for level in LEVELS if level in set(levels)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[level]) for level in there]
    names = [level.replace("_", " ").lower() for level in there]
    old, labels = axes.get_legend_handles_labels()
    kept = [(h, label) for h, label in zip(old, labels, strict=True) if "published" in label]
    axes.legend(
        handles + [h for h, _ in kept],
        names + [label for _, label in kept],
        ncols=6,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0,
    )
