"""Figures of failures: an examination on one page, fingerprints, confusion of causes, and the factorial."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.diagnose.causes import FITS, NO_FAULT, SIGNS, Diagnosis
from kdlib.diagnose.examination import Examination
from kdlib.evaluate.rounding import percent
from kdlib.show.drawing import outside_legend
from kdlib.show.figures import LEVEL_COLOURS, WIDTH_IN, style


def examination(result: Examination, diagnosis: Diagnosis) -> Figure:
    """One page: WRA by decoding of the token ids, concentration and length of hypotheses, and fit of the causes."""
    with plt.rc_context(style()):
        figure, ((decodings, spread), (lengths, causes)) = plt.subplots(2, 2, figsize=(WIDTH_IN, 5.0))
        best = result.redecodings[0] if result.redecodings else None
        alike = [way for way in result.redecodings if (way.tokenizer, way.specials) == (best.tokenizer, best.specials)]
        rows = sorted(alike, key=lambda row: row.offset)
        if rows:
            own = [row.as_written > 0.99 for row in rows]
            colours = [LEVEL_COLOURS["VERY_LOW"] if as_in_file else LEVEL_COLOURS["LOW"] for as_in_file in own]
            bars = decodings.bar([f"{row.offset:+d}" for row in rows], [100 * row.wra for row in rows], color=colours)
            decodings.bar_label(bars, [str(percent(row.wra)) for row in rows], fontsize=7)
            decodings.set_ylim(0, max(5, 118 * max(row.wra for row in rows)))
            in_file = f"; {rows[own.index(True)].offset:+d}: as in the file" if any(own) else ""
            without = "" if best.specials else ", without special ids"
            decodings.set_xlabel(f"offset of the ids{in_file}\n{textwrap.shorten(best.tokenizer, 36)}{without}")
        else:
            text = "no token ids, or no tokenizer"
            decodings.text(0.5, 0.5, text, ha="center", va="center", transform=decodings.transAxes)
            decodings.set_axis_off()
        decodings.set_title("other decodings: WRA (%)", loc="left")
        for name, colour, label in (
            ("reference", "0.6", "references"),
            ("hypothesis", LEVEL_COLOURS["LOW"], "hypotheses"),
        ):
            counts = result.texts[name].value_counts(normalize=True).cumsum()
            spread.plot(range(1, len(counts) + 1), 100 * counts.to_numpy(), color=colour, label=label)
        spread.set_xscale("log")
        spread.set_ylim(0, 105)
        spread.set_xlabel("distinct texts, most frequent first")
        spread.set_title("concentration: cumulative share (%)", loc="left")
        spread.legend(frameon=False)
        sizes = result.words.words - result.words.reference
        edge = int(max(2, np.abs(sizes).quantile(0.99)))
        lengths.hist(sizes.clip(-edge, edge), np.arange(-edge - 0.5, edge + 1), color=LEVEL_COLOURS["LOW"])
        lengths.set_xlabel("words in hypothesis minus words in reference")
        lengths.set_title("length: number of hypotheses", loc="left")
        fits = diagnosis.fits[:6][::-1]
        causes.barh(
            ["no fault" if fit.cause == NO_FAULT else f"({fit.cause})" for fit in fits],
            [min(fit.distance, 1) for fit in fits],
            color=[LEVEL_COLOURS["VERY_LOW"] if fit.cause in diagnosis.named else "0.7" for fit in fits],
        )
        if fits:
            if diagnosis.named:
                causes.axvline(FITS, color="black", linewidth=0.7)
            causes.set_xlabel("distance (left of the line: may fit)" if diagnosis.named else "distance (no cause fits)")
        else:
            causes.text(0.5, 0.5, "no fingerprints yet", ha="center", va="center", transform=causes.transAxes)
            causes.set_axis_off()
        causes.set_title("causes", loc="left")
        figure.suptitle(textwrap.fill(result.verdict, 92), x=0.01, ha="left", fontsize=8.5)
        return figure


def fingerprints(known: pd.DataFrame) -> Figure:
    """Signs (columns) of every case (rows; `causes.frame`), means over seeds, ordered by cause."""
    import seaborn as sns

    with plt.rc_context(style()):
        table = known.groupby(level=[0, 1]).mean()
        table = table[[name for name in SIGNS if name in table]]
        order = sorted(table.index, key=lambda place: (place[0] != NO_FAULT, len(place[0]), place))
        table = table.loc[order]
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 1.6 + 0.2 * len(table)))
        sns.heatmap(
            table.to_numpy(),
            ax=axes,
            vmin=-1,
            vmax=1,
            cmap="vlag",
            xticklabels=[name.replace("_", " ") for name in table.columns],
            yticklabels=[f"{case}  ({cause})" if cause != NO_FAULT else case for cause, case in table.index],
            cbar_kws={"label": "sign", "shrink": 0.6},
            linewidths=0.3,
        )
        axes.tick_params(left=False, bottom=False, labelsize=6.5)
        axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=55, ha="right", rotation_mode="anchor")
        return figure


def confusion(table: pd.DataFrame) -> Figure:
    """True causes (rows) against named causes (columns); "-": none named."""
    import seaborn as sns

    with plt.rc_context(style()):
        figure, axes = plt.subplots(figsize=(0.62 * WIDTH_IN, 1.2 + 0.24 * len(table)))
        sns.heatmap(
            table,
            ax=axes,
            annot=table.map(lambda value: f"{value:g}" if value else "").to_numpy(),
            fmt="",
            cmap="Blues",
            cbar=False,
            annot_kws={"size": 7},
            linewidths=0.3,
        )
        axes.set_xlabel("cause named from other seeds' fingerprints (-: none)")
        axes.set_ylabel("cause made")
        axes.tick_params(left=False, bottom=False, labelrotation=0)
        return figure


def factorial(table: pd.DataFrame) -> Figure:
    """WRA of the factorial's cells with intervals, one panel per student and head; the line is labels alone."""
    with plt.rc_context(style()):
        groups = list(table.groupby(["student", "head"], sort=False))
        figure, panels = plt.subplots(2, 2, figsize=(WIDTH_IN, 5.0), sharex=True, sharey=True)
        for axes, ((student, head), part) in zip(panels.flat, groups, strict=True):
            control = part[part.verdict == "control"].iloc[0]
            axes.axvspan(100 * control.low, 100 * control.high, color="0.9")
            axes.axvline(100 * control.WRA, color="0.4", linewidth=0.8)
            cells = part[part.verdict != "control"].iloc[::-1]
            colours = {"collapses": "C3", "hurts": "C1", "helps": "C2"}
            for place, row in enumerate(cells.itertuples()):
                colour = colours.get(row.verdict, "0.3")
                axes.plot([100 * row.low, 100 * row.high], [place, place], color=colour, linewidth=2)
                axes.plot(100 * row.WRA, place, "o", color=colour, markersize=4)
            factors = cells.system.str.split("+").str[1:].map(lambda names: " + ".join(names) or "(none)")
            axes.set_yticks(range(len(cells)), [textwrap.fill(text, 32) for text in factors], fontsize=7)
            axes.set_title(f"{student} student, {head}", loc="left")
            axes.set_xlim(-3, 103)
        for axes in panels[-1]:
            axes.set_xlabel("WRA (%)")
        shown = {"collapses": "C3", "hurts": "C1", "no difference shown": "0.3", "helps": "C2"}
        handles = [plt.Line2D([], [], color=colour, marker="o", markersize=4) for colour in shown.values()]
        labels = [f"{name} vs. labels alone" if name == "collapses" else name for name in shown]
        outside_legend(figure, handles, labels, below=True)
        return figure
