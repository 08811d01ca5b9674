"""WRA, WER and CER of hypotheses with intervals, in total and by speaker, level, word type and seen words.

WRA is the share of utterances whose whole normalised hypothesis equals the reference; other studies count the first
word only, so both are reported. WER and CER come from jiwer; over 100 % is normal on one-word references. Intervals are
bootstrap percentiles over utterances. `evaluation_<decoder>.json` has the format of the original study's result files.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from kdlib.errors import UserError
from kdlib.evaluate.hypotheses import IDS, Hypothesis, write_hypotheses
from kdlib.evaluate.normalisers import NORMALISERS
from kdlib.io import read_json, write_json
from kdlib.settings.evaluation import Scoring

DEFAULT = Scoring()
MEASURES = ("wra", "wra_first_word", "wer", "cer")
TIDY = ("system", "variant", "seed", "held_out", "decoder", "measure", "value", "low", "high", "n")
GROUPS = ("speaker", "level", "word_type", "seen")


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


@dataclass(frozen=True)
class About:
    """What the report of a system says of it."""

    system: str
    held_out: str = ""
    checkpoint: str = ""
    variant: str = ""  # of a student
    seed: int | None = None
    settings: Mapping = field(default_factory=dict)  # of its decoders, and the speaker that they were chosen on
    remark: str = ""  # a limit to what the scores show
    seen_in: str = "training"  # where the words of the group "seen" are


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    normaliser: str = "none",
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
        raise UserError(f"{len(references)} references, but {len(hypotheses)} hypotheses; their numbers must match")
    if not references:
        raise UserError("nothing to score: there are no utterances")
    same = NORMALISERS[normaliser]
    refs, hyps = [same(text) for text in references], [same(text) for text in hypotheses]
    if "" in refs:
        raise UserError(f"reference {refs.index('') + 1} of {len(refs)} is empty; a reference needs at least one word")
    correct = np.array([ref == hyp for ref, hyp in zip(refs, hyps, strict=True)])
    first = np.mean([ref.split()[:1] == hyp.split()[:1] for ref, hyp in zip(refs, hyps, strict=True)])
    words = jiwer.process_words(refs, hyps)
    return Score(
        len(refs),
        float(correct.mean()),
        interval(correct, bootstrap, seed),
        float(first),
        words.wer,
        words.substitutions,
        words.deletions,
        words.insertions,
        words.hits + words.substitutions + words.deletions,
        jiwer.cer(refs, hyps),
    )


def interval(correct: np.ndarray, bootstrap: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean, by resampling utterances."""
    rng = np.random.default_rng(seed)
    if correct.dtype == bool:  # the sum of a resample is binomial
        means = rng.binomial(len(correct), correct.mean(), bootstrap) / len(correct)
    else:
        means = correct[rng.integers(0, len(correct), (bootstrap, len(correct)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(low), 6), round(float(high), 6)


def scores_by(rows: Sequence[Hypothesis], decoder: str, group: str, **options) -> dict[str, Score]:
    """Scores by a column of the hypotheses: speaker, level, word_type or seen."""
    parts: dict[str, list[Hypothesis]] = {}
    for row in rows:
        parts.setdefault(getattr(row, group), []).append(row)
    return {name: _score_decoder(part, decoder, **options) for name, part in sorted(parts.items()) if name}


def summary(rows: Sequence[Hypothesis], decoders: Sequence[str], about: About, scoring: Scoring) -> dict:
    """The content of `scores.json`: headline and breakdowns of every decoder.

    The decoders are listed, not inferred: one whose hypotheses are all empty scores 0 %, it is not left out. Without
    utterances, as a teacher of other code may have none here, no decoder has a score.
    """
    options = {"normaliser": scoring.normaliser, "bootstrap": scoring.bootstrap}
    scores = {}
    for name in decoders if rows else ():
        headline = asdict(_score_decoder(rows, name, **options))
        groups = {
            group: {part: asdict(result) for part, result in scores_by(rows, name, group, **options).items()}
            for group in GROUPS
        }
        scores[name] = headline | {"by": groups}
    content = {
        "system": about.system,
        "held_out": about.held_out,
        "n": len(rows),
        "normaliser": scoring.normaliser,
        "decoders": scores,
        "settings": dict(about.settings),
    }
    content |= {"seen_in": about.seen_in} if about.seen_in != About.seen_in else {}
    return content | ({"remark": about.remark} if about.remark else {})


def write(
    rows: Sequence[Hypothesis],
    decoders: Sequence[str],
    folder: Path,
    about: About,
    tokenizer: str = "",
    scoring: Scoring = DEFAULT,
) -> dict:
    """Write hypotheses.csv, scores.json, scores.csv and one evaluation_<decoder>.json per decoder; return the scores.

    `tokenizer` is the fingerprint of the system's tokens.
    """
    write_hypotheses(rows, folder / "hypotheses.csv")
    scores = summary(rows, decoders, about, scoring)
    write_json(folder / "scores.json", scores)
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TIDY, lineterminator="\n")
        writer.writeheader()
        writer.writerows(tidy(scores, about.variant, about.seed))
    for name, result in scores["decoders"].items():
        write_json(folder / f"evaluation_{name}.json", _evaluation(rows, name, result, tokenizer, about.checkpoint))
    return scores


def tidy(scores: dict, variant: str = "", seed: int | None = None) -> list[dict]:
    """The scores of a system in tidy rows: one per decoder and measure, shares unrounded, with intervals of WRA."""
    keys = {"system": scores["system"], "variant": variant, "seed": seed, "held_out": scores["held_out"]}
    rows = []
    for decoder, result in scores["decoders"].items():
        for measure in MEASURES:
            low, high = result["ci95"] if measure == "wra" else (None, None)
            row = {"decoder": decoder, "measure": measure, "value": result[measure], "low": low, "high": high}
            rows.append(keys | row | {"n": result["n"]})
    return rows


def wra(folder: Path) -> dict[str, float]:
    """WRA by decoder, from the scores.json in a folder."""
    return {name: result["wra"] for name, result in read_json(folder / "scores.json")["decoders"].items()}


def _score_decoder(rows: Sequence[Hypothesis], decoder: str, **options) -> Score:
    return score([row.reference for row in rows], [getattr(row, decoder) for row in rows], **options)


def _evaluation(rows: Sequence[Hypothesis], decoder: str, result: dict, tokenizer: str, checkpoint: str) -> dict:
    correct = round(result["wra"] * len(rows))
    predictions = [
        {
            "utterance_id": row.utt_id,
            "target": row.reference,
            "prediction_tokens": [int(index) for index in getattr(row, IDS.get(decoder, ""), "").split()],
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
