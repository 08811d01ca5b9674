"""Figures for a thesis: every function takes tables and returns a figure; `save` writes it as PDF and PNG.

Figures have the width of a text column; fonts are embedded. Speakers are in the order of `Corpus.by_intelligibility`,
and an axis says what that is: `order` is the corpus's `speaker_order`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.corpus.manifest import LEVELS
from kdlib.corpus.utterances import Utterance
from kdlib.io import atomic_write
from kdlib.show.drawing import Signal, fit_texts, outside_legend, row_names, short, speaker_ticks, tick_space

LEVEL_COLOURS = {  # ordered: the less intelligible, the darker; legible in grey, and for the colour-blind (plasma)
    "CONTROL": "#9c9c9c",
    "HIGH": "#f89540",
    "MID": "#cc4778",
    "LOW": "#7e03a8",
    "VERY_LOW": "#0d0887",
}
WIDTH_IN = 6.3  # text width of a thesis page
MATRIX_IN = 7.2  # most that the rows of the teachers' matrices take of its height


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
        "text.parse_math": False,  # texts may contain dollar signs
        "figure.constrained_layout.use": True,
    }


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write `name`.pdf and `name`.png into a folder; return the PNG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    fit_texts(figure)
    for kind in ("pdf", "png"):
        with atomic_write(folder / f"{name}.{kind}") as hidden:
            figure.savefig(hidden, format=kind)
    return folder / f"{name}.png"


def durations(speakers: pd.DataFrame, order: str) -> Figure:
    """Word duration relative to controls, measured and published. One row per speaker.

    Without controls that share the speaker's words: the median duration of a recording.
    """
    with plt.rc_context(style()):
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 2.8))
        people = speakers[speakers.level != "CONTROL"]
        relative = people.duration_ratio.notna().any()
        height = people.duration_ratio if relative else people.median_s
        place = np.arange(len(people))
        axes.bar(place, height, color=[LEVEL_COLOURS.get(level, "grey") for level in people.level], width=0.7)
        known = people.published_ratio.notna().to_numpy()
        if known.any():
            axes.plot(place[known], people.published_ratio[known], "kD", markersize=4, label="published for UA-Speech")
        if relative:
            axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        speaker_ticks(axes, place, people.speaker)
        axes.set_ylabel(
            "median word duration\nrelative to controls" if relative else "median duration\nof a recording (s)"
        )
        axes.set_xlabel(f"speaker, {order}")
        _level_legend(axes, people.level)
        return figure


def spectrograms(utterances: Sequence[Utterance], labels: Sequence[str]) -> Figure:
    """The same word by several speakers, on one time axis: spectrograms, or heat maps of features."""
    with plt.rc_context(style()):
        if not utterances:
            figure = plt.figure(figsize=(WIDTH_IN, 1))
            figure.text(0.5, 0.5, "these speakers have no word in common", ha="center")
            return figure
        figure, grid = plt.subplots(2, -(-len(utterances) // 2), figsize=(WIDTH_IN, 3.8), sharex=True, sharey=True)
        for axes, utt, label in zip(grid.flat, utterances, labels, strict=False):
            Signal.of(utt).draw(axes)
            axes.set_title(short(label, 32))
        for axes in grid.flat[len(utterances) :]:
            axes.set_axis_off()
        ends = [image.get_extent()[1] for axes in grid.flat for image in axes.get_images()]
        grid.flat[0].set_xlim(0, max(ends))  # shared by all
        figure.supxlabel("time (s)", fontsize=9)
        return figure


def wra_by_speaker(scores: pd.DataFrame, held_out: str, order: str) -> Figure:
    """WRA per speaker with intervals. Columns: speaker, level, decoder, wra, low, high."""
    with plt.rc_context(style()):
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 3.0))
        names = list(dict.fromkeys(scores.speaker))
        decoders = list(dict.fromkeys(scores.decoder))
        colours = [LEVEL_COLOURS.get(level, "grey") for level in scores.drop_duplicates("speaker").level]
        faint = 0.5 ** np.arange(3) if len(decoders) < 4 else np.linspace(1, 0.2, len(decoders))
        for index, decoder in enumerate(decoders):
            part = scores[scores.decoder == decoder].set_index("speaker").reindex(names)
            width = 0.8 / len(decoders)
            place = np.arange(len(names)) + width * (index - (len(decoders) - 1) / 2)
            spread = np.abs(100 * np.array([part.wra - part.low, part.high - part.wra]))
            axes.bar(
                place,
                100 * part.wra,
                0.92 * width,
                yerr=spread,
                color=colours,
                alpha=faint[index],
                error_kw={"linewidth": 0.7},
            )
        speaker_ticks(axes, np.arange(len(names)), names)
        for name, tick in zip(names, axes.get_xticklabels(), strict=True):
            tick.set_fontweight("bold" if name == held_out else "normal")
        axes.set_ylim(0, 105)
        axes.set_ylabel("word recognition accuracy (%)")
        held = f"; held out: {held_out}" if held_out else ""
        axes.set_xlabel(f"speaker, {order}{held}\nfrom dark to light: {', '.join(decoders)}")
        _level_legend(axes, scores.level)
        return figure


def teacher_matrix(tables: Mapping[str, pd.DataFrame], order: str, measure: str = "wra") -> Figure:
    """WRA, or WER, of each teacher (row) on each speaker (column), one panel per decoder; its own speaker is framed."""
    import seaborn as sns

    with plt.rc_context(style()):
        first = next(iter(tables.values()))
        row_in = min(0.21, MATRIX_IN / (len(first) * len(tables)))
        height = 1.1 + row_in * len(first) * len(tables)
        figure, panels = plt.subplots(len(tables), 1, figsize=(WIDTH_IN, max(2.4, height)), squeeze=False, sharex=True)
        size = min(7, 0.42 * tick_space(figure, len(first.columns)), 55 * row_in)  # points: three digits fit in a cell
        for axes, (decoder, table) in zip(panels[:, 0], tables.items(), strict=True):
            sns.heatmap(
                100 * table,
                ax=axes,
                vmin=0,
                vmax=100,
                cmap="viridis_r" if measure == "wer" else "viridis",
                annot=True,
                fmt=".0f",
                annot_kws={"size": size},
                cbar=False,
                xticklabels=False,
                yticklabels=False,
            )
            for row, name in enumerate(table.index):
                if name in table.columns:
                    column = list(table.columns).index(name)
                    frame = {"fill": False, "edgecolor": "white", "linewidth": 0.28 * size}
                    axes.add_patch(plt.Rectangle((column, row), 1, 1, **frame))
            axes.set_title(f"{decoder}: {measure.upper()} (%)", loc="left")
            axes.set_xlabel("")
            axes.set_ylabel("teacher")
            axes.tick_params(left=False, bottom=False)
            names = [short(str(name)) for name in table.index]
            axes.set_yticks(np.arange(len(table)) + 0.5, names, fontsize=min(8, 55 * row_in))
        speaker_ticks(panels[-1, 0], np.arange(len(first.columns)) + 0.5, first.columns)
        panels[-1, 0].set_xlabel(f"speaker, {order}; framed: the teacher's own")
        return figure


def aggregates(table: pd.DataFrame, measure: str = "wra") -> Figure:
    """Greedy and closed-lexicon WRA, or WER, of every aggregate, one panel per kind of speech."""
    with plt.rc_context(style()):
        kinds = list(dict.fromkeys(table.speech))
        figure, panels = plt.subplots(1, len(kinds), figsize=(WIDTH_IN, 2.9), squeeze=False, sharey=True)
        for axes, kind in zip(panels[0], kinds, strict=True):
            part = table[table.speech == kind].iloc[::-1]
            place = np.arange(len(part))
            axes.barh(place + 0.2, 100 * part[f"greedy_{measure}"], 0.38, color=LEVEL_COLOURS["LOW"], label="greedy")
            axes.barh(
                place - 0.2,
                100 * part[f"lexicon_{measure}"],
                0.38,
                color=LEVEL_COLOURS["LOW"],
                alpha=0.45,
                label="closed lexicon",
            )
            axes.set_yticks(place, part.method)
            axes.set_xlim(0, max(100, 100 * table[f"greedy_{measure}"].max()))
            axes.set_title(f"{kind} speech ({part.n.iloc[0]} utterances)", loc="left")
            axes.set_xlabel(f"{measure.upper()} (%)")
        handles, names = panels[0, 0].get_legend_handles_labels()
        outside_legend(figure, handles, names, below=True)
        return figure


def differences(table: pd.DataFrame) -> Figure:
    """Differences between systems with their intervals, for these speakers (thick) and for new ones (thin).

    Columns: those of `verdict.verdict_frame`, and decoder.
    """
    with plt.rc_context(style()):
        rows = table.iloc[::-1]
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 0.9 + 0.2 * len(rows)))
        colours = {"better": "C2", "worse": "C3", "no difference shown": "0.45"}
        for place, row in enumerate(rows.itertuples()):
            colour = colours[row.verdict]
            for low, high, width in ((row.new_low, row.new_high, 0.8), (row.these_low, row.these_high, 2.4)):
                if not np.isnan(low):
                    axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=width)
            axes.plot(100 * row.difference, place, "o", color=colour, markersize=4)
        axes.axvline(0, color="black", linewidth=0.7)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        decoders = list(dict.fromkeys(table.decoder))
        one = len(decoders) == 1  # named once
        names = [f"{row.a} - {row.b}" + ("" if one else f", {row.decoder}") for row in rows.itertuples()]
        row_names(axes, names)
        what = f"{table.measure.iloc[0].upper()}{f', {decoders[0]}' if one else ''} (points)"
        axes.set_xlabel(f"difference in {what}\n95 %: thick for these speakers, thin for new ones")
        handles = [plt.Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours.values()]
        outside_legend(figure, handles, list(colours))
        return figure


def sweep(table: pd.DataFrame, chosen: Mapping[str, float]) -> Figure:
    """WER on dev speech by LM weight and word bonus, one panel per beam; the chosen setting is framed."""
    import seaborn as sns

    with plt.rc_context(style()):
        sizes = sorted(table["size"].unique())
        height = 1.2 + 0.24 * table.word_bonus.nunique()
        figure, panels = plt.subplots(1, len(sizes), figsize=(WIDTH_IN, max(1.9, height)), squeeze=False, sharey=True)
        for axes, size in zip(panels[0], sizes, strict=True):
            part = table[table["size"] == size].pivot_table(index="word_bonus", columns="lm_weight", values="wer")
            sns.heatmap(
                100 * part,
                ax=axes,
                vmin=100 * table.wer.min(),
                vmax=100 * table.wer.max() + 1e-6,
                cmap="viridis_r",
                annot=True,
                fmt=".0f",
                annot_kws={"size": 7},
                cbar=False,
            )
            if size == chosen["size"]:
                place = list(part.columns).index(chosen["lm_weight"]), list(part.index).index(chosen["word_bonus"])
                axes.add_patch(plt.Rectangle(place, 1, 1, fill=False, edgecolor="red", linewidth=2))
            axes.set_title(f"beam {size}", loc="left")
            axes.set_xlabel("")
            axes.set_ylabel("word bonus (nats)" if axes is panels[0, 0] else "")
            axes.tick_params(left=False, bottom=False, labelrotation=0)
        figure.supxlabel("weight of the language model; in the cells: WER (%) on dev speech", fontsize=9)
        return figure


def spikes(rows: Mapping[str, np.ndarray], stride_ms: float, title: str, remark: str = "") -> Figure:
    """P(not blank) over time of each teacher (row), and of their means, in one utterance; a remark below the title."""
    with plt.rc_context(style()):
        lines = [title, *textwrap.wrap(remark, 95)]
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 0.75 + 0.15 * len(lines) + 0.19 * len(rows)))
        end = stride_ms * max(map(len, rows.values())) / 1000
        image = axes.imshow(
            np.array(list(rows.values())),
            aspect="auto",
            cmap="magma_r",
            vmin=0,
            vmax=1,
            extent=(0, end, len(rows) - 0.5, -0.5),
            interpolation="nearest",
        )
        axes.set_yticks(range(len(rows)), map(short, rows))
        axes.set_xlabel("time (s)")
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9)  # wider than the axes
        figure.colorbar(image, ax=axes, label="P(not blank)")
        return figure


def _level_legend(axes: Axes, levels: pd.Series) -> None:
    shown = [level for level in LEVELS if level in set(levels)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=LEVEL_COLOURS[level]) for level in shown]
    names = [level.replace("_", " ").lower() for level in shown]
    old, labels = axes.get_legend_handles_labels()
    kept = [(h, label) for h, label in zip(old, labels, strict=True) if "published" in label]
    outside_legend(axes.figure, handles + [h for h, _ in kept], names + [label for _, label in kept])
