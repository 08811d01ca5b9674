"""`make power`: what plans of several sizes can show, with the spreads of earlier results where there are any."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from kdlib.console import progress
from kdlib.evaluate import compare, power
from kdlib.evaluate.power import Plan, Power
from kdlib.evaluate.rounding import percent
from kdlib.params import fold_names, load_recipe
from kdlib.pipeline import Fold


def of_recipe(recipe: str | Path, plan: Plan, decoder: str = "lexicon") -> tuple[Plan, str]:
    """A plan with the spreads of a recipe's scored students, and where they are from."""
    params = load_recipe(recipe)
    folds = [Fold.load(recipe, name) for name in fold_names(params.fold_set)]
    folds = [fold for fold in folds if (fold.layout.fold / "students").is_dir()]
    systems: dict[str, pd.DataFrame] = {}
    control: dict[str, str] = {}
    for variant in params.compare:
        its = folds[0].of(variant).params.distill.control if folds else variant
        for name in (variant, its):
            paths = [
                fold.layout.student_scores(seed, name)
                for seed in params.seeds
                for fold in folds
                if (fold.layout.student_scores(seed, name) / f"evaluation_{decoder}.json").is_file()
            ]
            if paths and len(paths) == len(params.seeds) * len(folds):
                systems[name] = compare.collect(paths, decoder)
        if variant in systems and its in systems:
            control[variant] = its
    used = {a: b for a, b in control.items() if a != b}
    found = power.spreads(systems, used, plan, params.scoring.unit)
    about = f"{', '.join(used)} against {', '.join(dict.fromkeys(used.values()))}, {len(folds)} folds, {decoder}"
    return found, about


def table(found: Sequence[Power]) -> pd.DataFrame:
    """One row per plan; differences in points."""
    rows = [
        {
            "folds": one.plan.folds,
            "utterances": one.plan.utterances,
            "seeds": one.plan.seeds,
            "shown for these speakers from": _points(one.these),
            "for new speakers from": _points(one.new),
            "least p for new speakers": f"{one.least_p:.2g}",
        }
        for one in found
    ]
    return pd.DataFrame(rows)


def run(folds: Sequence[int], seeds: Sequence[int], plan: Plan, recipe: str = "", decoder: str = "lexicon") -> None:
    """Print what the plans can show."""
    about = "assumed"
    if recipe:
        plan, about = of_recipe(recipe, plan, decoder)
    differing, speakers, trainings = (percent(x) for x in (plan.differing, plan.of_speakers, plan.of_seeds))
    print(
        f"Spreads ({about}): two systems differ on {differing:.1f} % of the utterances; their difference has a "
        f"standard deviation of {speakers:.1f} points between speakers and {trainings:.1f} between trainings. "
        f"Up to {power.STUDIES} simulated studies for each difference."
    )
    plans, found = [replace(plan, folds=a, seeds=b) for a, b in itertools.product(folds, seeds)], []
    with progress(len(plans), "simulated studies", "plan") as bar:
        for one in plans:
            found.append(power.power(one))
            bar.update(1)
    print(table(found).to_string(index=False))
    for one in found:
        print(one.text)


def _points(value: float | None) -> str:
    return "-" if value is None else f"{percent(value):.1f}"
