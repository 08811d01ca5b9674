"""A disk without room at every stage: one sentence, and after room is made the run goes on."""

import contextlib
import os
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
    "teacher and its parent": ("teachers/sb/M10/parent", "fold.parent_scores('M10')"),
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
import contextlib, io, resource
from kdlib.errors import UserError
from kdlib.pipeline import Fold
fold = Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides={overrides})
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    try:
        {call}
    except UserError as error:
        result = f"REFUSED {{error}}"
    else:
        result = "MADE"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(result)
"""


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk of its own, which can be filled; where none may be mounted, files are limited to 200 bytes instead."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", folder]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode if os.geteuid() == 0 else False
    yield folder, mounted
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def made(with_teachers, disk):
    """A fold with every kind of stage, on that disk."""
    shutil.copytree(with_teachers.layout.recipe, disk[0] / "smoke")
    overrides = {
        "outputs": str(disk[0]),
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
    mounted, filler = disk[1], disk[0] / "filler"
    try:
        if mounted:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        limited = PROGRAM.format(overrides=overrides, call=call, limit=-1 if mounted else 200)
        refused = forks.run(limited).stdout
        assert "REFUSED" in refused, refused[-1500:]
        sentence = refused.split("REFUSED ")[1].strip()
        assert "\n" not in sentence
        assert "Traceback" not in refused
        full = r"the disk is full while .* was written \(0 MB are free there\)"
        assert re.search(full if mounted else "larger than is allowed here while|File too large", sentence), sentence
        assert not (folder / "run.json").exists()
        filler.unlink(missing_ok=True)
        again = forks.run(PROGRAM.format(overrides=overrides, call=call, limit=-1)).stdout
        assert "MADE" in again, again[-1500:]
    finally:
        filler.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(kept, folder)


@pytest.mark.parametrize("name", ["teacher", "stored outputs", "student"])
def test_a_disk_that_is_read_only_is_one_sentence(made, disk, tmp_path, name):
    (root, mounted), (fold, overrides) = disk, made
    if not mounted:
        pytest.skip("only root may mount a disk that is read-only")
    place, call = STAGES[name]
    folder, kept = fold.layout.recipe / place, tmp_path / "kept"
    shutil.move(folder, kept)
    try:
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        refused = forks.run(PROGRAM.format(overrides=overrides, call=call, limit=-1)).stdout
    finally:
        subprocess.run(["mount", "-o", "remount,rw", root], check=True)
        shutil.move(kept, folder)
    sentence = refused.split("REFUSED ")[1].strip()
    assert "\n" not in sentence
    assert "cannot write to" in sentence
    assert "Read-only file system" in sentence
    assert "outputs: /path/to/outputs" in sentence
