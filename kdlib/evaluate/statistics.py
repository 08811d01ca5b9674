"""Tests and numbers that `compare` speaks of: flipped signs, Holm's correction, folds needed.

Flipping the signs of paired differences assumes only that, were there no difference, each might as well have been the
other way round; with equal ones it is the binomial test of their signs, which for right and wrong words is McNemar's.
"""

import itertools
from collections.abc import Sequence

import numpy as np

LEVEL, POWER = 0.05, 0.8
FLIPS, AT_ONCE, EXACT = 10_000, 500, 15  # draws, in how large parts; up to how many differences all are counted
MOST_FOLDS = 500


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(ps, kind="stable")
    found, highest = np.empty(len(ps)), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        found[index] = highest
    return found.tolist()


def folds_needed(differences: np.ndarray, level: float = LEVEL) -> int | None:
    """How many speakers would decide it, were these typical: a power of 80 %, and enough for the signs alone."""
    from scipy.stats import nct
    from scipy.stats import t as student

    mean, spread = abs(differences.mean()), differences.std(ddof=1) if len(differences) > 1 else np.nan
    if not mean or not np.isfinite(spread):
        return None
    least = next(count for count in itertools.count(2) if 2.0 ** (1 - count) < level)
    least = max(least, len(differences) + 1)  # so many have not decided it
    if not spread:
        return least
    counts = np.arange(least, MOST_FOLDS + 1)
    away = mean / spread * np.sqrt(counts)
    power = nct.sf(student.ppf(1 - level / 2, counts - 1), counts - 1, away)
    enough = counts[np.nan_to_num(power, nan=1.0) >= POWER]  # not a number where it is far away
    return int(enough[0]) if len(enough) else None


def sign_flip_p(parts: np.ndarray, rng: np.random.Generator) -> float:
    """Two-sided p that a sum of differences is as far from zero, were each as likely to be turned round."""
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


def training_p(differences: np.ndarray, least: float = 0.0) -> float:
    """Two-sided p of Student's t over the differences of several trainings; not a number with one.

    Other utterances are one reason why a difference might not come again, another training is another: two seeds
    of one recipe do differ. They are not taken to differ by less than `least`, what one utterance makes: that two have
    the same number of words right is no sign that all trainings would.
    """
    from scipy.stats import t as student

    if len(differences) < 2:
        return float("nan")
    if not differences.any():
        return 1.0
    spread = max(differences.std(ddof=1), least) / np.sqrt(len(differences))
    return float(2 * student.sf(abs(differences.mean()) / spread, len(differences) - 1))
