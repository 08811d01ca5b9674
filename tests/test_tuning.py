import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from kdlib import tuning
from kdlib.errors import DivergedError, UserError
from kdlib.io import repository_root, write_json
from kdlib.params import load
from kdlib.pipeline import Fold

SPACE = {"student.phases.0.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "student.batch_size": [4, 8]}


def write_recipe(folder: Path, outputs: Path, **tune) -> Path:
    """A recipe over the smoke recipe, with its outputs."""
    smoke = repository_root() / "params/smoke.yaml"
    settings = {"extends": os.path.relpath(smoke, folder), "name": "smoke", "outputs": str(outputs)}
    settings["tune"] = {"variant": "hard", "runs": 3, "settings": SPACE} | tune
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    return folder / "mine.yaml"


def trial_folders(search: tuning.Search) -> set[Path]:
    return set((search.base.layout.fold / "students").glob("hard+trial-*"))


def test_a_search_trains_and_writes_the_best_settings(smoke, outputs, tmp_path, capsys):
    recipe = write_recipe(tmp_path, outputs)
    search = tuning.Search(recipe, "M08")
    path = search.run()
    table = search.table()
    assert len(table) == 3
    assert table.dev_score[table.ended].is_monotonic_decreasing
    best = table.iloc[0]
    assert set(table["student.batch_size"]) <= {4, 8}
    assert table["student.phases.0.lr"].between(1e-4, 1e-2).all()
    params = load(path, "M08", variant="hard+tuned.best_of_3")
    assert path == tmp_path / "mine_tuned.yaml"
    assert params.student.phases[0].lr == pytest.approx(best["student.phases.0.lr"])
    assert params.student.batch_size == best["student.batch_size"]
    assert params.student.phases[0].steps == 6  # as it was
    assert params.distill.control == "hard+tuned.best_of_3"
    assert load(path, "M08").compare == ("hard", "hard+tuned.best_of_3")
    assert not list(search.base.layout.fold.glob("students/hard+trial-*/seed1/scores"))  # the held-out speaker is not
    # scored
    before = trial_folders(search)
    assert tuning.Search(recipe, "M08").run() == path  # all runs are done
    assert trial_folders(search) == before
    more = tuning.Search(recipe, "M08", runs=4)
    more.run()
    assert len(more.table()) == 4


def test_a_killed_search_continues_the_trial_that_was_killed(smoke, outputs, tmp_path, monkeypatch, capsys):
    steps = {"student": {"phases": [{"steps": 400, "lr": 1e-3}]}}
    recipe = write_recipe(tmp_path, outputs, runs=1, settings={"student.clip": {"low": 0.5, "high": 2.0}})
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | steps))
    command = [sys.executable, "-m", "kdlib", "tune", str(recipe), "M08"]
    killed = subprocess.Popen(command, cwd=repository_root(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    search, found, deadline = tuning.Search(recipe, "M08"), [], time.monotonic() + 120
    while not found and time.monotonic() < deadline:
        time.sleep(0.2)
        found = list(search.base.layout.fold.glob("students/hard+trial-*/.seed1.partial/phase1/latest.ckpt"))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert found, killed.stderr.read()
    monkeypatch.setattr(tuning, "GRACE_S", 2)
    monkeypatch.setattr(tuning, "HEARTBEAT_S", 1)
    search.run()
    log = capsys.readouterr()
    assert "resumes from step" in log.out + log.err
    table = search.table()
    assert len(table) == 1
    assert (found[0].parents[2] / "seed1" / "model.safetensors").is_file()
    killed_trial, resumed = search.study.get_trials()
    assert killed_trial.params == resumed.params


@pytest.fixture
def fake(monkeypatch):
    """Students that are not trained: the dev score is -|log10(lr) + 3|, or what the test says."""

    def student(fold, seed=1, watch=None, **_):
        import math

        lr = fold.params.student.phases[0].lr
        if lr > 5e-3:
            raise DivergedError("the loss is nan")
        score, rows = -abs(math.log10(lr) + 3), []
        for step in range(4):
            if watch:
                watch(pd.DataFrame(rows, columns=["step", "name", "value"]))
            rows.append((step, "dev_score", score))
            time.sleep(0.02)
        folder = fold.layout.student(seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "model.json", {"best_dev_score": score})
        return folder

    def partial(fold, seed=1, watch=None, **more):
        folder = fold.layout.student(seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return student(fold, seed, watch, **more)

    monkeypatch.setattr(Fold, "student", partial)
    monkeypatch.setattr(Fold, "preflight", lambda fold, seed=1: [])
    monkeypatch.setattr(tuning, "read_record", lambda folder: tuning.json.loads((folder / "model.json").read_text()))


LR = {"student.phases.0.lr": {"low": 1e-5, "high": 1e-2, "log": True}}


def test_poor_trials_are_stopped_early_and_removed(fake, tmp_path, outputs):
    search = tuning.Search(write_recipe(tmp_path, tmp_path, runs=16, settings=LR), "M08")
    search.run()
    table = search.table()
    assert len(table) == 16
    stopped = table[~table.ended]
    assert stopped.why.str.contains("below the median|nan").all()
    assert stopped.why.str.contains("below the median").any()
    assert len(trial_folders(search)) == table.ended.sum()
    assert table.ended.iloc[0]
    assert "16 runs" in search.write().read_text()


def test_two_processes_share_the_budget(fake, tmp_path):
    recipe = write_recipe(tmp_path, tmp_path, runs=9, settings=LR)
    assert not tuning.Search(recipe, "M08").study.trials  # makes the database
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=lambda: tuning.Search(recipe, "M08").run()) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    search = tuning.Search(recipe, "M08")
    done = [trial for trial in search.study.get_trials() if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(done) == len(search.table()) == 9
    search.run()
    assert len(search.table()) == 9


def test_lists_and_whole_numbers_are_written_as_a_recipe_has_them(fake, tmp_path):
    space = {"distill.temperature": [1.0, [[1, 4.0], [3, 3.0]]], "student.accumulate": {"low": 1, "high": 3}}
    search = tuning.Search(write_recipe(tmp_path, tmp_path, runs=3, settings=space), "M08")
    params = load(search.run(), "M08", variant="hard+tuned.best_of_3")
    assert params.student.accumulate in (1, 2, 3)
    assert str(params.distill.temperature) in ("1", "4 from epoch 1, 3 from epoch 3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student.phases.0.rate": [1.0, 2.0]}, r"unknown parameter 'student.phases.0.rate'"),
        ({"student.phases.1.lr": [1e-3, 2e-3]}, r"student.phases.1.lr: student.phases is no list of 2 values"),
        ({"studnet.clip": [1.0, 2.0]}, r"unknown parameter 'studnet'; did you mean 'student'\?"),
        ({"student.clip": [1.0, -2.0]}, r"student.clip.*greater than 0"),
        ({"student.clip": [1.0]}, "at least 2 items"),
        ({"student.clip": {"low": 2.0, "high": 1.0}}, "low below high"),
        ({}, "names no settings"),
    ],
)
def test_impossible_searches_are_refused_before_any_work(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        tuning.Search(write_recipe(tmp_path, tmp_path, settings=settings), "M08")
    assert not (tmp_path / "smoke").exists()


def test_a_set_of_ablations_is_not_tuned(tmp_path):
    with pytest.raises(UserError, match="is a set of ablations"):
        tuning.Search("params/ablations/temperature.yaml", "M08")
