"""Statistics for `compare`: sign-flip test, Holm's correction, number of folds needed, variation between seeds.

The sign-flip test of paired differences assumes only that, under the null hypothesis, each sign is equally likely. For
differences of equal size it is the binomial test of their signs, which for right and wrong words is McNemar's test.
"""

import itertools
from collections.abc import Sequence

import numpy as np

LEVEL, POWER = 0.05, 0.8
FLIPS, AT_ONCE, EXACT = 10_000, 500, 15  # draws, draws per block, largest number of differences with all flips counted
MOST_FOLDS = 500


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of `ps`.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(ps, kind="stable")
    adjusted, highest = np.empty(len(ps)), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted.tolist()


def folds_needed(differences: np.ndarray, level: float = LEVEL) -> int | None:
    """Number of speakers like these for a power of 80 %, and enough for the sign-flip test to reach `level`."""
    from scipy.stats import nct
    from scipy.stats import t as student

    mean, spread = abs(differences.mean()), differences.std(ddof=1) if len(differences) > 1 else np.nan
    if not mean or not np.isfinite(spread):
        return None
    least = next(count for count in itertools.count(2) if 2.0 ** (1 - count) < level)
    least = max(least, len(differences) + 1)  # this many did not decide it
    if not spread:
        return least
    counts = np.arange(least, MOST_FOLDS + 1)
    noncentrality = mean / spread * np.sqrt(counts)
    power = nct.sf(student.ppf(1 - level / 2, counts - 1), counts - 1, noncentrality)
    enough = counts[np.nan_to_num(power, nan=1.0) >= POWER]  # not a number for large noncentrality
    return int(enough[0]) if len(enough) else None


def sign_flip_p(parts: np.ndarray, rng: np.random.Generator) -> float:
    """Two-sided p of the sign-flip test: how often random signs give a sum at least as far from zero."""
    parts = parts[parts != 0]
    if not len(parts):
        return 1.0
    total = abs(parts.sum()) - 1e-12
    if len(parts) <= EXACT:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(parts))))
        return float((np.abs(signs @ parts) >= total).mean())
    if np.allclose(np.abs(parts), np.abs(parts[0])):
        from scipy.stats import binomtest

        return float(binomtest(int((parts > 0).sum()), len(parts)).pvalue)
    beyond = 0
    for _ in range(FLIPS // AT_ONCE):
        signs = rng.integers(0, 2, (AT_ONCE, len(parts)), dtype=np.int8) * 2.0 - 1
        beyond += int((np.abs(signs @ parts) >= total).sum())
    return (1 + beyond) / (1 + FLIPS)


def sign_p(more: int, fewer: int) -> float:
    """Two-sided p of the sign test; of right and wrong words it is McNemar's exact test.

    >>> round(sign_p(9, 1), 4), sign_p(0, 0)
    (0.0215, 1.0)
    """
    from scipy.stats import binomtest

    return float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def training_p(differences: np.ndarray, least: float = 0.0) -> float:
    """Two-sided p of Student's t over the differences of several trainings; not a number with one.

    A difference may fail to replicate with other utterances or with another training: two seeds of one recipe differ.
    Their standard deviation is at least `least`, the share of one utterance: if two seeds have the same number of words
    right, not all trainings need to.
    """
    from scipy.stats import t as student

    if len(differences) < 2:
        return float("nan")
    if not differences.any():
        return 1.0
    spread = max(differences.std(ddof=1), least) / np.sqrt(len(differences))
    return float(2 * student.sf(abs(differences.mean()) / spread, len(differences) - 1))
