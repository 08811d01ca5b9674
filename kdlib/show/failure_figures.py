"""Figures of failures: an examination on a page, fingerprints, who is taken for whom, and the factorial."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.diagnose.causes import FITS, NO_FAULT, SIGNS, Diagnosis, Fingerprint, frame
from kdlib.diagnose.examination import Examination
from kdlib.show.figures import LEVEL_COLOURS, WIDTH_IN, style


def examination(found: Examination, told: Diagnosis) -> Figure:
    """A page: WRA by the way that token ids are decoded, how concentrated and how long answers are, what causes fit."""
    with plt.rc_context(style()):
        figure, ((ways, spread), (lengths, causes)) = plt.subplots(2, 2, figsize=(WIDTH_IN, 5.0))
        best = found.redecodings[0] if found.redecodings else None
        alike = [one for one in found.redecodings if (one.tokenizer, one.specials) == (best.tokenizer, best.specials)]
        rows = sorted(alike, key=lambda one: one.offset)
        if rows:
            own = [one.as_written > 0.99 for one in rows]
            colours = [LEVEL_COLOURS["VERY_LOW"] if mine else LEVEL_COLOURS["LOW"] for mine in own]
            bars = ways.bar([f"{one.offset:+d}" for one in rows], [100 * one.wra for one in rows], color=colours)
            ways.bar_label(bars, [f"{100 * one.wra:.1f}" for one in rows], fontsize=7)
            ways.set_ylim(0, max(5, 118 * max(one.wra for one in rows)))
            framed = f"; {rows[own.index(True)].offset:+d}: as in the file" if any(own) else ""
            without = "" if best.specials else ", special ids left out"
            ways.set_xlabel(f"offset of the ids{framed}\n{textwrap.shorten(best.tokenizer, 36)}{without}")
        else:
            ways.text(0.5, 0.5, "no token ids, or no tokenizer", ha="center", va="center", transform=ways.transAxes)
            ways.set_axis_off()
        ways.set_title("decoded in other ways: WRA (%)", loc="left")
        for name, colour, label in (
            ("reference", "0.6", "references"),
            ("hypothesis", LEVEL_COLOURS["LOW"], "answers"),
        ):
            counts = found.texts[name].value_counts(normalize=True).cumsum()
            spread.plot(range(1, len(counts) + 1), 100 * counts.to_numpy(), color=colour, label=label)
        spread.set_xscale("log")
        spread.set_ylim(0, 105)
        spread.set_xlabel("different ones, the commonest first")
        spread.set_title("concentration: share of all (%)", loc="left")
        spread.legend(frameon=False)
        sizes = found.words.words - found.words.reference
        edge = int(max(2, np.abs(sizes).quantile(0.99)))
        lengths.hist(sizes.clip(-edge, edge), np.arange(-edge - 0.5, edge + 1), color=LEVEL_COLOURS["LOW"])
        lengths.set_xlabel("words more than the reference has")
        lengths.set_title("length: answers", loc="left")
        shown = told.fits[:6][::-1]
        causes.barh(
            ["no fault" if one.cause == NO_FAULT else f"({one.cause})" for one in shown],
            [min(one.distance, 1) for one in shown],
            color=[LEVEL_COLOURS["VERY_LOW"] if one.cause in told.named else "0.7" for one in shown],
        )
        if shown:
            causes.axvline(FITS, color="black", linewidth=0.7)
            causes.set_xlabel("distance (left of the line: fits)")
        else:
            causes.text(0.5, 0.5, "no fingerprints yet", ha="center", va="center", transform=causes.transAxes)
            causes.set_axis_off()
        causes.set_title("causes", loc="left")
        figure.suptitle(textwrap.fill(found.verdict, 92), x=0.01, ha="left", fontsize=8.5)
        return figure


def fingerprints(known: list[Fingerprint]) -> Figure:
    """Signs (columns) of every case (rows, means over seeds), ordered by cause."""
    import seaborn as sns

    with plt.rc_context(style()):
        table = frame(known).groupby(level=[0, 1]).mean()
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
    """True causes (rows) by named causes (columns); "-": none was named."""
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
        axes.set_xlabel("named by other seeds' fingerprints (-: none)")
        axes.set_ylabel("made")
        axes.tick_params(left=False, bottom=False, labelrotation=0)
        return figure


def factorial(table: pd.DataFrame) -> Figure:
    """WRA of the factorial's cells with intervals, a panel a student and head; the line is labels alone."""
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
            named = cells.system.str.split("+").str[1:].map(lambda some: " + ".join(some) or "(none)")
            axes.set_yticks(range(len(cells)), named)
            axes.set_title(f"{student} student, {head}", loc="left")
            axes.set_xlim(-3, 103)
        for axes in panels[-1]:
            axes.set_xlabel("WRA (%)")
        shown = {"collapses": "C3", "hurts": "C1", "no difference shown": "0.3", "helps": "C2"}
        handles = [plt.Line2D([], [], color=colour, marker="o", markersize=4) for colour in shown.values()]
        figure.legend(
            handles,
            [f"{name}, beside labels alone" if name == "collapses" else name for name in shown],
            ncols=4,
            frameon=False,
            loc="outside lower center",
        )
        return figure
