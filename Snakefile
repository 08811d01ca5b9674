"""The graph of stages and folds; every rule is one papermill call.

    snakemake --profile profiles/local --config recipe=params/demo.yaml folds=M08,M05

kdlib's stages decide by parameters, inputs and code whether there is work to do; the rules decide which notebooks to
execute. A rule's outputs are the executed notebook and its figures, never an artefact: Snakemake removes outputs before
a job, and artefacts must survive that. Saving a notebook with outputs triggers nothing: its code cells count, not its
date.
"""

import os
import sys
from pathlib import Path

from kdlib import params as kd
from kdlib import stage
from kdlib.corpus import prepare
from kdlib.errors import UserError
from kdlib.io import check_writable, resolve_path
from kdlib.models.nemo_files import SHIPPED_MODEL
from kdlib.teachers import base_model, teacher_sets

RECIPE = config.get("recipe", "params/demo.yaml")
FOLDS = [name for name in str(config.get("folds", "M08")).split(",") if name]  # "07,": 07 stays a name
try:
    if FOLDS == ["all"]:
        FOLDS = kd.fold_names(kd.load(RECIPE, "nobody", {"exclude": []}).fold_set)
    if not FOLDS:
        raise UserError(f"no folds: there are no fold files for {RECIPE}; write them with: make folds-for RECIPE={RECIPE}")
    SETTINGS = {held_out: kd.load(RECIPE, held_out) for held_out in FOLDS}
    VARIANTS = [name for name in str(config.get("variants", "")).split(",") if name] or SETTINGS[FOLDS[0]].compare
    for name in VARIANTS:  # and their controls
        kd.load(RECIPE, FOLDS[0], variant=kd.load(RECIPE, FOLDS[0], variant=name).distill.control)
    CORPUS = SETTINGS[FOLDS[0]].model_dump_json(include=prepare.SETTINGS | {"synthetic", "uaspeech", "torgo", "blocks", "seed"})
    CORPUS += prepare.files_fingerprint(SETTINGS[FOLDS[0]])
    check_writable(SETTINGS[FOLDS[0]].folder, "outputs")
except UserError as error:  # refused here, before any work
    sys.exit(f"\n{error}\n")
OUT = os.path.relpath(SETTINGS[FOLDS[0]].folder)
NAMES = ["00_corpus", "01_baseline", "02_teachers", "03_logits", "04_distill", "05_collapse"]
NOTEBOOK = {name: stage.notebook_fingerprint(Path(f"notebooks/{name}.ipynb")) for name in NAMES}
FIRST = SETTINGS[FOLDS[0]]
FILES = [resolve_path(name or "none") for name in (FIRST.manifest, FIRST.lexicon, FIRST.nemo_model, FIRST.tokens.source)]
FILES += [SHIPPED_MODEL, base_model.SHIPPED / "model.safetensors"]
CODE = stage.code_fingerprint(stage.SOURCES) + "".join(map(stage.fingerprint, FILES))
SEEDS = [int(one) for one in str(config.get("seeds", "")).split(",") if one] or list(FIRST.seeds)
STUDY = bool(config.get("study"))  # all students of a recipe are trained by 05_collapse, many per job
PARTS = int(config.get("parts", 2))  # jobs that share the teachers
SHARES = min(PARTS, len(FIRST.compare) * len(FIRST.seeds))  # and the students of a study
# Teachers shared by all folds are trained for all folds at once; those with a base model per fold, per fold.
OWNERS = FOLDS if teacher_sets.teacher_root(FIRST) != FIRST.folder else FOLDS[:1]
SHARE = "" if OWNERS == FOLDS else " of all"  # one fold needs only its own teachers
RUN = ("papermill {input.notebook} {log} --cwd notebooks --no-progress-bar --log-output --log-level INFO"
       " -r recipe {params.recipe:q} -r held_out {params.held_out}")
os.environ["FIRST_FOLD"] = FOLDS[0]  # the fold that 00_corpus shows; not a reason to run it again
END = " 2>&1 | python -m kdlib.console follow {params.label:q} || {{ python -m kdlib.console explain {log}; exit 1; }}; cp {log} {output.notebook}"

os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # .venv, activated or not
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")


def jobs(stem, held_out):
    """The executed notebooks of the jobs that make the teachers, or the stores, of a fold."""
    owner = held_out if held_out in OWNERS else OWNERS[0]
    return [f"{OUT}/{stem}_{owner}_{part}.ipynb" for part in range(1, PARTS + 1)]


def needs_teachers(variant):
    """Whether a variant uses the teachers of 02 and 03; with fewer labels it has its own."""
    params = kd.load(RECIPE, FOLDS[0], variant=variant)
    return params.distill.uses_teachers and params.teacher.backbone != "students" and params.labels == FIRST.labels


def teaching(wildcards):
    """The inputs of a variant's students: the fold's teachers, or the students that teach."""
    params = kd.load(RECIPE, wildcards.held_out, variant=wildcards.variant)
    if params.distill.uses_teachers and params.teacher.backbone == "students":
        names = teacher_sets.teaching_students(params)
        return [f"{OUT}/{wildcards.held_out}/students/{name}/04_distill.ipynb" for name in names]
    if needs_teachers(wildcards.variant):
        return [f"{OUT}/{wildcards.held_out}/target_report/03_logits.ipynb"]
    return [f"{OUT}/{wildcards.held_out}/baseline/01_baseline.ipynb"]


def examined(wildcards):
    """The inputs of a fold's examination: its students or, in a study, the jobs that train them."""
    if STUDY:
        return [f"{OUT}/{wildcards.held_out}/collapse/jobs/05_{part}.ipynb" for part in range(1, SHARES + 1)]
    return expand(
        f"{OUT}/{wildcards.held_out}/students/{{variant}}/seed{{seed}}/04_distill.ipynb", variant=VARIANTS, seed=SEEDS
    )


WITH_TEACHERS = FOLDS if any(needs_teachers(name) for name in VARIANTS) else []


# Teachers come first, because other jobs wait for them; a hard-label student and the baseline fill the gaps.
rule folds:
    input:
        expand(f"{OUT}/{{held_out}}/baseline/01_baseline.ipynb", held_out=FOLDS),
        expand(f"{OUT}/{{held_out}}/target_report/03_logits.ipynb", held_out=WITH_TEACHERS),
        expand(f"{OUT}/{{held_out}}/students/{{variant}}/seed{{seed}}/04_distill.ipynb", held_out=FOLDS, variant=VARIANTS, seed=SEEDS),
        expand(f"{OUT}/{{held_out}}/collapse/05_collapse.ipynb", held_out=FOLDS),


# `make collapse`: the students of a study have no notebooks of their own.
rule study:
    input:
        expand(f"{OUT}/{{held_out}}/collapse/05_collapse.ipynb", held_out=FOLDS),


wildcard_constraints:
    held_out="[^/]+",
    variant="[^/]+",
    seed="[0-9]+",


rule corpus:
    input:
        notebook=ancient("notebooks/00_corpus.ipynb"),
    output:
        report(f"{OUT}/figures/durations.png", category="corpus"),
        report(f"{OUT}/figures/spectrograms.png", category="corpus"),
        notebook=f"{OUT}/corpus/00_corpus.ipynb",
    log:
        f"{OUT}/logs/00_corpus.ipynb",
    params:
        recipe=RECIPE,
        held_out="$FIRST_FOLD",
        label="00_corpus",
        settings=CORPUS,
        code=CODE + NOTEBOOK["00_corpus"],
    shell:
        RUN + END


rule baseline:
    input:
        f"{OUT}/corpus/00_corpus.ipynb",
        notebook=ancient("notebooks/01_baseline.ipynb"),
    output:
        report(f"{OUT}/{{held_out}}/figures/wra_by_speaker.png", category="baseline", subcategory="{held_out}"),
        notebook=f"{OUT}/{{held_out}}/baseline/01_baseline.ipynb",
    priority: 1
    log:
        f"{OUT}/logs/01_baseline_{{held_out}}.ipynb",
    params:
        recipe=RECIPE,
        held_out=lambda wildcards: wildcards.held_out,
        label=lambda wildcards: f"{wildcards.held_out}/01_baseline",
        settings=lambda wildcards: SETTINGS[wildcards.held_out].model_dump_json(),
        code=CODE + NOTEBOOK["01_baseline"],
    shell:
        RUN + END


rule some_teachers:
    input:
        f"{OUT}/corpus/00_corpus.ipynb",
        notebook=ancient("notebooks/02_teachers.ipynb"),
    output:
        notebook=f"{OUT}/teachers/jobs/02_{{owner}}_{{part}}.ipynb",
    priority: 3
    log:
        f"{OUT}/logs/02_teachers_{{owner}}_{{part}}.ipynb",
    params:
        recipe=RECIPE,
        held_out=lambda wildcards: wildcards.owner,
        label=lambda wildcards: f"{wildcards.owner}/02_teachers {wildcards.part}/{PARTS}",
        speakers=lambda wildcards: f"{wildcards.part}/{PARTS}{SHARE}",
        settings=lambda wildcards: SETTINGS[wildcards.owner].model_dump_json(),
        code=CODE + NOTEBOOK["02_teachers"],
    shell:
        RUN + " -r speakers {params.speakers:q}" + END


rule some_logits:
    input:
        f"{OUT}/teachers/jobs/02_{{owner}}_{{part}}.ipynb",
        notebook=ancient("notebooks/03_logits.ipynb"),
    output:
        notebook=f"{OUT}/logits/jobs/03_{{owner}}_{{part}}.ipynb",
    priority: 3
    log:
        f"{OUT}/logs/03_logits_{{owner}}_{{part}}.ipynb",
    params:
        recipe=RECIPE,
        held_out=lambda wildcards: wildcards.owner,
        label=lambda wildcards: f"{wildcards.owner}/03_logits {wildcards.part}/{PARTS}",
        speakers=lambda wildcards: f"{wildcards.part}/{PARTS}{SHARE}",
        settings=lambda wildcards: SETTINGS[wildcards.owner].model_dump_json(),
        code=CODE + NOTEBOOK["03_logits"],
    shell:
        RUN + " -r speakers {params.speakers:q}" + END


rule teachers:
    input:
        lambda wildcards: jobs("teachers/jobs/02", wildcards.held_out),
        notebook=ancient("notebooks/02_teachers.ipynb"),
    output:
        report(f"{OUT}/{{held_out}}/figures/teacher_matrix.png", category="teachers", subcategory="{held_out}"),
        notebook=f"{OUT}/{{held_out}}/teachers/02_teachers.ipynb",
    priority: 2
    log:
        f"{OUT}/logs/02_teachers_{{held_out}}.ipynb",
    params:
        recipe=RECIPE,
        held_out=lambda wildcards: wildcards.held_out,
        label=lambda wildcards: f"{wildcards.held_out}/02_teachers",
        settings=lambda wildcards: SETTINGS[wildcards.held_out].model_dump_json(),
        code=CODE + NOTEBOOK["02_teachers"],
    shell:
        RUN + END


rule logits:
    input:
        f"{OUT}/{{held_out}}/teachers/02_teachers.ipynb",
        lambda wildcards: jobs("logits/jobs/03", wildcards.held_out),
        notebook=ancient("notebooks/03_logits.ipynb"),
    output:
        report(f"{OUT}/{{held_out}}/figures/aggregates.png", category="teachers", subcategory="{held_out}"),
        report(f"{OUT}/{{held_out}}/figures/spikes.png", category="teachers", subcategory="{held_out}"),
        notebook=f"{OUT}/{{held_out}}/target_report/03_logits.ipynb",
    priority: 2
    log:
        f"{OUT}/logs/03_logits_{{held_out}}.ipynb",
    params:
        recipe=RECIPE,
        held_out=lambda wildcards: wildcards.held_out,
        label=lambda wildcards: f"{wildcards.held_out}/03_logits",
        settings=lambda wildcards: SETTINGS[wildcards.held_out].model_dump_json(),
        code=CODE + NOTEBOOK["03_logits"],
    shell:
        RUN + END


rule students:
    input:
        teaching,
        notebook=ancient("notebooks/04_distill.ipynb"),
    output:
        report(
            f"{OUT}/{{held_out}}/figures/training_{{variant}}_seed{{seed}}.png", category="students", subcategory="{held_out}"
        ),
        notebook=f"{OUT}/{{held_out}}/students/{{variant}}/seed{{seed}}/04_distill.ipynb",
    log:
        f"{OUT}/logs/04_distill_{{held_out}}_{{variant}}_{{seed}}.ipynb",
    params:
        recipe=RECIPE,
        held_out=lambda wildcards: wildcards.held_out,
        variant=lambda wildcards: wildcards.variant,
        seed=lambda wildcards: wildcards.seed,
        label=lambda wildcards: f"{wildcards.held_out}/04_distill {wildcards.variant} {wildcards.seed}",
        settings=lambda wildcards: SETTINGS[wildcards.held_out].model_dump_json(),
        code=CODE + NOTEBOOK["04_distill"],
    shell:
        RUN + " -r variant {params.variant} -p seed {params.seed}" + END


rule some_students:
    input:
        lambda wildcards: jobs("logits/jobs/03", wildcards.held_out),
        notebook=ancient("notebooks/05_collapse.ipynb"),
    output:
        notebook=f"{OUT}/{{held_out}}/collapse/jobs/05_{{part}}.ipynb",
    log:
        f"{OUT}/logs/05_collapse_{{held_out}}_{{part}}.ipynb",
    params:
        recipe=RECIPE,
        held_out=lambda wildcards: wildcards.held_out,
        label=lambda wildcards: f"{wildcards.held_out}/05_collapse {wildcards.part}/{SHARES}",
        part=lambda wildcards: f"{wildcards.part}/{SHARES}",
        settings=lambda wildcards: SETTINGS[wildcards.held_out].model_dump_json(),
        code=CODE + NOTEBOOK["05_collapse"],
    shell:
        RUN + " -r part {params.part:q}" + END


rule collapse:
    input:
        examined,
        notebook=ancient("notebooks/05_collapse.ipynb"),
    output:
        report(f"{OUT}/{{held_out}}/figures/examination.png", category="collapse", subcategory="{held_out}"),
        notebook=f"{OUT}/{{held_out}}/collapse/05_collapse.ipynb",
    log:
        f"{OUT}/logs/05_collapse_{{held_out}}.ipynb",
    params:
        recipe=RECIPE,
        held_out=lambda wildcards: wildcards.held_out,
        label=lambda wildcards: f"{wildcards.held_out}/05_collapse",
        overrides="overrides: {}" if STUDY else f"overrides: {{compare: [{', '.join(VARIANTS)}], seeds: [{', '.join(map(str, SEEDS))}]}}",
        settings=lambda wildcards: SETTINGS[wildcards.held_out].model_dump_json(),
        code=CODE + NOTEBOOK["05_collapse"],
    shell:
        RUN + " -y {params.overrides:q}" + END
