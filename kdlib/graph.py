"""What a run of the graph of stages consists of: its folds, students and jobs, and what each job waits for.

The Snakefile turns this into rules; nothing here takes longer than reading the recipe.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdlib import source_code, stage
from kdlib.corpus import prepare
from kdlib.errors import UserError, nearest
from kdlib.io import check_writable, resolve_path
from kdlib.layout import Layout
from kdlib.models.nemo_files import SHIPPED_MODEL
from kdlib.objectives import terms
from kdlib.params import GIVEN, fold_names, load, load_recipe
from kdlib.settings.corpus import CorpusSettings

COMMANDS = {  # job -> its command of kdlib, and the job before it; those in SHARED are split into parts
    "prepare": ("prepare", "corpus"),
    "base": ("prepare --teachers", "prepare"),
    "teachers": ("teachers", "base"),
    "outputs": ("outputs", "teachers"),
}
SHARED = ("teachers", "outputs")
FOLD_STAGES = {  # notebook -> its folder, figures of the report, priority: first what students wait for
    "01_baseline": ("baseline", ["wra_by_speaker"], 5),
    "02_teachers": ("teachers", ["teacher_matrix"], 1),
    "03_logits": ("target_report", ["aggregates", "spikes"], 1),
    "05_collapse": ("collapse", ["examination"], 0),
}
# What a job asks of a cluster: memory in MB, and minutes; another attempt gets as much more. Profiles override it.
RESOURCES = {
    "corpus": (4000, 60),
    "prepare": (4000, 120),
    "base": (6000, 600),
    "teachers": (6000, 600),
    "outputs": (6000, 240),
    "notebook": (6000, 60),
    "students": (6000, 600),
}
STAGES = ("corpus", "baseline", "teachers", "logits", "students", "collapse")  # where a run can stop


class Graph:
    """A run of some folds, variants and seeds of a recipe; a mistake in them is refused here, before any work."""

    def __init__(self, config: Mapping) -> None:
        self.recipe = config.get("recipe", "params/demo.yaml")
        _check_stage(config.get("until", ""))
        named = _names(config.get("folds", "M08") or "")  # "07,": 07 stays a name
        self.folds = named_folds(self.recipe, named or list(load_recipe(self.recipe).ablation.folds))
        self.settings = {held_out: load(self.recipe, held_out) for held_out in self.folds}
        self.first = first = self.settings[self.folds[0]]
        self.variants = _names(config.get("variants", "")) or list(first.compare)
        grouped = [first.ensemble(name) for name in _names(config.get("ensembles", ""))]
        self.members = [pair for one in grouped for pair in itertools.product(one.variants, one.seeds)]
        self.of_variant = {}
        for name in dict.fromkeys([*self.variants, *(variant for variant, _ in self.members)]):
            self.of_variant[name] = load(self.recipe, self.folds[0], variant=name)
            control = self.of_variant[name].distill.control
            self.of_variant.setdefault(control, load(self.recipe, self.folds[0], variant=control))
        self.seeds = [int(seed) for seed in _names(config.get("seeds", ""))] or list(first.seeds)
        self.study = bool(config.get("study"))  # a study's students are trained by a command, many per job
        self.parts = list(range(1, int(config.get("parts", 2)) + 1))  # jobs that share work
        self.owners = self.folds if first.teachers_per_fold else ["all"]  # of teachers: each fold, or all together
        self.with_teachers = self.folds if any(map(self._taught, self.variants)) else []
        layout = Layout(first)
        check_writable(layout.recipe, "outputs")
        self.out = os.path.relpath(layout.recipe)
        corpus = first.part(CorpusSettings)
        self.corpus = f"{corpus.identity} {first.seed} {prepare.files_fingerprint(corpus)}"
        named = (first.manifest, first.lexicon, first.nemo_model, first.tokens.source)
        files = [*(resolve_path(name or "none") for name in named), SHIPPED_MODEL]
        others = {params.teacher.folder for params in (first, *self.of_variant.values()) if params.teacher.folder}
        self.code = source_code.fingerprint(source_code.SOURCES) + "".join(map(stage.fingerprint, files))
        self.code += "".join(_sizes_and_times(resolve_path(name)) for name in (*sorted(others), first.tokens.source))

    def code_of(self, notebook: str) -> str:
        """What makes a notebook's job run again, beside the settings: kdlib's code and files, and its own code."""
        return self.code + stage.notebook_fingerprint(Path(f"notebooks/{notebook}.ipynb"))

    def settings_of(self, fold: str) -> list[str]:
        """The settings that a job of a fold, or of all folds, depends on."""
        return [self.settings[name].model_dump_json() for name in (self.folds if fold == "all" else [fold])]

    def figures(self, name: str) -> list[str]:
        """The figures of a fold's notebook for the report; without a pretrained model there are no zero-shot scores."""
        return [] if name == "01_baseline" and self.first.pretrained == "none" else FOLD_STAGES[name][1]

    def notebook(self, held_out: str, name: str) -> str:
        """The executed notebook of a fold."""
        return f"{self.out}/{held_out}/{FOLD_STAGES[name][0]}/{name}.ipynb"

    def student(self, held_out: str, variant: str, seed: object) -> str:
        """The executed notebook of a student."""
        return f"{self.out}/{held_out}/students/{variant}/seed{seed}/04_distill.ipynb"

    def students(self, held_out: str) -> list[str]:
        """The executed notebooks of a fold's students, the members of ensembles among them."""
        pairs = dict.fromkeys([*itertools.product(self.variants, self.seeds), *self.members])
        return [self.student(held_out, *pair) for pair in pairs]

    def marks(self, job: str, owner: str) -> list[str]:
        """The marks that the jobs of a command leave, for a fold or for all."""
        owner = owner if owner in self.owners else "all"
        return [f"{self.out}/jobs/{job}_{owner}_{part}" for part in (self.parts if job in SHARED else [1])]

    def before_command(self, job: str, owner: str, part: str) -> list[str]:
        """What a command's job waits for; a share of the outputs, for the same share of the teachers."""
        before = COMMANDS[job][1]
        if before == "corpus":
            return [f"{self.out}/corpus/00_corpus.ipynb"]
        return [f"{self.out}/jobs/{before}_{owner}_{part}"] if before in SHARED else self.marks(before, owner)

    def before_notebook(self, name: str, held_out: str) -> list[str]:
        """What a fold's notebook waits for."""
        if name == "05_collapse":
            share = [f"{self.out}/jobs/students_{held_out}_{part}" for part in self.parts]
            return share if self.study else self.students(held_out)
        return self.marks({"01_baseline": "prepare", "02_teachers": "teachers", "03_logits": "outputs"}[name], held_out)

    def before_student(self, held_out: str, variant: str, seed: str) -> list[str]:
        """What a student's notebook waits for: the baseline, teachers or students that teach, and its control."""
        params = self.of_variant.get(variant) or load(self.recipe, held_out, variant=variant)
        before = [self.notebook(held_out, "01_baseline")]
        before += [self.student(held_out, *pair) for pair in params.learns_from(int(seed))]
        if variant in self.of_variant and self._taught(variant):
            selects = params.aggregation.method == "auto"  # by the report of 03, which is made once
            before += [self.notebook(held_out, "03_logits")] if selects else self.marks("outputs", held_out)
        if params.distill.control != variant:
            before += [self.student(held_out, params.distill.control, seed)]
        return before

    def processes(self, variant: str = "") -> int:
        """How many processes train a student: one for each device; by default the most of the run's students."""
        known = [self.of_variant[variant]] if variant in self.of_variant else self.of_variant.values()
        return max(1 if params.adapt else params.student.devices for params in known)

    def _taught(self, variant: str) -> bool:
        """True if a variant uses the teachers of 02 and 03; with fewer labels it has its own."""
        params = self.of_variant[variant]
        of_speakers = params.teacher.source != "students" and params.labels == self.first.labels
        return terms.uses_teachers(params.distill) and of_speakers


def _sizes_and_times(folder: Path) -> str:
    """What tells whether files of other code have changed: a folder's, at most four levels deep."""
    found = [path for depth in range(1, 5) for path in sorted(folder.glob("/".join(["*"] * depth))) if path.is_file()]
    return " ".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in found)


def resources(job: str, processes: Callable[[Any], int] = lambda wildcards: 1) -> dict[str, Callable[..., int]]:
    """The resources of a job as Snakemake takes them, of the first attempt and of later ones; memory by process."""
    memory, minutes = RESOURCES[job]
    return {
        "mem_mb": lambda wildcards, attempt: memory * processes(wildcards) * attempt,
        "runtime": lambda wildcards, attempt: minutes * attempt,
    }


def named_folds(recipe: str, names: list[str]) -> list[str]:
    """The folds of a run: those that are named, or all; the default ones of the Makefile are of UA-Speech."""
    known = fold_names(load_recipe(recipe).fold_set)
    if not known and names != [GIVEN]:
        raise UserError(
            f"no folds: there are no fold files for {recipe}; write them with: make folds-for RECIPE={recipe}"
        )
    if names == ["all"]:
        return known
    unknown = [name for name in names if name not in (*known, GIVEN)]
    if unknown or not names:
        found = f"no fold of {unknown[0]!r}{nearest(unknown[0], known)}" if unknown else "none named"
        advice = f"FOLDS={','.join(known[:2])} or FOLDS=all (for make demo: HELD_OUT={known[0]})"
        raise UserError(f"folds of {recipe}: {found}; name its folds: {advice}")
    return names


def _check_stage(until: str) -> None:
    """Refuse to run until a stage that does not exist."""
    if until and until not in (*STAGES, *(f"some_{job}" for job in COMMANDS)):
        hint = nearest(until, list(STAGES))
        stages = f" The stages are {', '.join(STAGES)}" if hint.endswith("?") else ""
        raise UserError(f"UNTIL: there is no stage {until!r}{hint}{stages}")


def _names(text: object) -> list[str]:
    return [name for name in str(text or "").split(",") if name]  # of an empty one Snakemake makes None
