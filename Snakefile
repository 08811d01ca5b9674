"""The graph of stages and folds; a rule is one papermill call or, where a job is no notebook, one command of kdlib.

    snakemake --profile profiles/local --config recipe=params/demo.yaml folds=M08,M05

kdlib's stages decide by parameters, inputs and code whether there is work to do; the rules decide which notebooks to
execute. A rule's outputs are the executed notebook and its figures, or a mark that a command was run, never an artefact:
Snakemake removes outputs before a job, and artefacts must survive that. Saving a notebook with outputs triggers
nothing: its code cells count, not its date. What a job waits for is in kdlib/graph.py.
"""

import json
import os
import sys
import time
from pathlib import Path

from kdlib import console
from kdlib.errors import UserError
from kdlib.graph import COMMANDS, FOLD_STAGES, SHARED, Graph, resources

try:
    RUN = Graph(config)
except UserError as error:
    sys.exit(f"\n{error}\n")
START, OUT, LOGS, KDLIB = time.time(), RUN.out, f"{RUN.out}/logs", "python -m kdlib"
COMPARED = f"overrides: {{compare: [{', '.join(RUN.variants)}], seeds: [{', '.join(map(str, RUN.seeds))}]}}"

os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # .venv, activated or not
os.environ["FIRST_FOLD"] = RUN.folds[0]  # the fold that 00_corpus shows; not a reason to run it again
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# A job's output is filtered; its warnings are kept for the end of the run.
FOLLOW = f" 2>&1 | {KDLIB} follow {{params.label:q}} --warnings {{log}}.warnings"
FOLLOW_COMMAND = FOLLOW + " --traceback {log}"
END = FOLLOW + f" || {{{{ {KDLIB} explain {{log}}; exit 1; }}}}; cp {{log}} {{output.notebook}}"
NOTEBOOK = (f"papermill {{input.notebook}} {{log}} --cwd notebooks --no-progress-bar --log-output --log-level INFO"
            f" -r recipe {RUN.recipe!r} -r held_out ")


rule folds:
    input:
        [RUN.notebook(fold, name) for fold in RUN.folds for name in ("01_baseline", "05_collapse")],
        [RUN.notebook(fold, name) for fold in RUN.with_teachers for name in ("02_teachers", "03_logits")],
        [name for fold in RUN.folds for name in RUN.students(fold)],


# `make collapse`: the students of a study have no notebooks of their own.
rule study:
    input:
        [RUN.notebook(fold, "05_collapse") for fold in RUN.folds],


# `make ablations`: the students of a set, and their notebook.
rule ablations:
    input:
        f"{OUT}/ablations/06_ablations.ipynb",


rule ablation_notebook:
    input:
        [name for fold in RUN.folds for name in RUN.students(fold)],
        notebook=ancient("notebooks/06_ablations.ipynb"),
    output:
        report(f"{OUT}/ablations/forest_lexicon.png", category="ablations"),
        notebook=f"{OUT}/ablations/06_ablations.ipynb",
    log:
        f"{LOGS}/06_ablations.ipynb",
    resources:
        **resources("notebook"),
    params:
        label="06_ablations",
        settings=lambda wildcards: RUN.settings_of("all"),
        code=RUN.code_of("06_ablations"),
        folds=f"folds: {json.dumps(RUN.folds)}",
    shell:
        NOTEBOOK.replace(" -r held_out ", " -y {params.folds:q}") + END


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
        [report(f"{OUT}/figures/{figure}.png", category="corpus") for figure in ("durations", "spectrograms")],
        notebook=f"{OUT}/corpus/00_corpus.ipynb",
    log:
        f"{LOGS}/00_corpus.ipynb",
    resources:
        **resources("corpus"),
    params:
        label="00_corpus",
        settings=RUN.corpus,
        code=RUN.code_of("00_corpus"),
    shell:
        NOTEBOOK + "$FIRST_FOLD" + END


for name, (command, _) in COMMANDS.items():
    of = f"/{len(RUN.parts)}" if name in SHARED else ""

    rule:
        name: f"some_{name}"
        input:
            lambda wildcards, name=name: RUN.before_command(name, wildcards.owner, wildcards.part),
        output:
            touch(f"{OUT}/jobs/{name}_{{owner}}_{{part}}"),
        priority: 3
        log:
            f"{LOGS}/{name}_{{owner}}_{{part}}",
        resources:
            **resources(name),
        params:
            label=lambda wildcards, name=name, of=of: f"{name} {wildcards.owner}" + f" {wildcards.part}{of}" * bool(of),
            command=command,  # a shell command is filled in when it runs, and this loop is over then
            share=lambda wildcards, of=of: f"--share {wildcards.part}{of}" * bool(of),
            folds=lambda wildcards: ",".join(RUN.folds) if wildcards.owner == "all" else wildcards.owner,
            settings=lambda wildcards: RUN.settings_of(wildcards.owner),
            code=RUN.code,
        shell:
            f"{KDLIB} {{params.command}} {RUN.recipe!r} {{params.folds:q}} {{params.share}}" + FOLLOW_COMMAND


for name, (folder, figures, rank) in FOLD_STAGES.items():
    figures = RUN.figures(name)

    rule:
        name: name[3:]
        input:
            lambda wildcards, name=name: RUN.before_notebook(name, wildcards.held_out),
            notebook=ancient(f"notebooks/{name}.ipynb"),
        output:
            [
                report(f"{OUT}/{{held_out}}/figures/{figure}.png", category=name[3:], subcategory="{held_out}")
                for figure in figures
            ],
            notebook=RUN.notebook("{held_out}", name),
        priority: rank
        log:
            f"{LOGS}/{name}_{{held_out}}.ipynb",
        resources:
            **resources("notebook"),
        params:
            label=lambda wildcards, name=name: f"{wildcards.held_out}/{name}",
            overrides=COMPARED if name == "05_collapse" and not RUN.study else "overrides: {}",
            settings=lambda wildcards: RUN.settings_of(wildcards.held_out),
            code=RUN.code_of(name),
        shell:
            NOTEBOOK + "{wildcards.held_out:q} -y {params.overrides:q}" + END


rule students:
    input:
        lambda wildcards: RUN.before_student(wildcards.held_out, wildcards.variant, wildcards.seed),
        notebook=ancient("notebooks/04_distill.ipynb"),
    output:
        report(
            f"{OUT}/{{held_out}}/figures/training_{{variant}}_seed{{seed}}.png", category="students", subcategory="{held_out}"
        ),
        notebook=RUN.student("{held_out}", "{variant}", "{seed}"),
    priority: 4
    log:
        f"{LOGS}/04_distill_{{held_out}}_{{variant}}_{{seed}}.ipynb",
    resources:
        **resources("students", lambda wildcards: RUN.processes(wildcards.variant)),
    params:
        label=lambda wildcards: f"{wildcards.held_out}/04_distill {wildcards.variant} {wildcards.seed}",
        settings=lambda wildcards: RUN.settings_of(wildcards.held_out),
        code=RUN.code_of("04_distill"),
    shell:
        NOTEBOOK + "{wildcards.held_out:q} -r variant {wildcards.variant:q} -p seed {wildcards.seed}" + END


rule some_students:
    input:
        RUN.notebook("{held_out}", "01_baseline"),
        lambda wildcards: RUN.marks("outputs", wildcards.held_out),
    output:
        touch(f"{OUT}/jobs/students_{{held_out}}_{{part}}"),
    log:
        f"{LOGS}/students_{{held_out}}_{{part}}",
    resources:
        **resources("students", lambda wildcards: RUN.processes()),
    params:
        label=lambda wildcards: f"students {wildcards.held_out} {wildcards.part}/{len(RUN.parts)}",
        settings=lambda wildcards: RUN.settings_of(wildcards.held_out),
        code=RUN.code,
    shell:
        f"{KDLIB} students {RUN.recipe!r} {{wildcards.held_out:q}} --share {{wildcards.part}}/{len(RUN.parts)}" + FOLLOW_COMMAND


def end():
    """Print the warnings of the jobs of this run together."""
    if lines := console.warnings_since(Path(LOGS), START):
        print("\n".join(["", f"Warnings of this run ({len(lines)}):", *lines]))


onsuccess:
    end()


onerror:
    end()
