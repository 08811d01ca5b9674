import json
import os
import subprocess
import sys

import pytest

from kdlib import stage
from kdlib.errors import UserError


def writer(text, calls):
    def build(partial):
        calls.append(text)
        (partial / "result.txt").write_text(text)

    return build


def made(folder, build, code=(), **depends):
    return stage.produce(stage.Stage(folder, "a", build=build, **depends), code)


def test_a_folder_is_built_once(tmp_path, capsys):
    calls = []
    for _ in range(2):
        made(tmp_path / "a", writer("one", calls), settings={"x": 1})
    assert calls == ["one"]
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["parameters", "input", "seed"])
def test_a_folder_is_rebuilt_when_its_dependencies_change(tmp_path, change):
    calls, file = [], tmp_path / "input.txt"
    file.write_text("1")
    made(tmp_path / "a", writer("one", calls), settings={"x": 1}, inputs=[file], seed=1)
    if change == "input":
        file.write_text("2")
    made(
        tmp_path / "a",
        writer("two", calls),
        settings={"x": 2 if change == "parameters" else 1},
        inputs=[file],
        seed=2 if change == "seed" else 1,
    )
    assert (tmp_path / "a" / "result.txt").read_text() == "two"


def test_a_failed_build_leaves_no_complete_folder(tmp_path):
    def build(partial):
        (partial / "half.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        made(tmp_path / "a", build)
    assert not (tmp_path / "a").exists()


def test_a_failed_rebuild_keeps_the_old_result(tmp_path):
    made(tmp_path / "a", writer("old", []), settings=1)
    with pytest.raises(ZeroDivisionError):
        made(tmp_path / "a", lambda partial: 1 / 0, settings=2)
    assert (tmp_path / "a" / "result.txt").read_text() == "old"


def test_the_next_run_resumes_a_killed_one(tmp_path):
    def build(partial):
        steps = partial / "steps.txt"
        done = len(steps.read_text()) if steps.exists() else 0
        steps.write_text("x" * (done + 1))
        if done == 0:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        made(tmp_path / "a", build, settings=1)
    made(tmp_path / "a", build, settings=1)
    assert (tmp_path / "a" / "steps.txt").read_text() == "xx"


def test_the_partial_folder_is_removed_when_parameters_change(tmp_path):
    def build(partial):
        assert [path.name for path in partial.iterdir()] == [".key"]
        (partial / "half.txt").write_text("half")
        raise RuntimeError("killed")

    for parameters in (1, 2):
        with pytest.raises(RuntimeError, match="killed"):
            made(tmp_path / "a", build, settings=parameters)


def test_run_json_has_the_provenance(tmp_path):
    made(tmp_path / "a", writer("one", []), code=["tokens.py"], settings={"x": 1}, seed=3)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["parameters"] == {"x": 1}
    assert record["seed"] == 3
    assert record["packages"]["torch"].startswith("2.11")
    assert record["peak_memory_mb"] > 1
    assert record["wall_s"] >= 0
    assert {"revision", "code", "inputs", "finished"} <= set(record)


def test_executed_notebooks_survive_a_rebuild(tmp_path):
    made(tmp_path / "a", writer("one", []), settings=1)
    (tmp_path / "a" / "00.ipynb").write_text("{}")
    made(tmp_path / "a", writer("two", []), settings=2)
    assert (tmp_path / "a" / "00.ipynb").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        made(tmp_path / "file" / "a", writer("one", []))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="make it writable"):
        made(tmp_path / "locked" / "a", writer("one", []))


def test_two_processes_do_not_build_the_same_folder_twice(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom kdlib.stage import Stage, produce\n"
        "def build(partial):\n    open(sys.argv[1] + '/log', 'a').write('x')\n    time.sleep(1)\n"
        "produce(Stage(Path(sys.argv[1]) / 'a', 'a', build=build))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert (tmp_path / "log").read_text() == "x"


def test_outputs_do_not_change_the_fingerprint_of_a_notebook(tmp_path):
    cell = {"cell_type": "code", "source": ["1 + 1"], "outputs": [], "metadata": {}}
    clean, saved, changed = (tmp_path / name for name in ("a.ipynb", "b.ipynb", "c.ipynb"))
    clean.write_text(json.dumps({"cells": [cell]}))
    saved.write_text(
        json.dumps({"cells": [cell | {"outputs": [{"text": "2"}]}, {"cell_type": "markdown", "source": "x"}]})
    )
    changed.write_text(json.dumps({"cells": [cell | {"source": ["1 + 2"]}]}))
    assert stage.notebook_fingerprint(clean) == stage.notebook_fingerprint(saved)
    assert stage.notebook_fingerprint(clean) != stage.notebook_fingerprint(changed)


def test_a_run_killed_before_the_renaming_is_only_renamed(tmp_path, monkeypatch):
    calls, replace = [], stage._replace

    def fail(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(stage, "_replace", fail)
    with pytest.raises(RuntimeError, match="killed"):
        made(tmp_path / "a", writer("one", calls))
    monkeypatch.setattr(stage, "_replace", replace)
    made(tmp_path / "a", writer("one", calls))
    assert calls == ["one"]
    assert (tmp_path / "a" / "result.txt").read_text() == "one"
