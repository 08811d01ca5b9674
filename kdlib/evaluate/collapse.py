"""The examination of a failure: what do a system's answers look like, what are they about, what else could they mean?

It needs no model: answers with their references, token ids where there are any, and tokenizers to decode these anew.
A system that recognises nothing may be deaf (its answers have nothing to do with what was said), may write one thing
over and over, or may hear well and be read wrongly: by ids one off, by another tokenizer, by an untrained head. The
second decoding tells the last from the rest: the ids are decoded again, shifted by -3 to 3, with every tokenizer at
hand, with and without special ids, and scored.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein

from kdlib.errors import UserError
from kdlib.evaluate.score import score
from kdlib.tokens import Tokens, normalise

CODE = ("evaluate/collapse.py", "evaluate/answers.py", "evaluate/score.py", "tokens.py")
OFFSETS = range(-3, 4)
SHUFFLES = 20  # of the answers, for what chance alone would give
HEARS = 0.1  # of what can be heard: a system below it on every measure is deaf


@dataclass(frozen=True)
class Reading:
    """The same ids, decoded in another way."""

    tokenizer: str
    offset: int  # added to every id
    specials: bool  # decoded as they are, or the ids 0, 1 and 2 left out first
    wra: float
    as_written: float  # the share of answers whose text in the file is this one

    def __str__(self) -> str:
        how = f"offset {self.offset:+d}" if self.offset else "no offset"
        return f"{how}, {self.tokenizer}" + ("" if self.specials else ", special ids left out")


@dataclass(frozen=True)
class Examination:
    """What was found: a severity and a verdict in words, and the figures that they rest on."""

    severity: str  # misread, silent, stuck, deaf, wrong, weak or sound
    verdict: str
    figures: dict[str, float]  # by name; not a number where it could not be asked
    commonest: pd.DataFrame  # answers, how often, and for which references they stand
    readings: list[Reading]  # the best first
    words: pd.DataFrame  # of each answer: how many words it has for how many of the reference
    texts: pd.DataFrame  # utt_id, reference, hypothesis as examined, and as read best

    @property
    def cure(self) -> Reading | None:
        """The other reading that recognises more than the file's own, if that is no chance."""
        if not self.readings:
            return None
        best, n = self.readings[0], self.figures["n"]
        chance = self.figures["wra_by_chance"]
        enough = self.figures["wra"] + max(5 / n, 0.02, chance + 4 * math.sqrt(chance / n))
        return best if best.wra > self.figures["wra"] and best.wra >= min(enough, 1.0) else None


def examine(
    table: pd.DataFrame,
    tokenizers: Mapping[str, Tokens] | None = None,
    *,
    vocabulary: Collection[str] = (),
    training: Collection[str] = (),
    teachers: Mapping[str, str] | None = None,
    posteriors: Path | None = None,
    blank: int = 2,
) -> Examination:
    """Examine answers as `answers.read(..., ids=True)` gives them.

    `tokenizers` decode the ids anew, the first being the system's own; `vocabulary` and `training` are texts that may
    be written, and that were trained on; `teachers` has what teachers wrote of utterances; `posteriors` is a file of
    log-probabilities by utterance.
    """
    tokenizers = dict(tokenizers or {})
    ids = [list(one) for one in table.token_ids] if "token_ids" in table and table.token_ids.notna().all() else None
    told = table.reference.tolist()
    if table.hypothesis.isna().any():
        if not tokenizers:
            raise UserError(
                "these answers have token ids and no text: name the sentencepiece model that they were written with "
                "(TOKENIZER=...)"
            )
        own = next(iter(tokenizers.values()))
        table = table.assign(hypothesis=[own.decode(one) for one in ids])
    said = table.hypothesis.tolist()
    figures = _figures(told, said, {normalise(one) for one in vocabulary}, {normalise(one) for one in training})
    readings = second_decoding(ids, told, tokenizers, said) if ids else []
    if ids:
        figures |= _of_ids(ids, told, readings, tokenizers)
    if teachers:
        figures |= _beside_teachers(table, teachers)
    if posteriors and posteriors.is_file():
        figures |= _by_frame(posteriors, blank)
    texts = table[["utt_id", "reference", "hypothesis"]].copy()
    found = Examination("", "", figures, commonest(told, said), readings, _lengths(told, said, ids), texts)
    if best := found.cure:
        texts["read anew"] = _texts(ids, tokenizers[best.tokenizer], best.offset, best.specials)
    severity, verdict = _judged(found)
    return Examination(severity, verdict, figures, found.commonest, readings, found.words, texts)


def second_decoding(
    ids: Sequence[Sequence[int]], references: Sequence[str], tokenizers: Mapping[str, Tokens], written: Sequence[str]
) -> list[Reading]:
    """What WRA each way of reading the ids would give, the best first; of equal ones the plainest."""
    found = []
    ways = (True, False) if any(one < 3 for row in ids for one in row) else (True,)
    told, written = np.array(references, dtype=object), np.array(written, dtype=object)
    for name, tokenizer in tokenizers.items():
        for specials in ways:
            for offset in OFFSETS:
                texts = np.array(_texts(ids, tokenizer, offset, specials), dtype=object)
                right, same = float((texts == told).mean()), float((texts == written).mean())
                found.append(Reading(name, offset, specials, right, same))
    return sorted(found, key=lambda one: (-one.wra, abs(one.offset), not one.specials))


def commonest(references: Sequence[str], answers: Sequence[str], count: int = 10) -> pd.DataFrame:
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


def shared_bits(references: Sequence[str], answers: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Mutual information of reference and answer in bits, what chance alone would give, and what there is to know.

    With as many different answers as utterances every answer tells its utterance: only what lies above shuffled
    answers counts. `hears` is that, over the most that it could be (adjusted mutual information, Vinh et al. 2010,
    with chance by shuffling).
    """
    told, heard = (pd.factorize(np.array(side, dtype=object))[0] for side in (references, answers))
    rng = np.random.default_rng(seed)
    by_chance = float(np.mean([_mutual(told, rng.permutation(heard)) for _ in range(SHUFFLES)]))
    bits, of = _mutual(told, heard), _entropy(told)
    most = (of + _entropy(heard)) / 2 - by_chance
    return {
        "bits": bits,
        "bits_by_chance": by_chance,
        "bits_of": of,
        "hears": max(0.0, (bits - by_chance) / most) if most > 1e-9 else 0.0,
    }


def consistency(references: Iterable[str], answers: Iterable[str]) -> tuple[float, float]:
    """How often two utterances of one word get the same answer, and how often any two utterances do.

    Empty answers are alike to nothing: a silent system is not consistent.
    """
    by_word: dict[str, Counter] = defaultdict(Counter)
    for word, answer in zip(references, answers, strict=True):
        by_word[word][answer] += 1
    pairs = sum(_pairs(given.total()) for given in by_word.values())
    same = sum(_alike(given) for given in by_word.values())
    together = sum(by_word.values(), Counter())
    any_pairs = _pairs(together.total())
    return same / pairs if pairs else math.nan, _alike(together) / any_pairs if any_pairs else math.nan


def likeness(references: Sequence[str], answers: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """1 - edits a letter, on average over utterances; and the same between answers and other utterances' references."""
    others = np.random.default_rng(seed).permutation(len(references))
    return (
        float(np.mean([_like(a, b) for a, b in zip(references, answers, strict=True)])),
        float(np.mean([_like(references[other], b) for other, b in zip(others, answers, strict=True)])),
    )


def loops(answers: Sequence[Sequence], times: int = 3) -> float:
    """The share of answers in which a run of tokens, or of words, comes at least so many times one after the other."""

    def looped(units: Sequence) -> bool:
        for size in range(1, min(8, len(units) // times) + 1):
            alike = 0
            for place in range(size, len(units)):
                alike = alike + 1 if units[place] == units[place - size] else 0
                if alike == size * (times - 1):
                    return True
        return False

    known: dict[tuple, bool] = {}
    return float(np.mean([known.setdefault(key, looped(key)) for key in map(tuple, answers)]))


def same_place(said: Sequence[Sequence[int]], told: Sequence[Sequence[int]], step: int) -> float:
    """The share of reference tokens that stand `step` places later in what was said."""
    hits = total = 0
    for one, other in zip(said, told, strict=True):
        hits += sum(0 <= index + step < len(one) and one[index + step] == token for index, token in enumerate(other))
        total += len(other)
    return hits / max(1, total)


def stepped(said: Sequence[Sequence[int]], told: Sequence[Sequence[int]]) -> dict[int, float]:
    """By offset: the share of reference tokens where that id, plus the offset, was said in its place."""
    steps: Counter[int] = Counter()
    for one, other in zip(said, told, strict=True):
        steps.update(a - b for a, b in zip(one, other, strict=False))
    total = max(1, sum(map(len, told)))
    return {offset: steps[offset] / total for offset in OFFSETS}


def divergence(one: Counter, other: Counter) -> float:
    """Jensen-Shannon divergence of two histograms in bits: 0 for the same, 1 for nothing in common."""
    if not one or not other:
        return math.nan
    keys = sorted({*one, *other}, key=str)
    shares = np.array([[some[key] for key in keys] for some in (one, other)], float)
    shares /= shares.sum(1, keepdims=True)
    middle = shares.mean(0)
    return float((_entropies(middle[None]) - _entropies(shares).mean())[0])


def _figures(told: list[str], said: list[str], vocabulary: set[str], training: set[str]) -> dict[str, float]:
    """What texts alone tell."""
    n, right = len(told), score(told, said, bootstrap=200)
    counts, wanted = Counter(said), Counter(told)
    written = [word for text in said for word in text.split()]
    known = {word for text in [*told, *vocabulary] for word in text.split()}
    learnt = {word for text in training for word in text.split()}
    same, any_same = consistency(told, said)
    like, like_by_chance = likeness(told, said)
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
        "spread": 2 ** _entropy(pd.factorize(np.array(said, dtype=object))[0]),  # as many equally common answers
        "spread_of_references": 2 ** _entropy(pd.factorize(np.array(told, dtype=object))[0]),
        "commonest": max(counts.values()) / n,
        "empty": counts[""] / n,
        "loops": loops([text.split() for text in said]),
        "words_per_reference": len(written) / sum(len(text.split()) for text in told),
        "vocabulary_words": _share([word in known for word in written]),
        "training_words": _share([word in learnt for word in written]) if learnt else math.nan,
        "wra_seen": _share(seen),
        "wra_unseen": _share(unseen),
        "cut_short": _share([bool(b) and a.startswith(b) for a, b in wrong]),
        "run_on": _share([b.startswith(a) for a, b in wrong]),
        "consistency": same,
        "consistency_by_chance": any_same,
        "likeness": like,
        "likeness_by_chance": like_by_chance,
        **shared_bits(told, said),
    }


def _of_ids(
    ids: list[list[int]], told: list[str], readings: Sequence[Reading], tokenizers: Mapping[str, Tokens]
) -> dict[str, float]:
    """What token ids tell: beside those of the references where a tokenizer can write these."""
    found = {
        "distinct_tokens": len(set(map(tuple, ids))),
        "token_loops": loops(ids),
        "special_ids": _share([one < 3 for row in ids for one in row]),
    }
    name = next(iter([*(one.tokenizer for one in readings[:1] if one.wra > 0), *tokenizers]))
    spelt = {text: _written(text, tokenizers[name]) for text in set(told)}
    pairs = [(row, spelt[text]) for row, text in zip(ids, told, strict=True) if spelt[text]]
    if len(pairs) < len(ids) / 2:  # a tokenizer that cannot write the references is not theirs
        return found
    ids, wanted = (list(side) for side in zip(*pairs, strict=True))
    steps = stepped(ids, wanted)
    off = max((offset for offset in OFFSETS if offset), key=lambda offset: steps[offset])
    used, told_ids = (Counter(one for row in some for one in row) for some in (ids, wanted))
    later, sooner = same_place(ids, wanted, 1), same_place(ids, wanted, -1)
    return found | {
        "tokens_per_reference": sum(map(len, ids)) / max(1, sum(map(len, wanted))),
        "tokens_right": steps[0],
        "tokens_off_by_one": max(steps[1], steps[-1]),
        "tokens_off": steps[off],
        "off_by": off,
        "tokens_displaced": max(later, sooner),  # by one place
        "histogram": divergence(used, told_ids),
        "strange_tokens": _share([one not in told_ids for row in ids for one in row]),  # in no reference
    }


def _beside_teachers(table: pd.DataFrame, teachers: Mapping[str, str]) -> dict[str, float]:
    """How alike answers are to what teachers wrote of the same utterances, above all where that is wrong."""
    rows = [
        (reference, answer, normalise(teachers[utt_id]))
        for utt_id, reference, answer in zip(table.utt_id, table.reference, table.hypothesis, strict=True)
        if utt_id in teachers
    ]
    wrong = [answer == text for reference, answer, text in rows if text != reference]
    theirs = Counter(word for _, _, text in rows for word in text.split())
    ours = Counter(word for _, answer, _ in rows for word in answer.split())
    return {
        "as_teachers": _share([answer == text for _, answer, text in rows]),
        "as_teachers_wrong": _share(wrong),
        "teachers_wra": _share([text == reference for reference, _, text in rows]),
        "histogram_of_teachers": divergence(ours, theirs),
    }


def _by_frame(path: Path, blank: int) -> dict[str, float]:
    """How blank and how sure the frames are, from log-probabilities by utterance."""
    blanks, entropies, sure = [], [], []
    with np.load(path) as kept:
        for name in kept.files:
            logprobs = kept[name].astype(np.float32)
            if len(logprobs):
                probs = np.exp(logprobs)
                blanks.append((logprobs.argmax(-1) == blank).mean())
                entropies.append(-(probs * np.maximum(logprobs, -60)).sum(-1).mean() / math.log(2))
                sure.append((probs.max(-1) > 0.9).mean())
    return {"blank_frames": _share(blanks), "entropy_bits": _share(entropies), "sure_frames": _share(sure)}


def _judged(found: Examination) -> tuple[str, str]:
    """The severity in a word, and the verdict in a sentence or two."""
    one, cure = found.figures, found.cure
    wra = f"WRA {100 * one['wra']:.1f} %"
    alike = (
        f"two utterances of one word get the same answer in {100 * one['consistency']:.0f} % of the pairs, any two in "
        f"{100 * one['consistency_by_chance']:.1f} %"
    )
    if math.isnan(one["consistency"]):
        alike = "no word comes twice"
    heard = (
        f"of {one['bits_of']:.1f} bits of what was said the answers hold {one['bits']:.1f} "
        f"({one['bits_by_chance']:.1f} by chance)"
    )
    if cure:
        own = next((other for other in found.readings if other.as_written > 0.99), None)
        was = f" (they were read with: {own})" if own and own != cure else ""
        return "misread", (
            f"The answers are READ WRONGLY: the same token ids, decoded with {cure}{was}, give WRA "
            f"{100 * cure.wra:.1f} % instead of {100 * one['wra']:.1f} %. This is a fault of decoding, not of training."
        )
    if one["empty"] > 0.5:
        return "silent", f"SILENT: {100 * one['empty']:.0f} % of the answers are empty; {wra}."
    measures = [
        one["hears"],
        (one["consistency"] - one["consistency_by_chance"]) / max(1e-9, 1 - one["consistency_by_chance"]),
        (one["likeness"] - one["likeness_by_chance"]) / max(1e-9, 1 - one["likeness_by_chance"]),
    ]
    if one["commonest"] > 0.5 and one["references"] > 3:
        top = found.commonest.iloc[0].answer
        return "stuck", f"STUCK: {100 * one['commonest']:.0f} % of the answers are {top!r}; {wra}."
    if one["references"] > 3 and one["wra"] < 0.1 and not any(value > HEARS for value in measures):
        long = one["words_per_reference"]
        much = f" It writes {long:.0f} words for one." if long > 2 else ""
        again = " No other reading of its token ids is better." if found.readings else ""
        return "deaf", f"DEAF: the answers have nothing to do with what was said ({alike}); {wra}.{much}{again}"
    if one["wra"] < 0.05:
        return "wrong", f"CONSISTENTLY WRONG: {wra}, but it hears: {heard}; {alike}."
    if one["wra"] < 0.5:
        return "weak", f"WEAK: {wra}; it hears: {heard}; {alike}."
    return "sound", f"SOUND: {wra}; {heard}."


def _texts(ids: Sequence[Sequence[int]], tokenizer: Tokens, offset: int, specials: bool) -> list[str]:
    rows = list(dict.fromkeys(map(tuple, ids)))
    texts = tokenizer.decode_all([one + offset for one in row if specials or one > 2] for row in rows)
    known = dict(zip(rows, texts, strict=True))
    return [known[tuple(row)] for row in ids]


def _written(text: str, tokenizer: Tokens) -> list[int]:
    """The ids of a text; none where it cannot be written, as hyphens often cannot."""
    try:
        return tokenizer.encode(text)
    except UserError:
        return []


def _lengths(told: list[str], said: list[str], ids: list[list[int]] | None) -> pd.DataFrame:
    table = pd.DataFrame({"reference": [len(one.split()) for one in told], "words": [len(one.split()) for one in said]})
    return table.assign(tokens=[len(row) for row in ids] if ids else np.nan)


def _share(values: Sequence) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _entropies(shares: np.ndarray) -> np.ndarray:
    return -(shares * np.log2(np.maximum(shares, 1e-300))).sum(-1)


def _entropy(codes: np.ndarray) -> float:
    return float(_entropies(np.bincount(codes) / len(codes)))


def _mutual(one: np.ndarray, other: np.ndarray) -> float:
    both = pd.factorize(one.astype(np.int64) * (int(other.max()) + 1) + other)[0]
    return _entropy(one) + _entropy(other) - _entropy(both)


def _pairs(total: int) -> int:
    return total * (total - 1) // 2


def _alike(given: Counter) -> int:
    return sum(_pairs(count) for answer, count in given.items() if answer)


def _like(one: str, other: str) -> float:
    return max(0.0, 1 - Levenshtein.distance(one, other) / max(1, len(one)))
