import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from kdlib.evaluate.statistics import folds_needed, holm, sign_flip_p


def test_holm_by_hand():
    assert holm([0.01, 0.02, 0.5]) == pytest.approx([0.03, 0.04, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_number_of_folds_grows_as_the_difference_shrinks():
    """Paired t-test, power of 80 %: a difference of one standard deviation needs 10 folds, of half of it, 34."""
    spread = np.array([-1.0, 1.0])
    spread = spread / spread.std(ddof=1)
    assert folds_needed(spread + 1.0) == 10
    assert folds_needed(spread + 0.5) == 34
    assert folds_needed(spread * 1e-9 + 1.0) == 6  # the sign-flip test of fewer than six cannot reach p < .05
    assert folds_needed(spread) is None
    many = np.tile(spread, 20) + 0.1
    assert folds_needed(many) > 40  # this many did not decide it
    assert folds_needed(np.array([1.0])) is None


def test_the_sign_flip_test_counts_all_flips_of_few_differences():
    """Of the 2 ** 5 sign flips of five differences, those whose sum is at least as far from zero."""
    parts = np.array([0.3, -0.1, 0.4, 0.2, 0.05])
    sums = [sum(s * p for s, p in zip(signs, parts, strict=True)) for signs in itertools.product((-1, 1), repeat=5)]
    expected = sum(abs(total) >= abs(parts.sum()) - 1e-12 for total in sums) / 32
    assert sign_flip_p(parts, np.random.default_rng(0)) == pytest.approx(expected)


def test_equal_differences_give_the_binomial_test():
    parts = np.array([1.0] * 30 + [-1.0] * 14 + [0.0] * 50)
    assert sign_flip_p(parts, np.random.default_rng(0)) == pytest.approx(binomtest(30, 44).pvalue)
    uneven = parts * np.where(np.arange(94) % 2, 1.0, 1.0001)  # drawn, not counted: close to it
    assert sign_flip_p(uneven, np.random.default_rng(0)) == pytest.approx(binomtest(30, 44).pvalue, abs=0.01)
    assert sign_flip_p(np.zeros(3), np.random.default_rng(0)) == 1.0
