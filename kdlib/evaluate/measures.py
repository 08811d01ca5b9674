"""Measures of hypotheses against references: information, consistency, similarity, loops, offsets, histograms."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein

OFFSETS = range(-3, 4)
SHUFFLES = 20  # of the hypotheses, to estimate the chance level


def shared_bits(references: Sequence[str], hypotheses: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Mutual information of references and hypotheses in bits, its chance level, and the entropy of the references.

    If all hypotheses differ, each identifies its utterance: only what lies above shuffled hypotheses counts.
    `information` is that, over its maximum (adjusted mutual information, Vinh et al. 2010, with chance by shuffling).
    """
    refs, hyps = (pd.factorize(np.array(texts, dtype=object))[0] for texts in (references, hypotheses))
    rng = np.random.default_rng(seed)
    by_chance = float(np.mean([_mutual(refs, rng.permutation(hyps)) for _ in range(SHUFFLES)]))
    bits, entropy = _mutual(refs, hyps), _entropy(refs)
    most = (entropy + _entropy(hyps)) / 2 - by_chance
    return {
        "bits": bits,
        "bits_by_chance": by_chance,
        "bits_of": entropy,
        "information": max(0.0, (bits - by_chance) / most) if most > 1e-9 else 0.0,
    }


def consistency(references: Iterable[str], hypotheses: Iterable[str]) -> tuple[float, float]:
    """Share of pairs with equal hypotheses: pairs of utterances of one word, and all pairs of utterances.

    Empty hypotheses equal nothing: a system with empty output is not consistent.
    """
    by_word: dict[str, Counter] = defaultdict(Counter)
    for word, hypothesis in zip(references, hypotheses, strict=True):
        by_word[word][hypothesis] += 1
    pairs = sum(_pairs(counts.total()) for counts in by_word.values())
    same = sum(_equal_pairs(counts) for counts in by_word.values())
    pooled: Counter = Counter()
    for counts in by_word.values():
        pooled.update(counts)
    all_pairs = _pairs(pooled.total())
    return same / pairs if pairs else math.nan, _equal_pairs(pooled) / all_pairs if all_pairs else math.nan


def letter_similarity(references: Sequence[str], hypotheses: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """Mean over utterances of 1 - edits per letter; and the same against references of other utterances."""
    shuffled = np.random.default_rng(seed).permutation(len(references))
    return (
        float(np.mean([_similarity(ref, hyp) for ref, hyp in zip(references, hypotheses, strict=True)])),
        float(np.mean([_similarity(references[k], hyp) for k, hyp in zip(shuffled, hypotheses, strict=True)])),
    )


def loops(hypotheses: Sequence[Sequence], times: int = 3) -> float:
    """Share of hypotheses in which a run of tokens, or of words, repeats at least `times` times in a row."""

    def has_loop(units: Sequence) -> bool:
        for size in range(1, min(8, len(units) // times) + 1):
            equal = 0
            for place in range(size, len(units)):
                equal = equal + 1 if units[place] == units[place - size] else 0
                if equal == size * (times - 1):
                    return True
        return False

    known: dict[tuple, bool] = {}
    return float(np.mean([known.setdefault(key, has_loop(key)) for key in map(tuple, hypotheses)]))


def position_matches(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]], step: int) -> float:
    """Share of reference tokens that occur `step` positions later in the hypothesis."""
    hits = total = 0
    for hyp, ref in zip(hypotheses, references, strict=True):
        hits += sum(0 <= index + step < len(hyp) and hyp[index + step] == token for index, token in enumerate(ref))
        total += len(ref)
    return hits / max(1, total)


def offset_matches(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[int, float]:
    """By offset: share of reference tokens with the id plus this offset at their position in the hypothesis."""
    offsets: Counter[int] = Counter()
    for hyp, ref in zip(hypotheses, references, strict=True):
        offsets.update(a - b for a, b in zip(hyp, ref, strict=False))
    total = max(1, sum(map(len, references)))
    return {offset: offsets[offset] / total for offset in OFFSETS}


def js_divergence(p: Counter, q: Counter) -> float:
    """Jensen-Shannon divergence of two histograms in bits: 0 if equal, 1 if disjoint."""
    if not p or not q:
        return math.nan
    keys = sorted({*p, *q}, key=str)
    shares = np.array([[counts[key] for key in keys] for counts in (p, q)], float)
    shares /= shares.sum(1, keepdims=True)
    middle = shares.mean(0)
    return float((_entropies(middle[None]) - _entropies(shares).mean())[0])


def effective_number(texts: Sequence[str]) -> float:
    """Effective number of different texts: 2 to the power of their entropy (perplexity)."""
    return 2 ** _entropy(pd.factorize(np.array(texts, dtype=object))[0])


def _entropies(shares: np.ndarray) -> np.ndarray:
    return -(shares * np.log2(np.maximum(shares, 1e-300))).sum(-1)


def _entropy(codes: np.ndarray) -> float:
    return float(_entropies(np.bincount(codes) / len(codes)))


def _mutual(a: np.ndarray, b: np.ndarray) -> float:
    both = pd.factorize(a.astype(np.int64) * (int(b.max()) + 1) + b)[0]
    return _entropy(a) + _entropy(b) - _entropy(both)


def _pairs(total: int) -> int:
    return total * (total - 1) // 2


def _equal_pairs(counts: Counter) -> int:
    return sum(_pairs(count) for hypothesis, count in counts.items() if hypothesis)


def _similarity(reference: str, hypothesis: str) -> float:
    return max(0.0, 1 - Levenshtein.distance(reference, hypothesis) / max(1, len(reference)))
