"""What a run costs, by stage: runs, hours and bytes, by what earlier runs took here; and what it has used so far.

Times are medians over the records (`run.json`) below outputs/, of any recipe: of a step for what is trained, by
encoder, decoder and whether teachers are read, else of a run. What was never run here is assumed, or measured by a
probe of twenty steps. A job that waits for another costs nothing here.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kdlib.errors import UserError
from kdlib.graph import Graph
from kdlib.io import read_json, repository_root
from kdlib.layout import Layout
from kdlib.objectives import terms
from kdlib.params import Params, fold_names, load
from kdlib.pipeline import Fold
from kdlib.settings.student import Phase

STEP_S = 0.2  # of a training, on one core, where none was measured
PROBE = (5, 25)  # steps of two trainings, whose difference is measured
SPARE = 1.5  # memory and minutes that a cluster's job asks for, times what it takes


class Known(NamedTuple):
    """A kind of run: its row of the table, where its records lie below a recipe's folder, and what is assumed."""

    stage: str
    places: tuple[str, ...]
    seconds: float
    mb: float


KINDS = {
    "corpus": Known("corpus", ("corpus",), 60, 300),
    "tokens": Known("shared", ("tokens", "*/tokens"), 1, 1),
    "zero-shot scores": Known("shared", ("zero_shot", "*/zero_shot"), 40, 3),
    "base model": Known("shared", ("parents/*", "*/parents/*"), 400, 10),
    "pretraining": Known("shared", ("pretrained", "*/pretrained"), 400, 30),
    "speaker features": Known("shared", ("speaker_features",), 3, 1),
    "teacher": Known("teachers", ("teachers/*/*", "*/teachers/*/*"), 30, 10),
    "outputs": Known("outputs", ("logits/*/*/*", "*/logits/*/*/*"), 10, 10),
    "teacher scores": Known("outputs", ("teachers/*/*/scores", "*/teachers/*/*/scores"), 15, 2),
    "parent scores": Known("outputs", ("teachers/*/*/parent", "*/teachers/*/*/parent"), 3, 1),
    "baseline": Known("folds", ("*/baseline",), 10, 2),
    "target report": Known("folds", ("*/target_report/*",), 90, 3),
    "combined teachers": Known("folds", ("*/combined_teachers/*/*",), 5, 2),
    "logit student": Known("folds", ("*/logit_student/*",), 20, 2),
    "student": Known("students", ("*/students/*/seed*",), 120, 25),
    "preflight": Known("scores", ("*/students/*/preflight*",), 3, 1),
    "scores": Known("scores", ("*/students/*/seed*/scores",), 12, 2),
    "notebook": Known("notebooks", (), 20, 1),
}
STAGES = tuple(dict.fromkeys(kind.stage for kind in KINDS.values()))
TRAINED = ("teacher", "student")
MEMORY_MB = 2500.0


@dataclass
class Measured:
    """What earlier runs took."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # by kind, of a run
    steps: dict[tuple, list[float]] = field(default_factory=dict)  # by kind of training, of a step
    mb: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)  # the largest, by stage

    @classmethod
    def here(cls, outputs: Path) -> "Measured":
        """From the records below a folder of outputs."""
        found = cls()
        for recipe in sorted(path for path in outputs.glob("*") if path.is_dir()):
            for kind, known in KINDS.items():
                for path in (one for place in known.places for one in recipe.glob(f"{place}/run.json")):
                    found._add(kind, path)
            for path in recipe.glob("*/students/*/seed*/04_distill.ipynb"):
                found._add_notebook(path)
        return found

    def _add(self, kind: str, path: Path) -> None:
        try:
            run, stage = read_json(path), KINDS[kind].stage
            seconds = float(run["wall_s"])
            self.seconds.setdefault(kind, []).append(seconds)
            self.mb.setdefault(kind, []).append(_size_mb(path.parent))
            self.memory[stage] = max(self.memory.get(stage, 0.0), float(run.get("peak_memory_mb", 0)))
            if kind in TRAINED:
                steps = read_json(path.with_name("model.json"))["steps"]
                self.steps.setdefault(_kind(run["parameters"]), []).append(seconds / max(1, steps))
        except (OSError, KeyError, ValueError, TypeError, AttributeError):
            return  # a run that is going on, or of an earlier version

    def _add_notebook(self, path: Path) -> None:
        """What a student's notebook takes beside training and scores."""
        try:
            total = read_json(path)["metadata"]["papermill"]["duration"]
            own = [read_json(path.parent / part / "run.json")["wall_s"] for part in ("", "scores")]
        except (OSError, KeyError, ValueError, TypeError):
            return
        if total and total > sum(own):  # executed once, with its training
            self.seconds.setdefault("notebook", []).append(total - sum(own))

    def step(self, kind: tuple) -> tuple[float, bool]:
        """Seconds of a step, and whether they were measured: of the same kind, else with or without teachers."""
        for known in (kind, (*kind[:-1], not kind[-1])):
            if known in self.steps:
                return statistics.median(self.steps[known]), True
        return STEP_S, False

    def run(self, kind: str) -> tuple[float, bool]:
        """Seconds of a run, and whether they were measured."""
        known = self.seconds.get(kind)
        return (statistics.median(known), True) if known else (KINDS[kind].seconds, False)

    def size(self, kind: str) -> float:
        """MB on disk."""
        return statistics.median(self.mb[kind]) if self.mb.get(kind) else KINDS[kind].mb


@dataclass(frozen=True)
class Row:
    """A stage of a run."""

    stage: str
    runs: int
    done: int
    seconds: float  # of all runs
    mb: float  # of all runs
    memory_mb: float  # of one
    measured: bool
    used_s: float  # by those that are done

    @property
    def left_s(self) -> float:
        """Seconds of the runs that are not done."""
        return self.seconds * (self.runs - self.done) / max(1, self.runs)


@dataclass(frozen=True)
class Cost:
    """What a run costs, by stage."""

    rows: Sequence[Row]
    cores: int

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
        return sum(row.mb * (row.runs - row.done) / max(1, row.runs) for row in self.rows) / 1000

    @property
    def text(self) -> str:
        """The cost in two sentences."""
        count = {row.stage: row for row in self.rows}
        assumed = [row.stage for row in self.rows if not row.measured and row.runs > row.done]
        how = f"assumed for {', '.join(assumed)}: none was run here" if assumed else "by the times measured here"
        students, teachers = count["students"], count["teachers"]
        return (
            f"{students.runs} students, {students.done} of them trained already, and {teachers.runs - teachers.done} "
            f"teachers to train: about {self.hours:.1f} hours of one core, {self.wall_hours:.1f} hours on {self.cores} "
            f"cores ({how}), and {self.gb:.1f} GB."
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
                "measured": "yes" if row.measured else "assumed",
                "a job asks for": _asked(row),
            }
            for row in self.rows
            if row.runs
        ).set_index("stage")
        total = table[["runs", "done", "hours of one core", "used", "GB"]].sum()
        table.loc["all"] = total.to_dict() | {"measured": "", "a job asks for": ""}
        return table.astype({"runs": int, "done": int}).round({"hours of one core": 2, "used": 2, "GB": 2})

    def require(self, budget_h: float) -> None:
        """Refuse a run that is longer than the budget."""
        if self.wall_hours > budget_h:
            raise UserError(
                f"{self.text} That is beyond BUDGET_H={budget_h:g}; take fewer folds, seeds or levels, or more hours"
            )


def cost(graph: Graph, cores: int = 2, measured: Measured | None = None) -> Cost:
    """What a run of the graph of stages costs, and what is done of it."""
    known = measured or Measured.here(repository_root() / graph.first.outputs)
    counted = _Counted(known, {stage: [0, 0, 0.0, 0.0, 0.0, True] for stage in STAGES})
    first, layout, teachers = graph.first, Layout(graph.first), {}
    counted.add("corpus", layout.corpus)
    counted.add("tokens", layout.tokens)
    if first.pretrained not in ("from_corpus", "none"):
        counted.add("zero-shot scores", layout.zero_shot)
    if first.pretrained in ("controls", "from_corpus"):
        counted.add("pretraining", layout.pretrained)
    if graph.with_teachers and first.teacher.parent in ("controls", "from_corpus") and not first.teacher.imported:
        counted.add("base model", layout.base_model)
    if graph.with_teachers and first.teacher.of_speakers:
        counted.add("speaker features", layout.speaker_features)
    counted.add("notebook", layout.corpus)
    for fold in graph.folds:
        one = Layout(graph.settings[fold])
        counted.add("baseline", one.baseline)
        if graph.with_teachers:
            counted.add("target report", one.target_report)
            counted.add("logit student", one.logit_student)
        for folder in [one.baseline, *([one.target_report] * 2 if graph.with_teachers else []), one.collapse]:
            counted.add("notebook", folder)
        for name in graph.of_variant:
            params = load(graph.recipe, fold, variant=name)
            if terms.uses_teachers(params.distill) and params.teacher.source == "speakers":
                teachers |= _teachers(Fold.load(graph.recipe, fold, name))
            counted.add("preflight", Layout(params).preflight(graph.seeds[0]))
            for seed in graph.seeds:
                folder = Layout(params).student(seed)
                counted.add("student", folder, _steps(params), _kind_of(params))
                counted.add("scores", folder / "scores")
                counted.add("notebook", folder)
    for folder, params in teachers.items():
        known_folder = folder if isinstance(folder, Path) else Path("/none")
        counted.add("teacher", known_folder, params.teacher.adapt.steps, _teacher_kind(params))
        for kind, part in (("outputs", "training"), ("outputs", "analysis"), ("teacher scores", "scores")):
            counted.add(kind, _part_of(known_folder, kind, part))
        counted.add("parent scores", known_folder / "parent")
    return Cost(counted.rows(), cores)


def probe(graph: Graph, measured: Measured) -> None:
    """Measure the step of every kind of student that was never trained here, by some steps of its control."""
    for name in graph.of_variant:
        params = load(graph.recipe, graph.folds[0], variant=name)
        if measured.step(_kind_of(params))[1]:
            continue
        control, taken = Fold.load(graph.recipe, graph.folds[0], params.distill.control), []
        for steps in PROBE:
            phase = Phase(steps=steps, lr=params.student.phases[-1].lr, warmup_steps=1)
            fold = control.but(student={"phases": (phase,)})
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                fold.train_student(Path(folder), graph.seeds[0])
            taken.append(time.perf_counter() - started)
        measured.steps.setdefault(_kind_of(control.params), []).append((taken[1] - taken[0]) / (PROBE[1] - PROBE[0]))


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


class _Counted(NamedTuple):
    """The runs of every stage: all, done; seconds and MB of all, seconds used; and whether all times were measured."""

    measured: Measured
    stages: dict[str, list]

    def add(self, kind: str, folder: Path, steps: int = 0, training: tuple = ()) -> None:
        """A run: of a training, by the time of its steps."""
        seconds, known = self.measured.run(kind)
        if training:
            seconds, known = self.measured.step(training)
            seconds *= steps
        used = _wall_s(folder)
        row = self.stages[KINDS[kind].stage]
        row[0], row[1] = row[0] + 1, row[1] + (used is not None)
        row[2], row[3] = row[2] + seconds, row[3] + self.measured.size(kind)
        row[4] += (
            0.0 if used is None else seconds if kind == "notebook" else used
        )  # notebooks leave no record of their own
        row[5] = row[5] and known

    def rows(self) -> list[Row]:
        """The rows of the table."""
        memory = self.measured.memory
        return [
            Row(stage, runs, done, seconds, mb, memory.get(stage) or MEMORY_MB, known, used)
            for stage, (runs, done, seconds, mb, used, known) in self.stages.items()
        ]


def _part_of(folder: Path, kind: str, part: str) -> Path:
    """Where a teacher's outputs or scores lie, by its own folder: <root>/teachers/<family>/<name>."""
    if kind != "outputs":
        return folder / part
    *root, _, family, name = folder.parts if len(folder.parts) > 3 else ("none", "", "none", "none")
    return Path(*root) / "logits" / family / name / part


def _asked(row: Row) -> str:
    """Memory and minutes that a job of the stage is to ask for."""
    gb, minutes = SPARE * row.memory_mb / 1000, max(5.0, SPARE * row.seconds / max(1, row.runs) / 60)
    return f"{gb:.1f} GB, {minutes:.0f} min"


def _wall_s(folder: Path) -> float | None:
    try:
        return float(read_json(folder / "run.json")["wall_s"])
    except (OSError, KeyError, ValueError):
        return None


def _size_mb(folder: Path) -> float:
    """The files of a stage, without the folders of other stages within it."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6


def _kind(parameters: Mapping) -> tuple:
    """The kind of a training, by its record."""
    if "student" in parameters:
        student = parameters["student"]
        taught = bool(parameters["distill"].get("alpha"))
        frozen = all(phase["freeze_encoder"] for phase in student["phases"])
        return "student", student["encoder"], student["decoder_layers"], student["batch_size"], frozen, taught
    return "teacher", parameters["encoder"], parameters["decoder_layers"], parameters["adapt"]["batch_size"], False


def _kind_of(params: Params) -> tuple:
    student, taught = params.student, terms.uses_teachers(params.distill)
    frozen = all(phase.freeze_encoder for phase in student.phases)
    return "student", student.encoder, student.decoder_layers, student.batch_size, frozen, taught


def _teacher_kind(params: Params) -> tuple:
    teacher = params.teacher
    return "teacher", teacher.encoder, teacher.decoder_layers, teacher.adapt.batch_size, False


def _steps(params: Params) -> int:
    """The steps of all phases; an epoch counts as a hundred."""
    return sum(phase.steps if phase.steps is not None else 100 * phase.epochs for phase in params.student.phases)


def _teachers(fold: Fold) -> dict[object, Params]:
    """The teachers of a fold by their folders; before there is a corpus, as many as may be."""
    params, layout = fold.params, fold.layout
    if not (layout.corpus / "run.json").is_file():
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
    measured = Measured.here(repository_root() / graph.first.outputs)
    if options.probe:
        probe(graph, measured)
    found = cost(graph, options.cores, measured)
    print(f"{found.frame.to_string()}\n\n{found.text}")
