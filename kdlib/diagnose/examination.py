"""The examination of a failure: what do a system's answers look like, what are they about, what else could they mean?

It needs no model: answers with their references, token ids where there are any, and tokenizers to decode these anew.
A system that recognises nothing may be deaf (its answers have nothing to do with what was said), may write one thing
over and over, or may hear well and be read wrongly: by ids one off, by another tokenizer, by an untrained head. The
second decoding tells the last from the rest: the ids are decoded again, shifted by -3 to 3, with every tokenizer at
hand, with and without special ids, and scored.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluate.measures import (
    OFFSETS,
    consistency,
    effective_number,
    js_divergence,
    letter_similarity,
    loops,
    offset_matches,
    position_matches,
    shared_bits,
)
from kdlib.evaluate.posteriors import Posteriors, entropy_bits
from kdlib.evaluate.score import score
from kdlib.tokens import Tokens, normalise

LEAST_GAIN, LEAST_CURED = 0.02, 5  # of WRA and of answers, from which on another reading is a better one
MIN_INFORMATION = 0.1  # of what can be heard: a system below it on every measure is deaf


@dataclass(frozen=True)
class Redecoding:
    """The same ids, decoded in another way."""

    tokenizer: str
    offset: int  # added to every id
    specials: bool  # decoded as they are, or the ids 0, 1 and 2 left out first
    wra: float
    by_chance: float  # WRA, if these answers were given to any utterance
    as_written: float  # the share of answers whose text in the file is this one

    @property
    def gain(self) -> float:
        """WRA above chance."""
        return self.wra - self.by_chance

    def __str__(self) -> str:
        how = f"offset {self.offset:+d}" if self.offset else "no offset"
        return f"{how}, {self.tokenizer}" + ("" if self.specials else ", special ids left out")


@dataclass(frozen=True)
class Examination:
    """What was found: a severity and a verdict in words, and the figures that they rest on."""

    severity: str  # misread, silent, stuck, deaf, wrong, weak or sound
    verdict: str
    figures: dict[str, float]  # by name; not a number where it could not be asked
    most_frequent: pd.DataFrame  # answers, how often, and for which references they stand
    redecodings: list[Redecoding]  # the best first
    words: pd.DataFrame  # of each answer: how many words it has for how many of the reference
    texts: pd.DataFrame  # utt_id, reference, hypothesis as examined, and as read best

    @property
    def better_decoding(self) -> Redecoding | None:
        """The other reading that recognises more than the file's own, if that is no chance."""
        if not self.redecodings:
            return None
        best, n = self.redecodings[0], self.figures["n"]
        more = best.wra - self.figures["wra"]
        doubt = 4 * math.sqrt(max(best.by_chance, 1 / n) / n)
        return best if more >= LEAST_GAIN and more * n > LEAST_CURED - 0.5 and best.gain > doubt else None


def examine(
    table: pd.DataFrame,
    tokenizers: Mapping[str, Tokens] | None = None,
    *,
    vocabulary: Collection[str] = (),
    training: Collection[str] = (),
    teachers: Mapping[str, Sequence[int]] | None = None,
    posteriors: Path | None = None,
) -> Examination:
    """Examine answers as `answers.read(..., ids=True)` gives them.

    `tokenizers` decode the ids anew, the first being the system's own; `vocabulary` and `training` are texts that may
    be written, and that were trained on; `teachers` has the token ids that teachers wrote of utterances, in the first
    tokenizer's pieces; `posteriors` is a file of what was said of every frame.
    """
    tokenizers = dict(tokenizers or {})
    ids = [list(one) for one in table.token_ids] if "token_ids" in table and table.token_ids.notna().all() else None
    told = table.reference.tolist()
    if (untold := table.hypothesis.isna()).any():
        if not tokenizers:
            raise UserError(
                "these answers have token ids and no text: name the sentencepiece model that they were written with "
                "(TOKENIZER=...)"
            )
        read = next(iter(tokenizers.values())).decode_all(ids)
        table = table.assign(hypothesis=table.hypothesis.where(~untold, pd.Series(read, table.index)))
    said = table.hypothesis.tolist()
    figures = _figures(told, said, {normalise(one) for one in vocabulary}, {normalise(one) for one in training})
    readings = second_decoding(ids, told, tokenizers, said) if ids else []
    if readings:
        figures |= _of_ids(ids, told, readings, tokenizers)
    if teachers and tokenizers:
        figures |= _compared_with_teachers(table, ids, teachers, next(iter(tokenizers.values())))
    if posteriors and posteriors.is_file():
        figures |= _by_frame(Posteriors(posteriors))
    texts = table[["utt_id", "reference", "hypothesis"]].copy()
    found = Examination("", "", figures, most_frequent(told, said), readings, _lengths(told, said), texts)
    if best := found.better_decoding:
        texts["read anew"] = _texts(ids, tokenizers[best.tokenizer], best.offset, best.specials)
    severity, verdict = _judged(found)
    return Examination(severity, verdict, figures, found.most_frequent, readings, found.words, texts)


def second_decoding(
    ids: Sequence[Sequence[int]], references: Sequence[str], tokenizers: Mapping[str, Tokens], written: Sequence[str]
) -> list[Redecoding]:
    """What WRA each way of reading the ids would give, the best above chance first; of equal ones the plainest."""
    found, wanted = [], Counter(references)
    ways = (True, False) if any(one < 3 for row in ids for one in row) else (True,)
    told, written = np.array(references, dtype=object), np.array(written, dtype=object)
    for name, tokenizer in tokenizers.items():
        for specials in ways:
            for offset in OFFSETS:
                texts = np.array(_texts(ids, tokenizer, offset, specials), dtype=object)
                chance = sum(wanted[text] * count for text, count in Counter(texts).items()) / len(told) ** 2
                right, same = float((texts == told).mean()), float((texts == written).mean())
                found.append(Redecoding(name, offset, specials, right, chance, same))
    return sorted(found, key=lambda one: (-round(one.gain, 9), abs(one.offset), not one.specials))


def most_frequent(references: Sequence[str], answers: Sequence[str], count: int = 10) -> pd.DataFrame:
    """The answers given most often, and the references that they stand for."""
    stands: dict[str, Counter] = defaultdict(Counter)
    for word, answer in zip(references, answers, strict=True):
        stands[answer][word] += 1
    rows = []
    for answer, words in sorted(stands.items(), key=lambda one: (-one[1].total(), one[0]))[:count]:
        named = ", ".join(f"{word} {times}" for word, times in words.most_common(4))
        more = f", {len(words) - 4} more" if len(words) > 4 else ""
        rows.append(
            {
                "answer": answer or "(nothing)",
                "times": words.total(),
                "share %": round(100 * words.total() / len(answers), 1),
                "references": len(words),
                "stands for": named + more,
            }
        )
    return pd.DataFrame(rows)


def _figures(told: list[str], said: list[str], vocabulary: set[str], training: set[str]) -> dict[str, float]:
    """What texts alone tell."""
    n, right = len(told), score(told, said, bootstrap=200)
    counts, wanted = Counter(said), Counter(told)
    written = [word for text in said for word in text.split()]
    known = {word for text in [*told, *vocabulary] for word in text.split()}
    learnt = {word for text in training for word in text.split()}
    same, any_same = consistency(told, said)
    like, like_by_chance = letter_similarity(told, said)
    wrong = [(a, b) for a, b in zip(told, said, strict=True) if a != b]
    unseen = [a == b for a, b in zip(told, said, strict=True) if a not in training] if training else []
    seen = [a == b for a, b in zip(told, said, strict=True) if a in training] if training else []
    return {
        "n": n,
        "wra": right.wra,
        "wra_by_chance": sum(wanted[text] * count for text, count in counts.items()) / n**2,
        "wer": right.wer,
        "cer": right.cer,
        "substitutions": right.substitutions,
        "deletions": right.deletions,
        "insertions": right.insertions,
        "references": len(wanted),
        "distinct_texts": len(counts),
        "effective_answers": effective_number(said),  # as many equally common answers
        "effective_references": effective_number(told),
        "most_frequent": max(counts.values()) / n,
        "empty": counts[""] / n,
        "repetition": loops([text.split() for text in said]),
        "words_per_reference": len(written) / sum(len(text.split()) for text in told),
        "vocabulary_words": _share([word in known for word in written]),
        "training_words": _share([word in learnt for word in written]) if learnt else math.nan,
        "wra_seen": _share(seen),
        "wra_unseen": _share(unseen),
        "truncated": _share([bool(b) and a.startswith(b) for a, b in wrong]),
        "overlong": _share([b.startswith(a) for a, b in wrong]),
        "consistency": same,
        "consistency_by_chance": any_same,
        "letter_similarity": like,
        "letter_similarity_by_chance": like_by_chance,
        **shared_bits(told, said),
    }


def _of_ids(
    ids: list[list[int]], told: list[str], readings: Sequence[Redecoding], tokenizers: Mapping[str, Tokens]
) -> dict[str, float]:
    """What token ids tell: beside those of the references where a tokenizer can write these."""
    found = {
        "distinct_tokens": len(set(map(tuple, ids))),
        "token_repetition": loops(ids),
        "special_ids": _share([one < 3 for row in ids for one in row]),
    }
    alike = max(readings, key=lambda one: (one.as_written, one.gain))  # the file's own way, or one that is its like
    name = readings[0].tokenizer if readings[0].gain > MIN_INFORMATION else alike.tokenizer
    spelt = {text: _written(text, tokenizers[name]) for text in set(told)}
    pairs = [(row, spelt[text]) for row, text in zip(ids, told, strict=True) if spelt[text]]
    if len(pairs) < len(ids) / 2:  # a tokenizer that cannot write the references is not theirs
        return found
    ids, wanted = (list(side) for side in zip(*pairs, strict=True))
    steps = offset_matches(ids, wanted)
    off = max((offset for offset in OFFSETS if offset), key=lambda offset: steps[offset])
    used, told_ids = (Counter(one for row in some for one in row) for some in (ids, wanted))
    later, sooner = position_matches(ids, wanted, 1), position_matches(ids, wanted, -1)
    return found | {
        "tokens_per_reference": sum(map(len, ids)) / max(1, sum(map(len, wanted))),
        "tokens_right": steps[0],
        "tokens_off_by_one": max(steps[1], steps[-1]),
        "tokens_off": steps[off],
        "off_by": off,
        "tokens_displaced": max(later, sooner),  # by one place
        "histogram": js_divergence(used, told_ids),
        "unknown_tokens": _share([one not in told_ids for row in ids for one in row]),  # in no reference
    }


def _compared_with_teachers(
    table: pd.DataFrame, ids: list[list[int]] | None, teachers: Mapping[str, Sequence[int]], tokens: Tokens
) -> dict[str, float]:
    """How alike answers are to what teachers wrote of the same utterances, above all where that is wrong."""
    there = table.utt_id.isin(set(teachers)).to_numpy()
    some = table[there]
    theirs = [list(teachers[name]) for name in some.utt_id]
    texts = np.array(tokens.decode_all(theirs), dtype=object)
    told, said = some.reference.to_numpy(object), some.hypothesis.to_numpy(object)
    found = {
        "agrees_with_teachers": _share(said == texts),
        "agrees_with_teachers_wrong": _share((said == texts)[texts != told]),
        "teachers_wra": _share(texts == told),
    }
    if ids:
        ours = Counter(one for row, used in zip(ids, there, strict=True) if used for one in row)
        found["histogram_of_teachers"] = js_divergence(ours, Counter(one for row in theirs for one in row))
    return found


def _by_frame(kept: Posteriors) -> dict[str, float]:
    """How blank and how sure the frames are."""
    blanks, doubts, sure = [], [], []
    for name in kept:
        logprobs = kept[name]
        if len(logprobs):
            blanks.append((logprobs.argmax(-1) == kept.blank).mean())
            doubts.append(entropy_bits(logprobs).mean())
            sure.append((np.exp(logprobs.max(-1)) > 0.9).mean())
    return {"blank_frames": _share(blanks), "entropy_bits": _share(doubts), "sure_frames": _share(sure)}


def _judged(found: Examination) -> tuple[str, str]:
    """The severity in a word, and the verdict in a sentence or two."""
    one, cure = found.figures, found.better_decoding
    sentences = found.words.reference.mean() > 1.5
    right = max(0.0, 1 - one["wer"]) if sentences else one["wra"]
    wra = f"WRA {100 * one['wra']:.1f} %" + (f", WER {100 * one['wer']:.1f} %" if sentences else "")
    alike = (
        f"two utterances of one word get the same answer in {100 * one['consistency']:.0f} % of the pairs, any two in "
        f"{100 * one['consistency_by_chance']:.1f} %"
    )
    if math.isnan(one["consistency"]):
        alike = "no reference comes twice"
    heard = (
        f"of {one['bits_of']:.1f} bits of what was said the answers hold {one['bits']:.1f} "
        f"({one['bits_by_chance']:.1f} by chance)"
    )
    if cure:
        own = next((other for other in found.redecodings if other.as_written > 0.99), None)
        was = f" (they were read with: {own})" if own and own != cure else ""
        return "wrong_decoding", (
            f"The answers are READ WRONGLY: the same token ids, decoded with {cure}{was}, give WRA "
            f"{100 * cure.wra:.1f} % instead of {100 * one['wra']:.1f} %. This is a fault of decoding, not of training."
        )
    if one["empty"] > 0.5:
        return "empty", f"SILENT: {100 * one['empty']:.0f} % of the answers are empty; {wra}."
    letters = (
        f"of the references' letters {100 * one['letter_similarity']:.0f} % are right, {100 * one['letter_similarity_by_chance']:.0f} % "
        "by chance"
    )
    measures = {
        heard: one["information"],
        alike: (one["consistency"] - one["consistency_by_chance"]) / max(1e-9, 1 - one["consistency_by_chance"]),
        letters: (one["letter_similarity"] - one["letter_similarity_by_chance"])
        / max(1e-9, 1 - one["letter_similarity_by_chance"]),
    }
    shows = "; ".join(text for text, value in measures.items() if value > MIN_INFORMATION) or heard
    if one["most_frequent"] > 0.5 and one["references"] > 3:
        top = found.most_frequent.iloc[0].answer
        return "constant", f"STUCK: {100 * one['most_frequent']:.0f} % of the answers are {top!r}; {wra}."
    if one["references"] > 3 and right < 0.1 and not any(value > MIN_INFORMATION for value in measures.values()):
        long = one["words_per_reference"]
        much = f" It writes {long:.0f} words for one." if long > 2 else ""
        again = " No other reading of its token ids is better." if found.redecodings else ""
        return (
            "input_independent",
            f"DEAF: the answers have nothing to do with what was said ({alike}); {wra}.{much}{again}",
        )
    if right < 0.05:
        return "consistently_wrong", f"CONSISTENTLY WRONG: {wra}, but it hears: {shows}."
    if right < 0.5:
        return "weak", f"WEAK: {wra}; it hears: {shows}."
    return "healthy", f"SOUND: {wra}; {shows}."


def _texts(ids: Sequence[Sequence[int]], tokenizer: Tokens, offset: int, specials: bool) -> list[str]:
    rows = list(dict.fromkeys(map(tuple, ids)))
    texts = tokenizer.decode_all([one + offset for one in row if specials or one > 2] for row in rows)
    known = dict(zip(rows, texts, strict=True))
    return [known[tuple(row)] for row in ids]


def _written(text: str, tokenizer: Tokens) -> list[int]:
    """The ids of a text; none where it cannot be written, as hyphens often cannot, or where its case is not known."""
    try:
        return [] if tokenizer.cased == "mixed" else tokenizer.encode(text)
    except UserError:
        return []


def _lengths(told: list[str], said: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"reference": [len(one.split()) for one in told], "words": [len(one.split()) for one in said]})


def _share(values: Sequence) -> float:
    return float(np.mean(values)) if len(values) else math.nan
