"""A student on two devices (processes on the CPU) is the student of one, whose batches count double."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from kdlib.io import read_json
from kdlib.pipeline import Fold
from kdlib.training.curves import read_curves

SIZES = {"d_model": 16, "layers": 1, "heads": 2, "ffn": 32, "kernel": 7, "mels": 20, "dropout": 0.0}
TRAIN = """
import json, sys
from kdlib.pipeline import Fold
Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides=json.loads(sys.argv[1])).student(1)
"""


def settings(outputs, steps=12, **student):
    """A student without anything random in its steps, taught by stored outputs."""
    phases = [{"steps": steps, "lr": 1.0e-3, "warmup_steps": 2}]
    about = {"encoder": "sb", "start": "scratch", "sizes": SIZES, "augment": "none", "phases": phases, "batch_size": 2}
    return {"outputs": str(outputs), "device": "cpu", "student": about | student}


def fold_of(overrides):
    return Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides=overrides)


def copied(outputs, tmp_path, name):
    """The shared stages of the smoke recipe in another folder of outputs, for a student of its own."""
    target = tmp_path / name / "smoke"
    target.parent.mkdir(parents=True)
    subprocess.run(["cp", "-al", str(outputs / "smoke"), str(target)], check=True)
    subprocess.run(["rm", "-rf", str(target / "M08" / "students")], check=True)
    return target.parent


@pytest.fixture(scope="module")
def one(with_teachers, outputs, tmp_path_factory):
    """The student of one process, which makes a step of two batches."""
    folder = copied(outputs, tmp_path_factory.mktemp("devices"), "one")
    return fold_of(settings(folder, accumulate=2)).student(1)


def assert_same_training(folder, expected):
    weights, known = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    for name, value in known.items():
        assert torch.allclose(weights[name], value, atol=1e-4), name
    dev, dev_known = (read_curves(each / "tensorboard") for each in (folder, expected))
    for name in ("dev_wra", "dev_wer"):
        values, others = (table[table.name == name].value.tolist() for table in (dev, dev_known))
        assert values == pytest.approx(others, abs=1e-6)
    assert read_json(folder / "model.json")["steps"] == read_json(expected / "model.json")["steps"]


def test_two_processes_train_the_student_of_one_with_stored_targets(one, outputs, tmp_path, monkeypatch):
    job = {"JOB_ID": "1", "NTASKS": "1", "STEP_NUM_TASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():  # as in a job of a cluster, which has one task
        monkeypatch.setenv(f"SLURM_{name}", value)
    folder = fold_of(settings(copied(outputs, tmp_path, "two"), devices=2)).student(1)
    assert_same_training(folder, one)


def test_two_processes_that_are_killed_resume_to_the_same_student(one, outputs, tmp_path):
    overrides = settings(copied(outputs, tmp_path, "killed"), devices=2)
    command = [sys.executable, "-c", TRAIN, json.dumps(overrides)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "killed/smoke/M08/students/ctc_kd/.seed1.partial"
    end = time.monotonic() + 240
    while not list(partial.glob("phase1/latest.ckpt")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()  # this process alone; those that it has started end by themselves
    process.wait()
    killed_in_time = not (partial.parent / "seed1").is_dir()
    folder = fold_of(overrides).student(1)
    assert_same_training(folder, one)
    assert killed_in_time, "it had ended before it was killed; the resumed student is the same all the same"
