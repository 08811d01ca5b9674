"""What runs took and left here: medians over the records (`run.json`) below outputs/, by kind of run.

Of what is trained the time is that of a step, by encoder, decoder, batch and whether teachers are read. Records of the
same recipe count; where there are none, those of other recipes do, which may be of other sizes, and are said to be.
(Of a run that was killed and resumed a record has the last part alone: a median hardly sees it.)
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kdlib.io import read_json
from kdlib.objectives import terms
from kdlib.params import Params

STEP_S = 0.2  # of a training, on one core, where none was measured
HERE, ELSEWHERE, ASSUMED = "this recipe", "other recipes", "assumed"  # in the order of trust
MEMORY_MB = 2500.0


class Kind(NamedTuple):
    """A kind of run: its row of the table, where its records lie below a recipe's folder, and what is assumed."""

    stage: str
    places: tuple[str, ...]
    seconds: float
    mb: float


KINDS = {
    "corpus": Kind("corpus", ("corpus",), 60, 300),
    "tokens": Kind("shared", ("tokens", "*/tokens"), 1, 1),
    "zero-shot scores": Kind("shared", ("zero_shot", "*/zero_shot"), 40, 3),
    "base model": Kind("shared", ("parents/*", "*/parents/*"), 400, 10),
    "pretraining": Kind("shared", ("pretrained", "*/pretrained"), 400, 30),
    "speaker features": Kind("shared", ("speaker_features",), 3, 1),
    "teacher": Kind("teachers", ("teachers/*/*", "*/teachers/*/*"), 30, 10),
    "outputs": Kind("outputs", ("logits/*/*/*", "*/logits/*/*/*"), 10, 10),
    "teacher scores": Kind("outputs", ("teachers/*/*/scores", "*/teachers/*/*/scores"), 15, 2),
    "parent scores": Kind("outputs", ("teachers/*/*/parent", "*/teachers/*/*/parent"), 3, 1),
    "baseline": Kind("folds", ("*/baseline",), 10, 2),
    "target report": Kind("folds", ("*/target_report/*",), 90, 3),
    "logit student": Kind("folds", ("*/logit_student/*",), 20, 2),
    "student": Kind("students", ("*/students/*/seed*",), 120, 25),
    "preflight": Kind("scores", ("*/students/*/preflight*",), 3, 1),
    "scores": Kind("scores", ("*/students/*/seed*/scores",), 12, 2),
    "notebook": Kind("notebooks", (), 20, 1),
}
STAGES = tuple(dict.fromkeys(kind.stage for kind in KINDS.values()))
TRAINED = ("teacher", "base model", "student")


@dataclass
class Measured:
    """What earlier runs took, by recipe."""

    recipe: str = ""  # whose records come first
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # (recipe, kind) -> of a run
    steps: dict[tuple[str, tuple], list[float]] = field(default_factory=dict)  # (recipe, training) -> of a step
    mb: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)  # the largest, by stage

    @classmethod
    def here(cls, outputs: Path, recipe: str = "") -> "Measured":
        """From the records below a folder of outputs."""
        found = cls(recipe)
        for folder in sorted(path for path in outputs.glob("*") if path.is_dir()):
            for kind, known in KINDS.items():
                for path in (one for place in known.places for one in folder.glob(f"{place}/run.json")):
                    found._add(folder.name, kind, path)
            for path in folder.glob("*/students/*/seed*/04_distill.ipynb"):
                found._add_notebook(folder.name, path)
        return found

    def _add(self, recipe: str, kind: str, path: Path) -> None:
        try:
            run, stage = read_json(path), KINDS[kind].stage
            seconds = float(run["wall_s"])
            self.seconds.setdefault((recipe, kind), []).append(seconds)
            self.mb.setdefault(kind, []).append(_size_mb(path.parent))
            self.memory[stage] = max(self.memory.get(stage, 0.0), float(run.get("peak_memory_mb", 0)))
            if kind in TRAINED:
                steps = read_json(path.with_name("model.json"))["steps"]
                training = of_record(kind, run["parameters"])
                self.steps.setdefault((recipe, training), []).append(seconds / max(1, steps))
        except (OSError, KeyError, ValueError, TypeError, AttributeError):
            return  # a run that is going on, or of an earlier version

    def _add_notebook(self, recipe: str, path: Path) -> None:
        """What a student's notebook takes beside training and scores."""
        try:
            total = read_json(path)["metadata"]["papermill"]["duration"]
            own = [read_json(path.parent / part / "run.json")["wall_s"] for part in ("", "scores")]
        except (OSError, KeyError, ValueError, TypeError):
            return
        if total and total > sum(own):  # executed once, with its training
            self.seconds.setdefault((recipe, "notebook"), []).append(total - sum(own))

    def step(self, training: tuple) -> tuple[float, str]:
        """Seconds of a step, and where they were measured: of the same training, else with or without teachers."""
        alike = (training, (*training[:-1], not training[-1]))
        return self._median(self.steps, alike) or (STEP_S, ASSUMED)

    def run(self, kind: str) -> tuple[float, str]:
        """Seconds of a run, and where they were measured."""
        return self._median(self.seconds, (kind,)) or (KINDS[kind].seconds, ASSUMED)

    def _median(self, known: Mapping[tuple, list[float]], wanted: tuple) -> tuple[float, str] | None:
        for name in wanted:
            if (self.recipe, name) in known:
                return statistics.median(known[self.recipe, name]), HERE
        for name in wanted:
            if values := [value for (_, one), some in known.items() if one == name for value in some]:
                return statistics.median(values), ELSEWHERE
        return None

    def size(self, kind: str) -> float:
        """MB on disk."""
        return statistics.median(self.mb[kind]) if self.mb.get(kind) else KINDS[kind].mb


def of_record(kind: str, parameters: Mapping) -> tuple:
    """The kind of a training, by its record."""
    if kind == "student":
        student = parameters["student"]
        frozen = all(phase["freeze_encoder"] for phase in student["phases"])
        size = student["encoder"], student["decoder_layers"], student["batch_size"] * student["accumulate"]
        return kind, *size, frozen, "alpha" in parameters["distill"]
    schedule = parameters["adapt" if kind == "teacher" else "base_training"]
    sizes = (parameters[name] for name in ("encoder", "d_model", "layers", "decoder_layers"))
    return kind, *sizes, schedule["batch_size"], False


def of_params(kind: str, params: Params) -> tuple:
    """The kind of a training, by the recipe."""
    if kind == "student":
        student, taught = params.student, terms.uses_teachers(params.distill)
        frozen = all(phase.freeze_encoder for phase in student.phases)
        return kind, student.encoder, student.decoder_layers, student.batch_size * student.accumulate, frozen, taught
    teacher = params.teacher
    schedule = teacher.adapt if kind == "teacher" else teacher.base_training
    sizes = teacher.encoder, teacher.d_model, teacher.layers, teacher.decoder_layers
    return kind, *sizes, schedule.batch_size, False


def wall_s(folder: Path) -> float | None:
    """Seconds that a finished stage took; none of another."""
    try:
        return float(read_json(folder / "run.json")["wall_s"])
    except (OSError, KeyError, ValueError):
        return None


def _size_mb(folder: Path) -> float:
    """The files of a stage, without the folders of other stages within it."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
