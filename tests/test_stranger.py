"""The embedded voices as a stranger's corpus: other names, 8 kHz, no levels, no controls, few words, one clipped."""

import os
import shutil
import subprocess
import sys

import corpora
import pandas as pd
import pytest
import yaml

from kdlib.corpus.describe import speaker_table
from kdlib.io import read_json, repository_root
from kdlib.pipeline import Fold
from kdlib.show import comparison

NAMES = ("Abigail", "Bernard", "Charlie")


@pytest.fixture(scope="module")
def recipe(corpus, tmp_path_factory):
    """The recipe of a user's own corpus, with a model and trainings of seconds, and its fold files."""
    folder = tmp_path_factory.mktemp("stranger")
    corpora.disguised(corpus, folder, words=4, repetitions=3)
    settings = yaml.safe_load((repository_root() / "params/own.yaml").read_text(encoding="utf-8"))
    settings |= {"manifest": str(folder / "corpus.csv"), "outputs": str(folder), "folds": f"stranger-{os.getpid()}"}
    sizes = {"d_model": 16, "layers": 1, "heads": 2, "conv_channels": 8}
    settings["pretraining"] |= sizes | {"steps": 30, "batch_size": 4, "warmup_steps": 2}
    settings["teacher"] |= {
        "heads": 2,
        "ffn": 16,
        "base_training": {"steps": 4},
        "adapt": {"steps": 4, "batch_size": 4},
    }
    settings["student"] = {"batch_size": 4, "phases": [{"steps": 4, "warmup_steps": 1}]}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "kdlib", "folds-for", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=repository_root(), check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    yield path
    shutil.rmtree(repository_root() / "params/folds" / settings["folds"], ignore_errors=True)


@pytest.fixture(scope="module")
def fold(recipe) -> Fold:
    return Fold.load(recipe, "Abigail", "hard")


def test_the_disguise_holds(recipe, fold):
    files = sorted(path.stem for path in (repository_root() / "params/folds" / fold.params.fold_set).glob("*.yaml"))
    assert files == sorted(NAMES)
    assert fold.corpus.speakers == list(NAMES)
    assert not any(fold.corpus.is_control(name) or fold.corpus.level(name) for name in NAMES)
    assert fold.corpus.speaker_order == "by name"
    report = (fold.corpus_folder / "report.txt").read_text(encoding="utf-8")
    assert "36 recordings checked, 0 left out" in report
    assert "36 files of 8000 Hz, 1 channel are read as 16000 Hz mono" in report
    assert "Charlie 12 of 12" in report
    assert "Abigail " not in report.split("clipped")[1]


def test_its_model_stops_early_on_the_dev_speaker_and_never_hears_the_held_out_one(fold):
    model = fold.pretrained_model()
    record = read_json(model.with_name("train_data.json"))
    assert record["speakers"] == ["Charlie"]
    assert fold.splits.settings.fold.dev == "Bernard"
    assert set(pd.read_csv(fold.baseline() / "dev/hypotheses.csv").speaker) == {"Bernard"}


def test_the_table_of_the_fold_has_the_start(fold):
    table = comparison.student_table(fold, 1)
    assert list(table.columns) == [(speech, name) for speech in ("held out", "dev") for name in ("baseline", "hard")]
    assert read_json(fold.student(1) / "model.json")["start_dev_wra"] * 100 == pytest.approx(
        table.loc["greedy", ("dev", "baseline")], abs=0.06
    )
    assert "the start" in comparison.start_line(fold, 1)


def test_it_is_described_without_levels(fold):
    table = speaker_table(fold.corpus)
    assert list(table.speaker) == list(NAMES)
    assert set(table.level) == {"?"}
