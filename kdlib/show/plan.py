"""What a run costs, by stage: runs, hours and bytes, by what earlier runs took here; and what it has used so far.

What was never run here is assumed, or measured by a probe of twenty steps (`measured.py`). A job that waits for another
costs nothing here.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kdlib import stage
from kdlib.errors import UserError
from kdlib.fold_stage import code_of
from kdlib.graph import FOLD_STAGES, Graph
from kdlib.io import repository_root
from kdlib.layout import Layout
from kdlib.objectives import terms
from kdlib.params import Params, fold_names, load
from kdlib.pipeline import Fold
from kdlib.settings.student import Phase
from kdlib.show.measured import ASSUMED, ELSEWHERE, HERE, KINDS, MEMORY_MB, STAGES, Measured, of_params, wall_s

PROBE = (2, 5, 25)  # steps of three trainings: the first warms up, the difference of the others is measured
SPARE = 1.5  # memory and minutes that a cluster's job asks for, times what it takes
EPOCH = 100  # steps of an epoch, where the corpus is not there to be counted
JOBS = {  # of a cluster: the rows of the table that one takes, and how many jobs share them
    "corpus, base model": ("corpus", "shared"),
    "half of the teachers": ("teachers", "outputs"),
    "a student": ("students", "scores"),
}


@dataclass(frozen=True)
class Row:
    """A stage of a run."""

    stage: str
    runs: int
    done: int
    seconds: float  # of all runs
    mb: float  # of all runs
    memory_mb: float  # of one
    how: str  # where the times were measured
    used_s: float  # by those that are done
    left_s: float  # of those that are not done
    left_mb: float
    longest_s: float  # of one


@dataclass(frozen=True)
class Cost:
    """What a run costs, by stage."""

    rows: Sequence[Row]
    cores: int
    parts: int = 2  # jobs that share the teachers

    @property
    def hours(self) -> float:
        """Of one core, for what is not done."""
        return sum(row.left_s for row in self.rows) / 3600

    @property
    def wall_hours(self) -> float:
        """With one process per core."""
        return self.hours / self.cores

    @property
    def gb(self) -> float:
        """Bytes of what is not done."""
        return sum(row.left_mb for row in self.rows) / 1000

    @property
    def text(self) -> str:
        """The cost in two sentences."""
        count = {row.stage: row for row in self.rows}
        left = [row for row in self.rows if row.runs > row.done]
        named = {how: ", ".join(row.stage for row in left if row.how == how) for how in (ELSEWHERE, ASSUMED)}
        parts = [f"by what other recipes took for {named[ELSEWHERE]}"] if named[ELSEWHERE] else []
        parts += [f"assumed for {named[ASSUMED]}: none was run here"] if named[ASSUMED] else []
        students, teachers = count["students"], count["teachers"]
        return (
            f"{students.runs} students, {students.done} of them trained already, and {teachers.runs - teachers.done} "
            f"teachers to train: about {self.hours:.1f} hours of one core, {self.wall_hours:.1f} hours on {self.cores} "
            f"cores ({'; '.join(parts) or 'by the times measured here'}), and {self.gb:.1f} GB."
        )

    @property
    def frame(self) -> pd.DataFrame:
        """One row per stage, and the sum."""
        table = pd.DataFrame(
            {
                "stage": row.stage,
                "runs": row.runs,
                "done": row.done,
                "hours of one core": row.seconds / 3600,
                "used": row.used_s / 3600,
                "GB": row.mb / 1000,
                "measured in": row.how,
            }
            for row in self.rows
            if row.runs
        ).set_index("stage")
        total = table[["runs", "done", "hours of one core", "used", "GB"]].sum()
        table.loc["all"] = total.to_dict() | {"measured in": ""}
        return table.astype({"runs": int, "done": int}).round({"hours of one core": 2, "used": 2, "GB": 2})

    @property
    def jobs(self) -> pd.DataFrame:
        """What the jobs of a cluster are to ask for."""
        found, count = {}, {row.stage: row for row in self.rows}
        each = count["notebooks"].seconds / max(1, count["notebooks"].runs)
        for name, stages in JOBS.items():
            rows = [count[one] for one in stages]
            share = self.parts if name == "half of the teachers" else 1
            if any(row.runs for row in rows):
                longest = sum(row.longest_s if name == "a student" else row.seconds / share for row in rows)
                minutes = SPARE * (longest + each) / 60
                memory = SPARE * max(row.memory_mb for row in rows) / 1000
                found[name] = {"memory (GB)": math.ceil(memory), "minutes": max(5, math.ceil(minutes))}
        return pd.DataFrame.from_dict(found, orient="index").rename_axis("a job of")

    def require(self, budget_h: float) -> None:
        """Refuse a run that is longer than the budget."""
        if self.wall_hours > budget_h:
            raise UserError(
                f"{self.text} That is beyond BUDGET_H={budget_h:g}; take fewer folds, seeds or levels, or more hours"
            )


def cost(graph: Graph, cores: int = 2, measured: Measured | None = None) -> Cost:
    """What a run of the graph of stages costs, and what is done of it."""
    known = measured or Measured.here(repository_root() / graph.first.outputs, graph.first.name)
    counted = _Counted(known, {stage: [] for stage in STAGES}, graph.processes())
    first, layout, teachers = graph.first, Layout(graph.first), {}
    layouts = [Layout(graph.settings[fold]) for fold in graph.folds]
    counted.add("corpus", layout.corpus)
    for folder in dict.fromkeys(one.tokens for one in layouts):
        counted.add("tokens", folder)
    if first.pretrained not in ("from_corpus", "none"):
        counted.add("zero-shot scores", layout.zero_shot)
    if first.pretrained in ("controls", "from_corpus"):
        for folder in dict.fromkeys(one.pretrained for one in layouts):
            counted.add("pretraining", folder)
    if graph.with_teachers and first.teacher.parent in ("controls", "from_corpus") and not first.teacher.imported:
        for folder in dict.fromkeys(one.base_model for one in layouts):
            counted.add("base model", folder, first.teacher.base_training.steps, of_params("base model", first))
    if graph.with_teachers and first.teacher.of_speakers:
        counted.add("speaker features", layout.speaker_features)
    counted.notebook(f"{graph.out}/corpus/00_corpus.ipynb")
    for fold in graph.folds:
        one = Layout(graph.settings[fold])
        counted.add("baseline", one.baseline)
        if graph.with_teachers:
            counted.add("target report", one.target_report)
            counted.add("logit student", one.logit_student)
        for name in FOLD_STAGES if graph.with_teachers else ("01_baseline", "05_collapse"):
            counted.notebook(graph.notebook(fold, name))
        variants: dict[str, Params] = {}
        trained = _students(graph, fold, variants)
        for name, params in variants.items():
            counted.add("preflight", Layout(params).preflight(graph.seeds[0]))
            if terms.uses_teachers(params.distill) and params.teacher.source == "speakers":
                teachers |= _teachers(Fold.load(graph.recipe, fold, name))
        for name, seed in trained:
            params = variants[name]
            folder = Layout(params).student(seed)
            counted.add("student", folder, _steps(params), of_params("student", params))
            counted.add("scores", folder / "scores")
            counted.notebook(graph.student(fold, name, seed))
    for folder, params in teachers.items():
        root = folder if isinstance(folder, Path) else Path("none/teachers/none/none")  # before there is a corpus
        logits = root.parents[2] / "logits" / root.parent.name / root.name
        counted.add("teacher", root, params.teacher.adapt.steps, of_params("teacher", params))
        counted.add("outputs", logits / "training")
        counted.add("outputs", logits / "analysis")
        counted.add("teacher scores", root / "scores")
        counted.add("parent scores", root / "parent")
    return Cost(counted.rows(), cores, len(graph.parts) * len(graph.owners))


def probe(graph: Graph, measured: Measured) -> None:
    """Measure the step of every kind of student that was never trained by this recipe, by some steps of its control."""
    for name in graph.of_variant:
        params = load(graph.recipe, graph.folds[0], variant=name)
        if measured.step(of_params("student", params))[1] == HERE:
            continue
        control, taken = Fold.load(graph.recipe, graph.folds[0], params.distill.control), []
        for steps in PROBE:
            phase = Phase(steps=steps, lr=params.student.phases[-1].lr, warmup_steps=1)
            fold = control.but(student={"phases": (phase,)})
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                fold.train_student(Path(folder), graph.seeds[0])
            taken.append(time.perf_counter() - started)
        difference = (taken[2] - taken[1]) / (PROBE[2] - PROBE[1])
        step = difference if difference > 0 else taken[2] / PROBE[2]
        measured.steps.setdefault((measured.recipe, of_params("student", control.params)), []).append(step)


def table(graph: Graph) -> pd.DataFrame:
    """The students of a run: trained ones of all, by variant."""
    rows = []
    for name in graph.of_variant:
        layouts = [Layout(load(graph.recipe, fold, variant=name)) for fold in graph.folds]
        folders = [layout.student(seed) for layout in layouts for seed in graph.seeds]
        rows.append(
            {"variant": name, "students": len(folders), "trained": sum((f / "run.json").is_file() for f in folders)}
        )
    return pd.DataFrame(rows).set_index("variant")


class _Run(NamedTuple):
    """A run of a stage: what it takes, where that was measured, and the seconds that it has used, if it is done."""

    seconds: float
    mb: float
    how: str
    used: float | None


class _Counted(NamedTuple):
    """The runs of every stage."""

    measured: Measured
    stages: dict[str, list[_Run]]
    devices: int  # of a student: each has a process, whose memory was measured

    def add(self, kind: str, folder: Path, steps: int = 0, training: tuple = ()) -> None:
        """A run: of a training, by the time of its steps."""
        seconds, how = self.measured.run(kind)
        if training:
            seconds, how = self.measured.step(training)
            seconds *= steps
        self._count(kind, seconds, how, wall_s(folder))

    def notebook(self, path: str) -> None:
        """A notebook: it leaves no record, and has used what such notebooks take."""
        seconds, how = self.measured.run("notebook")
        self._count("notebook", seconds, how, seconds if (repository_root() / path).is_file() else None)

    def _count(self, kind: str, seconds: float, how: str, used: float | None) -> None:
        self.stages[KINDS[kind].stage].append(_Run(seconds, self.measured.size(kind), how, used))

    def rows(self) -> list[Row]:
        """The rows of the table."""
        rows = []
        for name, runs in self.stages.items():
            left = [run for run in runs if run.used is None]
            rows.append(
                Row(
                    stage=name,
                    runs=len(runs),
                    done=len(runs) - len(left),
                    seconds=sum(run.seconds for run in runs),
                    mb=sum(run.mb for run in runs),
                    memory_mb=(self.measured.memory.get(name) or MEMORY_MB)
                    * (self.devices if name == "students" else 1),
                    how=max((run.how for run in runs), key=(HERE, ELSEWHERE, ASSUMED).index, default=HERE),
                    used_s=sum(run.used or 0.0 for run in runs),
                    left_s=sum(run.seconds for run in left),
                    left_mb=sum(run.mb for run in left),
                    longest_s=max((run.seconds for run in runs), default=0.0),
                )
            )
        return rows


def _students(graph: Graph, fold: str, variants: dict[str, Params]) -> list[tuple[str, int]]:
    """The students of a fold: those that are compared, their controls, and those that teach them or are adapted.

    The settings of each variant are read once, into `variants`.
    """
    waiting = [(name, seed) for name in graph.of_variant for seed in graph.seeds]
    found: dict[tuple[str, int], None] = {}
    while waiting:
        name, seed = waiting.pop(0)
        if (name, seed) in found:
            continue
        found[name, seed] = None
        if name not in variants:
            variants[name] = load(graph.recipe, fold, variant=name)
        waiting += [*variants[name].learns_from(seed), (variants[name].distill.control, seed)]
    return list(found)


def _has_corpus(fold: Fold) -> bool:
    """True if the corpus is there as the recipe has it: else nothing is made for an estimate."""
    return stage.is_current(Fold.prepared_corpus.__wrapped__(fold), code_of("prepared_corpus"))


def _steps(params: Params) -> int:
    """The steps of all phases; those of an epoch are counted where there is a corpus."""
    phases, each = params.student.phases, EPOCH
    if any(phase.epochs for phase in phases):
        fold = Fold(params)
        if _has_corpus(fold):
            each = math.ceil(len(fold.splits.train) / (params.student.batch_size * params.student.accumulate))
    return sum(phase.steps if phase.steps is not None else each * phase.epochs for phase in phases)


def _teachers(fold: Fold) -> dict[object, Params]:
    """The teachers of a fold by their folders; before there is a corpus, as many as may be."""
    params, layout = fold.params, fold.layout
    if not _has_corpus(fold):
        owner = params.held_out if params.teachers_per_fold else ""
        count = params.teacher.max_teachers or len(fold_names(params.fold_set)) - 2
        return {(layout.family, owner, number): params for number in range(count)}
    return {layout.teacher(name): params for name in fold.teacher_names()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("recipe", help="such as params/demo.yaml")
    parser.add_argument("folds", help="held-out speakers, comma-separated, or all")
    parser.add_argument("--variants", default="", help="by default the recipe's")
    parser.add_argument("--seeds", default="", help="by default the recipe's")
    parser.add_argument("--cores", type=int, default=2, help="processes side by side")
    parser.add_argument(
        "--probe", action="store_true", help="measure steps that were never taken here, by twenty of each"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command: what some folds of a recipe cost."""
    chosen = {"variants": options.variants, "seeds": options.seeds}
    graph = Graph({"recipe": options.recipe, "folds": f"{options.folds},", **chosen})
    measured = Measured.here(repository_root() / graph.first.outputs, graph.first.name)
    if options.probe:
        probe(graph, measured)
    found = cost(graph, options.cores, measured)
    print(f"{found.frame.to_string()}\n\n{found.jobs.to_string()}\n\n{found.text}")
