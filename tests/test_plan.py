"""What a run costs: by the records of earlier runs, and what was used against it."""

import json
from pathlib import Path

import pytest

from kdlib.errors import UserError
from kdlib.graph import Graph, resources
from kdlib.io import repository_root
from kdlib.show import plan
from kdlib.show.measured import Measured


def record(folder: Path, wall_s: float, parameters: dict | None = None, steps: int = 0) -> None:
    """A finished stage."""
    folder.mkdir(parents=True)
    about = {"wall_s": wall_s, "peak_memory_mb": 1800, "parameters": parameters or {}}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "file.bin").write_bytes(bytes(2_000_000))
    if steps:
        (folder / "model.json").write_text(json.dumps({"steps": steps}))


def student(alpha: float = 0.0, frozen: bool = False) -> dict:
    phases = [{"freeze_encoder": frozen}]
    about = {"encoder": "nemo", "decoder_layers": 0, "batch_size": 16, "accumulate": 1, "phases": phases}
    return {"student": about, "distill": {"alpha": alpha} if alpha else {}}


@pytest.fixture
def records(tmp_path) -> Path:
    """Records of another recipe."""
    other = tmp_path / "other"
    for seed, wall_s in enumerate((60.0, 62.0, 90.0), start=1):
        record(other / f"M05/students/hard/seed{seed}", wall_s, student(), steps=600)
        record(other / f"M05/students/hard/seed{seed}/scores", 10.0)
    record(other / "M05/students/ctc_kd/seed1", 120.0, student(0.5), steps=600)
    teacher = {"encoder": "sb", "d_model": 96, "layers": 4, "decoder_layers": 2, "adapt": {"batch_size": 16}}
    record(other / "teachers/sb/M04", 24.0, teacher, steps=120)
    record(other / "corpus", 40.0)
    return tmp_path


def graph_of(records: Path, more: str = "", **config: str) -> Graph:
    """The demo's graph, with its records in a folder."""
    recipe = records / "demo.yaml"
    recipe.write_text(f"extends: {repository_root() / 'params/demo.yaml'}\noutputs: {records}\n{more}")
    return Graph({"recipe": str(recipe), "folds": "M08,", **config})


def test_a_run_costs_what_its_steps_took_elsewhere(records):
    graph = graph_of(records)
    found = plan.cost(graph, measured=Measured.here(records, "demo"))
    rows = {row.stage: row for row in found.rows}
    assert (rows["students"].runs, rows["students"].done) == (2, 0)
    assert rows["students"].seconds == pytest.approx(600 * (62 / 600 + 120 / 600))  # 600 steps: hard, ctc_kd
    assert rows["teachers"].seconds == pytest.approx(4 * 120 * 24 / 120)  # before there is a corpus: at most four
    assert rows["corpus"].seconds == 40.0
    assert rows["students"].how == "other recipes"
    assert rows["folds"].how == "assumed"
    assert "by what other recipes took for corpus, teachers, students" in found.text
    assert "assumed for " in found.text
    assert found.frame.loc["students", "measured in"] == "other recipes"
    assert found.jobs.loc["a student", "memory (GB)"] == 3  # half as much again as 1.8
    assert 5 <= found.jobs.loc["half of the teachers", "minutes"] <= 10


def test_each_process_of_a_student_takes_its_memory(records):
    graph = graph_of(records, "student: {devices: 2}\n")
    found = plan.cost(graph, measured=Measured.here(records, "demo"))
    assert found.jobs.loc["a student", "memory (GB)"] == 6  # half as much again as twice 1.8
    asked = resources("students", lambda _: graph.processes())["mem_mb"]
    assert [asked(None, attempt) for attempt in (1, 2)] == [12000, 24000]
    assert resources("students")["mem_mb"](None, 1) == 6000
    of_one = graph_of(records, "variants: {ctc_kd: {student: {devices: 2}}, hard: {student: {devices: 2}}}\n")
    assert (of_one.first.student.devices, of_one.processes("hard"), of_one.processes()) == (1, 2, 2)


def test_seeds_folds_and_variants_multiply_what_is_trained(records):
    measured = Measured.here(records)
    one = {row.stage: row for row in plan.cost(graph_of(records), measured=measured).rows}
    more = plan.cost(graph_of(records, folds="M08,M05,", seeds="1,2,3", variants="hard"), measured=measured)
    more = {row.stage: row for row in more.rows}
    assert more["students"].runs == 2 * 3
    assert more["folds"].runs == 2  # without teachers: baselines
    assert more["teachers"].runs == 0
    assert more["corpus"].runs == one["corpus"].runs == 1


def test_what_was_used_stands_beside_the_estimate(records, tmp_path):
    measured = Measured.here(records)
    record(records / "demo/M08/students/hard/seed1", 70.0, student(), steps=600)
    graph = graph_of(records)
    rows = {row.stage: row for row in plan.cost(graph, measured=measured).rows}
    assert (rows["students"].done, rows["students"].used_s) == (1, 70.0)
    with pytest.raises(UserError, match=r"beyond BUDGET_H=0\.001"):
        plan.cost(graph, measured=measured).require(0.001)


def test_what_is_left_is_that_of_the_runs_that_are_not_done(records):
    record(records / "demo/M08/students/hard/seed1", 60.0, student(), steps=600)
    rows = {row.stage: row for row in plan.cost(graph_of(records), measured=Measured.here(records)).rows}
    assert rows["students"].left_s == pytest.approx(120.0)  # ctc_kd, not the mean of the two
    assert rows["students"].longest_s == pytest.approx(120.0)


def test_what_a_fold_has_of_its_own_is_counted_for_every_fold(records):
    recipe = records / "own.yaml"
    text = f"extends: {repository_root() / 'params/demo.yaml'}\noutputs: {records}\nteacher: {{parent: from_corpus}}\n"
    recipe.write_text(text)
    found = {}
    for folds in ("M08,", "M08,M05,M16,"):
        cost = plan.cost(Graph({"recipe": str(recipe), "folds": folds}), measured=Measured.here(records))
        shared = {row.stage: row.runs for row in cost.rows}["shared"]
        found[folds] = shared, cost.jobs.loc["half of the teachers"].minutes
    (one, minutes), (three, same) = found.values()
    assert three == one + 2  # two more base models
    assert same == minutes  # each fold has jobs of its own


def test_records_of_the_same_recipe_come_first(records):
    record(records / "demo/M08/students/hard/seed1", 300.0, student(), steps=600)
    measured = Measured.here(records, "demo")
    assert measured.step(("student", "nemo", 0, 16, False, False)) == (0.5, "this recipe")
    assert measured.step(("student", "nemo", 0, 16, False, True)) == (0.5, "this recipe")  # with teachers: its nearest
    assert measured.step(("student", "sb", 0, 16, False, True)) == (0.2, "assumed")


def test_students_that_teach_or_are_adapted_are_counted(records):
    rows = {row.stage: row for row in plan.cost(graph_of(records, variants="born_again")).rows}
    assert rows["students"].runs == 4  # it, its control, and three teachers, of which the control is one
    rows = {row.stage: row for row in plan.cost(graph_of(records, variants="adapted_words")).rows}
    assert rows["students"].runs >= 4


def test_a_probe_measures_steps_that_were_never_taken(with_teachers, monkeypatch):
    monkeypatch.setattr(plan, "PROBE", (1, 1, 4))
    graph = Graph({"recipe": "params/smoke.yaml", "folds": "M08,", "variants": "hard"})
    monkeypatch.setattr(plan.Fold, "load", lambda *arguments, **_: with_teachers.of("hard"))
    measured = Measured(recipe="smoke")
    plan.probe(graph, measured)
    ((recipe, training), (seconds,)) = next(iter(measured.steps.items()))
    assert (recipe, training[:2]) == ("smoke", ("student", "nemo"))
    assert 0 < seconds < 60


def test_a_damaged_record_is_left_out(records):
    (records / "other/corpus/run.json").write_text("{")
    assert ("other", "corpus") not in Measured.here(records).seconds
