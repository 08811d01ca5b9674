"""Power before compute: the smallest difference that so many folds, utterances and seeds can show.

Studies are simulated and compared by `compare` itself, so that the promise holds for its verdicts, with their tests,
corrections and rules. A simulated study has speakers whose control recognises a share of their words; the true
difference of a speaker and seed varies around the difference of the study by the spread of speakers and of seeds, and
two systems differ on a share of the utterances even where they are equally good. These spreads are estimated from
earlier results (`spreads`), or assumed.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluate import compare
from kdlib.evaluate.statistics import LEVEL, POWER
from kdlib.evaluate.verdict import NO_DIFFERENCE

STUDIES = 200  # simulated for each difference
EARLY = (25, 50, 100)  # of these decide where three standard errors do not reach 80 %
STEPS = 9  # of the bisection: to 0.1 points
MOST = 0.5  # difference


@dataclass(frozen=True)
class Plan:
    """What a study would have, and the spreads that it would meet."""

    folds: int
    utterances: int  # of each held-out speaker
    seeds: int
    pairs: int = 1  # of systems, for Holm's correction
    accuracy: tuple[float, ...] = (0.4, 0.6, 0.8, 0.9)  # of the control, by speaker, in turn
    differing: float = 0.15  # utterances that one system recognises and the other does not
    of_speakers: float = 0.03  # standard deviation of the difference between speakers
    of_seeds: float = 0.02  # and between trainings
    alike: float = 1.0  # recordings that count as one, where several are of one word (`scoring: {unit: word}`)
    shared: float = 0.0  # share of an utterance's chance that all trainings have in common

    @property
    def independent(self) -> int:
        """How many utterances without repeated words would decide as much."""
        return max(1, round(self.utterances / self.alike))


@dataclass(frozen=True)
class Power:
    """What a plan can show."""

    plan: Plan
    these: float | None  # the smallest difference that is shown for these speakers with 80 % power; None: none below .5
    new: float | None  # the same for new speakers
    least_p: float  # for new speakers, with so many folds

    @property
    def text(self) -> str:
        """In sentences."""
        plan = self.plan
        many = f"{plan.utterances} utterances"
        if plan.alike > 1:
            many += f" (as many as {plan.independent} of different words)"
        size = f"{plan.folds} folds of {many} and {plan.seeds} seed{'s' * (plan.seeds > 1)}"
        corrected = f", {plan.pairs} comparisons" if plan.pairs > 1 else ""
        return f"{size}{corrected}: {self._these}. {self._new}."

    @property
    def _these(self) -> str:
        if self.these is None:
            return f"no difference below {100 * MOST:.0f} points is shown for these speakers with 80 % power"
        return f"a difference of {100 * self.these:.1f} points is shown for these speakers with 80 % power"

    @property
    def _new(self) -> str:
        if self.least_p >= LEVEL:
            return (
                f"For new speakers nothing can be shown: {self.plan.folds} folds cannot go below p = {self.least_p:.3g}"
            )
        if self.new is None:
            return f"For new speakers no difference below {100 * MOST:.0f} points is"
        return f"For new speakers one of {100 * self.new:.1f} points is"


def spreads(
    systems: Mapping[str, pd.DataFrame], against: Mapping[str, str], plan: Plan, unit: str = "utterance"
) -> Plan:
    """A plan with the spreads that earlier results show: systems and their controls, tables from `compare.collect`."""
    found: dict[str, list[float]] = {name: [] for name in ("differing", "of_speakers", "of_seeds", "alike", "shared")}
    accuracy: list[float] = []
    for name, control in against.items():
        if name == control:
            continue
        right = [_right(systems[each]) for each in (name, control)]  # [utterances, seeds], by speaker and utterance
        seeds = min(table.shape[1] for table in right)
        a, b = (table.iloc[:, :seeds] for table in right)
        accuracy += b.mean(axis=1).groupby(level=0).mean().tolist()
        if not (differing := float((a.to_numpy() != b.to_numpy()).mean())):
            continue  # one system under two names
        found["differing"].append(differing)
        words = _words(a.index, systems[name]) if unit == "word" else None
        drawn, of_mean = (_drawn(part, words) for part in (a - b, (a - b).mean(axis=1).to_frame()))
        common = (seeds * of_mean - drawn) / (seeds - 1) if seeds > 1 else plan.shared * drawn  # to all trainings
        common = min(max(0.0, common), drawn)
        found["alike"].append(drawn / _drawn(a - b, None))
        found["shared"].append(common / drawn)
        by_speaker = (a - b).groupby(level=0).mean()  # [speakers, seeds]
        trainings = max(0.0, by_speaker.var(axis=1, ddof=1).mean() - (drawn - common)) if seeds > 1 else 0.0
        if seeds > 1:
            found["of_seeds"].append(trainings)
        if len(by_speaker) > 1:
            noise = common + (drawn - common + trainings) / seeds
            found["of_speakers"].append(by_speaker.mean(axis=1).var(ddof=1) - noise)
    if not accuracy:
        raise UserError("power: expected systems with controls, found none; train some first, or give the spreads")
    return replace(
        plan,
        accuracy=tuple(accuracy),
        differing=float(np.mean(found["differing"] or [plan.differing])),
        of_speakers=_sd(found["of_speakers"], plan.of_speakers),
        of_seeds=_sd(found["of_seeds"], plan.of_seeds),
        alike=max(1.0, float(np.mean(found["alike"] or [plan.alike]))),
        shared=float(np.mean(found["shared"] or [plan.shared])),
    )


def _words(utterances: pd.MultiIndex, system: pd.DataFrame) -> np.ndarray:
    """The word of each utterance."""
    reference = system.drop_duplicates("utt_id").set_index("utt_id").reference
    return reference[utterances.get_level_values(1)].to_numpy()


def _drawn(differences: pd.DataFrame, words: np.ndarray | None) -> float:
    """The variance of a speaker's mean difference by the choice of utterances, or of words with all recordings."""
    speakers = differences.index.get_level_values(0)
    centred = differences - differences.groupby(level=0).transform("mean")
    units = centred.groupby([speakers, differences.index.get_level_values(1) if words is None else words]).sum()
    by_speaker = (units**2).groupby(level=0).agg(["sum", "size"]).swaplevel(axis=1)
    size, count = by_speaker["size"], differences.groupby(level=0).size()
    variances = by_speaker["sum"].mul(1 / count**2, axis=0) * size / (size - 1).clip(lower=1)
    return float(variances.to_numpy().mean())


def power(plan: Plan, seed: int = 0, studies: int = STUDIES) -> Power:
    """The smallest differences that a plan shows with 80 % power."""
    least_p = 2.0 ** (1 - plan.folds)
    found: defaultdict[float, list[tuple[bool, bool]]] = defaultdict(list)  # verdicts of both kinds, by difference

    def reaches(difference: float, kind: int) -> bool:
        """Whether 80 % of the studies show a difference; where it is clear, after few of them."""
        known = found[difference]
        for count in (*(size for size in EARLY if size < studies), studies):
            known += [_verdict(plan, difference, _rng(seed, number)) for number in range(len(known), count)]
            share = float(np.mean([verdict[kind] for verdict in known[:count]]))
            if abs(share - POWER) > 3 * np.sqrt(POWER * (1 - POWER) / count):
                break
        return share >= POWER

    these = _smallest(lambda difference: reaches(difference, 0))
    new = _smallest(lambda difference: reaches(difference, 1)) if least_p < LEVEL else None
    return Power(plan, these, new, least_p)


def shown(plan: Plan, difference: float, seed: int = 0, studies: int = STUDIES) -> tuple[float, float]:
    """The share of simulated studies whose verdict shows a true difference: for these speakers, and for new ones."""
    found = [_verdict(plan, difference, _rng(seed, number)) for number in range(studies)]
    these, new = zip(*found, strict=True)
    return float(np.mean(these)), float(np.mean(new))


def _rng(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, number])


def simulate(plan: Plan, difference: float, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    """A study of a system `a` that differs from its control `b`, as tables like those of `compare.collect`."""
    right: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    count = plan.independent
    for speaker in range(plan.folds):
        known, common = rng.random(count), rng.random(count) < plan.shared  # the same for all trainings
        accuracy = plan.accuracy[speaker % len(plan.accuracy)]
        of_speaker = difference + plan.of_speakers * rng.standard_normal()
        for _ in range(plan.seeds):
            true = float(np.clip(of_speaker + plan.of_seeds * rng.standard_normal(), -accuracy, 1 - accuracy))
            differing = max(plan.differing, abs(true))
            gained, lost = min((differing + true) / 2, 1 - accuracy), min((differing - true) / 2, accuracy)
            drawn, of_b = np.where(common, known, rng.random(count)), np.arange(count) < round(accuracy * count)
            # of the words that b recognises a share is lost, of the others a share is gained
            change = np.where(of_b, drawn < lost / max(accuracy, 1e-9), drawn < gained / max(1 - accuracy, 1e-9))
            right["b"].append(of_b)
            right["a"].append(of_b ^ change)
    speakers = np.repeat([f"S{speaker}" for speaker in range(plan.folds)], plan.seeds * count)
    seeds = np.tile(np.repeat(np.arange(plan.seeds), count), plan.folds)
    places = np.tile(np.arange(count), plan.folds * plan.seeds)
    shared = pd.DataFrame({"speaker": speakers, "reference": "WORD", "seed": seeds})
    shared["utt_id"] = shared.speaker + "_" + pd.Series(places).astype(str)
    return {
        name: shared.assign(hypothesis=np.where(np.concatenate(rows), "WORD", "OTHER")) for name, rows in right.items()
    }


def _verdict(plan: Plan, difference: float, rng: np.random.Generator) -> tuple[bool, bool]:
    """Whether a simulated study shows its difference, after Bonferroni's correction: Holm's for the hardest pair."""
    result = compare.compare(simulate(plan, difference, rng), against={"a": "b"}, seed=int(rng.integers(2**31)))[0]
    chance, agree = result.p * plan.pairs < LEVEL, result.seeds == 1 or result.seeds_p < LEVEL
    these = chance and agree and result.difference > 0
    return these, these and result.new_speakers != NO_DIFFERENCE and result.speakers_p * plan.pairs < LEVEL


def _smallest(reaches: Callable[[float], bool]) -> float | None:
    """The smallest difference with 80 % power, by bisection."""
    low, high = 0.0, MOST
    if not reaches(high):
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _right(table: pd.DataFrame) -> pd.DataFrame:
    """Whether each hypothesis is right: utterances by seeds."""
    right = (table.reference == table.hypothesis).astype(float)
    return right.groupby([table.speaker, table.utt_id, table.seed]).mean().unstack()


def _sd(variances: list[float], otherwise: float) -> float:
    return float(np.sqrt(max(0.0, np.mean(variances)))) if variances else otherwise
