"""WRA, WER and CER of hypotheses, with intervals, by whatever an utterance is known by.

WRA is the share of utterances whose whole normalised hypothesis equals the reference; others count the first word only,
so both are reported. WER and CER come from jiwer; over 100 % is normal on one-word references. Intervals are bootstrap
percentiles over utterances. `evaluation_<decoder>.json` has the shape of the original study's result files.
"""

import csv
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np

from kdlib.errors import UserError
from kdlib.io import read_json, write_json
from kdlib.tokens import normalise

GROUPS = ("speaker", "level", "word_type", "seen")
IDS = {"greedy": "token_ids", "attention": "attention_ids"}  # the columns of what decoders wrote before it was text


@dataclass(frozen=True)
class Hypothesis:
    """One row of `hypotheses.csv`: an utterance and what each decoder heard in it; decoders not used are empty."""

    utt_id: str
    speaker: str
    level: str
    word_type: str
    seen: str  # "yes", "no", or empty where it does not apply
    reference: str
    greedy: str = ""
    lexicon: str = ""
    lexicon_posterior: float = 0.0  # of the word that `lexicon` chose
    beam: str = ""
    attention: str = ""
    attention_beam: str = ""
    attention_lexicon: str = ""
    joint: str = ""
    joint_lexicon: str = ""
    n_tokens: int = 0
    blank_share: float = 0.0
    token_ids: str = ""  # greedy, space-separated
    attention_ids: str = ""  # of `attention`


@dataclass(frozen=True)
class Score:
    """Shares between 0 and 1 (WER and CER may exceed it) and counts."""

    n: int
    wra: float
    ci95: tuple[float, float]
    wra_first_word: float
    wer: float
    substitutions: int
    deletions: int
    insertions: int
    reference_words: int
    cer: float


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    fold_homophones: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Score:
    """Score texts against texts.

    >>> result = score(["ONE", "TWO", "TWO"], ["one", "TO", "TWO OF"])
    >>> round(result.wra, 3), round(result.wra_first_word, 3), result.substitutions, result.insertions
    (0.333, 0.667, 1, 1)
    """
    import jiwer

    if len(references) != len(hypotheses):
        raise UserError(f"{len(references)} references, but {len(hypotheses)} hypotheses: they must go in pairs")
    if not references:
        raise UserError("nothing to score: no utterances were given")
    fold = fold_words if fold_homophones else normalise
    told, heard = [fold(text) for text in references], [fold(text) for text in hypotheses]
    if "" in told:
        raise UserError(f"reference {told.index('') + 1} of {len(told)} is empty; a reference needs at least one word")
    right = np.array([a == b for a, b in zip(told, heard, strict=True)])
    first = np.mean([a.split()[:1] == b.split()[:1] for a, b in zip(told, heard, strict=True)])
    words = jiwer.process_words(told, heard)
    return Score(
        len(told),
        float(right.mean()),
        interval(right, bootstrap, seed),
        float(first),
        words.wer,
        words.substitutions,
        words.deletions,
        words.insertions,
        words.hits + words.substitutions + words.deletions,
        jiwer.cer(told, heard),
    )


def interval(right: np.ndarray, bootstrap: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean, by resampling utterances."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(right), (bootstrap, len(right)))
    low, high = np.percentile(right[draws].mean(1), [2.5, 97.5])
    return round(float(low), 6), round(float(high), 6)


def fold_words(text: str) -> str:
    """A text with every word replaced by the first of its homophones.

    >>> fold_words("two write")
    'TO RIGHT'
    """
    return " ".join(_homophones().get(word, word) for word in normalise(text).split())


def scores_by(rows: Sequence[Hypothesis], decoder: str, group: str, **options) -> dict[str, Score]:
    """Scores by a column of the hypotheses: speaker, level, word_type or seen."""
    parts: dict[str, list[Hypothesis]] = {}
    for row in rows:
        parts.setdefault(getattr(row, group), []).append(row)
    return {name: _of(part, decoder, **options) for name, part in sorted(parts.items()) if name}


def summary(rows: Sequence[Hypothesis], decoders: Sequence[str], *, system: str, held_out: str, **options) -> dict:
    """The content of `scores.json`: headline and breakdowns of every decoder that was used.

    Which were used is said, not guessed: a decoder that writes nothing at all scores 0 %, it is not left out.
    """
    scores = {}
    for name in decoders:
        headline = asdict(_of(rows, name, **options))
        groups = {
            group: {part: asdict(one) for part, one in scores_by(rows, name, group, **options).items()}
            for group in GROUPS
        }
        scores[name] = headline | {"by": groups}
    return {
        "system": system,
        "held_out": held_out,
        "n": len(rows),
        "homophones_folded": options.get("fold_homophones", False),
        "decoders": scores,
    }


def write(
    rows: Sequence[Hypothesis],
    decoders: Sequence[str],
    folder: Path,
    *,
    system: str,
    held_out: str,
    tokenizer: str,
    checkpoint: str,
    settings: dict | None = None,
    remark: str = "",
    **options,
) -> dict:
    """Write hypotheses.csv, scores.json and one evaluation_<decoder>.json a decoder; return the scores.

    `settings` are those of the decoders that have some, and say on whom they were chosen; `remark` what these scores
    are not.
    """
    write_hypotheses(rows, folder / "hypotheses.csv")
    scores = summary(rows, decoders, system=system, held_out=held_out, **options) | {"settings": settings or {}}
    if remark:
        scores["remark"] = remark
    write_json(folder / "scores.json", scores)
    for name, result in scores["decoders"].items():
        write_json(folder / f"evaluation_{name}.json", _evaluation(rows, name, result, tokenizer, checkpoint))
    return scores


def decode_again(row: Hypothesis, read: Callable[[list[int]], str]) -> Hypothesis:
    """The same answer, its token ids made text in another way."""
    written = {name: [int(one) for one in getattr(row, ids).split()] for name, ids in IDS.items()}
    return replace(row, **{name: read(ids) for name, ids in written.items() if ids})


def wra(folder: Path) -> dict[str, float]:
    """WRA by decoder, of a folder that `write` has filled."""
    return {name: one["wra"] for name, one in read_json(folder / "scores.json")["decoders"].items()}


def write_hypotheses(rows: Iterable[Hypothesis], path: Path) -> None:
    """Write `hypotheses.csv`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Hypothesis.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_hypotheses(path: Path) -> list[Hypothesis]:
    """Read `hypotheses.csv`."""
    if not path.is_file():
        raise UserError(f"no hypotheses in {path}: run the notebook that scores this system first")
    with path.open(newline="", encoding="utf-8") as file:
        numbers = {"n_tokens": int, "blank_share": float, "lexicon_posterior": float}
        return [
            Hypothesis(**row | {name: kind(row[name]) for name, kind in numbers.items() if name in row})
            for row in csv.DictReader(file)
        ]


def _of(rows: Sequence[Hypothesis], decoder: str, **options) -> Score:
    return score([row.reference for row in rows], [getattr(row, decoder) for row in rows], **options)


def _evaluation(rows: Sequence[Hypothesis], decoder: str, result: dict, tokenizer: str, checkpoint: str) -> dict:
    correct = round(result["wra"] * len(rows))
    predictions = [
        {
            "utterance_id": row.utt_id,
            "target": row.reference,
            "prediction_tokens": [int(one) for one in getattr(row, IDS.get(decoder, ""), "").split()],
            "prediction_text": getattr(row, decoder),
        }
        for row in rows
    ]
    return {
        "checkpoint": checkpoint,
        "epoch": None,
        "num_samples": len(rows),
        "tokenizer": tokenizer,
        "wer": {
            "value": result["wer"],
            "S": result["substitutions"],
            "D": result["deletions"],
            "I": result["insertions"],
            "N": result["reference_words"],
        },
        "wra": {"value": result["wra"], "correct": correct, "total": len(rows)},
        "predictions": predictions,
    }


@functools.cache
def _homophones() -> dict[str, str]:
    groups = json.loads(files("kdlib").joinpath("data/homophones.json").read_text(encoding="utf-8"))
    return {word: group[0] for group in groups for word in group}
