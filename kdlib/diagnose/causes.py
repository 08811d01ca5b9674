"""Which of the known causes fits a failure, how well, on what evidence, and what would have caught it before training.

The known causes were each made on purpose (`params/ablations/collapse.yaml`) and examined; the signs of those
examinations are the fingerprints. An unknown result is compared with each fingerprint in
the signs that it has; a cause is named only where it fits, and clearly better than what is sound. Else the answer is
that one cannot tell. One cause needs no likeness: where the ids of a file, decoded as they are, recognise what its
texts do not, the file itself shows that it was read wrongly. And where all answers are the same, only frames tell.
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

from kdlib.diagnose.examination import Examination
from kdlib.errors import UserError
from kdlib.io import repository_root, write_json

NO_FAULT = "none"
CAUSES = {
    "a": "teachers spoke of other recordings (their own speakers'), averaged frame by frame",
    "b": "no ground truth in the loss",
    "c": "the best look was chosen by KL and not by words",
    "d": "the teachers' token ids are shifted against the student's",
    "e": "no frame on which the teachers say blank is taught",
    "f": "the mean of teachers whose spikes lie apart in time",
    "g": "the decoder knows the words that it was trained on, and no others",
    "h": "evaluation makes another text of the token ids than they mean",
    "i": "answers are decoded through a head that was not trained",
    "j": "targets belong to other utterances",
    NO_FAULT: "no fault",
}
FITS = 0.2  # root mean square of the signs' differences, up to which a fingerprint fits
SAME = 0.1  # up to which it is as good as the same
ONE_ANSWER = 0.95  # share of one answer, or of none, from which on texts say nothing of the cause
WRONG_DECODING = "h"  # what the second decoding shows by itself
CLEARER = 0.8  # times the distance of the next, or of what has no fault
SIGNS = {  # sign -> how it is said
    "wrong_decoding": "token ids decoded as they are recognise words that the texts do not",
    "offset_decoding": "token ids decoded at another offset recognise words",
    "wra": "words recognised",
    "empty": "empty answers",
    "most_frequent": "the commonest answer",
    "distinct": "different answers, beside the references'",
    "information": "shared with what was said",
    "consistent": "the same answer for the same word",
    "letter_similarity": "letters in common with the reference",
    "repetition": "answers that repeat themselves",
    "length": "longer than the references",
    "truncated": "wrong answers that are the beginning of their reference",
    "overlong": "wrong answers that go on behind their reference",
    "vocabulary_words": "words of the answers that are in the vocabulary",
    "seen_minus_unseen": "words of training recognised better than other words",
    "tokens_right": "tokens right in their place",
    "tokens_off_by_one": "tokens whose id is one off",
    "tokens_displaced": "tokens one place off",
    "tokens_unknown": "tokens that no reference has",
    "token_histogram": "tokens used otherwise than in the references",
    "blank_frames": "blank frames",
    "frame_entropy": "bits of doubt a frame",
    "lost_after_training": "words right in training that the scored answers lack",
    "better_checkpoint": "words right at a better look than the one that was kept",
    "teacher_errors_shared": "the teachers' wrong answers, given too",
}


@dataclass(frozen=True)
class Fingerprint:
    """The signs of one produced case."""

    cause: str  # one of CAUSES; of several, joined: "ad"
    case: str  # the variant that made it
    seed: int
    signs: dict[str, float]
    checks: tuple[str, ...] = ()  # of the preflight: those that warned or refused


@dataclass(frozen=True)
class Fit:
    """How well a cause fits."""

    cause: str
    case: str  # the fingerprint nearest to the result
    distance: float  # root mean square of the signs' differences
    evidence: str
    checks: tuple[str, ...] = ()  # of the preflight, that saw that case
    shown: bool = False  # by the result itself, whatever it is like

    @property
    def fits(self) -> bool:
        """Whether it is near enough to be the cause, or shown to be."""
        return self.shown or self.distance <= FITS


@dataclass(frozen=True)
class Diagnosis:
    """The causes that were named, and how all of them fit."""

    named: tuple[str, ...]  # none: nothing is shown to be wrong, or one cannot tell
    text: str
    fits: list[Fit]


def signs(found: Examination, curves: pd.DataFrame | None = None, dev_wra: float = math.nan) -> dict[str, float]:
    """What a fingerprint is made of: figures of an examination between 0 and 1 (or -1 and 1), however large the task.

    `curves` are those of the training (step, name, value), `dev_wra` what the kept weights' texts score on dev speech.
    """
    one, cure = found.figures, found.better_decoding
    gain = min(1.0, (cure.wra - one["wra"]) / 0.1) if cure else 0.0 if found.redecodings else math.nan
    made = {
        "wrong_decoding": 0.0 if cure and cure.offset else gain,
        "offset_decoding": 0.0 if cure and not cure.offset else gain,
        "wra": one["wra"],
        "empty": one["empty"],
        "most_frequent": one["most_frequent"],
        "distinct": min(1.0, one["effective_answers"] / one["effective_references"]),
        "information": one["information"],
        "consistent": _above(one["consistency"], one["consistency_by_chance"]),
        "letter_similarity": _above(one["letter_similarity"], one["letter_similarity_by_chance"]),
        "repetition": max(one["repetition"], one.get("token_repetition", 0.0)),
        "length": float(np.clip(math.log2(max(0.125, one["words_per_reference"])) / 3, -1, 1)),
        "truncated": one["truncated"],
        "overlong": one["overlong"],
        "vocabulary_words": one["vocabulary_words"],
        "seen_minus_unseen": one["wra_seen"] - one["wra_unseen"],
    }
    if "tokens_right" in one:
        made |= {
            "length": float(np.clip(math.log2(max(0.125, one["tokens_per_reference"])) / 3, -1, 1)),
            "tokens_right": one["tokens_right"],
            "tokens_off_by_one": one["tokens_off_by_one"],
            "tokens_displaced": one["tokens_displaced"],
            "tokens_unknown": one["unknown_tokens"],
            "token_histogram": one["histogram"],
        }
    if "blank_frames" in one:
        made |= {"blank_frames": one["blank_frames"], "frame_entropy": min(1.0, one["entropy_bits"] / 4)}
    if curves is not None and len(looks := curves[curves.name == "dev_wra"]):
        scores = curves[curves.name == "dev_score"].set_index("step").value
        kept = looks.set_index("step").value.get(scores.idxmax(), math.nan) if len(scores) else math.nan
        lost, passed_over = kept - dev_wra, looks.value.max() - kept
        made |= {
            "lost_after_training": float(np.clip(lost, 0, 1)),
            "better_checkpoint": float(np.clip(passed_over, 0, 1)),
        }
    if "agrees_with_teachers_wrong" in one:
        made["teacher_errors_shared"] = one["agrees_with_teachers_wrong"]
    return {name: float(value) for name, value in made.items() if not math.isnan(value)}


def diagnose(result: Mapping[str, float], known: Sequence[Fingerprint] | None = None) -> Diagnosis:
    """Which causes fit the signs of a result."""
    known = known_fingerprints() if known is None else list(known)
    if not known:
        return Diagnosis((), "There are no fingerprints to compare with; make them: make collapse", [])
    alike = result.get("most_frequent", 0.0) >= ONE_ANSWER and result.get("wra", 0.0) < 1 - ONE_ANSWER
    if alike and "blank_frames" not in result and result.get("wrong_decoding", 0.0) < 1:
        why = "(nearly) all answers are the same, as too little training and several causes leave them"
        return Diagnosis((), f"Cannot tell the cause: {why}; what the frames say would be needed.", [])
    table = frame(known)
    middles = table.groupby(level=[0, 1]).mean()
    value = pd.Series(result, dtype=float).reindex(table.columns)
    distance = np.sqrt(((middles - value) ** 2).mean(axis=1)).fillna(np.inf)  # of what has none of the signs
    sound = [place for place in middles.index if place[0] == NO_FAULT]
    ordinary = middles.loc[sound].mean() if sound else middles.mean()
    fits = []
    for cause in dict.fromkeys(one.cause for one in known):
        place = distance[[place for place in middles.index if place[0] == cause]].idxmin()
        told = _evidence(value, middles.loc[place], ordinary) if cause != NO_FAULT else ""
        seen = next(one.checks for one in known if (one.cause, one.case) == place)
        shown = cause == WRONG_DECODING and result.get("wrong_decoding", 0.0) >= 1
        fits.append(Fit(cause, place[1], float(distance[place]), told, tuple(seen), shown))
    fits.sort(key=lambda one: (not one.shown, one.distance))
    return _named(fits)


def frame(known: Sequence[Fingerprint]) -> pd.DataFrame:
    """Signs as columns, one row a fingerprint, by cause and case."""
    places = pd.MultiIndex.from_tuples([(one.cause, one.case) for one in known], names=["cause", "case"])
    return pd.DataFrame([one.signs for one in known], index=places, dtype=float)


def table(found: Diagnosis, least: int = 4) -> pd.DataFrame:
    """How the causes fit, the best first."""
    return pd.DataFrame(
        [
            {
                "cause": one.cause,
                "what it is": CAUSES[one.cause],
                "distance": round(one.distance, 2),
                "fits": "yes" if one.fits else "no",
                "like": one.case,
                "evidence": one.evidence,
                "seen by the preflight's": ", ".join(one.checks),
            }
            for one in found.fits[:least]
        ]
    ).set_index("cause")


def of_other_seeds(known: Sequence[Fingerprint], seed: int) -> list[Fingerprint]:
    """The fingerprints by which a case of a seed is told."""
    return [one for one in known if one.seed != seed]


def confusion(known: Sequence[Fingerprint], others: Sequence[Fingerprint] = ()) -> pd.DataFrame:
    """True cause by named cause: every case, and of `others` (mixtures), told by the fingerprints of other seeds."""
    rows = []
    for one in [*known, *others]:
        named = diagnose(one.signs, of_other_seeds(known, one.seed)).named
        for name in named or ["-"]:
            rows.append({"true": one.cause, "named": name, "count": 1 / max(1, len(named))})
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
    """The fingerprints that `make collapse` has made here, or else those that kdlib comes with."""
    made = sorted((repository_root() / "outputs" / "collapse").glob("*/collapse/fingerprints.json"))
    path = made[0] if made else files("kdlib").joinpath("data/fingerprints.json")
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["fingerprints"]
    if not set(rows[0]["signs"]) <= set(SIGNS):
        raise UserError(
            f"{path} was made by an earlier version of kdlib, which had other names; make it anew, or move it"
        )
    return [Fingerprint(**one | {"checks": tuple(one["checks"])}) for one in rows]


def save(known: Sequence[Fingerprint], path: Path, **about: object) -> None:
    """Write fingerprints, and how they were made."""
    rows = [asdict(one) | {"signs": {name: round(value, 4) for name, value in one.signs.items()}} for one in known]
    write_json(path, about | {"fingerprints": rows})


def _named(fits: list[Fit]) -> Diagnosis:
    """Name what fits, and clearly better than what has no fault; or say that one cannot tell."""
    sound = min((one for one in fits if one.cause == NO_FAULT), key=lambda one: one.distance, default=None)
    best, least = fits[0], sound.distance if sound else math.inf
    if not best.shown and (least <= SAME or (best.cause == NO_FAULT and best.fits)):
        like = f"nearest is a student without one ({sound.case}), at a distance of {sound.distance:.2f}"
        return Diagnosis((), f"No fault is shown: {like}.", fits)
    reach = max(best.distance / CLEARER, best.distance + SAME / 10)
    near = [one for one in fits if one.cause != NO_FAULT and one.distance <= reach]
    near = [one for one in near if one.shown or (one.fits and one.distance < CLEARER * least)]
    if not near:
        why = f"at a distance of {best.distance:.2f}" + ("" if best.fits else f", where up to {FITS:g} would fit")
        so = ", and what has no fault is as near" if best.fits and best.cause != NO_FAULT else ""
        return Diagnosis((), f"Cannot tell the cause: nearest is ({best.cause}) {CAUSES[best.cause]}, {why}{so}.", fits)
    first = near[0]
    how = f"distance {first.distance:.2f}" + (", and the second decoding shows it by itself" if first.shown else "")
    text = f"Cause ({first.cause}): {CAUSES[first.cause]}; {how}. Evidence: {first.evidence}."
    if len(near) > 1:
        text += " Nearly as near: " + "; ".join(f"({one.cause}) {CAUSES[one.cause]}" for one in near[1:]) + "."
    if first.checks:
        text += f" The preflight would have said so: {', '.join(first.checks)}."
    return Diagnosis(tuple(one.cause for one in near), text, fits)


def _evidence(value: pd.Series, like: pd.Series, ordinary: pd.Series) -> str:
    """The signs that speak most for a fingerprint and against what has no fault."""
    gain = ((value - ordinary) ** 2 - (value - like) ** 2).dropna()
    best = [name for name in gain.sort_values(ascending=False).index if gain[name] > SAME**2][:3]
    return "; ".join(
        f"{SIGNS[name]} {value[name]:.2f} (there {like[name]:.2f}, without a fault {ordinary[name]:.2f})"
        for name in best
    )


def _above(value: float, chance: float) -> float:
    return (value - chance) / max(1e-9, 1 - chance)
