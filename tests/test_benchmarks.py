"""Every benchmark in a smoke run, the page that is made of the results, and `make bench`. No time is asserted."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import lab
import pytest

from kdlib.io import read_json

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
NAMES = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in ("report", "page"))


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """Scripts import `report` and `systems` as `make bench` lets them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(ROOT)


@pytest.fixture
def page():
    import page

    return page


def run(monkeypatch, name, *options):
    """A script as from the command line, in this process: torch and NeMo are imported once for all."""
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *options])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_run_ends_with_a_table(name, page, tmp_path, monkeypatch, capsys):
    if name == "explorer" and not lab.CHROMIUM.is_file():
        pytest.skip(f"no browser: {lab.CHROMIUM} is missing (apt install chromium)")
    run(monkeypatch, name, "--smoke", "--out", str(tmp_path))
    result = page.Result(**read_json(tmp_path / f"{name}.json"))
    assert result.question.endswith("?")
    assert page.table(result.rows) in capsys.readouterr().out
    assert len(result.rows) > 2
    assert page.section(name, result).startswith(f"## {page.TITLES[name]}\n\n")


def test_without_a_folder_a_smoke_run_leaves_no_result(monkeypatch, capsys):
    results = ROOT / "outputs" / "benchmarks"
    before = {path: path.stat().st_mtime_ns for path in results.glob("*")}
    run(monkeypatch, "score", "--smoke")
    assert "jiwer" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in results.glob("*")} == before


def test_a_benchmark_that_fails_leaves_no_earlier_result(tmp_path, monkeypatch):
    (tmp_path / "score.json").write_text("{}")
    monkeypatch.setattr("kdlib.evaluate.score.score", None)
    with pytest.raises(TypeError):
        run(monkeypatch, "score", "--smoke", "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_forms_take_turns_and_the_first_of_several_rounds_is_not_counted():
    import report

    calls = []
    forms = {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}
    times = report.interleaved(forms, 2, lambda number: number)
    assert calls == [(name, number) for number in range(3) for name in "ab"]
    assert {name: len(some) for name, some in times.items()} == {"a": 2, "b": 2}
    assert {len(some) for some in report.interleaved({"a": list}, 1).values()} == {1}
    found = report.against({"a": [1.0, 2.0, 4.0], "b": [3.0, 4.0, 4.0]}, "a")
    assert found == {"a": (2.0, 1.0), "b": (4.0, 2.0)}


def test_the_page_has_a_section_for_every_benchmark(page, tmp_path, monkeypatch):
    import report

    out = tmp_path / "results"
    for name, ratio in (("kd_loss", 0.3204), ("store", 1 / 3)):
        rows = [{"form": "peer", "ratio": 1.0}, {"form": "kdlib", "ratio": ratio, "MB": 20054.3}]
        report.Run(name, "How fast?", ["With a peer."], True, out).save(rows, [f"A note {'that is long ' * 30}"])
    command = ["page.py", "--results", str(out), "--page", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", command)
    page.main()
    text = (tmp_path / "page.md").read_text()
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == list(page.TITLES.values())
    assert "| kdlib |  0.32 | 20,100 |" in text
    assert text.count("How fast?\n\nWith a peer.\n") == 2
    assert " ".join(text.split()).count(f"Measured on {report.machine()}.") == 1
    assert text.count("Not measured here") == len(NAMES) - 2
    assert all(len(line) <= 130 for line in text.splitlines() if not line.startswith("|"))
    assert all(f"`benchmarks/{name}.py`" in text or f"benchmarks/{name}.py" in text for name in NAMES)


def test_every_benchmark_has_a_title_and_a_question(page):
    assert sorted(page.TITLES) == NAMES
    for name in NAMES:
        doc = ast.get_docstring(ast.parse((BENCHMARKS / f"{name}.py").read_text()))
        assert doc.split("\n")[0].endswith("?"), name


def test_the_committed_page_mentions_every_benchmark():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [name for name in NAMES if f"benchmarks/{name}.py" not in text] == []


def test_make_bench_goes_on_after_a_failure_and_names_it(tmp_path):
    python = tmp_path / "python"  # stands for .venv/bin/python
    python.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/ran\ncase "$1" in */beam.py|*/store.py) exit 3;; esac\n')
    python.chmod(0o755)
    (tmp_path / "ready").touch()
    made = subprocess.run(
        ["make", "bench", f"READY={tmp_path}/ready", f"BIN={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode != 0
    assert "failed: benchmarks/beam.py benchmarks/store.py\n" in made.stdout
    ran = (tmp_path / "ran").read_text().split()
    assert ran == [f"benchmarks/{name}.py" for name in [*NAMES, "page"]]
