"""Effects of the factors of a set of ablations, each tested like any comparison of two systems (`compare`).

A cell is compared with its control, which says what distillation gains there. The effect of a level is the mean
difference between the cells that have it and those that have the base's level and are otherwise the same; where factors
are crossed, an interaction says by how much the effect of one level differs between two levels of another factor. All
cells are of the same utterances, folds and seeds: others are refused.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluate import compare
from kdlib.evaluate.verdict import Verdict
from kdlib.settings.ablation import Ablation, Cell

FLAT = 1.0  # utterances of the dev speech by which a flat curve may still rise in its last third


@dataclass(frozen=True)
class Effect:
    """The effect of a level against the base's, or the interaction of two levels."""

    factor: str  # "temperature", or "temperature x weight"
    level: str  # "t4", or "t4 x half"
    against: str
    verdict: Verdict


@dataclass(frozen=True)
class Curve:
    """How far the dev curve of a student still rises in the last third of its training."""

    variant: str
    held_out: str
    seed: int
    rise: float  # of WRA, over the best before the last third
    utterances: int  # of the dev speech
    best_step: int
    steps: int

    @property
    def flat(self) -> bool:
        """True if it rises by at most one utterance."""
        return self.rise * self.utterances <= FLAT + 0.01  # logged in single precision


def check_same_utterances(systems: Mapping[str, pd.DataFrame]) -> None:
    """Refuse systems of different utterances or numbers of seeds."""
    sets = {name: (frozenset(table.utt_id), int(table.seed.max()) + 1) for name, table in systems.items()}
    first = next(iter(sets))
    for name, (utterances, seeds) in sets.items():
        if utterances != sets[first][0]:
            only = sorted(utterances ^ sets[first][0])
            raise UserError(
                f"ablations: {name} and {first} were scored on different utterances ({len(only)} are in one alone, "
                f"first {only[0]}); score both on the same folds"
            )
        if seeds != sets[first][1]:
            raise UserError(f"ablations: {name} has {seeds} seeds, {first} {sets[first][1]}; train both with the same")


def against_controls(
    systems: Mapping[str, pd.DataFrame], control: Mapping[str, str], measure: str
) -> dict[str, Verdict]:
    """By cell: its verdict against its control; without cells that are their own control."""
    pairs = {a: b for a, b in control.items() if a != b}
    return {found.a: found for found in compare.compare(systems, against=pairs, measure=measure)} if pairs else {}


def effects(ablation: Ablation, systems: Mapping[str, pd.DataFrame], measure: str) -> list[Effect]:
    """The effect of every level, and the interactions of the crossed factors."""
    by_levels = {tuple(sorted(cell.levels.items())): cell for cell in ablation.cells}
    tables, pairs, about = {}, {}, {}
    for factor in ablation.factors:
        own = ablation.own_level(factor)
        for level in [name for name in ablation.factors[factor] if name != own]:
            with_level, without = _matched(by_levels, {factor: level}, {factor: own})
            _add(tables, pairs, about, (factor, level, own), systems, with_level, without)
    for one, other in itertools.combinations([name for name in ablation.factors if name in ablation.cross], 2):
        own = {one: ablation.own_level(one), other: ablation.own_level(other)}
        for first, second in itertools.product(ablation.factors[one], ablation.factors[other]):
            if first == own[one] or second == own[other]:
                continue
            both, neither = _matched(by_levels, {one: first, other: second}, own)
            alone, alone_too = _matched(by_levels, {one: first, other: own[other]}, {one: own[one], other: second})
            name = f"{one} x {other}", f"{first} x {second}", f"{own[one]} x {own[other]}"
            _add(tables, pairs, about, name, systems, [*both, *neither], [*alone, *alone_too])
    if not pairs:
        return []
    found = {result.a: result for result in compare.compare(tables, against=pairs, measure=measure)}
    return [
        Effect(*name, replace(found[key], a=name[1], b=name[2]) if " x " not in name[0] else _doubled(found[key], name))
        for key, name in about.items()
    ]


def _add(tables: dict, pairs: dict, about: dict, name: tuple, systems: Mapping, left: list, right: list) -> None:
    """Two stacks of cells as a pair of systems."""
    a, b = f"{name[0]}: {name[1]}", f"{name[0]}: {name[1]} against {name[2]}"
    tables[a], tables[b] = (_stacked([systems[cell.variant] for cell in cells]) for cells in (left, right))
    pairs[a], about[a] = b, name


def _matched(by_levels: Mapping, wanted: Mapping, other: Mapping) -> tuple[list[Cell], list[Cell]]:
    """The cells with some levels, and those with others that are otherwise the same."""
    with_level, without = [], []
    for levels, cell in by_levels.items():
        levels = dict(levels)
        if all(levels[factor] == level for factor, level in wanted.items()):
            partner = by_levels.get(tuple(sorted((levels | other).items())))
            if partner:
                with_level.append(cell)
                without.append(partner)
    return with_level, without


def _stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Several cells as the runs of one system."""
    seeds = int(tables[0].seed.max()) + 1
    return pd.concat([table.assign(seed=table.seed + seeds * place) for place, table in enumerate(tables)])


def _doubled(result: Verdict, name: tuple[str, str, str]) -> Verdict:
    """An interaction is the difference of two sums of two cells, twice the difference of their means."""
    names = ("difference", "these_low", "these_high", "new_low", "new_high")
    return replace(result, a=name[1], b=name[2], **{each: 2 * getattr(result, each) for each in names})


def rise(curves: pd.DataFrame, measure: str = "wra") -> tuple[float, int]:
    """How far the dev WRA, or 1 - WER, rises in the last third of a training over its best before; the best's step."""
    dev = curves[curves.name == f"dev_{measure}"]
    if measure == "wer":
        dev = dev.assign(value=1 - dev.value)
    late = dev.step > dev.step.max() * 2 / 3
    best = int(dev.step[dev.value.idxmax()]) if len(dev) else 0
    if not late.any() or late.all():
        return float("nan"), best
    return float(np.maximum(dev.value[late].max() - dev.value[~late].max(), 0.0)), best
