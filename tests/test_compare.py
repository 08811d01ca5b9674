"""Comparison of systems: simulated ones with a known difference, and small ones by hand."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from scipy.stats import t as student

from kdlib.__main__ import main
from kdlib.errors import UserError
from kdlib.evaluate import compare
from kdlib.show import format


def system(right, seed=0, wrong="NO"):
    """The table of a system from {speaker: [right or wrong, ...]}; every reference is the word YES."""
    rows = [
        (f"{speaker}_{index}", speaker, "YES", "YES" if correct else wrong, seed)
        for speaker, results in right.items()
        for index, correct in enumerate(results)
    ]
    return pd.DataFrame(rows, columns=["utt_id", "speaker", "reference", "hypothesis", "seed"])


def simulated(rng, speakers=5, words=200, gain=0.0, spread=0.0):
    """Two systems whose probabilities of a right word differ by `gain`, with a `spread` between speakers."""
    a, b, gains = {}, {}, []
    for index in range(speakers):
        speaker_gain = gain + spread * rng.standard_normal()
        gains.append(speaker_gain)
        easy = rng.beta(2, 2, words) * 0.6 + 0.1
        a[f"S{index}"] = rng.random(words) < np.clip(easy + speaker_gain, 0, 1)
        b[f"S{index}"] = rng.random(words) < easy
    return system(a), system(b), gains


def test_mcnemar_and_the_sign_flip_test_agree():
    """9 fixed and 2 broken for one speaker: twice the chance of 2 or fewer heads in 11 tosses."""
    a = system({"A": [1] * 9 + [0] * 2 + [1] * 30})
    b = system({"A": [0] * 9 + [1] * 2 + [1] * 30})
    (result,) = compare.compare({"a": a, "b": b}, against="b")
    expected = 2 * binom.cdf(2, 11, 0.5)
    assert result.mcnemar_p == pytest.approx(expected)
    assert result.p == pytest.approx(expected)
    assert (result.fixed, result.broken) == (9, 2)
    assert result.difference == pytest.approx(7 / 41)
    assert result.verdict == "no difference shown"
    assert "One speaker allows no inference to new speakers" in result.text


def repeated(seed, speakers=2, words=24, recordings=8):
    """Two models as good as each other, each of which knows other words, and so nearly all recordings of them."""
    rng, tables = np.random.default_rng(seed), {}
    for name in "ab":
        rows = []
        for speaker, word in np.ndindex(speakers, words):
            share = rng.choice([0.1, 0.9])
            rows += [
                (f"{speaker} {word} {k}", f"S{speaker}", f"W{word}", f"W{word}" if rng.random() < share else "NO", 0)
                for k in range(recordings)
            ]
        tables[name] = pd.DataFrame(rows, columns=["utt_id", "speaker", "reference", "hypothesis", "seed"])
    return tables


def test_many_recordings_of_a_word_are_no_independent_evidence():
    found = {unit: [compare.compare(repeated(k), unit=unit)[0] for k in range(30)] for unit in compare.UNITS}
    covered = {unit: sum(one.these_low <= 0 <= one.these_high for one in some) for unit, some in found.items()}
    assert covered["word"] >= 26
    assert covered["utterance"] < covered["word"] - 5
    for one, other in zip(*found.values(), strict=True):
        assert one.difference == pytest.approx(other.difference)
    assert found["word"][0].utterances == 48
    with pytest.raises(UserError, match="unit: expected one of utterance, word, found 'sentence'"):
        compare.compare(repeated(0), unit="sentence")


def test_a_clear_difference_is_better_in_one_direction_and_worse_in_the_other():
    a, b = system({"A": [1] * 30, "B": [1] * 30}), system({"A": [0] * 20 + [1] * 10, "B": [0] * 22 + [1] * 8})
    forth, back = compare.compare({"a": a, "b": b})[0], compare.compare({"b": b, "a": a})[0]
    assert (forth.a, forth.verdict) == ("b", "worse")
    assert (back.a, back.verdict) == ("a", "better")
    assert back.difference == pytest.approx(0.7)
    assert back.new_speakers == "no difference shown"  # the sign-flip test over two speakers cannot reach a small p
    assert back.least_p == 0.5
    assert "no less than 0.5 with 2" in back.text


@pytest.mark.parametrize(("speakers", "least"), [(4, 0.125), (6, 0.03125), (15, 2**-14)])
def test_the_smallest_p_depends_on_the_number_of_speakers(speakers, least):
    a = system({f"S{index}": [1] * 10 for index in range(speakers)})
    b = system({f"S{index}": [0] * (5 + index % 2) + [1] * (5 - index % 2) for index in range(speakers)})
    result = compare.compare({"a": a, "b": b}, against="b")[0]
    assert result.least_p == pytest.approx(least)
    assert result.speakers_p == pytest.approx(least)
    assert result.new_speakers == ("better" if least < 0.05 else "no difference shown")
    assert result.folds_needed is None or result.folds_needed > speakers


def seeds(*right):
    return pd.concat([system({"A": results}, seed=index) for index, results in enumerate(right)])


def test_a_difference_must_exceed_the_variation_between_seeds():
    """Seeds that gain 60 and 59 points show a difference, seeds that gain 60 and 1 do not; t, one degree of freedom.

    The standard deviation between seeds is at least one utterance of the 100.
    """
    b = system({"A": [0] * 100})
    similar = compare.compare({"a": seeds([1] * 60 + [0] * 40, [1] * 59 + [0] * 41), "b": b}, against="b")[0]
    assert (similar.seeds, similar.agreeing_seeds, similar.verdict) == (2, 2, "better")
    assert similar.seeds_p == pytest.approx(2 * student.sf(59.5 / 2**-0.5, 1))
    different = compare.compare({"a": seeds([1] * 60 + [0] * 40, [1] + [0] * 99), "b": b}, against="b")[0]
    assert different.holm_p < 0.001
    assert (different.agreeing_seeds, different.verdict) == (2, "no difference shown")
    assert f"p = {different.seeds_p:.2g} for another training" in different.text
    equal = compare.compare({"a": seeds([1] * 30 + [0] * 70, [1] * 30 + [0] * 70), "b": b}, against="b")[0]
    assert equal.seeds_p == pytest.approx(2 * student.sf(30 / 2**-0.5, 1))  # and not 0


def test_a_verdict_against_its_interval_says_why():
    """Intervals are of one pair of models as trained; a verdict asks for other trainings too, and counts pairs."""
    b = system({"A": [0] * 100})
    seed_noise = compare.compare({"a": seeds([1] * 60 + [0] * 40, [1] + [0] * 99), "b": b}, against="b")[0]
    assert seed_noise.these_low > 0
    assert seed_noise.verdict == "no difference shown"
    assert "Although the interval leaves out 0, another training alone could give such a difference." in seed_noise.text
    table = format.verdict_table([seed_noise])
    assert table.verdict[0] == "no difference shown: another training alone could give such a difference"
    # 7 fixed and none broken: p = 2 / 2**7 = .016, and .064 as the least of four pairs
    fixed = {name: system({"A": [1] * 7 + [0] * 93}) for name in ("a", "c", "d", "e")}
    many = compare.compare(fixed | {"b": b}, against="b")[0]
    assert (many.p, many.holm_p) == (pytest.approx(2 / 2**7), pytest.approx(8 / 2**7))
    assert many.these_low > 0
    assert "in so many comparisons chance could give such a difference" in many.text
    # 5 fixed: p = 2 / 2**5 = .0625 alone
    barely = compare.compare({"a": system({"A": [1] * 5 + [0] * 95}), "b": b}, against="b")[0]
    assert (barely.p, barely.these_low > 0) == (pytest.approx(2 / 2**5), True)
    assert "the test does not exclude chance, but barely" in barely.text
    alike = replace(barely, these_low=-0.001, p=0.04, holm_p=0.04, verdict="better")
    assert "Although the interval includes 0, the test excludes chance, but barely." in alike.text
    for agreeing in (replace(barely, these_low=-0.001), replace(barely, p=0.01, holm_p=0.01, verdict="better")):
        assert agreeing.caveat == ""
        assert "Although" not in agreeing.text


def test_systems_may_have_unequal_numbers_of_seeds():
    """Two seeds against three, and three against two."""
    good = [[1] * 90 + [0] * 10, [1] * 91 + [0] * 9, [1] * 92 + [0] * 8]
    bad = [[0] * 100, [1] + [0] * 99, [0] * 100]
    for many, few in ((good, bad[:2]), (good[:2], bad)):
        result = compare.compare({"a": seeds(*many), "b": seeds(*few)}, against="b")[0]
        assert (result.seeds, result.agreeing_seeds, result.verdict) == (3, 3, "better")
        back = compare.compare({"a": seeds(*few), "b": seeds(*many)}, against="b")[0]
        assert (back.seeds, back.verdict) == (3, "worse")


def test_speakers_missing_in_one_file_are_taken_from_the_other():
    a, b = system({"A": [1] * 10, "B": [0, 1] * 5}), system({"A": [0] * 10, "B": [0] * 10})
    for left, right in ((a, b.assign(speaker="")), (a.assign(speaker=""), b)):
        assert compare.compare({"a": left, "b": right}, against="b")[0].speakers == 2
    with pytest.raises(UserError, match="different speakers for 10 utterances, first A_0: 'A' and 'C'"):
        compare.compare({"a": a, "b": b.assign(speaker=b.speaker.replace("A", "C"))}, against="b")


def test_one_id_must_have_one_reference(tmp_path):
    """Two files with the same names and different words are from two speakers, not from two seeds."""
    for speaker, word in (("F01", "UP"), ("M01", "DOWN")):
        line = {"audio_filepath": "0001.wav", "text": word, "pred_text": word}
        (tmp_path / f"{speaker}.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"0001.wav has more than one reference, 'UP' and 'DOWN'"):
        compare.collect([tmp_path / "F01.jsonl", tmp_path / "M01.jsonl"])


def test_homophones_count_as_correct_on_request(tmp_path):
    (tmp_path / "ref.txt").write_text("TWO\nONE\n")
    (tmp_path / "hyp.txt").write_text("TO\nONE\n")
    for normaliser, same in (("none", 1), ("homophones", 2)):
        table = compare.collect([tmp_path / "hyp.txt"], references=tmp_path / "ref.txt", normaliser=normaliser)
        assert (table.reference == table.hypothesis).sum() == same


def test_equal_speakers_give_no_interval_for_new_speakers():
    a, b = ({name: [right] * 5 + [0] * 5 for name in "ABC"} for right in (1, 0))
    result = compare.compare({"a": system(a), "b": system(b)}, against="b")[0]
    assert np.isnan(result.new_low)
    assert np.isnan(result.new_high)
    assert result.new_speakers == "no difference shown"


def test_two_speakers_who_differ_leave_no_impossible_interval():
    a, b = system({"A": [1] * 4, "B": [0, 0, 1, 1]}), system({"A": [0] * 4, "B": [0, 0, 1, 1]})
    (result,) = compare.compare({"a": a, "b": b}, against="b")
    assert (result.new_low, result.new_high) == (-1.0, 1.0)


def test_identical_systems_have_an_interval_wider_than_zero():
    """300 equal pairs rule out a share of 1.2 % and more: (1 - share) ** 300 = 2.5 %."""
    a = system({"A": [1] * 300})
    result = compare.compare({"a": a, "b": a}, against="b")[0]
    assert result.these_high == pytest.approx(1 - 0.025 ** (1 / 300))
    assert (result.difference, result.p, result.verdict) == (0.0, 1.0, "no difference shown")


def test_recordings_by_seven_microphones_are_one_utterance():
    """The original study's 1,785 predictions are 255 words: seven times as many would make intervals too narrow."""

    def recorded(right):
        rows = [
            (f"M08_B3_CW{word}_M{mic}", "M08", "YES", "YES" if word < right else "NO", 0)
            for word in range(1, 41)
            for mic in range(2, 9)
        ]
        return pd.DataFrame(rows, columns=["utt_id", "speaker", "reference", "hypothesis", "seed"])

    result = compare.compare({"a": recorded(29), "b": recorded(21)}, against="b")[0]
    assert result.utterances == 40
    assert result.difference == pytest.approx(8 / 40)
    assert result.p == pytest.approx(2 * 0.5**8)  # eight words, not 56 recordings
    assert np.isnan(result.mcnemar_p)


def test_wer_counts_words_and_lower_is_better():
    a, b = (
        pd.DataFrame(
            [(f"A_{i}", "A", "GO UP NOW", text, 0) for i in range(40)],
            columns=["utt_id", "speaker", "reference", "hypothesis", "seed"],
        )
        for text in ("GO UP NOW", "GO DOWN")
    )
    result = compare.compare({"a": a, "b": b}, against="b", measure="wer")[0]
    assert result.difference == pytest.approx(-2 / 3)
    assert result.verdict == "better"
    assert np.isnan(result.mcnemar_p)


def test_intervals_cover_the_true_difference_and_false_verdicts_are_rare():
    """120 simulations of 5 speakers x 200 words: the standard error of a share of 5 % is 2 %; the benchmark has 500."""
    rng = np.random.default_rng(5)
    covered = false = 0
    for _ in range(120):
        a, b, gains = simulated(rng, gain=0.03, spread=0.02)
        result = compare.compare({"a": a, "b": b}, against="b")[0]
        covered += result.these_low <= np.mean(gains) <= result.these_high
        a, b, _ = simulated(rng)
        false += compare.compare({"a": a, "b": b}, against="b")[0].verdict != "no difference shown"
    assert 0.95 - 2 * 0.02 <= covered / 120 <= 0.95 + 2 * 0.02
    assert false / 120 <= 0.05 + 2 * 0.02


def test_systems_that_cannot_be_compared_are_refused():
    a, b = system({"A": [1, 0]}), system({"B": [1, 0]})
    with pytest.raises(UserError, match="no utterance in common; their ids are like B_0 and A_0"):
        compare.compare({"a": a, "b": b})
    with pytest.raises(UserError, match="needs two systems"):
        compare.compare({"a": a})
    changed = a.assign(reference="NO")
    with pytest.raises(UserError, match="different references for 2 utterances, first A_0: 'NO' and 'YES'"):
        compare.compare({"a": a, "b": changed})
    with pytest.raises(UserError, match="every seed must have a hypothesis for every utterance"):
        compare.compare({"a": pd.concat([a, a.iloc[:1].assign(seed=1)]), "b": a})
    with pytest.raises(UserError, match="unknown system 'c'"):
        compare.compare({"a": a, "b": a}, against="c")


def test_the_command_prints_and_writes_the_verdict(tmp_path, capsys):
    (tmp_path / "ref.txt").write_text("YES\n" * 40)
    (tmp_path / "a.txt").write_text("YES\n" * 40)
    (tmp_path / "b.txt").write_text("NO\n" * 20 + "YES\n" * 20)
    systems = [f"{name}={tmp_path / name}.txt" for name in "ab"]
    options = ["--against", "b", "--references", str(tmp_path / "ref.txt"), "--out", str(tmp_path / "out")]
    assert main(["verdict", *systems, *options]) == 0
    assert "a is better than b (WRA +50.0 points" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "out" / "verdicts.csv").verdict.tolist() == ["better"]
    assert main(["verdict", "a", "b"]) == 1
    assert "expected NAME=PATH, or a folder with a folder for each system, found 'a'" in capsys.readouterr().err
