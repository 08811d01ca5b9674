"""Ablations as tables, figures and a paragraph: what was varied, what it changed, and what was not shown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import friedmanchisquare, studentized_range

from kdlib.evaluate import ablations
from kdlib.evaluate.ablations import Effect
from kdlib.evaluate.rounding import percent, span
from kdlib.evaluate.verdict import NO_DIFFERENCE, Verdict
from kdlib.graph import Graph
from kdlib.show import figures, plan
from kdlib.show.ablation_study import Study, folds_of
from kdlib.show.drawing import outside_legend, row_names
from kdlib.show.figures import WIDTH_IN, style

DECODERS = ("lexicon", "greedy", "attention")  # the first, of the paragraph's first sentences
COLOURS = {"better": "C2", "worse": "C3", NO_DIFFERENCE: "0.45"}
LEAST_SYSTEMS, LEAST_FOLDS = 5, 10  # of a critical-difference diagram


@dataclass(frozen=True)
class Results:
    """The results of a study by one decoder."""

    study: Study
    decoder: str
    systems: dict[str, pd.DataFrame]
    verdicts: dict[str, Verdict]  # of every cell against its control
    effects: list[Effect]

    @property
    def frame(self) -> pd.DataFrame:
        """Tidy: one row per cell, shares unrounded."""
        rows = []
        for cell in self.study.ablation.cells:
            if cell.variant not in self.systems:
                continue
            right = _right(self.systems[cell.variant])
            row = {"cell": cell.variant, **cell.levels, "control": self.study.control[cell.variant]}
            row |= {"decoder": self.decoder, "mean": right.groupby(level=0).mean().mean()}
            if verdict := self.verdicts.get(cell.variant):
                kept = ("b_value", "difference", "these_low", "these_high", "holm_p", "seeds_p", "verdict")
                row |= {name: getattr(verdict, name) for name in kept}
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def table(self) -> pd.DataFrame:
        """For display: every cell with its control and verdict."""
        frame = self.frame
        shown = frame[["cell", *self.study.ablation.factors]].copy()
        shown["WRA"] = percent(frame["mean"])
        shown["control"] = frame.control
        if "difference" in frame:
            shown["control's"] = percent(frame.b_value)
            rows = frame[["difference", "these_low", "these_high"]].itertuples(index=False)
            shown["difference, 95 %"] = [
                ""
                if np.isnan(row.difference)
                else f"{percent(row.difference):+.1f} ({span(row.these_low, row.these_high)})"
                for row in rows
            ]
            shown["Holm p"] = [f"{p:.2g}" for p in frame.holm_p]
            shown["verdict"] = frame.verdict
        return shown.set_index("cell")

    @property
    def effect_frame(self) -> pd.DataFrame:
        """Tidy: one row per effect and interaction."""
        rows = [
            {"factor": one.factor, "level": one.level, "against": one.against, "decoder": self.decoder}
            | {name: value for name, value in asdict(one.verdict).items() if name not in ("a", "b")}
            for one in self.effects
        ]
        return pd.DataFrame(rows)

    @property
    def effect_table(self) -> pd.DataFrame:
        """For display: the effects of levels, and interactions, in points."""
        rows = [
            {
                "factor": one.factor,
                "level": one.level,
                "against": one.against,
                "effect": f"{percent(one.verdict.difference):+.1f}",
                "95 %": span(one.verdict.these_low, one.verdict.these_high),
                "Holm p": f"{one.verdict.holm_p:.2g}",
                "another training, p": f"{one.verdict.seeds_p:.2g}",
                "verdict": _word(one),
            }
            for one in self.effects
        ]
        return pd.DataFrame(rows)

    @property
    def by_speaker(self) -> pd.DataFrame:
        """Differences from the control: cells by speakers."""
        rows = {}
        for cell in self.verdicts:
            of_cell, of_control = (
                _right(self.systems[name]).groupby(level=0).mean() for name in (cell, self.study.control[cell])
            )
            rows[cell] = of_cell - of_control
        return pd.DataFrame(rows).T

    def forest(self) -> Figure:
        """Differences of all cells from their controls, and the effects of levels, with their intervals."""
        rows = [(f"{cell} - {found.b}", found, found.verdict) for cell, found in self.verdicts.items()]
        rows += [
            (f"{one.factor}: {one.level} - {one.against}", one.verdict, one.verdict.verdict) for one in self.effects
        ]
        with plt.rc_context(style()):
            figure, axes = plt.subplots(figsize=(WIDTH_IN, 1.0 + 0.2 * len(rows)))
            for place, (_, found, verdict) in enumerate(reversed(rows)):
                axes.plot(
                    [100 * found.these_low, 100 * found.these_high], [place] * 2, color=COLOURS[verdict], linewidth=2
                )
                axes.plot(100 * found.difference, place, "o", color=COLOURS[verdict], markersize=4)
            axes.axvline(0, color="black", linewidth=0.7)
            if self.effects and self.verdicts:
                axes.axhline(len(self.effects) - 0.5, color="grey", linewidth=0.5, linestyle=":")
            axes.set_ylim(-0.6, len(rows) - 0.4)
            row_names(axes, [name for name, _, _ in reversed(rows)], 7)
            axes.set_xlabel(
                f"difference in {self.study.measure.upper()} (points), 95 % for these speakers; {self.decoder}"
            )
            handles = [plt.Line2D([], [], color=colour, marker="o", markersize=4) for colour in COLOURS.values()]
            outside_legend(figure, handles, list(COLOURS))
        return figure

    def heat_map(self) -> Figure:
        """Differences from the control by speaker, in points."""
        return by_speaker_map(self.by_speaker, self.study.measure)

    @property
    def why_no_ranks(self) -> str:
        """Why there is no diagram of ranks; empty where there is."""
        systems, folds = len(self.systems), len(self.study.folds)
        if systems >= LEAST_SYSTEMS and folds >= LEAST_FOLDS:
            return ""
        return (
            f"No critical-difference diagram: with {systems} systems and {folds} folds, ranks would show nothing "
            f"({LEAST_SYSTEMS} systems and {LEAST_FOLDS} folds are the least)."
        )

    def critical_difference(self) -> Figure:
        """Mean ranks over folds, and the difference of ranks that Nemenyi's test needs (Demsar 2006)."""
        table = pd.DataFrame({name: _right(table).groupby(level=0).mean() for name, table in self.systems.items()})
        ranks = table.rank(axis=1, ascending=False).mean().sort_values()
        count, folds = len(ranks), len(table)
        p = friedmanchisquare(*(table[name] for name in table)).pvalue
        critical = studentized_range.ppf(0.95, count, np.inf) / np.sqrt(2) * np.sqrt(count * (count + 1) / (6 * folds))
        with plt.rc_context(style()):
            figure, axes = plt.subplots(figsize=(WIDTH_IN, 0.9 + 0.2 * count))
            for place, rank in enumerate(ranks):
                axes.plot([rank, rank + critical], [place, place], color="0.7", linewidth=2)
                axes.plot(rank, place, "o", color="C0", markersize=4)
            axes.set_yticks(range(count), list(ranks.index), fontsize=7)
            axes.invert_yaxis()
            about = f"grey: critical difference {critical:.2f}; Friedman p = {p:.2g}"
            axes.set_xlabel(f"mean rank over {folds} folds (1 is the best); {about}")
        return figure

    def paragraph(self) -> str:
        """What matters, and what was not shown: generated from the tests, without an adjective of its own."""
        study, verdicts = self.study, self.verdicts
        names = [fold.params.held_out for fold in study.folds]
        seeds = ", ".join(map(str, study.seeds))
        utterances = len(next(iter(self.systems.values())).utt_id.unique())
        parts = [
            f"{len(study.ablation.cells)} cells over {_listed(study.ablation.factors)} on {_listed(names)} "
            f"({utterances} utterances; seed{'s' * (len(study.seeds) > 1)} {seeds}; decoder {self.decoder})."
        ]
        counts = {word: [cell for cell, found in verdicts.items() if found.verdict == word] for word in COLOURS}
        if verdicts:
            parts.append(
                f"Against their hard-label controls {len(counts['better'])} of {len(verdicts)} cells are better, "
                f"{len(counts['worse'])} worse, and for {len(counts[NO_DIFFERENCE])} no difference is shown."
            )
            far = max(verdicts.values(), key=lambda found: abs(found.difference))
            parts.append(f"The largest difference is that of {far.a}: {_points(far)}, {far.verdict}.")
        alone = [one for one in self.effects if " x " not in one.factor]
        shown = [one for one in alone if one.verdict.verdict != NO_DIFFERENCE]
        for one in shown:
            parts.append(
                f"{one.factor} {one.level} is {one.verdict.verdict} than {one.against} ({_points(one.verdict)})."
            )
        if len(shown) < len(alone):
            rest = [one for one in alone if one not in shown]
            least = max(rest, key=lambda one: abs(one.verdict.difference))
            effects = _listed(f"{one.factor} {one.level} against {one.against}" for one in rest)
            parts.append(f"Not shown: {effects}; the largest of these effects is {_points(least.verdict)}.")
        crossed = [one for one in self.effects if " x " in one.factor]
        if crossed:
            count = sum(one.verdict.verdict != NO_DIFFERENCE for one in crossed)
            parts.append(f"{count} of {len(crossed)} interactions are shown.")
        steep, count = [curve for curve in study.curves if not curve.flat], len(study.curves)
        if steep:
            worst = max(steep, key=lambda curve: curve.rise)
            whose = f"{worst.variant}, {worst.held_out}, seed {worst.seed}"
            parts.append(
                f"{len(steep)} of {count} dev curves of controls still rise in the last third of the training (by up "
                f"to {percent(worst.rise):.1f} points: {whose}): a longer training may change these results."
            )
        else:
            parts.append(f"The dev curves of all {count} controls are flat in the last third of the training.")
        return " ".join(parts)


def by_speaker_map(table: pd.DataFrame, measure: str) -> Figure:
    """Differences from the control (shares), cells by speakers, in points."""
    import seaborn as sns

    table = 100 * table
    most = max(1.0, float(np.abs(table.to_numpy()).max()))
    with plt.rc_context(style()):
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 1.0 + 0.25 * len(table)))
        sns.heatmap(table, ax=axes, cmap="RdBu", vmin=-most, vmax=most, annot=True, fmt="+.1f", annot_kws={"size": 7})
        axes.tick_params(labelsize=7, rotation=0)
        axes.set_ylabel("")
        axes.set_xlabel(f"held-out speaker; difference from the control, {measure.upper()} points")
    return figure


def print_plan(recipe: str, folds: Sequence[str], seeds: Sequence[str], budget_h: float | None) -> None:
    """What the set would cost; refused beyond a budget."""
    folds = folds or folds_of(recipe)
    graph = Graph({"recipe": recipe, "folds": ",".join(folds) + ",", "seeds": ",".join(seeds)})
    found = plan.cost(graph)
    print(plan.table(graph).to_string())
    print(found.frame.to_string())
    print(found.text)
    if budget_h is not None:
        found.require(budget_h)


def print_results(recipe: str, folds: Sequence[str]) -> None:
    """Tables, figures and the paragraph of a set; all are written to `<recipe>/ablations/`."""
    study = Study.load(recipe, folds)
    out = study.out
    out.mkdir(parents=True, exist_ok=True)
    shown = [results(study, decoder) for decoder in DECODERS if study.has(decoder)]
    for found in shown:
        print(f"\n{found.decoder}\n{found.table.to_string()}\n\n{found.effect_table.to_string(index=False)}")
        figures.save(found.forest(), out, f"forest_{found.decoder}")
        figures.save(found.heat_map(), out, f"by_speaker_{found.decoder}")
    pd.concat(found.frame for found in shown).to_csv(out / "cells.csv", index=False)
    pd.concat(found.effect_frame for found in shown).to_csv(out / "effects.csv", index=False)
    long = (
        shown[0].by_speaker.rename_axis("cell").reset_index().melt("cell", var_name="speaker", value_name="difference")
    )
    long.assign(measure=study.measure).to_csv(out / "by_speaker.csv", index=False)
    text = "\n\n".join(found.paragraph() for found in shown)
    (out / "paragraph.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")


def results(study: Study, decoder: str) -> Results:
    """The verdicts and effects of a study by a decoder."""
    systems = study.systems(decoder)
    control = {cell: name for cell, name in study.control.items() if cell in systems and name in systems}
    verdicts = ablations.against_controls(systems, control, study.measure)
    complete = all(cell.variant in systems for cell in study.ablation.cells)
    found = ablations.effects(study.ablation, systems, study.measure) if complete else []
    return Results(study, decoder, systems, verdicts, found)


def curve_table(study: Study) -> pd.DataFrame:
    """Whether the controls were trained until their dev curves were flat."""
    rows = [
        {
            "control": one.variant,
            "held out": one.held_out,
            "seed": one.seed,
            "steps": one.steps,
            "best step": one.best_step,
            "rise in the last third (points)": percent(one.rise),
            "flat": "yes" if one.flat else "no",
        }
        for one in study.curves
    ]
    return pd.DataFrame(rows).set_index(["control", "held out", "seed"])


def varied(study: Study) -> pd.DataFrame:
    """What was varied: every level with its settings."""
    rows = [
        {"factor": factor, "level": level, "settings": _short(settings), "crossed": factor in study.ablation.cross}
        for factor, levels in study.ablation.factors.items()
        for level, settings in levels.items()
    ]
    return pd.DataFrame(rows).set_index(["factor", "level"])


def _right(table: pd.DataFrame) -> pd.Series:
    """Whether each hypothesis is correct, by speaker and utterance, the mean over seeds."""
    right = (table.reference == table.hypothesis).groupby([table.speaker, table.utt_id]).mean()
    return right.astype(float)


def _word(one: Effect) -> str:
    if " x " not in one.factor:
        return one.verdict.verdict
    return "not shown" if one.verdict.verdict == NO_DIFFERENCE else "shown"


def _points(found: Verdict) -> str:
    interval = span(found.these_low, found.these_high)
    return f"{percent(found.difference):+.1f} points, 95 % {interval}, corrected p = {found.holm_p:.2g}"


def _listed(names) -> str:
    *first, last = list(names)
    return f"{', '.join(first)} and {last}" if first else last


def _short(settings: dict) -> str:
    import yaml

    return yaml.safe_dump(settings, default_flow_style=True, width=10_000).strip() if settings else "the base's"
