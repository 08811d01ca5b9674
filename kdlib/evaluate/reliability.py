"""Reliability of posteriors: is the share of right words what the confidence says? Expected calibration error.

Bins have equal numbers of utterances (Nguyen & O'Connor 2015): with bins of equal width almost all utterances of a
confident system would lie in the last one. Utterances of equal confidence count as their mean, so that no result
depends on the order of the utterances.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from kdlib.errors import UserError

Z = 1.959964  # of a 95 % interval
DRAWS = 100  # of answers, to estimate the chance level
COLUMNS = ("bin", "n", "confidence", "accuracy", "low", "high")


def reliability(confidence: Sequence[float], correct: Sequence[bool], bins: int = 10) -> pd.DataFrame:
    """By bin, from the least confident: number, mean confidence, share of right words, its 95 % Wilson interval."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    if len(confidence) != len(correct):
        raise UserError(f"reliability: expected a confidence for each of {len(correct)} words, found {len(confidence)}")
    if not ((confidence >= 0) & (confidence <= 1 + 1e-9)).all():
        raise UserError("reliability: expected confidences between 0 and 1, found others; give posteriors, not scores")
    _, place, count = np.unique(confidence, return_inverse=True, return_counts=True)
    correct = (np.bincount(place, correct) / count)[place]
    rows = [
        (number, len(part), confidence[part].mean(), correct[part].mean(), *_wilson(correct[part].mean(), len(part)))
        for number, part in enumerate(np.array_split(np.argsort(confidence, kind="stable"), bins), start=1)
        if len(part)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def right_near(value: float, confidence: Sequence[float], correct: Sequence[bool], count: int = 30) -> tuple[int, int]:
    """Of the `count` words whose confidence is the nearest to a value: how many are right, and how many there are.

    >>> right_near(0.9, [0.1, 0.85, 0.92], [False, True, False], 2)
    (1, 2)
    """
    nearest = np.argsort(np.abs(np.asarray(confidence, float) - value), kind="stable")[:count]
    return int(np.asarray(correct)[nearest].sum()), len(nearest)


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool], bins: int = 10) -> float:
    """Mean distance of confidence and accuracy over equal-mass bins; not a number without utterances."""
    table = reliability(confidence, correct, bins)
    if table.empty:
        return float("nan")
    return float(np.average((table.accuracy - table.confidence).abs(), weights=table.n))


def error_by_chance(confidence: Sequence[float], bins: int = 10, seed: int = 0) -> float:
    """The mean error of perfectly calibrated answers of these confidences: few answers never have an error of 0."""
    rng, confidence = np.random.default_rng(seed), np.minimum(np.asarray(confidence, float), 1.0)
    draws = rng.random((DRAWS, len(confidence))) < confidence
    return float(np.mean([expected_calibration_error(confidence, correct, bins) for correct in draws]))


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share."""
    middle = share + Z**2 / (2 * count)
    half = Z * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return (middle - half) / (1 + Z**2 / count), (middle + half) / (1 + Z**2 / count)
