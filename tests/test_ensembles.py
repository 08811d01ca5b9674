"""Ensembles of the smoke recipe's students, and students that teach the next."""

import json

import pandas as pd
import pytest
from safetensors.torch import load_file

from kdlib.distill import ensembles, ingredients, results, students
from kdlib.errors import UserError
from kdlib.params import load, root
from kdlib.stage import read_json
from kdlib.teachers import adapt, targets


@pytest.fixture(scope="module")
def variant(taught, outputs):
    def named(which, **overrides):
        always = {"outputs": str(outputs), "student": {"keep": 2, "looks": 2}}
        always["ensembles"] = {
            "two": {"of": ["hard"], "seeds": [1, 2]},
            "soup": {"of": ["hard"], "seeds": [1, 2], "average": "weights"},
            "looks": {"of": ["hard"], "seeds": [1], "average": "weights", "checkpoints": 2},
            "three": {"of": ["hard"], "seeds": [1, 2, 7]},
        }
        return load("params/smoke.yaml", "M08", overrides=always | overrides, variant=which)

    return named


@pytest.fixture(scope="module")
def hard(variant):
    for seed in (1, 2):
        students.scored(variant("hard"), seed)
    return variant("hard")


def test_the_best_looks_are_kept(hard):
    folder = ingredients.place(hard, 1)
    record = read_json(folder / "model.json")
    assert [one["dev_score"] for one in record["looks"]] == sorted(
        (o["dev_score"] for o in record["looks"]), reverse=True
    )
    best, first, second = (
        load_file(folder / name) for name in ("model.safetensors", "look1.safetensors", "look2.safetensors")
    )
    assert all((first[name] == weight).all() for name, weight in best.items())
    assert any((second[name] != weight).any() for name, weight in best.items())


def test_an_ensemble_is_one_more_system_with_the_same_files(hard):
    for name in ("two", "soup", "looks"):
        folder = ensembles.scored(hard, name)
        scores = read_json(folder / "scores.json")
        assert scores["system"] == f"ensemble {name}"
        assert set(scores["decoders"]) == {"greedy", "lexicon", "beam"}
        heard = pd.read_csv(folder / "hypotheses.csv")
        assert len(heard) == scores["n"] > 0
    there = results.folders(hard, ["hard"], [1, 2], ["two", "soup"])
    table = results.fold(there)
    assert ("two", "ensemble") in table.index
    assert ("hard", "mean") in table.index
    verdicts = results.verdicts([there], {"hard": "baseline", "two": "hard"}, "lexicon", hard.scoring)
    assert [(one.a, one.b) for one in verdicts] == [("hard", "baseline"), ("two", "hard")]


def test_what_an_ensemble_lacks_is_said(hard, variant):
    with pytest.raises(UserError, match=r"no student 'hard' of seed 7 .*train it first"):
        ensembles.scored(hard, "three")
    with pytest.raises(UserError, match="unknown ensemble 'thre'; did you mean 'three'"):
        ensembles.scored(hard, "thre")
    with pytest.raises(UserError, match=r"averages 3 checkpoints .* only 2 are kept"):
        variant("hard", ensembles={"x": {"seeds": [1], "checkpoints": 3}})
    with pytest.raises(UserError, match=r"ensembles.x.of: unknown variant 'hrad'"):
        variant("hard", ensembles={"x": {"of": ["hrad"]}})


def test_students_teach_the_next(hard, variant):
    params = variant("born_again", teacher={"student_seeds": [1, 2]})
    assert targets.teachers(params) == ["hard/seed1", "hard/seed2"]
    ensemble = targets.target(params)
    store = ensemble.stores["hard/seed1"]
    assert store.header.heard == tuple(read_json(ingredients.place(hard, 1) / "model.json")["heard"])
    assert not {"M08", "M10"} & set(store.header.heard)
    record = read_json(students.student(params) / "model.json")
    assert record["taught"]
    with pytest.raises(UserError, match=r"no student 'hard' of seed 9 .*train it first"):
        adapt.teacher(variant("born_again", teacher={"student_seeds": [9]}), "hard/seed9")


def test_a_student_that_heard_the_held_out_speaker_is_no_member(hard, variant, monkeypatch):
    monkeypatch.setattr("kdlib.models.committee.Together", lambda *_: type("One", (), {"record": {"heard": ["M10"]}}))
    with pytest.raises(UserError, match="a member has heard M10"):
        ensembles.scored(variant("hard", scoring={"bootstrap": 201}), "two")


def test_the_command_prints_tables_and_verdicts_and_draws_them(hard, outputs, tmp_path, capsys):
    recipe = tmp_path / "smoke.yaml"
    group = {"two": {"of": ["hard"], "seeds": [1, 2]}}
    known = {"outputs": str(outputs), "student": {"keep": 2, "looks": 2}, "ensembles": group}
    recipe.write_text(json.dumps({"extends": str(root() / "params/smoke.yaml")} | known))
    results.main(str(recipe), ["M08"], ["hard"], [1, 2], ["two"])
    said = capsys.readouterr().out
    assert "greedy: two and hard: no difference shown" in said
    assert "One speaker says nothing of new ones" in said
    out = outputs / "smoke" / "compare"
    assert {"table.csv", "verdicts.csv", "differences.png", "differences.pdf"} <= {path.name for path in out.iterdir()}
    table = pd.read_csv(out / "table.csv")
    assert table.system.tolist() == ["baseline", "hard", "hard", "two", "hard"]
    verdicts = pd.read_csv(out / "verdicts.csv")
    assert set(zip(verdicts.a, verdicts.b, strict=True)) == {("hard", "baseline"), ("two", "hard")}
