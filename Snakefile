"""The graph of stages and folds; a rule is one papermill call or, where a job is no notebook, one command of kdlib.

    snakemake --profile profiles/local --config recipe=params/demo.yaml folds=M08,M05

kdlib's stages decide by parameters, inputs and code whether there is work to do; the rules decide which notebooks to
execute. A rule's outputs are the executed notebook and its figures, or a mark that a command was run, never an artefact:
Snakemake removes outputs before a job, and artefacts must survive that. Saving a notebook with outputs triggers
nothing: its code cells count, not its date.
"""

import os
import sys
import time
from pathlib import Path

from kdlib import console, source_code, stage
from kdlib.corpus import prepare
from kdlib.errors import UserError
from kdlib.io import check_writable, resolve_path
from kdlib.layout import Layout
from kdlib.models.nemo_files import SHIPPED_MODEL
from kdlib.params import fold_names, load, load_recipe
from kdlib.settings.corpus import CorpusSettings
from kdlib.teachers.teacher_sets import student_teachers

RECIPE = config.get("recipe", "params/demo.yaml")
FOLDS = [name for name in str(config.get("folds", "M08")).split(",") if name]  # "07,": 07 stays a name
try:
    if FOLDS == ["all"]:
        FOLDS = fold_names(load_recipe(RECIPE).fold_set)
    if not FOLDS:
        raise UserError(f"no folds: there are no fold files for {RECIPE}; write them with: make folds-for RECIPE={RECIPE}")
    SETTINGS = {held_out: load(RECIPE, held_out) for held_out in FOLDS}
    FIRST = SETTINGS[FOLDS[0]]
    VARIANTS = [name for name in str(config.get("variants", "")).split(",") if name] or list(FIRST.compare)
    VARIANT = {name: load(RECIPE, FOLDS[0], variant=name) for name in VARIANTS}
    CONTROL = {name: VARIANT[name].distill.control for name in VARIANTS}
    VARIANT |= {name: load(RECIPE, FOLDS[0], variant=name) for name in CONTROL.values()}
    CORPUS = FIRST.part(CorpusSettings)
    CORPUS = f"{CORPUS.identity} {FIRST.seed} {prepare.files_fingerprint(CORPUS)}"
    check_writable(Layout(FIRST).recipe, "outputs")
except UserError as error:  # refused here, before any work
    sys.exit(f"\n{error}\n")
OUT = os.path.relpath(Layout(FIRST).recipe)
SEEDS = [int(number) for number in str(config.get("seeds", "")).split(",") if number] or list(FIRST.seeds)
STUDY = bool(config.get("study"))  # the students of a study are trained by a command, many per job
PARTS = range(1, int(config.get("parts", 2)) + 1)  # jobs that share the teachers, and the students of a study
OWNERS = FOLDS if FIRST.teachers_per_fold else ["all"]  # of teachers: every fold, or all folds together
FILES = [resolve_path(name or "none") for name in (FIRST.manifest, FIRST.lexicon, FIRST.nemo_model, FIRST.tokens.source)]
FILES += [SHIPPED_MODEL, SHIPPED_MODEL.with_name("parent") / "model.safetensors"]
CODE = source_code.fingerprint(source_code.SOURCES) + "".join(map(stage.fingerprint, FILES))
START = time.time()
LOGS = f"{OUT}/logs"
KDLIB = "python -m kdlib"
RUN = ("papermill {input.notebook} {log} --cwd notebooks --no-progress-bar --log-output --log-level INFO"
       " -r recipe {params.recipe:q} -r held_out {params.held_out}")
FOLLOW = f" 2>&1 | {KDLIB} follow {{params.label:q}} --warnings {{log}}.warnings"
END = FOLLOW + f" || {{{{ {KDLIB} explain {{log}}; exit 1; }}}}; cp {{log}} {{output.notebook}}"

os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # .venv, activated or not
os.environ["FIRST_FOLD"] = FOLDS[0]  # the fold that 00_corpus shows; not a reason to run it again
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")


def code(name):
    """What makes a notebook's job run again, beside the settings: kdlib's code, its files, and the notebook's code."""
    return CODE + stage.notebook_fingerprint(Path(f"notebooks/{name}.ipynb"))


def settings(wildcards):
    """The settings of a job's fold; of all folds for a job of all."""
    names = [wildcards.get("held_out") or wildcards.get("owner")]
    return [SETTINGS[name].model_dump_json() for name in (FOLDS if names == ["all"] else names)]


def jobs(name):
    """The marks of the jobs that prepare a fold, or make its teachers or their outputs."""
    parts = range(1, COMMANDS[name][2] + 1)
    return lambda wildcards: [f"{OUT}/jobs/{name}_{wildcards.held_out if wildcards.held_out in OWNERS else 'all'}_{part}" for part in parts]


def teaches(variant):
    """Whether a variant uses the teachers of 02 and 03; with fewer labels it has its own."""
    params = VARIANT[variant]
    return params.distill.uses_teachers and params.teacher.backbone != "students" and params.labels == FIRST.labels


def needed(wildcards):
    """What a student's job waits for: the fold's teachers, students that teach, and its control's job."""
    fold, variant = f"{OUT}/{wildcards.held_out}", wildcards.variant
    params = VARIANT[variant] if variant in VARIANT else load(RECIPE, FOLDS[0], variant=variant)
    names = [f"{fold}/baseline/01_baseline.ipynb"]
    if params.distill.uses_teachers and params.teacher.backbone == "students":
        names += [f"{fold}/students/{name}/04_distill.ipynb" for name in student_teachers(params.teacher)]
    elif variant in VARIANT and teaches(variant):
        names += [f"{fold}/target_report/03_logits.ipynb"]
    if params.distill.control != variant:
        names += [f"{fold}/students/{params.distill.control}/seed{wildcards.seed}/04_distill.ipynb"]
    return names


def examined(wildcards):
    """What a fold's examination waits for: its students or, in a study, the jobs that train them."""
    if STUDY:
        return [f"{OUT}/jobs/students_{wildcards.held_out}_{part}" for part in PARTS]
    return expand(f"{OUT}/{wildcards.held_out}/students/{{variant}}/seed{{seed}}/04_distill.ipynb", variant=VARIANTS, seed=SEEDS)


WITH_TEACHERS = FOLDS if any(map(teaches, VARIANTS)) else []
# job: command, what it waits for; jobs of several parts share the work
COMMANDS = {
    "prepare": ("prepare", f"{OUT}/corpus/00_corpus.ipynb", 1),
    "base": ("prepare --teachers", f"{OUT}/jobs/prepare_{{owner}}_1", 1),
    "teachers": ("teachers", f"{OUT}/jobs/base_{{owner}}_1", len(PARTS)),
    "outputs": ("outputs", f"{OUT}/jobs/teachers_{{owner}}_{{part}}", len(PARTS)),
}
# notebook: folder, what it waits for, figures of the report, priority. Teachers come first, because other jobs wait.
FOLD_STAGES = {
    "01_baseline": ("baseline", jobs("prepare"), ["wra_by_speaker"], 1),
    "02_teachers": ("teachers", jobs("teachers"), ["teacher_matrix"], 2),
    "03_logits": ("target_report", jobs("outputs"), ["aggregates", "spikes"], 2),
    "05_collapse": ("collapse", examined, ["examination"], 0),
}


rule folds:
    input:
        expand(f"{OUT}/{{held_out}}/baseline/01_baseline.ipynb", held_out=FOLDS),
        expand(f"{OUT}/{{held_out}}/teachers/02_teachers.ipynb", held_out=WITH_TEACHERS),
        expand(f"{OUT}/{{held_out}}/target_report/03_logits.ipynb", held_out=WITH_TEACHERS),
        expand(f"{OUT}/{{held_out}}/students/{{variant}}/seed{{seed}}/04_distill.ipynb", held_out=FOLDS, variant=VARIANTS, seed=SEEDS),
        expand(f"{OUT}/{{held_out}}/collapse/05_collapse.ipynb", held_out=FOLDS),


# `make collapse`: the students of a study have no notebooks of their own.
rule study:
    input:
        expand(f"{OUT}/{{held_out}}/collapse/05_collapse.ipynb", held_out=FOLDS),


wildcard_constraints:
    held_out="[^/]+",
    owner="[^/]+",
    variant="[^/]+",
    part="[0-9]+",
    seed="[0-9]+",


rule corpus:
    input:
        notebook=ancient("notebooks/00_corpus.ipynb"),
    output:
        report(f"{OUT}/figures/durations.png", category="corpus"),
        report(f"{OUT}/figures/spectrograms.png", category="corpus"),
        notebook=f"{OUT}/corpus/00_corpus.ipynb",
    log:
        f"{LOGS}/00_corpus.ipynb",
    params:
        recipe=RECIPE,
        held_out="$FIRST_FOLD",
        label="00_corpus",
        settings=CORPUS,
        code=code("00_corpus"),
    shell:
        RUN + END


for name, (command, waits_for, parts) in COMMANDS.items():

    rule:
        name: f"some_{name}"
        input:
            waits_for,
        output:
            touch(f"{OUT}/jobs/{name}_{{owner}}_{{part}}"),
        priority: 3
        log:
            f"{LOGS}/{name}_{{owner}}_{{part}}",
        params:
            label=lambda wildcards, name=name, parts=parts: f"{name} {wildcards.owner} {wildcards.part}/{parts}",
            folds=lambda wildcards: ",".join(FOLDS if wildcards.owner == "all" else [wildcards.owner]),
            settings=settings,
            code=CODE,
        shell:
            f"{KDLIB} {command} {RECIPE!r} {{params.folds:q}}" + f" --share {{wildcards.part}}/{parts}" * (parts > 1) + FOLLOW


for name, (folder, waits_for, figures, rank) in FOLD_STAGES.items():

    rule:
        name: name[3:]
        input:
            waits_for,
            notebook=ancient(f"notebooks/{name}.ipynb"),
        output:
            [report(f"{OUT}/{{held_out}}/figures/{figure}.png", category=name[3:], subcategory="{held_out}") for figure in figures],
            notebook=f"{OUT}/{{held_out}}/{folder}/{name}.ipynb",
        priority: rank
        log:
            f"{LOGS}/{name}_{{held_out}}.ipynb",
        params:
            recipe=RECIPE,
            held_out=lambda wildcards: wildcards.held_out,
            label=lambda wildcards, name=name: f"{wildcards.held_out}/{name}",
            overrides="overrides: {}" if STUDY or name != "05_collapse" else f"overrides: {{compare: [{', '.join(VARIANTS)}], seeds: [{', '.join(map(str, SEEDS))}]}}",
            settings=settings,
            code=code(name),
        shell:
            RUN + " -y {params.overrides:q}" + END


rule students:
    input:
        needed,
        notebook=ancient("notebooks/04_distill.ipynb"),
    output:
        report(f"{OUT}/{{held_out}}/figures/training_{{variant}}_seed{{seed}}.png", category="students", subcategory="{held_out}"),
        notebook=f"{OUT}/{{held_out}}/students/{{variant}}/seed{{seed}}/04_distill.ipynb",
    log:
        f"{LOGS}/04_distill_{{held_out}}_{{variant}}_{{seed}}.ipynb",
    params:
        recipe=RECIPE,
        held_out=lambda wildcards: wildcards.held_out,
        label=lambda wildcards: f"{wildcards.held_out}/04_distill {wildcards.variant} {wildcards.seed}",
        settings=settings,
        code=code("04_distill"),
    shell:
        RUN + " -r variant {wildcards.variant:q} -p seed {wildcards.seed}" + END


rule some_students:
    input:
        f"{OUT}/{{held_out}}/baseline/01_baseline.ipynb",
        jobs("outputs"),
    output:
        touch(f"{OUT}/jobs/students_{{held_out}}_{{part}}"),
    log:
        f"{LOGS}/students_{{held_out}}_{{part}}",
    params:
        label=lambda wildcards: f"students {wildcards.held_out} {wildcards.part}/{len(PARTS)}",
        settings=settings,
        code=CODE,
    shell:
        f"{KDLIB} students {RECIPE!r} {{wildcards.held_out:q}} --share {{wildcards.part}}/{len(PARTS)}" + FOLLOW


def end():
    """The warnings of the jobs of this run, together."""
    if lines := console.warnings_since(Path(LOGS), START):
        print("\n".join(["", f"Warnings of this run ({len(lines)}):", *lines]))


onsuccess:
    end()


onerror:
    end()
