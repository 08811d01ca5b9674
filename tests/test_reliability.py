"""Reliability tables and the expected calibration error against loops and simulations."""

import numpy as np
import pytest
from scipy.stats import binomtest

from kdlib.errors import UserError
from kdlib.evaluate.reliability import error_by_chance, expected_calibration_error, reliability


def by_loop(confidence, correct, bins):
    """The definition, one utterance at a time; confidences differ."""
    order = sorted(range(len(confidence)), key=lambda index: confidence[index])
    size, more = divmod(len(order), bins)
    total, first = 0.0, 0
    for number in range(bins):
        part = order[first : first + size + (number < more)]
        first += len(part)
        distance = sum(correct[index] for index in part) - sum(confidence[index] for index in part)
        total += abs(distance) / len(confidence)
    return total


@pytest.mark.parametrize("count", [10, 37, 500])
@pytest.mark.parametrize("bins", [1, 3, 10])
def test_it_is_the_mean_distance_over_bins_of_equal_size(count, bins):
    rng = np.random.default_rng(count + bins)
    confidence, correct = rng.random(count), rng.random(count) < 0.4
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(by_loop(confidence, correct, bins))
    sizes = reliability(confidence, correct, bins).n
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == count


def test_calibrated_answers_have_almost_no_error_and_overconfident_ones_their_excess():
    rng = np.random.default_rng(0)
    confidence = rng.beta(4, 1, 200_000)
    assert expected_calibration_error(confidence, rng.random(200_000) < confidence) < 0.005
    right = rng.random(200_000) < 0.8 * confidence
    assert expected_calibration_error(confidence, right) == pytest.approx(0.2 * confidence.mean(), abs=0.005)


def test_few_calibrated_answers_have_an_error_by_chance():
    """A bin of n answers of confidence c misses it by sqrt(2 c (1 - c) / (pi n)) on average: the mean of |normal|."""
    expected = np.sqrt(2 * 0.25 / (np.pi * 400))
    confidence = 0.5 + np.linspace(-1e-6, 1e-6, 4000)
    assert error_by_chance(confidence) == pytest.approx(expected, rel=0.1)
    assert error_by_chance(np.ones(50)) == 0
    assert error_by_chance(confidence[::100]) > 3 * error_by_chance(confidence)


def test_errors_in_opposite_directions_do_not_cancel_between_bins():
    confidence = np.r_[np.full(50, 0.2), np.full(50, 0.9)]
    correct = np.r_[np.ones(50), np.zeros(50)]
    assert expected_calibration_error(confidence, correct, 2) == pytest.approx((0.8 + 0.9) / 2)
    assert expected_calibration_error(confidence, correct, 1) == pytest.approx(abs(0.5 - 0.55))


def test_the_order_of_equally_confident_answers_does_not_matter():
    """Sorted by speaker, the wrong ones would fill bins of their own."""
    confidence, correct = np.ones(100), np.r_[np.ones(60), np.zeros(40)]
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.4)
    assert reliability(confidence, correct).accuracy.tolist() == pytest.approx([0.6] * 10)


def test_intervals_are_wilsons():
    table = reliability(np.linspace(0, 1, 40), np.arange(40) % 3 == 0, 4)
    for row in table.itertuples():
        expected = binomtest(round(row.accuracy * row.n), row.n).proportion_ci(method="wilson")
        assert (row.low, row.high) == pytest.approx((expected.low, expected.high))


def test_few_answers_have_fewer_bins_and_none_have_no_error():
    assert reliability([0.2, 0.9, 0.5], [0, 1, 1]).n.tolist() == [1, 1, 1]
    assert np.isnan(expected_calibration_error([], []))


@pytest.mark.parametrize(
    ("confidence", "message"), [([0.5, 1.2], "between 0 and 1"), ([-3.0, 0.5], "between 0 and 1"), ([0.5], "found 1")]
)
def test_scores_in_place_of_posteriors_are_refused(confidence, message):
    with pytest.raises(UserError, match=message):
        reliability(confidence, [True, False])
