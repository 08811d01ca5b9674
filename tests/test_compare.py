"""Comparison of systems: on simulated ones whose difference is known, and on small ones by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from kdlib.errors import UserError
from kdlib.evaluate import compare


def system(right, seed=0, wrong="NO"):
    """A system of {speaker: [right or wrong, ...]}; every reference is the word YES."""
    rows = [
        (f"{speaker}_{index}", speaker, "YES", "YES" if one else wrong, seed)
        for speaker, some in right.items()
        for index, one in enumerate(some)
    ]
    return pd.DataFrame(rows, columns=["utt_id", "speaker", "reference", "hypothesis", "seed"])


def simulated(rng, speakers=5, words=200, gain=0.0, spread=0.0):
    """Two systems that get a word right with probabilities that differ by `gain`, more or less by speaker."""
    a, b, gains = {}, {}, []
    for index in range(speakers):
        own = gain + spread * rng.standard_normal()
        gains.append(own)
        easy = rng.beta(2, 2, words) * 0.6 + 0.1
        a[f"S{index}"] = rng.random(words) < np.clip(easy + own, 0, 1)
        b[f"S{index}"] = rng.random(words) < easy
    return system(a), system(b), gains


def test_mcnemar_and_the_flipped_signs_agree():
    """9 fixed and 2 broken of one speaker: twice the chance of 2 or fewer heads in 11 tosses."""
    a = system({"A": [1] * 9 + [0] * 2 + [1] * 30})
    b = system({"A": [0] * 9 + [1] * 2 + [1] * 30})
    (one,) = compare.compare({"a": a, "b": b}, against="b")
    expected = 2 * binom.cdf(2, 11, 0.5)
    assert one.mcnemar_p == pytest.approx(expected)
    assert one.p == pytest.approx(expected)
    assert (one.fixed, one.broken) == (9, 2)
    assert one.difference == pytest.approx(7 / 41)
    assert one.verdict == "no difference shown"
    assert "One speaker says nothing of new ones" in one.text


def test_a_clear_difference_is_better_one_way_and_worse_the_other():
    a, b = system({"A": [1] * 30, "B": [1] * 30}), system({"A": [0] * 20 + [1] * 10, "B": [0] * 22 + [1] * 8})
    forth, back = compare.compare({"a": a, "b": b})[0], compare.compare({"b": b, "a": a})[0]
    assert (forth.a, forth.verdict) == ("b", "worse")
    assert (back.a, back.verdict) == ("a", "better")
    assert back.difference == pytest.approx(0.7)
    assert back.new_speakers == "no difference shown"  # two speakers' signs cannot reach any small p
    assert back.least_p == 0.5
    assert "no less than 0.5 with 2" in back.text


@pytest.mark.parametrize(("speakers", "least"), [(4, 0.125), (6, 0.03125), (15, 2**-14)])
def test_the_smallest_p_that_speakers_can_reach(speakers, least):
    a = system({f"S{index}": [1] * 10 for index in range(speakers)})
    b = system({f"S{index}": [0] * (5 + index % 2) + [1] * (5 - index % 2) for index in range(speakers)})
    one = compare.compare({"a": a, "b": b}, against="b")[0]
    assert one.least_p == pytest.approx(least)
    assert one.speakers_p == pytest.approx(least)
    assert one.new_speakers == ("better" if least < 0.05 else "no difference shown")


def test_seeds_that_do_not_agree_show_no_difference():
    a = pd.concat([system({"A": [1] * 60 + [0] * 40}, seed=0), system({"A": [0] * 58 + [1] * 42}, seed=1)])
    b = system({"A": [0] * 60 + [1] * 1 + [0] * 39})
    one = compare.compare({"a": a, "b": b}, against="b")[0]
    assert one.seeds == 2
    assert one.agreeing_seeds == 2
    assert one.verdict == "better"
    worse = pd.concat([system({"A": [1] * 60 + [0] * 40}, seed=0), system({"A": [0] * 100}, seed=1)])
    other = compare.compare({"a": worse, "b": b}, against="b")[0]
    assert other.agreeing_seeds == 1
    assert other.verdict == "no difference shown"
    assert "1 of 2 seeds agree" in other.text


def test_systems_that_never_part_have_no_interval_of_zero_width():
    """300 pairs without one that parts rule out a share of 1.2 % and more: (1 - share) ** 300 = 2.5 %."""
    a = system({"A": [1] * 300})
    one = compare.compare({"a": a, "b": a}, against="b")[0]
    assert one.these_high == pytest.approx(1 - 0.025 ** (1 / 300))
    assert (one.difference, one.p, one.verdict) == (0.0, 1.0, "no difference shown")


def test_seven_microphones_are_one_utterance():
    """The original study's 1,785 predictions are 255 words: seven times as many would make intervals too narrow."""

    def heard(right):
        rows = [
            (f"M08_B3_CW{word}_M{mic}", "M08", "YES", "YES" if word < right else "NO", 0)
            for word in range(1, 41)
            for mic in range(2, 9)
        ]
        return pd.DataFrame(rows, columns=["utt_id", "speaker", "reference", "hypothesis", "seed"])

    one = compare.compare({"a": heard(29), "b": heard(21)}, against="b")[0]
    assert one.utterances == 40
    assert one.difference == pytest.approx(8 / 40)
    assert one.p == pytest.approx(2 * 0.5**8)  # eight words, not 56 recordings
    assert np.isnan(one.mcnemar_p)


def test_wer_counts_words_and_less_is_better():
    a, b = (
        pd.DataFrame(
            [(f"A_{i}", "A", "GO UP NOW", text, 0) for i in range(40)],
            columns=["utt_id", "speaker", "reference", "hypothesis", "seed"],
        )
        for text in ("GO UP NOW", "GO DOWN")
    )
    one = compare.compare({"a": a, "b": b}, against="b", measure="wer")[0]
    assert one.difference == pytest.approx(-2 / 3)
    assert one.verdict == "better"
    assert np.isnan(one.mcnemar_p)


def test_intervals_cover_the_truth_and_verdicts_seldom_err():
    """120 simulations of 5 speakers x 200 words: the standard error of a share of 5 % is 2 %; the bench has 500."""
    rng = np.random.default_rng(5)
    covered = false = 0
    for _ in range(120):
        a, b, gains = simulated(rng, gain=0.03, spread=0.02)
        one = compare.compare({"a": a, "b": b}, against="b")[0]
        covered += one.these_low <= np.mean(gains) <= one.these_high
        a, b, _ = simulated(rng)
        false += compare.compare({"a": a, "b": b}, against="b")[0].verdict != "no difference shown"
    assert 0.95 - 2 * 0.02 <= covered / 120 <= 0.95 + 2 * 0.02
    assert false / 120 <= 0.05 + 2 * 0.02


def test_what_is_not_comparable_is_refused():
    a, b = system({"A": [1, 0]}), system({"B": [1, 0]})
    with pytest.raises(UserError, match="no utterance in common: B_0 and A_0"):
        compare.compare({"a": a, "b": b})
    with pytest.raises(UserError, match="needs two systems"):
        compare.compare({"a": a})
    other = a.assign(reference="NO")
    with pytest.raises(UserError, match="other references for 2 utterances, first A_0: 'NO' and 'YES'"):
        compare.compare({"a": a, "b": other})
    with pytest.raises(UserError, match="every seed must have heard every utterance"):
        compare.compare({"a": pd.concat([a, a.iloc[:1].assign(seed=1)]), "b": a})
    with pytest.raises(UserError, match="unknown system 'c'"):
        compare.compare({"a": a, "b": a}, against="c")


def test_the_command(tmp_path, capsys):
    (tmp_path / "ref.txt").write_text("YES\n" * 40)
    (tmp_path / "a.txt").write_text("YES\n" * 40)
    (tmp_path / "b.txt").write_text("NO\n" * 20 + "YES\n" * 20)
    named = [f"{name}={tmp_path / name}.txt" for name in "ab"]
    compare.main([*named, "--against", "b", "--references", str(tmp_path / "ref.txt"), "--out", str(tmp_path / "out")])
    assert "a is better than b (WRA +50.0 points" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "out" / "verdicts.csv").verdict.tolist() == ["better"]
    with pytest.raises(UserError, match="expected NAME=PATH"):
        compare.main(["a", "b"])
