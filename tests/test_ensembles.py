"""Ensembles of the smoke recipe's students, and students as teachers of the next."""

import json

import pandas as pd
import pytest
from safetensors.torch import load_file

from kdlib.errors import UserError
from kdlib.io import read_json, repository_root
from kdlib.models import averaging
from kdlib.pipeline import Fold
from kdlib.show import comparison, fold_comparison, format


@pytest.fixture(scope="module")
def variant(with_teachers, outputs):
    def load_variant(name, **overrides):
        defaults = {"outputs": str(outputs), "student": {"keep_checkpoints": 2, "validations_per_epoch": 2}}
        defaults["ensembles"] = {
            "two": {"variants": ["hard"], "seeds": [1, 2]},
            "soup": {"variants": ["hard"], "seeds": [1, 2], "average": "weights"},
            "checkpoints": {"variants": ["hard"], "seeds": [1], "average": "weights", "checkpoints": 2},
            "three": {"variants": ["hard"], "seeds": [1, 2, 7]},
        }
        return Fold.load("params/smoke.yaml", "M08", name, overrides=defaults | overrides)

    return load_variant


@pytest.fixture(scope="module")
def hard(variant):
    for seed in (1, 2):
        variant("hard").scores(seed)
    return variant("hard")


def test_the_best_checkpoints_are_kept(hard):
    folder = hard.layout.student(1)
    scores = [checkpoint["dev_score"] for checkpoint in read_json(folder / "model.json")["checkpoints"]]
    assert scores == sorted(scores, reverse=True)
    best, first, second = (
        load_file(folder / name) for name in ("model.safetensors", "best1.safetensors", "best2.safetensors")
    )
    assert all((first[name] == weight).all() for name, weight in best.items())
    assert any((second[name] != weight).any() for name, weight in best.items())


def test_an_ensemble_is_scored_like_a_student(hard):
    for name in ("two", "soup", "checkpoints"):
        folder = hard.ensemble(name)
        scores = read_json(folder / "scores.json")
        assert scores["system"] == f"ensemble {name}"
        assert set(scores["decoders"]) == {"greedy", "lexicon", "lexicon_plain", "beam"}
        assert len(pd.read_csv(folder / "hypotheses.csv")) == scores["n"] > 0
    folders = comparison.score_folders(hard, ["hard"], [1, 2], ["two", "soup"])
    table = format.fold_table(comparison.fold_scores(folders, "M08"), "wra")
    assert ("M08", "two", "ensemble") in table.index
    assert ("M08", "hard", "mean") in table.index
    verdicts = comparison.verdicts([folders], {"hard": "baseline", "two": "hard"}, "lexicon", hard.params.scoring)
    assert [(verdict.a, verdict.b) for verdict in verdicts] == [("hard", "baseline"), ("two", "hard")]


def test_an_incomplete_ensemble_is_refused(hard, variant):
    with pytest.raises(UserError, match=r"no student 'hard' of seed 7 .*train it first"):
        hard.ensemble("three")
    with pytest.raises(UserError, match="unknown ensemble 'thre'; did you mean 'three'"):
        hard.ensemble("thre")
    with pytest.raises(UserError, match=r"averages 3 checkpoints .* only 2 are kept"):
        variant("hard", ensembles={"x": {"seeds": [1], "checkpoints": 3}})
    with pytest.raises(UserError, match=r"ensembles.x.variants: unknown variant 'hrad'"):
        variant("hard", ensembles={"x": {"variants": ["hrad"]}})


def test_students_are_teachers_of_the_next(hard, variant):
    fold = variant("born_again", teacher={"student_seeds": [1, 2]})
    assert fold.target_teachers() == ["hard/seed1", "hard/seed2"]
    ensemble = fold.targets()
    store = ensemble.stores["hard/seed1"]
    assert store.header.train_speakers == tuple(read_json(hard.layout.student(1) / "model.json")["train_speakers"])
    assert not {"M08", "M10"} & set(store.header.train_speakers)
    record = read_json(fold.student() / "model.json")
    assert record["uses_teachers"]
    with pytest.raises(UserError, match=r"no student 'hard' of seed 9 .*train it first"):
        variant("born_again", teacher={"student_seeds": [9]}).teacher("hard/seed9")


def test_a_student_trained_on_the_dev_speaker_is_no_member(hard, variant, monkeypatch):
    monkeypatch.setattr(
        averaging, "EnsembleSystem", lambda *_: type("System", (), {"record": {"train_speakers": ["M10"]}})
    )
    with pytest.raises(UserError, match="a member was trained on M10"):
        variant("hard", scoring={"bootstrap": 201}).ensemble("two")


def test_the_command_prints_tables_and_verdicts_and_draws_them(hard, outputs, tmp_path, capsys):
    recipe = tmp_path / "smoke.yaml"
    settings = {"extends": str(repository_root() / "params/smoke.yaml"), "outputs": str(outputs)}
    settings |= {"student": {"keep_checkpoints": 2, "validations_per_epoch": 2}}
    recipe.write_text(json.dumps(settings | {"ensembles": {"two": {"variants": ["hard"], "seeds": [1, 2]}}}))
    fold_comparison.compare_folds(str(recipe), ["M08"], ["hard"], [1, 2], ["two"])
    printed = capsys.readouterr().out
    assert "greedy: two and hard: no difference shown" in printed
    assert "One speaker allows no inference to new speakers" in printed
    out = outputs / "smoke" / "compare"
    files = {path.name for path in out.iterdir()}
    assert {"scores.csv", "verdicts.csv", "differences.png", "differences.pdf"} <= files
    calibrated = pd.read_csv(out / "lexicon_against_lexicon_plain.csv")
    assert set(calibrated.a) == {"baseline (lexicon)", "hard (lexicon)", "two (lexicon)"}
    assert "What calibration gives, its settings chosen on dev speech" in printed
    scores = pd.read_csv(out / "scores.csv")
    assert set(scores.fold) == {"M08"}
    assert scores.revision.str.len().min() >= 7  # of the code that scored each system
    assert scores.drop_duplicates(["system", "seed"]).system.tolist() == ["baseline", "hard", "hard", "two"]
    lines = printed.split("fold system")[1].splitlines()[1:6]
    rows = [[word for word in line.split() if "." not in word and word != "-"] for line in lines]
    assert rows == [["M08", "baseline"], ["hard", "1"], ["2"], ["two", "ensemble"], ["hard", "mean"]]
    passes = pd.read_csv(out / "passes.csv", index_col=0).loc["hard"]
    assert passes.forward == passes.backward > 0
    assert passes["of other students"] == 0
    verdicts = pd.read_csv(out / "verdicts.csv")
    assert set(zip(verdicts.a, verdicts.b, strict=True)) == {("hard", "baseline"), ("two", "hard")}
    assert set(zip(verdicts.speech, verdicts.level, strict=True)) == {("held out", "all"), ("dev", "all")}
    assert verdicts.groupby("speech").size().nunique() == 1  # the same pairs and decoders
    assert "Dev speakers, by whose speech checkpoints and decoders were chosen:" in printed


def test_dev_speech_of_every_fold_counts_once(tmp_path):
    """Folds may have one dev speaker; the recordings of two are no two trainings."""
    for name in ("M08", "M05", "M16"):
        (tmp_path / name / "dev").mkdir(parents=True)
        (tmp_path / name / "dev" / "scores.json").write_text("{}")
    folds = {"M10": {("hard", 1): tmp_path / "M08"}, "M11": {("hard", 1): tmp_path / "M05", ("none", 1): tmp_path}}
    assert comparison.on_dev(folds) == [
        {("hard", 1): tmp_path / "M08" / "dev"},
        {("hard", 1): tmp_path / "M05" / "dev"},
    ]
    assert comparison.on_dev({"M10": {("hard", 1): tmp_path}}) == []
