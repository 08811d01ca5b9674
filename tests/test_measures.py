"""What is counted of answers, against its definition."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from kdlib.evaluate import measures

WORDS = "ONE TWO SEVEN NINE COME GO YALE CAN THE WATER OTHER PEOPLE ALPHA BRAVO SIERRA COMMAND DELETE ENTER"
WORDS = WORDS.split(" ")


def test_shared_bits_are_what_is_known_above_chance():
    told = WORDS * 20
    same = measures.shared_bits(told, told)
    assert same["bits"] == pytest.approx(math.log2(len(WORDS)))
    assert same["information"] == pytest.approx(1)
    rng = random.Random(4)
    assert measures.shared_bits(told, [rng.choice(WORDS) for _ in told])["information"] < 0.02
    assert (
        measures.shared_bits(told, [f"A{place}" for place in range(len(told))])["information"] < 1e-9
    )  # tells nothing
    assert measures.shared_bits(told, ["ONE"] * len(told))["bits"] == pytest.approx(0, abs=1e-9)


def test_consistency_counts_pairs():
    told = ["A", "A", "A", "B", "B", "C"]
    said = ["X", "X", "Y", "Y", "Y", "X"]
    pairs = list(itertools.combinations(range(6), 2))
    mine = [said[a] == said[b] for a, b in pairs if told[a] == told[b]]
    every = [said[a] == said[b] for a, b in pairs]
    assert measures.consistency(told, said) == pytest.approx((np.mean(mine), np.mean(every)))
    assert measures.consistency(["A", "A"], ["", ""]) == (0, 0)


def test_loops_steps_places_and_histograms():
    assert measures.loops([[1, 2, 1, 2, 1, 2], [1, 2, 3], [5, 5, 5], [5, 5], []]) == pytest.approx(2 / 5)
    assert measures.offset_matches([[4, 5], [9]], [[3, 5], [9, 9]])[1] == pytest.approx(1 / 4)
    assert measures.offset_matches([[4, 5], [9]], [[3, 5], [9, 9]])[0] == pytest.approx(2 / 4)
    assert measures.position_matches([[1, 2, 3]], [[2, 3, 4]], 1) == pytest.approx(2 / 3)
    one = Counter("aab")
    assert measures.js_divergence(one, one) == pytest.approx(0)
    assert measures.js_divergence(one, Counter("xyz")) == pytest.approx(1)
    assert math.isnan(measures.js_divergence(Counter(), one))
