"""Every file of a finished stage, damaged in every way: it is named, and made anew or refused; never read as good."""

import os
import shutil

import pytest

from kdlib import stage
from kdlib.errors import UserError
from kdlib.models import hybrid
from kdlib.pipeline import Fold

WAYS = ("truncated", "flipped", "empty", "missing")


def damage(path, way):
    content = path.read_bytes()
    if way == "missing":
        path.unlink()
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        changed = bytearray(content)
        changed[len(changed) // 3] ^= 4
        times = path.stat()
        path.write_bytes(changed)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk does it


@pytest.fixture(scope="module")
def made(with_teachers, tmp_path_factory):
    """A fold with every kind of stage, in a folder of its own."""
    out = tmp_path_factory.mktemp("damage")
    shutil.copytree(with_teachers.layout.recipe, out / "smoke")
    overrides = {"outputs": str(out), "student": {"encoder": "sb", "phases": [{"steps": 2}]}}
    fold = Fold.load("params/smoke.yaml", "M08", "hard", overrides=overrides)
    fold.baseline()
    fold.target_report()
    fold.scores()
    return fold


STAGES = {
    "corpus": lambda fold: fold.prepared_corpus(),
    "pretrained model": lambda fold: fold.pretraining(),
    "tokens": lambda fold: fold.tokens_folder(),
    "language model": lambda fold: fold.decoding_model(),
    "baseline": lambda fold: fold.baseline(),
    "base model": lambda fold: fold.base_model(),
    "teacher": lambda fold: fold.teacher("M10"),
    "teacher and its parent": lambda fold: fold.parent_scores("M10"),
    "stored outputs": lambda fold: fold.outputs("M10", "training"),
    "scores of a teacher": lambda fold: fold.teacher_scores("M10"),
    "target report": lambda fold: fold.target_report(),
    "preflight": lambda fold: fold.preflight_checks(),
    "student": lambda fold: fold.student(),
    "scores of a student": lambda fold: fold.scores(),
}


def files_of(folder):
    names = stage.read_json(folder / stage.FILES)
    return [folder / name for name in names]


@pytest.mark.parametrize("name", STAGES)
def test_every_damaged_file_is_named(made, name):
    """One file after the other; afterwards it is put back, and the stage is as good as before."""
    folder, missed = STAGES[name](made), []
    for path in files_of(folder)[:40]:
        content, times = path.read_bytes(), path.stat()
        for way in WAYS:
            if way in ("truncated", "flipped", "empty") and not content:
                continue
            damage(path, way)
            stage._intact.clear()
            found = stage.damaged(folder)
            if not found.startswith(path.relative_to(folder).as_posix()):
                missed.append((path.name, way, found))
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    stage._intact.clear()
    assert stage.damaged(folder) == ""
    assert missed == []


@pytest.mark.parametrize(
    ("name", "file"), [("scores of a student", "hypotheses.csv"), ("student", "model.safetensors")]
)
@pytest.mark.parametrize("way", WAYS)
def test_what_kdlib_made_is_made_anew(made, capsys, name, file, way):
    folder = STAGES[name](made)
    before = (folder / file).read_bytes()
    damage(folder / file, way)
    stage._intact.clear()
    assert STAGES[name](made) == folder
    out = capsys.readouterr().out
    assert f"{file} has" in out or f"{file} is missing" in out
    assert "it is made anew" in out
    assert (folder / file).read_bytes() == before


def test_a_damaged_record_or_list_of_files_is_noticed(made):
    folder = made.scores()
    for file in ("run.json", stage.FILES):
        content = (folder / file).read_bytes()
        for way in WAYS:
            damage(folder / file, way)
            stage._intact.clear()
            made.scores()
            assert stage.damaged(folder) == ""
            assert (folder / "scores.json").is_file()
        (folder / file).write_bytes((folder / file).read_bytes() or content)


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_model_that_is_only_read_is_refused(made, tmp_path, way):
    """A teacher or student named by its folder: it is the user's, and not made again."""
    shutil.copytree(made.teacher("M10"), tmp_path / "mine")
    damage(tmp_path / "mine/model.safetensors", way)
    with pytest.raises(UserError, match=r"model.safetensors (has|is).*; train it again, or take it from a copy"):
        hybrid.load(tmp_path / "mine")
