"""Measures of hypotheses against their definitions."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from kdlib.evaluate import measures

WORDS = "ONE TWO SEVEN NINE COME GO YALE CAN THE WATER OTHER PEOPLE ALPHA BRAVO SIERRA COMMAND DELETE ENTER"
WORDS = WORDS.split(" ")


def test_shared_bits_are_the_information_above_chance():
    refs = WORDS * 20
    same = measures.shared_bits(refs, refs)
    assert same["bits"] == pytest.approx(math.log2(len(WORDS)))
    assert same["information"] == pytest.approx(1)
    rng = random.Random(4)
    assert measures.shared_bits(refs, [rng.choice(WORDS) for _ in refs])["information"] < 0.02
    unique = [f"A{index}" for index in range(len(refs))]  # all different: no information
    assert measures.shared_bits(refs, unique)["information"] < 1e-9
    assert measures.shared_bits(refs, ["ONE"] * len(refs))["bits"] == pytest.approx(0, abs=1e-9)


def test_consistency_counts_pairs():
    refs = ["A", "A", "A", "B", "B", "C"]
    hyps = ["X", "X", "Y", "Y", "Y", "X"]
    pairs = list(itertools.combinations(range(6), 2))
    same_word = [hyps[a] == hyps[b] for a, b in pairs if refs[a] == refs[b]]
    all_pairs = [hyps[a] == hyps[b] for a, b in pairs]
    assert measures.consistency(refs, hyps) == pytest.approx((np.mean(same_word), np.mean(all_pairs)))
    assert measures.consistency(["A", "A"], ["", ""]) == (0, 0)


def test_loops_offsets_positions_and_histograms():
    assert measures.loops([[1, 2, 1, 2, 1, 2], [1, 2, 3], [5, 5, 5], [5, 5], []]) == pytest.approx(2 / 5)
    assert measures.offset_matches([[4, 5], [9]], [[3, 5], [9, 9]])[1] == pytest.approx(1 / 4)
    assert measures.offset_matches([[4, 5], [9]], [[3, 5], [9, 9]])[0] == pytest.approx(2 / 4)
    assert measures.position_matches([[1, 2, 3]], [[2, 3, 4]], 1) == pytest.approx(2 / 3)
    counts = Counter("aab")
    assert measures.js_divergence(counts, counts) == pytest.approx(0)
    assert measures.js_divergence(counts, Counter("xyz")) == pytest.approx(1)
    assert math.isnan(measures.js_divergence(Counter(), counts))
