"""Fold files for a user's own corpus."""

import pytest
import yaml
from corpora import SPEAKERS, own

from kdlib import params
from kdlib.__main__ import main
from kdlib.corpus.fold_files import fold_file
from kdlib.corpus.manifest import Speaker
from kdlib.io import repository_root


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe for a user's own corpus, in a separate repository."""
    (tmp_path / "params").mkdir()
    (tmp_path / "params/base.yaml").write_text("seed: 1\n")
    (tmp_path / "data").mkdir()
    own(tmp_path / "data", words=("can't", "café"), repetitions=1, spoken=False)
    (tmp_path / "params/mine.yaml").write_text("corpus: manifest\nmanifest: data/corpus.csv\npretrained: from_corpus\n")
    monkeypatch.chdir(tmp_path)
    return "params/mine.yaml"


def written(recipe):
    """Write the fold files of a recipe; return their folder."""
    assert main(["folds-for", recipe]) == 0
    return repository_root() / "params/folds/mine"


def test_one_file_per_speaker_with_its_rule(recipe, capsys):
    folder = written(recipe)
    assert sorted(path.stem for path in folder.iterdir()) == sorted(SPEAKERS)
    assert "next: make folds RECIPE=params/mine.yaml FOLDS=07,Alma" in capsys.readouterr().out
    devs = {name: params.load(recipe, name).fold.dev for name in SPEAKERS}
    assert devs == dict(zip(SPEAKERS, (*SPEAKERS[1:], SPEAKERS[0]), strict=True))
    assert "Dev speaker: the next by name, since nothing else is known" in (folder / "07.yaml").read_text()


@pytest.mark.parametrize("name", ["07", "NO", "Žofie"])
def test_names_that_yaml_would_convert_stay_names(recipe, name):
    folder = written(recipe)
    assert yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))["held_out"] == name


def test_controls_get_no_fold_and_levels_choose_the_dev_speaker(recipe):
    path = repository_root() / recipe
    info = {"07": {"level": "CONTROL"}, "NO": {"level": "LOW"}, "Alma": {"level": "LOW"}, "Boris": {"level": "HIGH"}}
    path.write_text(path.read_text() + yaml.safe_dump({"speakers": info}))
    folder = written(recipe)
    assert not (folder / "07.yaml").exists()
    assert params.load(recipe, "NO").fold.dev == "Alma"
    assert "Dev speaker: the nearest in level" in (folder / "NO.yaml").read_text()


def test_an_edited_file_is_not_overwritten(recipe, capsys):
    folder = written(recipe)
    edited = (folder / "Alma.yaml").read_text().replace("exclude: []", "exclude: [Boris]")
    (folder / "Alma.yaml").write_text(edited)
    written(recipe)
    assert (folder / "Alma.yaml").read_text() == edited
    assert "edited, and not overwritten: Alma" in capsys.readouterr().out


def test_two_speakers_are_too_few_for_a_dev_speaker():
    text = fold_file("A", ["A", "B"], {"A": Speaker("A"), "B": Speaker("B")})
    assert yaml.safe_load(text)["fold"]["dev"] is None
    assert "none, since there are too few speakers" in text


def test_the_error_for_a_missing_fold_file_has_the_command(recipe):
    with pytest.raises(params.UserError, match="write its fold files with: make folds-for"):
        params.load(recipe, "Alma")


def test_files_of_speakers_outside_the_corpus_are_named(recipe, capsys):
    folder = written(recipe)
    (folder / "Gone.yaml").write_text("held_out: Gone\n")
    capsys.readouterr()
    written(recipe)
    assert "not needed, since their speakers are controls or not in the corpus: Gone" in capsys.readouterr().out
