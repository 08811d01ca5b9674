"""What can be counted of answers beside their references: bits, consistency, likeness, loops, places, histograms."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein

OFFSETS = range(-3, 4)
SHUFFLES = 20  # of the answers, for what chance alone would give


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
        "information": max(0.0, (bits - by_chance) / most) if most > 1e-9 else 0.0,
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
    together: Counter = Counter()
    for given in by_word.values():
        together.update(given)
    any_pairs = _pairs(together.total())
    return same / pairs if pairs else math.nan, _alike(together) / any_pairs if any_pairs else math.nan


def letter_similarity(references: Sequence[str], answers: Sequence[str], seed: int = 0) -> tuple[float, float]:
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


def position_matches(said: Sequence[Sequence[int]], told: Sequence[Sequence[int]], step: int) -> float:
    """The share of reference tokens that stand `step` places later in what was said."""
    hits = total = 0
    for one, other in zip(said, told, strict=True):
        hits += sum(0 <= index + step < len(one) and one[index + step] == token for index, token in enumerate(other))
        total += len(other)
    return hits / max(1, total)


def offset_matches(said: Sequence[Sequence[int]], told: Sequence[Sequence[int]]) -> dict[int, float]:
    """By offset: the share of reference tokens where that id, plus the offset, was said in its place."""
    steps: Counter[int] = Counter()
    for one, other in zip(said, told, strict=True):
        steps.update(a - b for a, b in zip(one, other, strict=False))
    total = max(1, sum(map(len, told)))
    return {offset: steps[offset] / total for offset in OFFSETS}


def js_divergence(one: Counter, other: Counter) -> float:
    """Jensen-Shannon divergence of two histograms in bits: 0 for the same, 1 for nothing in common."""
    if not one or not other:
        return math.nan
    keys = sorted({*one, *other}, key=str)
    shares = np.array([[some[key] for key in keys] for some in (one, other)], float)
    shares /= shares.sum(1, keepdims=True)
    middle = shares.mean(0)
    return float((_entropies(middle[None]) - _entropies(shares).mean())[0])


def effective_number(texts: Sequence[str]) -> float:
    """How many equally common texts would be as spread as these: 2 to the power of their entropy."""
    return 2 ** _entropy(pd.factorize(np.array(texts, dtype=object))[0])


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
