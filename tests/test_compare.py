"""Comparison of systems: on simulated ones whose difference is known, and on small ones by hand."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from scipy.stats import t as student

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
    assert one.folds_needed is None or one.folds_needed > speakers


def seeds(*right):
    return pd.concat([system({"A": one}, seed=index) for index, one in enumerate(right)])


def test_a_difference_must_stand_out_from_how_much_seeds_differ():
    """Against the same system: 60 and 59 points more is one thing, 60 and 1 another; t with one degree of freedom.

    Seeds are not taken to differ by less than one utterance in the 100.
    """
    b = system({"A": [0] * 100})
    alike = compare.compare({"a": seeds([1] * 60 + [0] * 40, [1] * 59 + [0] * 41), "b": b}, against="b")[0]
    assert (alike.seeds, alike.agreeing_seeds, alike.verdict) == (2, 2, "better")
    assert alike.seeds_p == pytest.approx(2 * student.sf(59.5 / 2**-0.5, 1))
    apart = compare.compare({"a": seeds([1] * 60 + [0] * 40, [1] + [0] * 99), "b": b}, against="b")[0]
    assert apart.holm_p < 0.001
    assert (apart.agreeing_seeds, apart.verdict) == (2, "no difference shown")
    assert f"p = {apart.seeds_p:.2g} for another training" in apart.text
    equal = compare.compare({"a": seeds([1] * 30 + [0] * 70, [1] * 30 + [0] * 70), "b": b}, against="b")[0]
    assert equal.seeds_p == pytest.approx(2 * student.sf(30 / 2**-0.5, 1))  # and not 0


def test_systems_of_unequal_numbers_of_seeds():
    """Two against three, whichever comes first."""
    good = [[1] * 90 + [0] * 10, [1] * 91 + [0] * 9, [1] * 92 + [0] * 8]
    bad = [[0] * 100, [1] + [0] * 99, [0] * 100]
    for many, few in ((good, bad[:2]), (good[:2], bad)):
        one = compare.compare({"a": seeds(*many), "b": seeds(*few)}, against="b")[0]
        assert (one.seeds, one.agreeing_seeds, one.verdict) == (3, 3, "better")
        back = compare.compare({"a": seeds(*few), "b": seeds(*many)}, against="b")[0]
        assert (back.seeds, back.verdict) == (3, "worse")


def test_speakers_that_one_file_does_not_know_are_the_others():
    a, b = system({"A": [1] * 10, "B": [0, 1] * 5}), system({"A": [0] * 10, "B": [0] * 10})
    for left, right in ((a, b.assign(speaker="")), (a.assign(speaker=""), b)):
        assert compare.compare({"a": left, "b": right}, against="b")[0].speakers == 2
    with pytest.raises(UserError, match="other speakers for 10 utterances, first A_0: 'A' and 'C'"):
        compare.compare({"a": a, "b": b.assign(speaker=b.speaker.replace("A", "C"))}, against="b")


def test_one_id_is_one_recording(tmp_path):
    """Two files with the same names and other words are two speakers', not two seeds."""
    for who, word in (("F01", "UP"), ("M01", "DOWN")):
        line = {"audio_filepath": "0001.wav", "text": word, "pred_text": word}
        (tmp_path / f"{who}.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"0001.wav has more than one reference, 'UP' and 'DOWN'"):
        compare.collect([tmp_path / "F01.jsonl", tmp_path / "M01.jsonl"])


def test_homophones_count_where_they_shall(tmp_path):
    (tmp_path / "ref.txt").write_text("TWO\nONE\n")
    (tmp_path / "hyp.txt").write_text("TO\nONE\n")
    known = {"references": tmp_path / "ref.txt"}
    for folded, same in ((False, 1), (True, 2)):
        table = compare.collect([tmp_path / "hyp.txt"], **known, fold_homophones=folded)
        assert (table.reference == table.hypothesis).sum() == same


def test_nothing_is_said_of_new_speakers_where_nothing_tells_how_they_differ():
    a, b = ({name: [right] * 5 + [0] * 5 for name in "ABC"} for right in (1, 0))
    one = compare.compare({"a": system(a), "b": system(b)}, against="b")[0]
    assert np.isnan(one.new_low)
    assert np.isnan(one.new_high)
    assert one.new_speakers == "no difference shown"


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
