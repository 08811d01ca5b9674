"""What a run costs: by the records of earlier runs, and what was used against it."""

import json
from pathlib import Path

import pytest

from kdlib.errors import UserError
from kdlib.graph import Graph
from kdlib.settings.student import Phase
from kdlib.show import plan


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
    about = {"encoder": "nemo", "decoder_layers": 0, "batch_size": 16, "phases": phases}
    return {"student": about, "distill": {"alpha": alpha}}


@pytest.fixture
def outputs(tmp_path) -> Path:
    """Records of another recipe."""
    other = tmp_path / "other"
    for seed, wall_s in enumerate((60.0, 62.0, 90.0), start=1):
        record(other / f"M05/students/hard/seed{seed}", wall_s, student(), steps=600)
        record(other / f"M05/students/hard/seed{seed}/scores", 10.0)
    record(other / "M05/students/ctc_kd/seed1", 120.0, student(0.5), steps=600)
    teacher = {"encoder": "sb", "decoder_layers": 2, "adapt": {"batch_size": 16}}
    record(other / "teachers/sb/M04", 24.0, teacher, steps=120)
    record(other / "corpus", 40.0)
    return tmp_path


def graph_of(outputs: Path, **config: str) -> Graph:
    graph = Graph({"recipe": "params/demo.yaml", "folds": "M08,", **config})
    for params in (graph.first, *graph.settings.values()):
        object.__setattr__(params, "outputs", str(outputs))
    return graph


def test_a_run_costs_what_its_steps_took_elsewhere(outputs):
    graph = graph_of(outputs)
    found = plan.cost(graph, measured=plan.Measured.here(outputs))
    rows = {row.stage: row for row in found.rows}
    assert (rows["students"].runs, rows["students"].done) == (2, 0)
    assert rows["students"].seconds == pytest.approx(600 * (62 / 600 + 120 / 600))  # 600 steps: hard, ctc_kd
    assert rows["teachers"].seconds == pytest.approx(4 * 120 * 24 / 120)  # before there is a corpus: at most four
    assert rows["corpus"].seconds == 40.0
    assert rows["students"].measured
    assert not rows["folds"].measured
    assert "assumed for" in found.text
    assert "students" in found.frame.index
    assert found.frame.loc["students", "a job asks for"].startswith("2.7 GB")


def test_seeds_folds_and_variants_multiply_what_is_trained(outputs):
    measured = plan.Measured.here(outputs)
    one = {row.stage: row for row in plan.cost(graph_of(outputs), measured=measured).rows}
    more = plan.cost(graph_of(outputs, folds="M08,M05,", seeds="1,2,3", variants="hard"), measured=measured)
    more = {row.stage: row for row in more.rows}
    assert more["students"].runs == 2 * 3
    assert more["folds"].runs == 2  # without teachers: baselines
    assert more["teachers"].runs == 0
    assert more["corpus"].runs == one["corpus"].runs == 1


def test_what_was_used_stands_beside_the_estimate(outputs, tmp_path):
    measured = plan.Measured.here(outputs)
    record(outputs / "demo/M08/students/hard/seed1", 70.0, student(), steps=600)
    graph = graph_of(outputs)
    rows = {row.stage: row for row in plan.cost(graph, measured=measured).rows}
    assert (rows["students"].done, rows["students"].used_s) == (1, 70.0)
    with pytest.raises(UserError, match=r"beyond BUDGET_H=0\.001"):
        plan.cost(graph, measured=measured).require(0.001)


def test_a_probe_measures_steps_that_were_never_taken(with_teachers, monkeypatch):
    monkeypatch.setattr(plan, "PROBE", (1, 3))
    graph = Graph({"recipe": "params/smoke.yaml", "folds": "M08,", "variants": "hard"})
    monkeypatch.setattr(plan.Fold, "load", lambda *arguments, **_: with_teachers.of("hard"))
    measured = plan.Measured()
    plan.probe(graph, measured)
    (kind, (seconds,)) = next(iter(measured.steps.items()))
    assert kind[:2] == ("student", "nemo")
    assert -5 < seconds < 60  # a difference of two short trainings: noisy, but measured
    assert Phase(steps=1).steps == 1


def test_a_damaged_record_is_left_out(outputs):
    (outputs / "other/corpus/run.json").write_text("{")
    assert "corpus" not in plan.Measured.here(outputs).seconds
