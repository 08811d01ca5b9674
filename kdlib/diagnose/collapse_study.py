"""The study of collapses: examine a fold's students, collect fingerprints of known causes, and find which collapse it.

Every student of a recipe can be examined; those of `params/ablations/collapse.yaml` have known causes, read off the
recipe.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.diagnose import causes
from kdlib.diagnose.causes import NO_FAULT, Diagnosis, Fingerprint
from kdlib.diagnose.examination import Examination, examine
from kdlib.evaluate import compare, posteriors, predictions
from kdlib.evaluate.score import interval
from kdlib.evaluate.statistics import LEVEL
from kdlib.evaluate.verdict import NO_DIFFERENCE
from kdlib.objectives import terms
from kdlib.settings.distill import Distill
from kdlib.settings.student import Faults
from kdlib.tokens import Tokens
from kdlib.training.curves import TENSORBOARD, read_curves

FACTORS = ("own_recordings", "no_references", "shifted_tokens")  # joined to a base
BASES = {  # a base of the factorial -> student, head
    "ctc_kd": ("NeMo", "CTC"),
    "decoder_kd": ("NeMo", "decoder"),
    "sb_ctc_kd": ("SpeechBrain", "CTC"),
    "sb_decoder_kd": ("SpeechBrain", "decoder"),
}
COLLAPSED = 0.1  # WRA below which a student counts as collapsed, if its control has more than three times that


@dataclass(frozen=True)
class Case:
    """An examined student."""

    variant: str
    seed: int
    cause: str  # of CAUSES, several joined
    examination: Examination
    signs: dict[str, float]
    checks: tuple[str, ...] = ()  # preflight checks that warned or refused

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the case. Together with no ground truth (b), another fault counts as that fault alone."""
        other = self.cause.replace("b", "") if self.cause != NO_FAULT else NO_FAULT
        return Fingerprint(other or self.cause, self.variant, self.seed, self.signs, self.checks)

    @property
    def mixed(self) -> bool:
        """True if it has several causes."""
        return self.cause != NO_FAULT and len(self.fingerprint.cause) > 1


@dataclass(frozen=True)
class StudentResults:
    """What is examined of a student."""

    variant: str
    seed: int
    cause: str  # that its recipe has, or NO_FAULT
    scores: Path  # its folder of scores
    decoder: str
    tokens: Tokens
    vocabulary: Sequence[str]
    training: Sequence[str]  # texts
    teachers: Path | None = None  # scores of its combined teachers on the same speech
    checks: tuple[str, ...] = ()  # preflight checks that warned or refused


def causes_of(fault: Faults, settings: Distill) -> str:
    """The known causes that a recipe has, by their letters, or `NO_FAULT`."""
    distilled = terms.uses_teachers(settings)
    present = {
        "a": distilled and fault.own_recordings,
        "b": distilled and not settings.beta,
        "c": fault.choose_by == "kl",
        "d": distilled and fault.token_shift,
        "e": distilled and settings.blanks == "drop_blank",
        "f": distilled and fault.frame_jitter,
        "g": fault.max_words,
        "h": fault.changes_decoding,
        "i": fault.untrained_head,
        "j": distilled and fault.mispaired,
    }
    return "".join(name for name, value in present.items() if value) or NO_FAULT


def examined_decoder(fault: Faults, settings: Distill) -> str:
    """The decoder whose hypotheses are examined: of the trained head, or of the one that should have been trained."""
    return "attention" if settings.heads == "decoder" and not fault.untrained_head else "greedy"


def examine_student(results: StudentResults) -> Case:
    """Examine a student's hypotheses on the held-out speaker's test speech, with the record of its training."""
    folder, name, teachers = results.scores, results.decoder, results.teachers
    examination = examine(
        predictions.read(folder, name, ids=True),
        {"the student's own pieces": results.tokens},
        vocabulary=results.vocabulary,
        training=results.training,
        teachers=_token_ids(teachers) if teachers else None,
        posteriors=folder / "posteriors" / posteriors.FILE if name == "greedy" else None,
    )
    dev_wra = math.nan
    if (folder / "dev").is_dir():
        dev = predictions.read(folder / "dev", name)
        dev_wra = float((dev.reference == dev.hypothesis).mean())
    signs = causes.signs(examination, read_curves(folder.parent / TENSORBOARD), dev_wra)
    return Case(results.variant, results.seed, results.cause, examination, signs, results.checks)


def is_complete(cases: Sequence[Case]) -> bool:
    """True if these students are enough to distinguish causes: some without a fault, and causes with two seeds each."""
    unmixed = {(case.fingerprint.cause, case.seed) for case in cases if not case.mixed}
    times = Counter(cause for cause, _ in unmixed)
    return times[NO_FAULT] > 1 and sum(count > 1 for count in times.values()) > 3


def is_factorial(variants: Sequence[str]) -> bool:
    """True if these are all students of the factorial."""
    return set(_factorial_variants()) <= set(variants)


def write(folder: Path, table: pd.DataFrame, known: Sequence[Fingerprint] | None, recipe: str, held_out: str) -> None:
    """Write the summary of a fold's students and, where they are a study, their fingerprints."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "summary.csv", index=False)
    if known:
        causes.save(known, folder / "fingerprints.json", recipe=recipe, held_out=held_out)


def summary(cases: Sequence[Case], known: Sequence[Fingerprint] | None = None) -> pd.DataFrame:
    """One row per student: the state of its hypotheses, its causes, and the causes that are named."""
    rows = []
    for case in cases:
        diagnosis, figures = diagnosis_of(case, known), case.examination.figures
        rows.append(
            {
                "student": case.variant,
                "seed": case.seed,
                "wra": figures["wra"],
                "severity": case.examination.severity,
                "distinct_texts": int(figures["distinct_texts"]),
                "references": int(figures["references"]),
                "information": figures["information"],
                "cause_made": case.cause,
                "causes_named": ", ".join(diagnosis.named) or "-",
                "diagnosis": diagnosis.text,
            }
        )
    return pd.DataFrame(rows)


def fingerprints(cases: Sequence[Case]) -> list[Fingerprint]:
    """The fingerprints of the cases with one cause or none; those with several are mixtures."""
    return [case.fingerprint for case in cases if not case.mixed]


def mixtures(cases: Sequence[Case]) -> list[Fingerprint]:
    """The fingerprints of the cases with several causes."""
    return [case.fingerprint for case in cases if case.mixed]


def identification_rates(known: Sequence[Fingerprint], mixed: Sequence[Fingerprint] = ()) -> pd.DataFrame:
    """How often `diagnose` is correct: on cases of another seed, on mixtures, and without a fault (false alarms)."""
    rows = []
    groups = {
        "one cause": [case for case in known if case.cause != NO_FAULT],
        "two or more causes": list(mixed),
        "no fault": [case for case in known if case.cause == NO_FAULT],
    }
    for name, group in groups.items():
        correct = wrong = unnamed = 0
        for case in group:
            true = set() if case.cause == NO_FAULT else set(case.cause)
            named = causes.diagnose(case.signs, causes.of_other_seeds(known, case.seed)).named
            correct += bool(named) and named[0] in true
            wrong += bool(named) and not true & set(named)
            unnamed += not named
        if group:
            counts = {"n": len(group), "correct cause first": correct, "wrong causes only": wrong, "none": unnamed}
            rows.append({"cases": name} | counts)
    return pd.DataFrame(rows).set_index("cases")


def factorial(
    scores: Callable[[str, int], Path], control_of: Callable[[str], str], seeds: Sequence[int]
) -> pd.DataFrame:
    """WRA of every combination of causes, and of the control of the same student and head, with intervals and verdicts.

    Two seeds per cell hardly show the spread of trainings, so this is pooled over all cells, and a difference must be
    significant against it and over the utterances (Holm's correction over the combinations of one control). `scores`
    gives the folder of a variant and seed.
    """
    rows, spreads = [], []
    for base, (student, head) in BASES.items():
        names = [name for name in _factorial_variants() if name.split("+")[0] == base]
        control = control_of(base)
        systems, decoder_name = {}, "attention" if head == "decoder" else "greedy"
        for name in [control, *names]:
            systems[name] = compare.collect([scores(name, seed) for seed in seeds], decoder_name)
        verdicts = {verdict.a: verdict for verdict in compare.compare(systems, against=control)}
        control_wra = (systems[control].reference == systems[control].hypothesis).mean()
        for name in [control, *names]:
            right = systems[name].assign(right=systems[name].reference == systems[name].hypothesis)
            by_seed = right.groupby("seed").right.mean()
            spreads.append(by_seed.var(ddof=1))
            low, high = interval(right.groupby("utt_id").right.mean().to_numpy(float), bootstrap=2000)
            joined, verdict = name.split("+")[1:], verdicts.get(name)
            rows.append(
                {
                    "student": student,
                    "head": head,
                    "system": name,
                    "recording": "-" if name == control else "own" if "own_recordings" in joined else "same",
                    "ground truth": "only" if name == control else "no" if "no_references" in joined else "yes",
                    "ids": "-" if name == control else "shifted" if "shifted_tokens" in joined else "aligned",
                    "WRA": right.right.mean(),
                    "low": low,
                    "high": high,
                    "control": control_wra,
                    "difference": verdict.difference if verdict else math.nan,
                    "difference_low": verdict.these_low if verdict else math.nan,
                    "difference_high": verdict.these_high if verdict else math.nan,
                    "p": verdict.holm_p if verdict else math.nan,
                }
            )
    table = pd.DataFrame(rows)
    spread, freedom = float(np.sqrt(np.nanmean(spreads))), len(table) * (len(seeds) - 1)
    table["seeds_p"] = _seeds_p(table.difference, spread, len(seeds), freedom)
    table["verdict"] = [_verdict(row) for row in table.itertuples()]
    return table.assign(spread_of_seeds=spread)


def _seeds_p(differences: pd.Series, spread: float, seeds: int, freedom: int) -> np.ndarray:
    """Two-sided p of differences between means over so many seeds each, with the pooled spread."""
    if seeds < 2:
        return np.full(len(differences), math.nan)
    from scipy.stats import t as student_t

    return 2 * student_t.sf(differences.abs() / (max(spread, 1e-9) * math.sqrt(2 / seeds)), freedom)


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """The effect of each factor on WRA, all else equal, by student and head: mean and range over the other factors."""
    rows = []
    cells = table[table.verdict != "control"]
    levels = {"recording": ("own", "same"), "ground truth": ("no", "yes"), "ids": ("shifted", "aligned")}
    for (student, head), part in cells.groupby(["student", "head"], sort=False):
        for factor, (bad, good) in levels.items():
            others = [name for name in levels if name != factor]
            wide = part.pivot_table(index=others, columns=factor, values="WRA")
            change = wide[bad] - wide[good]
            rows.append(
                {
                    "student": student,
                    "head": head,
                    "factor": f"{factor}: {bad} instead of {good}",
                    "mean": change.mean(),
                    "least": change.max(),
                    "most": change.min(),
                }
            )
    return pd.DataFrame(rows).set_index(["factor", "student", "head"]).sort_index(sort_remaining=True)


def _factorial_variants() -> list[str]:
    """The variants of the factorial."""
    factors = [subset for count in range(len(FACTORS) + 1) for subset in itertools.combinations(FACTORS, count)]
    return ["+".join([base, *subset]) for base in BASES for subset in factors]


def _verdict(row: Any) -> str:
    if math.isnan(row.difference):
        return "control"
    if not (row.p < LEVEL and row.seeds_p < LEVEL):
        return NO_DIFFERENCE
    if row.difference > 0:
        return "helps"
    return "collapses" if row.WRA < COLLAPSED and row.control > 3 * COLLAPSED else "hurts"


def _token_ids(folder: Path) -> dict[str, list[int]]:
    """The token ids of the greedy hypothesis of each utterance."""
    rows = predictions.read(folder, "greedy", ids=True)
    return {row.utt_id: list(row.token_ids or ()) for row in rows.itertuples()}


def diagnosis_of(case: Case, known: Sequence[Fingerprint] | None) -> Diagnosis:
    """Diagnose a case by the fingerprints of other seeds, or by those of kdlib."""
    others = causes.known_fingerprints() if known is None else causes.of_other_seeds(known, case.seed)
    return causes.diagnose(case.signs, others)
