"""The figures of a thesis that no notebook draws, and the looks that all of them share."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.evaluate.rounding import percent
from kdlib.show import ablations, failure_figures, figures
from kdlib.show.drawing import outside_legend
from kdlib.show.figures import style
from kdlib.show.thesis_tables import PRETRAINED, Results

COLOURS = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#56b4e9", "#949494")  # colour-blind-safe
MARKERS = "osD^vP*X"  # and legible in grey
GREY = "#4d4d4d"  # of the pretrained model
MOST = len(COLOURS)  # systems in a figure, with the pretrained model
MAIN = ("lexicon", "greedy")  # decoders of the main figures and numbers, the first that there is


def main_decoder(results: Results) -> str:
    """The decoder of the main figures: the calibrated closed lexicon, else greedy, else the only one."""
    known = list(dict.fromkeys(results.scores.decoder))
    return next((name for name in MAIN if name in known), known[0])


def main_systems(results: Results) -> list[str]:
    """The systems that figures of single systems show: of many, the pretrained model, the controls, and the first."""
    controls = set() if results.verdicts.empty else set(results.verdicts.b)
    return sorted(results.systems, key=lambda name: (name != PRETRAINED, name not in controls))[:MOST]


def _of_main(table: pd.DataFrame, results: Results) -> tuple[pd.DataFrame, str]:
    """The rows of the main systems, and how many others there are, in words."""
    names = main_systems(results)
    more = table.system.nunique() - len(set(names) & set(table.system))
    return table[table.system.isin(names)], f"; {more} more systems are in the tables" if more else ""


def colours(results: Results) -> dict[str, str]:
    """One colour per system, the same in every figure; more than there are colours share them."""
    first = main_systems(results)
    others = [name for name in [*first, *results.systems] if name != PRETRAINED]
    others = list(dict.fromkeys(others))
    found = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(others)}
    return {PRETRAINED: GREY} | found


def accuracy(table: pd.DataFrame, results: Results) -> Figure:
    """WRA of the main systems by held-out speaker, with intervals over utterances."""
    table, more = _of_main(table, results)
    names, systems, colour = list(dict.fromkeys(table.held_out)), list(dict.fromkeys(table.system)), colours(results)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(figsize=(figures.WIDTH_IN, 3.0))
        for index, system in enumerate(systems):
            part = table[table.system == system].set_index("held_out").reindex(names)
            place = np.arange(len(names)) + 0.7 * ((index + 0.5) / len(systems) - 0.5)
            spread = np.abs(100 * np.array([part["mean"] - part.low, part.high - part["mean"]]))
            form = MARKERS[index % len(MARKERS)]
            look = {"fmt": form, "color": colour[system], "markersize": 4, "linewidth": 1}
            axes.errorbar(place, 100 * part["mean"], spread, label=system, **look)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylim(0, max(105, 105 * table["mean"].max()))
        axes.set_ylabel(f"{results.measured} (%)")
        bars = "" if table.low.isna().all() else "bars: 95 % over utterances; "
        axes.set_xlabel(f"held-out speaker; {bars}{main_decoder(results)}{more}")
        outside_legend(figure, *axes.get_legend_handles_labels())
    return figure


def curves(table: pd.DataFrame, results: Results) -> Figure:
    """Dev WRA of the main systems over the steps, the mean of the seeds; shaded: all of them."""
    table, _ = _of_main(table, results)
    colour, names = colours(results), list(dict.fromkeys(table.held_out))
    with plt.rc_context(style()):
        figure, grid = plt.subplots(1, len(names), figsize=(figures.WIDTH_IN, 2.6), sharey=True, squeeze=False)
        for axes, name in zip(grid[0], names, strict=True):
            for system, part in table[table.held_out == name].groupby("system", sort=False):
                mean = part.groupby("step").value.agg(["mean", "min", "max"])
                axes.plot(mean.index, 100 * mean["mean"], color=colour[system], linewidth=1.2, label=system)
                axes.fill_between(mean.index, 100 * mean["min"], 100 * mean["max"], color=colour[system], alpha=0.15)
            axes.set_title(f"{name} held out")
            axes.set_xlabel("step")
        grid[0, 0].set_ylabel(f"dev {'1 - WER' if results.measure == 'wer' else 'WRA'}, greedy (%)")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        outside_legend(figure, handles, labels)
    return figure


def confidence(table: pd.DataFrame, results: Results) -> Figure:
    """Share of right words by confidence, a line per main system."""
    table, more = _of_main(table, results)
    colour = colours(results)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(figsize=(figures.WIDTH_IN, 3.0))
        axes.plot([0, 100], [0, 100], color="grey", linewidth=0.8, linestyle=":")
        for index, (system, part) in enumerate(table.groupby("system", sort=False)):
            spread = 100 * np.abs(np.stack([part.accuracy - part.low, part.high - part.accuracy]))
            label = f"{system} (ECE {percent(part.ece.iloc[0]):.1f} %)"
            form = MARKERS[index % len(MARKERS)]
            axes.errorbar(
                100 * part.confidence,
                100 * part.accuracy,
                spread,
                fmt=f"{form}-",
                color=colour[system],
                label=label,
                markersize=3,
                linewidth=1,
            )
        axes.set_xlabel(f"confidence of the closed lexicon (%){more}")
        axes.set_ylabel("right words (%), 95 %")
        outside_legend(figure, *axes.get_legend_handles_labels())
    return figure


def speakers(table: pd.DataFrame, results: Results) -> Figure:
    """WRA of the pretrained model on every speaker."""
    return figures.wra_by_speaker(table, "", results.order)


def differences(table: pd.DataFrame, results: Results) -> Figure:
    """Differences from the controls."""
    return figures.differences(table)


def gains(table: pd.DataFrame, results: Results) -> Figure:
    """What each step gives."""
    return figures.differences(table)


def teachers(table: pd.DataFrame, results: Results) -> Figure:
    """WRA of every teacher on every speaker."""
    matrices = {}
    for decoder, part in table.groupby("decoder", sort=False):
        wide = part.pivot(index="teacher", columns="speaker", values="value")
        matrices[decoder] = wide.loc[list(dict.fromkeys(part.teacher)), list(dict.fromkeys(part.speaker))]
    return figures.teacher_matrix(matrices, results.order, results.measure)


def targets(table: pd.DataFrame, results: Results) -> Figure:
    """WRA of every combination of the teachers."""
    return figures.aggregates(table, results.measure)


def durations(table: pd.DataFrame, results: Results) -> Figure:
    """Word durations relative to controls."""
    return figures.durations(table, results.order)


def sweep(table: pd.DataFrame, results: Results) -> Figure:
    """WER on dev speech by the settings of beam search."""
    return figures.sweep(table, table[table.chosen].iloc[0])


def effects(table: pd.DataFrame, results: Results) -> Figure:
    """Effects of the levels of an ablation, with their intervals."""
    names = table.factor + ": " + table.level
    return figures.differences(table.assign(a=names, b=table.against))


def by_speaker(table: pd.DataFrame, results: Results) -> Figure:
    """Differences of the cells of an ablation from their controls, by speaker."""
    wide = table.pivot(index="cell", columns="speaker", values="difference")
    order = list(dict.fromkeys(table.cell)), list(dict.fromkeys(table.speaker))
    return ablations.by_speaker_map(wide.loc[order[0], order[1]], table.measure.iloc[0])


def fingerprints(table: pd.DataFrame, results: Results) -> Figure:
    """Signs of the causes of a collapse, made on purpose."""
    return failure_figures.fingerprints(table.set_index(["cause", "case"]))


def confusion(table: pd.DataFrame, results: Results) -> Figure:
    """Causes made and causes named."""
    return failure_figures.confusion(table.set_index("cause"))


def factorial(table: pd.DataFrame, results: Results) -> Figure:
    """Which causes collapse a student, crossed."""
    return failure_figures.factorial(table)
