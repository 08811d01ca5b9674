"""The study of collapses: a fold's students examined, fingerprints of known causes, and which of them kills.

Every student of a recipe can be examined; those of `params/ablations/collapse.yaml` have known causes, read off the
recipe. `make` trains what is missing, a part of it where several processes share the work.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.corpus import prepare
from kdlib.distill import faults, ingredients, students
from kdlib.errors import UserError
from kdlib.evaluate import answers, collapse, compare, diagnose
from kdlib.evaluate.collapse import Examination
from kdlib.evaluate.diagnose import SOUND, Diagnosis, Fingerprint
from kdlib.models import vocabulary
from kdlib.params import Params
from kdlib.stage import read_json

Variants = Callable[[str], Params]  # a variant's name -> its parameters, in one fold
FACTORS = {"own": "recording", "untold": "ground truth", "shifted": "ids"}  # what is joined to a base, and its factor
BASES = {  # a base of the factorial -> student, head
    "ctc_kd": ("NeMo", "CTC"),
    "decoder_kd": ("NeMo", "decoder"),
    "sb_ctc_kd": ("SpeechBrain", "CTC"),
    "sb_decoder_kd": ("SpeechBrain", "decoder"),
}
DEAD = 0.1  # a student below it is killed, if labels alone teach it three times as much


@dataclass(frozen=True)
class Case:
    """A student that was examined."""

    variant: str
    seed: int
    cause: str  # of diagnose.CAUSES, several joined
    found: Examination
    signs: dict[str, float]

    @property
    def fingerprint(self) -> Fingerprint:
        """What is kept of it. Without ground truth (b) another fault is that fault, undisturbed."""
        alone = self.cause.replace("b", "") if self.cause != SOUND else SOUND
        return Fingerprint(alone or self.cause, self.variant, self.seed, self.signs)

    @property
    def mixed(self) -> bool:
        """Whether it has several causes."""
        return self.cause != SOUND and len(self.fingerprint.cause) > 1


def listed(params: Params, part: str = "") -> list[tuple[str, int]]:
    """The students of a recipe, by variant and seed; of a part such as `1/2` every other one."""
    every = [(variant, seed) for seed in params.seeds for variant in params.compare]
    if not part:
        return every
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise UserError(f"part: expected something like 1/2, found {part!r}")
    return every[int(number) - 1 :: int(parts)]


def cause(params: Params) -> str:
    """Which of the known causes a recipe has, by their letters; those without any are sound."""
    one, settings = params.faults, params.distill
    taught = settings.taught
    there = {
        "a": taught and one.own_recordings,
        "b": taught and not settings.beta,
        "c": one.choose_by == "kl",
        "d": taught and one.shift,
        "e": taught and settings.blanks == "drop_blank",
        "f": taught and one.jitter,
        "g": one.words,
        "h": faults.misreads(params),
        "i": one.untrained_head,
        "j": taught and one.mispaired,
    }
    return "".join(name for name, value in there.items() if value) or SOUND


def decoder(params: Params) -> str:
    """The decoder whose answers are examined: that of the head that learns, or of the one that should have."""
    return "attention" if params.distill.heads == "decoder" and not params.faults.untrained_head else "greedy"


def examined(params: Params, seed: int) -> Case:
    """A student's answers on the held-out speaker's test speech, examined beside the record of its training."""
    from kdlib import train

    folder, used = students.scored(params, seed), ingredients.effective(params)
    which = decoder(used)
    rows = answers.read(folder, which, ids=True)
    tokens = vocabulary.vocabulary(params)
    material = ingredients.material(params, tokens)
    found = collapse.examine(
        rows,
        {"the student's own pieces": tokens},
        vocabulary=list(prepare.spellings(params)),
        training=[utt.text for utt in material.train if utt.text],
        posteriors=folder / "posteriors" / "ctc.npz" if which == "greedy" else None,
    )
    dev = read_json(folder / "dev" / "scores.json")["decoders"] if (folder / "dev" / "scores.json").is_file() else {}
    dev_wra = dev.get(which, {}).get("wra", math.nan)
    curves = train.curves(folder.parent / train.CURVES)
    return Case(params.variant, seed, cause(used), found, diagnose.signs(found, curves, dev_wra))


def cases(of: Variants, names: Sequence[tuple[str, int]]) -> list[Case]:
    """The students of a recipe, trained now or found, and examined."""
    return [examined(of(variant), seed) for variant, seed in names]


def complete(found: Sequence[Case]) -> bool:
    """Whether these students are enough to tell causes apart: sound ones, and causes by at least two seeds."""
    made = {(one.fingerprint.cause, one.seed) for one in found if not one.mixed}
    several = {cause for cause, seed in made if any((cause, other) in made for other in range(seed))}
    return SOUND in several and len(several) > 3


def crossed(params: Params) -> bool:
    """Whether a recipe has all students of the factorial."""
    return set(_joined()) <= set(params.compare)


def write(params: Params, table: pd.DataFrame, known: Sequence[Fingerprint] | None) -> Path:
    """Write the summary of a fold's students and, where they are a study, their fingerprints."""
    folder = params.fold_folder / "collapse"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "summary.csv")
    if known:
        diagnose.save(known, folder / "fingerprints.json", recipe=params.name, held_out=params.held_out)
    return folder


def summary(cases: Sequence[Case], known: Sequence[Fingerprint] | None = None) -> pd.DataFrame:
    """One row a student: what its answers look like, and what causes are named."""
    rows = []
    for one in cases:
        diagnosis = told(one, known)
        figures = one.found.figures
        rows.append(
            {
                "student": one.variant,
                "seed": one.seed,
                "WRA %": round(100 * figures["wra"], 1),
                "state": one.found.severity,
                "different answers": int(figures["distinct_texts"]),
                "references": int(figures["references"]),
                "hears %": round(100 * figures["hears"]),
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


def told_apart(known: Sequence[Fingerprint], mixed: Sequence[Fingerprint] = ()) -> pd.DataFrame:
    """How often `diagnose` is right: of cases of another seed, of mixtures, and of what is sound (false alarms)."""
    rows = []
    groups = {
        "one cause": [one for one in known if one.cause != SOUND],
        "two or more causes": list(mixed),
        "sound or weak": [one for one in known if one.cause == SOUND],
    }
    for name, group in groups.items():
        found = []
        for one in group:
            rest = [other for other in known if other.seed != one.seed]
            found.append((one.cause, diagnose.diagnose(one.signs, rest).named))
        if found:
            rows.append(
                {
                    "cases": name,
                    "n": len(found),
                    "a cause named": sum(bool(named) for _, named in found),
                    "first named is right": sum(bool(named) and named[0] in made for made, named in found),
                    "only wrong ones named": sum(bool(named) and not set(named) & set(made) for made, named in found),
                    "cannot tell, or sound": sum(not named for _, named in found),
                }
            )
    return pd.DataFrame(rows).set_index("cases")


def factorial(of: Variants, seeds: Sequence[int]) -> pd.DataFrame:
    """WRA of every joining of causes, beside the control of the same student and head, with intervals and verdicts."""
    rows = []
    for base, (student, head) in BASES.items():
        names = [name for name in _joined() if name.split("+")[0] == base]
        control = of(base).distill.control
        systems, place = {}, "attention" if head == "decoder" else "greedy"
        for name in [control, *names]:
            systems[name] = compare.collected([students.scored(of(name), seed) for seed in seeds], place)
        found = {one.a: one for one in compare.compare(systems, against=control)}
        for name in [control, *names]:
            right = systems[name].reference == systems[name].hypothesis
            low, high = _interval(systems[name].assign(right=right))
            joined = name.split("+")[1:]
            verdict = found.get(name)
            rows.append(
                {
                    "student": student,
                    "head": head,
                    "system": name,
                    "recording": "-" if name == control else "own" if "own" in joined else "same",
                    "ground truth": "only" if name == control else "no" if "untold" in joined else "yes",
                    "ids": "-" if name == control else "shifted" if "shifted" in joined else "aligned",
                    "WRA": right.mean(),
                    "low": low,
                    "high": high,
                    "difference": verdict.difference if verdict else math.nan,
                    "difference_low": verdict.these_low if verdict else math.nan,
                    "difference_high": verdict.these_high if verdict else math.nan,
                    "verdict": _verdict(right.mean(), verdict) if verdict else "control",
                }
            )
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame) -> pd.DataFrame:
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


def _verdict(wra: float, verdict: "compare.Verdict") -> str:
    if wra < DEAD and verdict.b_value > 3 * DEAD:
        return "kills"
    return {"worse": "hurts", "better": "helps"}.get(verdict.verdict, verdict.verdict)


def _interval(table: pd.DataFrame, draws: int = 2000) -> tuple[float, float]:
    """95 % of WRA, utterances drawn anew with what all seeds made of them."""
    by_utterance = table.groupby("utt_id").right.mean().to_numpy(float)
    drawn = np.random.default_rng(0).integers(0, len(by_utterance), (draws, len(by_utterance)))
    low, high = np.percentile(by_utterance[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def told(one: Case, known: Sequence[Fingerprint] | None) -> Diagnosis:
    """What is said of a case by those that it is none of."""
    others = diagnose.shipped() if known is None else [other for other in known if other.seed != one.seed]
    return diagnose.diagnose(one.signs, others)
