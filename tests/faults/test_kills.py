"""A run that is killed at random moments ends with the same values as an undisturbed one.

`make test` kills it a few times; `make faults` twenty times (KILLS=20, another SEED for other moments).
"""

import os
import random
import signal
import sys
import time

import pytest
from unchanged import snapshot

from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.nemo_files import SHIPPED_MODEL, restore_model
from kdlib.pipeline import Fold
from kdlib.training.curves import read_curves

KILLS, SEED = int(os.environ.get("KILLS", "4")), int(os.environ.get("SEED", "1"))


def whole_run(outputs):
    """Corpus, pretraining, tokens, teachers, stored outputs, targets, a distilled student, scores."""
    overrides = {
        "outputs": str(outputs),
        "student": {"phases": [{"steps": 12, "warmup_steps": 1}], "validations_per_epoch": 2},
        "distill": {"allow": ["target", "pairs", "shift of ctc targets", "pseudo-labels"]},
    }
    fold = Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides=overrides)
    fold.baseline()
    for name in ("M04", "M10"):
        fold.teacher_scores(name)
    fold.target_report()
    fold.scores()
    fold.logit_student()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of an undisturbed run, and the number of its stages."""
    folder = tmp_path_factory.mktemp("undisturbed")
    restore_model(SHIPPED_MODEL)  # all libraries are imported once, for the forks
    Conformer(ConformerShape(d_model=16, layers=1, heads=2, ffn=16, kernel=7, mels=20))
    whole_run(folder)
    return folder, finished(folder)


def start(outputs):
    """Run in a process of its own, and return its number."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
                whole_run(outputs)
            status = 0
        finally:
            os._exit(status)
    return child


def finished(folder):
    """The number of finished stages."""
    folders = (os.path.relpath(root, folder) for root, _, files in os.walk(folder) if "run.json" in files)
    return sum(not any(part.startswith(".") for part in name.split(os.sep)) for name in folders)


def test_killed_at_random_moments(undisturbed, tmp_path):
    """The kills are spread over the stages; the last attempt is not disturbed."""
    folder, stages = undisturbed
    moments, within = random.Random(SEED), []
    for kill in range(KILLS + 1):
        child, ended = start(tmp_path), (0, 0)
        waited = moments.uniform(0.0, 1.2)
        deadline = None
        while ended[0] == 0 and (deadline is None or time.monotonic() < deadline):
            if deadline is None and kill < KILLS and finished(tmp_path) >= kill * stages // KILLS:
                deadline = time.monotonic() + waited
            ended = os.waitpid(child, os.WNOHANG)
            time.sleep(0.005)
        if ended[0]:
            assert ended[1] == 0, "the run failed after a kill"
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        begun = [path.name[1:].removesuffix(".partial") for path in tmp_path.rglob(".*.partial")]
        within += begun or ["between stages"]
    print(f"killed {len(within)} times, within: {', '.join(within)}")
    assert len(within) >= KILLS - 1
    expected, found = snapshot.snapshot(folder), snapshot.snapshot(tmp_path)
    assert found.keys() == expected.keys()
    for name in (name for name in expected if found[name] != expected[name]):
        assert name.endswith("tensorboard")  # a resumed training adds a file, and repeats some steps
        assert read_curves(tmp_path / name).equals(read_curves(folder / name))
