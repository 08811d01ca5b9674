"""Diagnose a failure: which known cause fits, how well, by which evidence, and which check detects it before training.

Each known cause was produced on purpose (`params/ablations/collapse.yaml`) and examined; the signs of those
examinations are the fingerprints. A new result is compared with each fingerprint in the signs that it has, and with
sound results that recognise as many words (`sound.py`): a weak result has other signs than a good one without any
fault. A cause is named only where it fits, where the signs differ from all sound results, and clearly less from the
cause; otherwise it is unknown. Two causes need no similarity, and exclude all others: where the ids of a file, decoded
as they are, recognise what its texts do not, its decoding is wrong; where they do so with an offset, the ids are
shifted. And where all hypotheses are the same, only frames distinguish causes.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.diagnose import sound
from kdlib.diagnose.examination import Examination, above_chance
from kdlib.diagnose.sound import Sound
from kdlib.errors import UserError
from kdlib.io import repository_root, write_json

NO_FAULT = "none"
CAUSES = {
    "a": "teacher outputs of other recordings (of the teachers' own speakers), averaged frame by frame",
    "b": "no ground truth in the loss",
    "c": "the best checkpoint was chosen by KL and not by WRA",
    "d": "the teachers' token ids are shifted against the student's",
    "e": "the teachers' blank frames are left out of the loss",
    "f": "the average of teachers whose spikes are in different frames",
    "g": "the decoder outputs the words that it was trained on, and no others",
    "h": "evaluation decodes the token ids with the wrong offset or tokenizer",
    "i": "hypotheses are decoded from an untrained head",
    "j": "targets belong to other utterances",
    NO_FAULT: "no fault",
}
FITS = 0.2  # root mean square of the signs' differences, up to which a fingerprint fits
SAME = 0.1  # up to which it is practically the same
ONE_ANSWER = 0.95  # share of one hypothesis, or of empty ones, from which on texts do not distinguish causes
SHOWN_BY = {"wrong_decoding": "h", "offset_decoding": "d"}  # signs that the second decoding proves -> their cause
SHIFTED = "the token ids are shifted: in training, or where they were written"
CLEARER = 0.8  # times the distance of the next cause, or of students without a fault
SIGNS = {  # sign -> its description
    "wrong_decoding": "the token ids, decoded as they are, recognise more than the texts (1: yes)",
    "offset_decoding": "the token ids, decoded with an offset, recognise more than the texts (1: yes)",
    "wra": "words recognised",
    "empty": "empty hypotheses",
    "most_frequent": "share of the most frequent hypothesis",
    "distinct": "effective number of hypotheses, relative to references",
    "information": "mutual information with the references",
    "consistent": "same hypothesis for the same word",
    "letter_similarity": "letters in common with the reference",
    "repetition": "repetitive hypotheses",
    "length": "longer than the references",
    "truncated": "wrong hypotheses that are the beginning of their reference",
    "overlong": "wrong hypotheses that begin with their reference",
    "vocabulary_words": "hypothesis words in the vocabulary",
    "seen_minus_unseen": "training words recognised better than other words",
    "tokens_right": "tokens correct in their position",
    "tokens_off_by_one": "tokens whose id is off by one",
    "tokens_displaced": "tokens off by one position",
    "tokens_unknown": "tokens that occur in no reference",
    "token_histogram": "divergence of the token histogram from the references'",
    "blank_frames": "blank frames",
    "frame_entropy": "entropy per frame",
    "lost_after_training": "dev words recognised in training and not in the scored hypotheses",
    "better_checkpoint": "dev words recognised by a better checkpoint than the selected one",
    "teacher_errors_shared": "the teachers' wrong hypotheses repeated",
}


@dataclass(frozen=True)
class Fingerprint:
    """The signs of one student with known causes."""

    cause: str  # one of CAUSES, or several joined: "ad"
    case: str  # its variant
    seed: int
    signs: dict[str, float]
    checks: tuple[str, ...] = ()  # preflight checks that warned or refused


@dataclass(frozen=True)
class Fit:
    """How well a cause fits."""

    cause: str
    case: str  # the fingerprint nearest to the result
    distance: float  # root mean square of the signs' differences
    evidence: str
    checks: tuple[str, ...] = ()  # preflight checks that detected that case
    shown: bool = False  # by the result itself, at any distance

    @property
    def fits(self) -> bool:
        """True if it is near enough to be the cause, or shown to be."""
        return self.shown or self.distance <= FITS


@dataclass(frozen=True)
class Diagnosis:
    """The causes that were named, and the fit of all of them."""

    named: tuple[str, ...]  # empty: no fault detected, or the cause unknown
    text: str
    fits: list[Fit]

    def judge(self, fit: Fit) -> str:
        """Whether a cause fits, as the text says it: those that are named do, and no other one."""
        if fit.cause in self.named or (fit.cause == NO_FAULT and fit.fits and not self.named):
            return "yes"
        if not fit.fits:
            return "no"
        return "no: another is nearer" if self.named else "no: no fault is as near"


def signs(result: Examination, curves: pd.DataFrame | None = None, dev_wra: float = math.nan) -> dict[str, float]:
    """The signs of an examination: figures between 0 and 1 (or -1 and 1), independent of the size of the task.

    `curves` are those of the training (step, name, value), `dev_wra` is the WRA of the scored hypotheses on dev speech.
    """
    figures, better = result.figures, result.better_decoding
    gain = 1.0 if better else 0.0 if result.redecodings else math.nan
    values = {
        "wrong_decoding": 0.0 if better and better.offset else gain,
        "offset_decoding": 0.0 if better and not better.offset else gain,
        "wra": figures["wra"],
        "empty": figures["empty"],
        "most_frequent": figures["most_frequent"],
        "distinct": min(1.0, figures["effective_answers"] / figures["effective_references"]),
        "information": figures["information"],
        "consistent": above_chance(figures["consistency"], figures["consistency_by_chance"]),
        "letter_similarity": above_chance(figures["letter_similarity"], figures["letter_similarity_by_chance"]),
        "repetition": max(figures["repetition"], figures.get("token_repetition", 0.0)),
        "length": _log_ratio(figures["words_per_reference"]),
        "truncated": figures["truncated"],
        "overlong": figures["overlong"],
        "vocabulary_words": figures["vocabulary_words"],
        "seen_minus_unseen": figures["wra_seen"] - figures["wra_unseen"],
    }
    if "tokens_right" in figures:
        values |= {
            "length": _log_ratio(figures["tokens_per_reference"]),
            "tokens_right": figures["tokens_right"],
            "tokens_off_by_one": figures["tokens_off_by_one"],
            "tokens_displaced": figures["tokens_displaced"],
            "tokens_unknown": figures["unknown_tokens"],
            "token_histogram": figures["histogram"],
        }
    if "blank_frames" in figures:
        values |= {"blank_frames": figures["blank_frames"], "frame_entropy": min(1.0, figures["entropy_bits"] / 4)}
    if curves is not None and len(validations := curves[curves.name == "dev_wra"]):
        scores = curves[curves.name == "dev_score"].set_index("step").value
        best = validations.set_index("step").value.get(scores.idxmax(), math.nan) if len(scores) else math.nan
        values |= {
            "lost_after_training": float(np.clip(best - dev_wra, 0, 1)),
            "better_checkpoint": float(np.clip(validations.value.max() - best, 0, 1)),
        }
    if "agrees_with_teachers_wrong" in figures:
        values["teacher_errors_shared"] = figures["agrees_with_teachers_wrong"]
    return {name: float(value) for name, value in values.items() if not math.isnan(value)}


def _log_ratio(ratio: float) -> float:
    """The logarithm of a ratio of lengths: 0 if equal, 1 for eight times, -1 for an eighth."""
    return float(np.clip(math.log2(max(0.125, ratio)) / 3, -1, 1))


def diagnose(result: Mapping[str, float], known: Sequence[Fingerprint] | None = None) -> Diagnosis:
    """Name the causes that fit the signs of a result."""
    known = known_fingerprints() if known is None else list(known)
    if not known:
        return Diagnosis((), "There are no fingerprints to compare with; make them: make collapse", [])
    proved = next((cause for sign, cause in SHOWN_BY.items() if result.get(sign, 0.0) >= 1), "")
    constant = result.get("most_frequent", 0.0) >= ONE_ANSWER and result.get("wra", 0.0) < 1 - ONE_ANSWER
    if constant and "blank_frames" not in result and not proved:
        why = "(nearly) all hypotheses are the same, as after too little training and with several causes"
        return Diagnosis((), f"Cause unknown: {why}; frame posteriors would be needed.", [])
    table = frame(known)
    middles = table.groupby(level=[0, 1]).mean()
    value = pd.Series(result, dtype=float).reindex(table.columns)
    distance = np.sqrt(((middles - value) ** 2).mean(axis=1)).fillna(np.inf)  # without a common sign
    healthy = [place for place in middles.index if place[0] == NO_FAULT]
    ordinary = middles.loc[healthy].mean() if healthy else middles.mean()
    as_weak = sound.expected(result)
    fits = []
    for cause in dict.fromkeys(fingerprint.cause for fingerprint in known):
        place = distance[[place for place in middles.index if place[0] == cause]].idxmin()
        evidence = _evidence(value, middles.loc[place], ordinary) if cause != NO_FAULT else ""
        checks = next(tuple(row.checks) for row in known if (row.cause, row.case) == place)
        if cause == NO_FAULT and as_weak.distance < distance[place]:
            fits.append(Fit(NO_FAULT, as_weak.name, as_weak.distance, ""))
            continue
        fits.append(Fit(cause, place[1], float(distance[place]), evidence, checks, cause == proved))
    fits.sort(key=lambda fit: (not fit.shown, fit.distance))
    if proved and not fits[0].shown:  # among fingerprints without it
        fits.insert(0, Fit(proved, "", math.nan, "", shown=True))
    return _name_causes(fits, as_weak)


def frame(known: Sequence[Fingerprint]) -> pd.DataFrame:
    """Signs as columns, one row per fingerprint, by cause and case."""
    places = pd.MultiIndex.from_tuples([(row.cause, row.case) for row in known], names=["cause", "case"])
    return pd.DataFrame([row.signs for row in known], index=places, dtype=float)


def table(diagnosis: Diagnosis, count: int = 4) -> pd.DataFrame:
    """The nearest causes, the nearest first."""
    return pd.DataFrame(
        [
            {
                "cause": fit.cause,
                "description": CAUSES[fit.cause],
                "distance": round(fit.distance, 2),
                "fits": diagnosis.judge(fit),
                "nearest case": fit.case,
                "evidence": fit.evidence,
                "preflight checks": ", ".join(fit.checks),
            }
            for fit in diagnosis.fits[:count]
        ]
    ).set_index("cause")


def of_other_seeds(known: Sequence[Fingerprint], seed: int) -> list[Fingerprint]:
    """The fingerprints by which a case of a seed is diagnosed."""
    return [fingerprint for fingerprint in known if fingerprint.seed != seed]


def confusion(known: Sequence[Fingerprint], mixtures: Sequence[Fingerprint] = ()) -> pd.DataFrame:
    """True by named cause: every case, and every mixture of causes, diagnosed by the fingerprints of other seeds."""
    rows = []
    for case in [*known, *mixtures]:
        named = diagnose(case.signs, of_other_seeds(known, case.seed)).named
        for name in named or ["-"]:
            rows.append({"true": case.cause, "named": name, "count": 1 / max(1, len(named))})
    order = [*CAUSES, "-"]
    wide = pd.DataFrame(rows).pivot_table(index="true", columns="named", values="count", aggfunc="sum", fill_value=0.0)
    return wide.reindex(
        index=sorted(
            wide.index,
            key=lambda name: (len(name) > 1 and name != NO_FAULT, order.index(name[0]) if name != NO_FAULT else 98),
        ),
        columns=[name for name in order if name in wide.columns],
    )


@functools.cache
def known_fingerprints() -> list[Fingerprint]:
    """The fingerprints that `make collapse` produced here, or else those shipped with kdlib."""
    paths = sorted((repository_root() / "outputs" / "collapse").glob("*/collapse/fingerprints.json"))
    path = paths[0] if paths else files("kdlib").joinpath("data/fingerprints.json")
    return read(path) if path.is_file() else []


def read(path: Path) -> list[Fingerprint]:
    """Read fingerprints that `save` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))["fingerprints"]
    if not set(rows[0]["signs"]) <= set(SIGNS):
        raise UserError(f"{path} was made by an earlier version of kdlib with other names; make it again, or move it")
    return [Fingerprint(**row | {"checks": tuple(row["checks"])}) for row in rows]


def save(known: Sequence[Fingerprint], path: Path, **about: object) -> None:
    """Write fingerprints, and `about` how they were made."""
    rows = [asdict(row) | {"signs": {name: round(value, 4) for name, value in row.signs.items()}} for row in known]
    write_json(path, about | {"fingerprints": rows})


def _name_causes(fits: list[Fit], as_weak: Sound) -> Diagnosis:
    """Name the causes that fit, and clearly better than no fault; otherwise the cause is unknown."""
    healthy = min((fit for fit in fits if fit.cause == NO_FAULT), key=lambda fit: fit.distance, default=None)
    best, least = fits[0], healthy.distance if healthy else math.inf
    if not best.shown and (least <= max(SAME, as_weak.usual) or (best.cause == NO_FAULT and best.fits)):
        text = f"nearest without one: {healthy.case}, at a distance of {healthy.distance:.2f}"
        return Diagnosis((), f"No fault detected: {text}.", fits)
    reach = max(best.distance / CLEARER, best.distance + SAME / 10)
    near = [fit for fit in fits if fit.cause != NO_FAULT and fit.distance <= reach]
    near = [fit for fit in near if fit.fits and fit.distance < CLEARER * least]
    if best.shown:
        near = [best]
    if not near:
        text = f"the nearest is ({best.cause}) {CAUSES[best.cause]}, at a distance of {best.distance:.2f}"
        text += "" if best.fits else f", where up to {FITS:g} would fit"
        text += ", and students without a fault are as near" if best.fits and best.cause != NO_FAULT else ""
        return Diagnosis((), f"Cause unknown: {text}.", fits)
    first = near[0]
    how = "the second decoding alone shows it" if first.shown else f"distance {first.distance:.2f}"
    what = SHIFTED if first.shown and first.cause == SHOWN_BY["offset_decoding"] else CAUSES[first.cause]
    text = f"Cause ({first.cause}): {what}; {how}."
    text += f" Evidence: {first.evidence}." if first.evidence else ""
    if len(near) > 1:
        text += " Nearly as near: " + "; ".join(f"({fit.cause}) {CAUSES[fit.cause]}" for fit in near[1:]) + "."
    if first.checks:
        text += f" Preflight checks that detect it: {', '.join(first.checks)}."
    return Diagnosis(tuple(fit.cause for fit in near), text, fits)


def _evidence(value: pd.Series, case: pd.Series, ordinary: pd.Series) -> str:
    """The signs that are strongest evidence for a fingerprint and against no fault."""
    gain = ((value - ordinary) ** 2 - (value - case) ** 2).dropna()
    best = [name for name in gain.sort_values(ascending=False).index if gain[name] > SAME**2][:3]
    return "; ".join(
        f"{SIGNS[name]} {value[name]:.2f} (fingerprint {case[name]:.2f}, without a fault {ordinary[name]:.2f})"
        for name in best
    )
