"""Power before compute: what a plan promises holds in simulated studies."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from kdlib.errors import UserError
from kdlib.evaluate import power
from kdlib.evaluate.power import Plan, Power
from kdlib.show import power as shown_power

SMALL = Plan(folds=3, utterances=60, seeds=1)


def test_the_promise_of_80_percent_holds_in_200_other_studies():
    promised = power.power(SMALL, seed=1, studies=60).these
    assert 0.05 < promised < 0.3
    share, _ = power.shown(SMALL, promised, seed=2, studies=200)
    error = math.sqrt(0.8 * 0.2 * (1 / 60 + 1 / 200))  # of both estimates
    assert abs(share - 0.8) < 3 * error


def test_equal_systems_are_rarely_shown_to_differ():
    equal = replace(SMALL, of_speakers=0.0, of_seeds=0.0)
    assert power.shown(equal, 0.0, studies=100)[0] < 0.08  # one side of 5 %, and chance


def test_more_comparisons_need_a_larger_difference():
    difference = 0.12
    one, many = (power.shown(replace(SMALL, pairs=pairs), difference, studies=60)[0] for pairs in (1, 20))
    assert many < one


def test_few_folds_can_show_nothing_for_new_speakers():
    found = Power(replace(SMALL, folds=4, seeds=3), 0.08, None, 2.0**-3)
    assert found.text == (
        "4 folds of 60 utterances and 3 seeds: a difference of 8.0 points is shown for these speakers with 80 % power. "
        "For new speakers nothing can be shown: 4 folds cannot go below p = 0.125."
    )
    assert "no difference below 50 points" in Power(SMALL, None, None, 0.01).text


def test_a_simulated_study_has_its_difference():
    plan = Plan(folds=2, utterances=4000, seeds=2, of_speakers=0.0, of_seeds=0.0, accuracy=(0.5, 0.8))
    tables = power.simulate(plan, 0.1, power.np.random.default_rng(0))
    right = {name: (table.reference == table.hypothesis).mean() for name, table in tables.items()}
    assert right["b"] == pytest.approx(0.65, abs=0.001)
    assert right["a"] - right["b"] == pytest.approx(0.1, abs=0.01)
    differs = (tables["a"].hypothesis != tables["b"].hypothesis).mean()
    assert differs == pytest.approx(plan.differing, abs=0.02)


def test_spreads_are_estimated_from_results():
    true = Plan(folds=12, utterances=400, seeds=4, of_speakers=0.08, of_seeds=0.04, accuracy=(0.6,))
    systems = power.simulate(true, 0.05, power.np.random.default_rng(3))
    found = power.spreads(systems, {"a": "b"}, SMALL)
    assert found.accuracy == pytest.approx([0.6] * 12, abs=0.001)
    assert found.of_speakers == pytest.approx(0.08, abs=0.035)
    assert found.of_seeds == pytest.approx(0.04, abs=0.012)
    assert (found.folds, found.utterances) == (3, 60)
    with pytest.raises(UserError, match="power: expected systems with controls, found none"):
        power.spreads(systems, {"b": "b"}, SMALL)


def test_recordings_of_a_word_count_as_few():
    """Eight copies of each utterance of a word decide no more than one; eight different utterances count as eight."""
    systems = power.simulate(replace(SMALL, utterances=200), 0.05, power.np.random.default_rng(3))
    words = {name: table.assign(reference=table.utt_id.str.split("_").str[1]) for name, table in systems.items()}
    for name, table in words.items():
        right = systems[name].hypothesis == "WORD"
        words[name] = table.assign(hypothesis=power.np.where(right, table.reference, "OTHER"))
    copies = {
        name: pd.concat([table.assign(utt_id=table.utt_id + f"_{copy}") for copy in range(8)])
        for name, table in words.items()
    }
    assert power.spreads(words, {"a": "b"}, SMALL, "word").alike == pytest.approx(1, abs=1e-9)
    found = power.spreads(copies, {"a": "b"}, SMALL, "word")
    assert found.alike == pytest.approx(8, rel=0.01)
    assert power.spreads(copies, {"a": "b"}, SMALL).alike == 1
    plan = replace(found, utterances=1600, alike=8.0)
    assert plan.independent == 200
    assert "1600 utterances (as many as 200 of different words)" in Power(plan, 0.1, None, 0.1).text


def test_what_all_trainings_share_is_no_spread_between_them():
    """Words that every training of a system knows vary its mean difference, and not its difference between seeds."""
    true = Plan(folds=40, utterances=200, seeds=4, of_speakers=0.0, of_seeds=0.04, accuracy=(0.6,), shared=0.8)
    systems = power.simulate(true, 0.05, power.np.random.default_rng(3))
    found = power.spreads(systems, {"a": "b"}, SMALL)
    assert found.shared == pytest.approx(0.8, abs=0.1)
    assert found.of_seeds == pytest.approx(0.04, abs=0.01)
    assert found.of_speakers == pytest.approx(0.0, abs=0.02)
    one = power.spreads({name: table[table.seed == 0] for name, table in systems.items()}, {"a": "b"}, SMALL)
    assert one.shared == SMALL.shared  # one training cannot tell


def test_a_system_under_two_names_tells_no_spread():
    systems = power.simulate(Plan(folds=4, utterances=200, seeds=2), 0.05, power.np.random.default_rng(3))
    found = power.spreads(systems | {"c": systems["b"]}, {"a": "b", "c": "b"}, SMALL, "utterance")
    alone = power.spreads(systems, {"a": "b"}, SMALL, "utterance")
    assert replace(found, accuracy=()) == replace(alone, accuracy=())


def test_the_command_prints_a_row_per_plan(monkeypatch, capsys):
    monkeypatch.setattr(power, "STUDIES", 5)
    monkeypatch.setattr(power, "power", lambda plan: Power(plan, 0.1, None, 2.0 ** (1 - plan.folds)))
    shown_power.run([2, 8], [1, 3], SMALL)
    printed = capsys.readouterr().out
    assert printed.count("a difference of 10.0 points is shown") == 4
    assert "Spreads (assumed): two systems differ on 15.0 % of the utterances" in printed
