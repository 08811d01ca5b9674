"""The notebooks, run headless by papermill and Snakemake on the smoke recipe."""

import json
import subprocess
import time

import nbformat
import psutil
import pytest
import yaml
from graph import BIN, ENVIRONMENT, papermill, snakemake

from kdlib.console import explain_failure, follow
from kdlib.io import atomic_write, repository_root

NOTEBOOKS = sorted((repository_root() / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The smoke recipe with the shipped model and an output folder of its own."""
    folder = tmp_path_factory.mktemp("notebooks")
    settings = yaml.safe_load((repository_root() / "params/smoke.yaml").read_text()) | {
        "pretrained": "shipped",
        "outputs": str(folder),
        "milestones": [
            {"after_steps": 4, "wer": 20},
            {"speech": "test", "wra": [98, 99], "name": "hope"},
            {"of": "teacher", "wra": 99},
        ],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    return folder / "mine.yaml"


@pytest.fixture(scope="module")
def demo(recipe):
    """A finished run of the graph for one fold."""
    run = snakemake(recipe, "folds=M08", "parts=1")
    assert run.returncode == 0, run.stdout + run.stderr
    return recipe.parent / "mine", run.stdout + run.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_follow_the_rules_of_the_repository(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown"
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert len(code) <= 15
    assert max(len(cell.source.splitlines()) for cell in code) <= 15


def test_graph_writes_the_documented_files(demo):
    out, _ = demo
    for name in ("corpus/manifest.csv", "corpus/lexicon.txt", "corpus/run.json", "corpus/00_corpus.ipynb"):
        assert (out / name).is_file()
    for name in (
        "tokens/tokenizer.model",
        "parents/sb/model.safetensors",
        "teachers/sb/M04/scores/scores.json",
        "logits/sb/M04/training/ctc/header.json",
        "logits/sb/M04/training/decoder/frames.bin",
        "logits/sb/M04/analysis/outputs.csv",
        "M08/teachers/02_teachers.ipynb",
        "M08/figures/teacher_matrix.pdf",
        "M08/target_report/03_logits.ipynb",
        "M08/target_report/sb/logprob_mean/dev/scores.json",
        "M08/figures/spikes.png",
        "M08/students/ctc_kd/preflight/checks.json",
        "M08/students/ctc_kd/seed1/latest.safetensors",
        "M08/students/ctc_kd/seed1/scores/hypotheses.csv",
        "M08/students/ctc_kd/seed1/scores/dev/scores.json",
        "M08/students/hard/seed1/04_distill.ipynb",
        "M08/figures/training_hard_seed1.pdf",
        "M08/figures/one_batch_ctc_kd_seed1.png",
        "M08/collapse/05_collapse.ipynb",
        "M08/collapse/summary.csv",
        "M08/figures/examination.pdf",
    ):
        assert (out / name).is_file()
    for name in (
        "run.json",
        "01_baseline.ipynb",
        "hypotheses.csv",
        "scores.json",
        "evaluation_greedy.json",
        "posteriors/ctc.safetensors",
    ):
        assert (out / "M08/baseline" / name).is_file()
    scores = json.loads((out / "M08/baseline/scores.json").read_text())
    assert (scores["system"], scores["held_out"], scores["n"]) == ("pretrained", "M08", 6)
    assert scores["decoders"]["lexicon"]["wra"] >= scores["decoders"]["greedy"]["wra"]


def test_log_is_readable(demo):
    _, log = demo
    assert "01_baseline | baseline: made in" in log
    for noise in ("Executing Cell", "IPKernelApp", "OneLogger", "Traceback"):
        assert noise not in log


def test_executed_notebooks_have_figures_and_no_errors(demo):
    out, _ = demo
    for name in (
        "corpus/00_corpus",
        "M08/baseline/01_baseline",
        "M08/teachers/02_teachers",
        "M08/target_report/03_logits",
        "M08/students/ctc_kd/seed1/04_distill",
        "M08/students/hard/seed1/04_distill",
        "M08/collapse/05_collapse",
    ):
        outputs = [
            output
            for cell in nbformat.read(out / f"{name}.ipynb", as_version=4).cells
            for output in cell.get("outputs", [])
        ]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert not any(output.output_type == "error" for output in outputs)
        shown = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
        for noise in ("Empty DataFrame", "encoder_config", "{'", "RuntimeWarning"):
            assert noise not in shown


def test_missed_milestones_come_with_advice(demo):
    out, _ = demo
    for name, word in (
        ("M08/students/ctc_kd/seed1/04_distill", "distill.alpha"),
        ("M08/teachers/02_teachers", "teacher."),
    ):
        cells = nbformat.read(out / f"{name}.ipynb", as_version=4).cells
        cell = next(cell for cell in cells if "milestones.missed" in cell.source)
        shown = "".join(str(output) for output in cell.outputs)
        assert "missed" in shown
        assert word in shown


def test_nothing_is_run_again_even_after_saving_with_outputs(demo, recipe):
    """Saving an executed notebook over its source must not trigger a new run."""
    path = repository_root() / "notebooks" / "00_corpus.ipynb"
    before = path.read_text()
    try:
        notebook = nbformat.reads(before, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.execution_count, cell.outputs = 1, [nbformat.v4.new_output("stream", text="saved")]
        with atomic_write(path) as hidden:  # another process may be reading it
            hidden.write_text(nbformat.writes(notebook), encoding="utf-8")
        run = snakemake(recipe, "folds=M08", "parts=1", "--dry-run", "--quiet", "host")
    finally:
        with atomic_write(path) as hidden:
            hidden.write_text(before, encoding="utf-8")
    assert "Nothing to be done" in run.stdout + run.stderr


def test_a_study_is_split_into_jobs_of_one_notebook(demo, recipe):
    """As `make collapse`: students of joined variants, split between jobs, then one examination."""
    out, _ = demo
    study = recipe.parent / "study.yaml"
    settings = {
        "compare": ["hard", "ctc_kd+no_references"],
        "variants": {"no_references": {"distill": {"alpha": 1.0, "beta": 0.0}}},
    }
    study.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | settings | {"name": "mine"}))
    options = ("--rerun-triggers", "mtime", "--forcerun", "some_students")  # reuses the results of the demo
    run = snakemake(study, "folds=M08,", "study=1", "parts=2", *options, "--until", "collapse", "--", "study")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (out / "jobs/students_M08_2").is_file()
    summary = (out / "M08/collapse/summary.csv").read_text()
    assert "ctc_kd+no_references,1," in summary
    assert not (out / "M08/students/ctc_kd+no_references/seed1/04_distill.ipynb").exists()


def test_another_fold_reuses_the_shared_stages(demo, recipe):
    out, _ = demo
    records = {name: (out / name / "run.json").read_text() for name in ("corpus", "zero_shot")}
    run = snakemake(recipe, "folds=M10", "--until", "baseline")
    assert run.returncode == 0, run.stdout + run.stderr
    assert records == {name: (out / name / "run.json").read_text() for name in records}
    assert (out / "M10/baseline/scores.json").is_file()


def test_a_changed_parameter_triggers_its_stages(demo, recipe):
    recipe.write_text(recipe.read_text().replace("bootstrap: 200", "bootstrap: 201"))
    try:
        run = snakemake(recipe, "folds=M08", "parts=1", "--dry-run", "--quiet", "host")
    finally:
        recipe.write_text(recipe.read_text().replace("bootstrap: 201", "bootstrap: 200"))
    assert "baseline" in run.stdout + run.stderr
    assert "Nothing to be done" not in run.stdout + run.stderr


def test_an_invalid_recipe_is_refused_before_anything_runs(recipe, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(recipe.read_text() + "sead: 3\n")
    run = snakemake(bad, "folds=M08")
    assert run.returncode != 0
    assert "unknown parameter 'sead'; did you mean 'seed'" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert "00_corpus |" not in run.stdout + run.stderr


def test_an_error_in_a_notebook_is_one_sentence(demo, recipe, tmp_path):
    """The recipe has the same name, so it shares the finished corpus; only the model is missing."""
    out, _ = demo
    broken = tmp_path / "broken.yaml"
    settings = yaml.safe_load(recipe.read_text()) | {"name": "mine", "pretrained": "nemo", "nemo_model": "none.nemo"}
    broken.write_text(yaml.safe_dump(settings))
    notebook = out / "M10" / "baseline" / "01_baseline.ipynb"
    before = notebook.read_bytes() if notebook.exists() else None  # of another test
    run = snakemake(broken, "folds=M10", "--until", "baseline")
    log = run.stdout + run.stderr
    assert run.returncode != 0
    assert log.count("nemo_model: there is no file") == 1
    assert "Traceback" not in log
    assert (notebook.read_bytes() if notebook.exists() else None) == before  # nothing was run after it


def test_a_notebook_shows_a_user_error_without_a_traceback(tmp_path):
    run = papermill("00_corpus", tmp_path / "out.ipynb", "-p", "recipe", "params/none.yaml")
    assert run.returncode != 0
    errors = [
        output
        for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert len(errors[0].traceback) == 1
    assert "params/none.yaml: no such file; recipes there:" in errors[0].traceback[0]
    assert "no such file" in explain_failure(tmp_path / "out.ipynb")


def test_the_reason_of_a_job_that_is_no_notebook_is_its_last_line(tmp_path, capsys):
    log = [
        "teachers: 1 of 4\n",
        "Traceback (most recent call last):\n",
        '  File "a.py", line 3\n',
        "KeyError: 'M04'\n",
        "\n",
    ]
    follow("teachers 1/2", log, tmp_path / "warnings", tmp_path / "log")
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["teachers 1/2 | teachers: 1 of 4", "teachers 1/2 | KeyError: 'M04'"]
    assert printed[2].startswith("teachers 1/2 | the traceback is in ")
    assert "a.py" in (tmp_path / "log").read_text()


def test_a_fold_file_can_be_given_to_papermill(demo, recipe, tmp_path):
    run = papermill(
        "00_corpus",
        tmp_path / "out.ipynb",
        "-f",
        str(repository_root() / "params/folds/uaspeech/M04.yaml"),
        "-p",
        "recipe",
        str(recipe),
        "-y",
        "{overrides: {synthetic: {speakers: [M04, F03, M08]}, name: other}}",
    )
    assert run.returncode == 0, run.stderr
    assert "held out M04, dev F03" in (tmp_path / "out.ipynb").read_text()


def test_the_next_run_resumes_a_killed_graph(demo, recipe, tmp_path):
    """kill -9 of every process while the corpus is prepared: no lock or half a corpus blocks the next run."""
    out, _ = demo
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"outputs": str(tmp_path)}))
    command = [BIN / "snakemake", "--profile", "profiles/local", "--config", f"recipe={other}", "folds=M08"]
    running = subprocess.Popen(
        [*map(str, command)],
        cwd=repository_root(),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial = tmp_path / "other" / ".corpus.partial"
    until = time.monotonic() + 120
    while running.poll() is None and not partial.exists() and time.monotonic() < until:
        time.sleep(0.05)
    for process in [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]:
        process.kill()  # the kernel has a session of its own: killing the group would leave it alive
    running.wait()
    assert not (tmp_path / "other" / "corpus" / "run.json").exists()  # Snakemake creates the empty folder

    again = snakemake(other, "folds=M08", "--until", "corpus")
    assert again.returncode == 0, again.stdout + again.stderr
    manifests = [(folder / "corpus/manifest.csv").read_bytes() for folder in (out, tmp_path / "other")]
    assert manifests[0] == manifests[1]
