"""What a run would cost before it starts: its trainings, hours and bytes, by what earlier trainings took here.

The time of a step is the median over trained students of the same encoder and decoder, of any recipe; where there is
none it is assumed. Preparation, notebooks and waiting are not counted.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kdlib.errors import UserError
from kdlib.graph import Graph
from kdlib.io import read_json, repository_root
from kdlib.layout import Layout
from kdlib.objectives import terms
from kdlib.params import Params, fold_names, load
from kdlib.pipeline import Fold

ASSUMED_S = 0.2  # a step of 16 words on one core, where none was measured
ASSUMED_MB = 20.0  # a student with its checkpoints
SCORES_S = 15.0  # decoding two speakers, calibration
TEACHER_S, TEACHER_MB = 75.0, 50.0  # a teacher with its outputs and scores


@dataclass(frozen=True)
class Measured:
    """What earlier students took."""

    seconds: dict[tuple, float]  # per step, by encoder and decoder layers
    mb: float

    @classmethod
    def here(cls, outputs: Path) -> "Measured":
        """From the records of the students below a folder of outputs."""
        times: dict[tuple, list[float]] = {}
        sizes = []
        for path in outputs.glob("*/*/students/*/seed*/run.json"):
            try:
                run, model = read_json(path), read_json(path.with_name("model.json"))
                kind = _kind(run["parameters"]["student"])
                times.setdefault(kind, []).append(run["wall_s"] / max(1, model["steps"]))
                sizes.append(sum(file.stat().st_size for file in path.parent.glob("*.safetensors")) / 1e6)
            except (OSError, KeyError, ValueError, TypeError):
                continue  # a run that is going on, or of an earlier version
        seconds = {kind: statistics.median(values) for kind, values in times.items()}
        return cls(seconds, statistics.median(sizes) if sizes else ASSUMED_MB)

    def step(self, student: dict) -> tuple[float, bool]:
        """Seconds of a step, and whether they were measured."""
        known = self.seconds.get(_kind(student))
        return (ASSUMED_S, False) if known is None else (known, True)


@dataclass(frozen=True)
class Cost:
    """The trainings of a run."""

    students: int
    done: int
    teachers: int  # to be trained
    hours: float  # of one core
    gb: float
    measured: bool
    cores: int

    @property
    def wall_hours(self) -> float:
        """With one training per core."""
        return self.hours / self.cores

    @property
    def text(self) -> str:
        """The cost in two sentences."""
        how = (
            "by the step times measured here" if self.measured else f"assuming {ASSUMED_S} s a step: none was measured"
        )
        return (
            f"{self.students} students, {self.done} of them trained already, and {self.teachers} teachers to train: "
            f"about {self.hours:.1f} hours of one core, {self.wall_hours:.1f} hours on {self.cores} cores ({how}), "
            f"and {self.gb:.1f} GB."
        )

    def require(self, budget_h: float) -> None:
        """Refuse a run that is longer than the budget."""
        if self.wall_hours > budget_h:
            raise UserError(
                f"{self.text} That is beyond BUDGET_H={budget_h:g}; take fewer folds, seeds or levels, or more hours"
            )


def cost(graph: Graph, cores: int = 2) -> Cost:
    """What a run of the graph of stages costs."""
    outputs = repository_root() / graph.first.outputs
    measured = Measured.here(outputs)
    seconds, mb, done, known, teachers = 0.0, 0.0, 0, [True], set()
    jobs = [(fold, name, seed) for fold in graph.folds for name in _variants(graph) for seed in graph.seeds]
    for fold, name, seed in jobs:
        params = load(graph.recipe, fold, variant=name)
        if (Layout(params).student(seed) / "run.json").is_file():
            done += 1
            continue
        step, was_measured = measured.step(params.student.model_dump())
        known.append(was_measured)
        seconds += step * _steps(params) + SCORES_S
        mb += measured.mb
        if terms.uses_teachers(params.distill) and params.teacher.source == "speakers":
            teachers |= _missing_teachers(Fold.load(graph.recipe, fold, name))
    seconds += TEACHER_S * len(teachers)
    mb += TEACHER_MB * len(teachers)
    return Cost(len(jobs), done, len(teachers), seconds / 3600, mb / 1000, all(known), cores)


def table(graph: Graph) -> pd.DataFrame:
    """The students of a run: trained ones of all, by variant."""
    rows = []
    for name in _variants(graph):
        layouts = [Layout(load(graph.recipe, fold, variant=name)) for fold in graph.folds]
        folders = [layout.student(seed) for layout in layouts for seed in graph.seeds]
        rows.append(
            {"variant": name, "students": len(folders), "trained": sum((f / "run.json").is_file() for f in folders)}
        )
    return pd.DataFrame(rows).set_index("variant")


def _variants(graph: Graph) -> list[str]:
    """The variants that are compared, and their controls."""
    return list(graph.of_variant)


def _kind(student: dict) -> tuple:
    return student["encoder"], student["decoder_layers"]


def _steps(params: Params) -> int:
    """The steps of all phases; an epoch counts as a hundred."""
    return sum(phase.steps if phase.steps is not None else 100 * phase.epochs for phase in params.student.phases)


def _missing_teachers(fold: Fold) -> set[object]:
    """The teachers of a fold that are not trained: their folders; before there is a corpus, as many as may be."""
    params, layout = fold.params, fold.layout
    if not (layout.corpus / "run.json").is_file():
        owner = params.held_out if params.teachers_per_fold else ""
        return {
            (owner, number) for number in range(params.teacher.max_teachers or len(fold_names(params.fold_set)) - 2)
        }
    folders = (layout.teacher(name) for name in fold.teacher_names())
    return {folder for folder in folders if not (folder / "run.json").is_file()}
