"""A disk without room at every stage: one sentence, and after room is made the run goes on."""

import contextlib
import re
import shutil
import subprocess

import forks
import pytest

from kdlib.pipeline import Fold

STAGES = {
    "corpus": ("corpus", "fold.prepared_corpus()"),
    "pretrained model": ("pretrained", "fold.pretraining()"),
    "tokens": ("tokens", "fold.tokens_folder()"),
    "language model": ("M08/lm", "fold.decoding_model()"),
    "baseline": ("M08/baseline", "fold.baseline()"),
    "base model": ("parents", "fold.base_model()"),
    "teacher": ("teachers/sb/M10", "fold.teacher('M10')"),
    "stored outputs": ("logits/sb/M10/training", "fold.outputs('M10', 'training')"),
    "scores of a teacher": ("teachers/sb/M10/scores", "fold.teacher_scores('M10')"),
    "target report": ("M08/target_report", "fold.target_report()"),
    "combined teachers": ("M08/combined_teachers", "fold.combined_teachers()"),
    "preflight": ("M08/students/ctc_kd/preflight", "fold.preflight_checks()"),
    "student": ("M08/students/ctc_kd/seed1", "fold.student()"),
    "scores of a student": ("M08/students/ctc_kd/seed1/scores", "fold.scores()"),
    "logit student": ("M08/logit_student", "fold.logit_student()"),
}
PROGRAM = """
from kdlib.errors import UserError
from kdlib.pipeline import Fold
fold = Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides={overrides})
try:
    {call}
except UserError as error:
    print("REFUSED", error)
else:
    print("MADE")
"""


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk of its own, which can be filled."""
    folder = tmp_path_factory.mktemp("disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def made(with_teachers, disk):
    """A fold with every kind of stage, on that disk."""
    shutil.copytree(with_teachers.layout.recipe, disk / "smoke")
    overrides = {
        "outputs": str(disk),
        "student": {"encoder": "sb", "phases": [{"steps": 4}]},
        "distill": {"allow": ["target", "pairs", "shift of ctc targets"]},
    }
    fold = Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides=overrides)
    for _, call in STAGES.values():
        eval(call, {"fold": fold})
    return fold, overrides


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(made, disk, tmp_path, name):
    fold, overrides = made
    place, call = STAGES[name]
    folder, kept = fold.layout.recipe / place, tmp_path / "kept"
    shutil.move(folder, kept)
    program, filler = PROGRAM.format(overrides=overrides, call=call), disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        refused = forks.run(program).stdout
        assert "REFUSED" in refused, refused[-1500:]
        sentence = refused.split("REFUSED ")[1].strip()
        assert "\n" not in sentence
        assert "Traceback" not in refused
        assert re.search(r"the disk is full while .* was written \(0 MB are free there\)", sentence), sentence
        assert not (folder / "run.json").exists()
        filler.unlink()
        again = forks.run(program).stdout
        assert "MADE" in again, again[-1500:]
    finally:
        filler.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(kept, folder)


@pytest.mark.parametrize("name", ["teacher", "stored outputs", "student"])
def test_a_disk_that_is_read_only_is_one_sentence(made, disk, tmp_path, name):
    fold, overrides = made
    place, call = STAGES[name]
    folder, kept = fold.layout.recipe / place, tmp_path / "kept"
    shutil.move(folder, kept)
    try:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused = forks.run(PROGRAM.format(overrides=overrides, call=call)).stdout
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        shutil.move(kept, folder)
    sentence = refused.split("REFUSED ")[1].strip()
    assert "\n" not in sentence
    assert "cannot write to" in sentence
    assert "Read-only file system" in sentence
    assert "outputs: /path/to/outputs" in sentence
