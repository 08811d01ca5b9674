"""The study of collapses: a fold's students examined, fingerprints of known causes, and which of them kills.

Every student of a recipe can be examined; those of `params/ablations/collapse.yaml` have known causes, read off the
recipe. `cases` trains what is missing; where several processes share the work, each makes a part of what is `listed`.
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

from kdlib.corpus import prepare
from kdlib.diagnose import causes, examination
from kdlib.diagnose.causes import NO_FAULT, Diagnosis, Fingerprint
from kdlib.diagnose.examination import Examination
from kdlib.distill import faults, preflight
from kdlib.distill.checks import PASS
from kdlib.distill.setup import resolved, student_data
from kdlib.distill.student_scores import student_scores
from kdlib.errors import UserError
from kdlib.evaluate import compare, posteriors, predictions
from kdlib.evaluate.baseline import baseline
from kdlib.evaluate.score import interval
from kdlib.evaluate.statistics import LEVEL
from kdlib.evaluate.verdict import NO_DIFFERENCE
from kdlib.params import Params
from kdlib.pretrained.pieces import load_tokens
from kdlib.targets.target_report import combined_teacher_scores

Variants = Callable[[str], Params]  # a variant's name -> its parameters, in one fold
FACTORS = ("own_recordings", "no_references", "shifted_tokens")  # what is joined to a base
BASES = {  # a base of the factorial -> student, head
    "ctc_kd": ("NeMo", "CTC"),
    "decoder_kd": ("NeMo", "decoder"),
    "sb_ctc_kd": ("SpeechBrain", "CTC"),
    "sb_decoder_kd": ("SpeechBrain", "decoder"),
}
COLLAPSED = 0.1  # a student below it is killed, if labels alone teach it three times as much


@dataclass(frozen=True)
class Case:
    """A student that was examined."""

    variant: str
    seed: int
    cause: str  # of diagnose.CAUSES, several joined
    found: Examination
    signs: dict[str, float]
    checks: tuple[str, ...] = ()  # of the preflight: those that warned or refused

    @property
    def fingerprint(self) -> Fingerprint:
        """What is kept of it. Without ground truth (b) another fault is that fault, undisturbed."""
        alone = self.cause.replace("b", "") if self.cause != NO_FAULT else NO_FAULT
        return Fingerprint(alone or self.cause, self.variant, self.seed, self.signs, self.checks)

    @property
    def mixed(self) -> bool:
        """Whether it has several causes."""
        return self.cause != NO_FAULT and len(self.fingerprint.cause) > 1


def listed_students(params: Params, part: str = "") -> list[tuple[str, int]]:
    """The students of a recipe, by variant and seed; of a part such as `1/2` every other one."""
    every = [(variant, seed) for seed in params.seeds for variant in params.compare]
    if not part:
        return every
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise UserError(f"part: expected something like 1/2, found {part!r}")
    return every[int(number) - 1 :: int(parts)]


def causes_of(params: Params) -> str:
    """Which of the known causes a recipe has, by their letters; those without any are sound."""
    one, settings = params.faults, params.distill
    taught = settings.uses_teachers
    there = {
        "a": taught and one.own_recordings,
        "b": taught and not settings.beta,
        "c": one.choose_by == "kl",
        "d": taught and one.token_shift,
        "e": taught and settings.blanks == "drop_blank",
        "f": taught and one.frame_jitter,
        "g": one.max_words,
        "h": faults.changes_decoding(params),
        "i": one.untrained_head,
        "j": taught and one.mispaired,
    }
    return "".join(name for name, value in there.items() if value) or NO_FAULT


def decoder(params: Params) -> str:
    """The decoder whose answers are examined: that of the head that learns, or of the one that should have."""
    return "attention" if params.distill.heads == "decoder" and not params.faults.untrained_head else "greedy"


def examined(params: Params, seed: int) -> Case:
    """A student's answers on the held-out speaker's test speech, examined beside the record of its training."""
    from kdlib.training.checkpoints import TENSORBOARD, read_curves

    folder, used = student_scores(params, seed), resolved(params)
    which = decoder(used)
    rows = predictions.read(folder, which, ids=True)
    tokens = load_tokens(params)
    material = student_data(params, tokens)
    theirs = combined_teacher_scores(used)
    found = examination.examine(
        rows,
        {"the student's own pieces": tokens},
        vocabulary=list(prepare.spellings(params)),
        training=[utt.text for utt in material.train if utt.text],
        teachers=_written(theirs) if theirs else None,
        posteriors=folder / "posteriors" / posteriors.FILE if which == "greedy" else None,
    )
    dev_wra = math.nan
    if (folder / "dev").is_dir():
        dev = predictions.read(folder / "dev", which)
        dev_wra = float((dev.reference == dev.hypothesis).mean())
    curves = read_curves(folder.parent / TENSORBOARD)
    signs = causes.signs(found, curves, dev_wra)
    seen = tuple(one.name for one in preflight.preflight(params, seed) if one.verdict != PASS)
    return Case(params.variant, seed, causes_of(used), found, signs, seen)


def cases(of: Variants, names: Sequence[tuple[str, int]]) -> list[Case]:
    """The students of a recipe, trained now or found, and examined."""
    return [examined(of(variant), seed) for variant, seed in names]


def compared_systems(of: Variants, one: Case) -> dict[str, Path]:
    """The scores of the pretrained model, of a case's control and of the case itself, to look at side by side."""
    params = of(one.variant)
    names = dict.fromkeys([params.distill.control, one.variant])
    return {"pretrained": baseline(params)} | {name: student_scores(of(name), one.seed) for name in names}


def is_complete(found: Sequence[Case]) -> bool:
    """Whether these students are enough to tell causes apart: sound ones, and causes by at least two seeds."""
    made = {(one.fingerprint.cause, one.seed) for one in found if not one.mixed}
    times = Counter(cause for cause, _ in made)
    return times[NO_FAULT] > 1 and sum(count > 1 for count in times.values()) > 3


def is_factorial(params: Params) -> bool:
    """Whether a recipe has all students of the factorial."""
    return set(_joined()) <= set(params.compare)


def write(params: Params, table: pd.DataFrame, known: Sequence[Fingerprint] | None) -> Path:
    """Write the summary of a fold's students and, where they are a study, their fingerprints."""
    folder = params.fold_folder / "collapse"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "summary.csv")
    if known:
        causes.save(known, folder / "fingerprints.json", recipe=params.name, held_out=params.held_out)
    return folder


def summary(cases: Sequence[Case], known: Sequence[Fingerprint] | None = None) -> pd.DataFrame:
    """One row a student: what its answers look like, and what causes are named."""
    rows = []
    for one in cases:
        diagnosis = diagnosis_of(one, known)
        figures = one.found.figures
        rows.append(
            {
                "student": one.variant,
                "seed": one.seed,
                "WRA %": round(100 * figures["wra"], 1),
                "state": one.found.severity,
                "different answers": int(figures["distinct_texts"]),
                "references": int(figures["references"]),
                "information %": round(100 * figures["information"]),
                "made": one.cause,
                "named": ", ".join(diagnosis.named) or "-",
                "what it says": diagnosis.text,
            }
        )
    return pd.DataFrame(rows).set_index(["student", "seed"])


def fingerprints(cases: Sequence[Case]) -> list[Fingerprint]:
    """Of the cases that have one cause, or none; the factorial's joined ones are mixtures."""
    return [one.fingerprint for one in cases if not one.mixed]


def mixtures(cases: Sequence[Case]) -> list[Fingerprint]:
    """Of the cases that have several causes."""
    return [one.fingerprint for one in cases if one.mixed]


def identification_rates(known: Sequence[Fingerprint], mixed: Sequence[Fingerprint] = ()) -> pd.DataFrame:
    """How often `diagnose` is right: of cases of another seed, of mixtures, and of what has no fault (false alarms)."""
    rows = []
    groups = {
        "one cause": [one for one in known if one.cause != NO_FAULT],
        "two or more causes": list(mixed),
        "no fault": [one for one in known if one.cause == NO_FAULT],
    }
    for name, group in groups.items():
        right = wrong = silent = 0
        for one in group:
            made = set() if one.cause == NO_FAULT else set(one.cause)
            named = causes.diagnose(one.signs, causes.of_other_seeds(known, one.seed)).named
            right += bool(named) and named[0] in made
            wrong += bool(named) and not made & set(named)
            silent += not named
        if group:
            counts = {"n": len(group), "the cause named first": right, "only others named": wrong, "none named": silent}
            rows.append({"cases": name} | counts)
    return pd.DataFrame(rows).set_index("cases")


def factorial(of: Variants, seeds: Sequence[int]) -> pd.DataFrame:
    """WRA of every joining of causes, beside the control of the same student and head, with intervals and verdicts.

    Two seeds a cell say little of how much another training differs, so its spread is estimated over all cells
    together, and a difference must stand out from it and from the utterances (Holm's correction over a control's own).
    """
    rows, spreads = [], []
    for base, (student, head) in BASES.items():
        names = [name for name in _joined() if name.split("+")[0] == base]
        control = of(base).distill.control
        systems, place = {}, "attention" if head == "decoder" else "greedy"
        for name in [control, *names]:
            systems[name] = compare.collect([student_scores(of(name), seed) for seed in seeds], place)
        found = {one.a: one for one in compare.compare(systems, against=control)}
        for name in [control, *names]:
            right = systems[name].assign(right=systems[name].reference == systems[name].hypothesis)
            by_seed = right.groupby("seed").right.mean()
            spreads.append(by_seed.var(ddof=1))
            low, high = interval(right.groupby("utt_id").right.mean().to_numpy(float), bootstrap=2000)
            joined, verdict = name.split("+")[1:], found.get(name)
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
                    "control": systems[control].pipe(lambda one: one.reference == one.hypothesis).mean(),
                    "difference": verdict.difference if verdict else math.nan,
                    "difference_low": verdict.these_low if verdict else math.nan,
                    "difference_high": verdict.these_high if verdict else math.nan,
                    "p": verdict.holm_p if verdict else math.nan,
                }
            )
    table = pd.DataFrame(rows)
    spread, freedom = float(np.sqrt(np.nanmean(spreads))), len(table) * (len(seeds) - 1)
    table["seeds_p"] = _of_seeds(table.difference, spread, len(seeds), freedom)
    table["verdict"] = [_verdict(one) for one in table.itertuples()]
    return table.assign(spread_of_seeds=spread)


def _of_seeds(differences: pd.Series, spread: float, seeds: int, freedom: int) -> np.ndarray:
    """Two-sided p of differences between means of so many trainings each, of the pooled spread."""
    from scipy.stats import t as student

    if seeds < 2:
        return np.full(len(differences), math.nan)
    return 2 * student.sf(differences.abs() / (max(spread, 1e-9) * math.sqrt(2 / seeds)), freedom)


def factorial_for_reading(table: pd.DataFrame) -> pd.DataFrame:
    """The factorial for reading: per cent, with the interval of WRA and of the difference to the control."""
    per_cent = table.assign(**{name: (100 * table[name]).round(1) for name in table.select_dtypes("float")})
    per_cent["95 %"] = [f"{one.low} - {one.high}" for one in per_cent.itertuples()]
    per_cent["difference, 95 %"] = [
        ""
        if one.verdict == "control"
        else f"{one.difference:+.1f} ({one.difference_low:+.1f} to {one.difference_high:+.1f})"
        for one in per_cent.itertuples()
    ]
    return per_cent.set_index(["student", "head", "system"])[["WRA", "95 %", "difference, 95 %", "verdict"]]


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """What each factor does to WRA, all else equal, by student and head: mean and range over the other factors."""
    rows = []
    cells = table[table.verdict != "control"]
    levels = {"recording": ("own", "same"), "ground truth": ("no", "yes"), "ids": ("shifted", "aligned")}
    for (student, head), part in cells.groupby(["student", "head"], sort=False):
        for factor, (bad, good) in levels.items():
            others = [name for name in levels if name != factor]
            wide = part.pivot_table(index=others, columns=factor, values="WRA")
            change = 100 * (wide[bad] - wide[good])
            rows.append(
                {
                    "student": student,
                    "head": head,
                    "factor": f"{factor}: {bad} instead of {good}",
                    "mean": round(change.mean(), 1),
                    "least": round(change.max(), 1),
                    "most": round(change.min(), 1),
                }
            )
    return pd.DataFrame(rows).set_index(["factor", "student", "head"]).sort_index(sort_remaining=True)


def _joined() -> list[str]:
    """The variants of the factorial."""
    every = [some for count in range(len(FACTORS) + 1) for some in itertools.combinations(FACTORS, count)]
    return ["+".join([base, *some]) for base in BASES for some in every]


def _verdict(row: Any) -> str:
    if math.isnan(row.difference):
        return "control"
    if not (row.p < LEVEL and row.seeds_p < LEVEL):
        return NO_DIFFERENCE
    if row.difference > 0:
        return "helps"
    return "collapses" if row.WRA < COLLAPSED and row.control > 3 * COLLAPSED else "hurts"


def _written(folder: Path) -> dict[str, list[int]]:
    """The token ids that were written of each utterance, greedily."""
    rows = predictions.read(folder, "greedy", ids=True)
    return {row.utt_id: list(row.token_ids or ()) for row in rows.itertuples()}


def diagnosis_of(one: Case, known: Sequence[Fingerprint] | None) -> Diagnosis:
    """What is said of a case by those that it is none of."""
    others = causes.known_fingerprints() if known is None else causes.of_other_seeds(known, one.seed)
    return causes.diagnose(one.signs, others)
