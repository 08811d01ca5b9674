"""Sets of ablations: their cells and controls, effects and interactions, what they cost, and what is said of them."""

import itertools
import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from graph import output, snakemake

from kdlib.errors import UserError
from kdlib.evaluate import ablations
from kdlib.graph import Graph
from kdlib.io import repository_root
from kdlib.params import load
from kdlib.pipeline import Fold
from kdlib.settings.ablation import Ablation
from kdlib.show import ablations as shown
from kdlib.show import plan

TEMPERATURE = {"t2": {}, "t4": {"distill": {"temperature": 4.0}}}
ENCODER = {"free": {}, "frozen": {"student": {"phases": [{"steps": 6, "freeze_encoder": True}]}}}
HEAD = {
    "ctc": {},
    "decoder": {"student": {"decoder_layers": 2}, "distill": {"heads": "decoder", "allow_decoder_kd": True}},
}


def of(factors, cross=(), **more):
    return Ablation(base="ctc_kd", factors=factors, cross=cross, **more)


def variants(ablation):
    return [cell.variant for cell in ablation.cells]


def test_factors_are_varied_one_at_a_time_or_crossed():
    factors = {"temperature": TEMPERATURE, "encoder": ENCODER}
    alone = ["ctc_kd", "ctc_kd+temperature.t4", "ctc_kd+encoder.frozen"]
    assert variants(of(factors)) == alone
    crossed = of(factors, ("temperature", "encoder"))
    assert set(variants(crossed)) == {*alone, "ctc_kd+temperature.t4+encoder.frozen"}
    three = of(factors | {"head": HEAD}, ("temperature", "encoder"))
    assert len(three.cells) == 5  # the third factor is varied alone
    assert three.cells[0].levels == {"temperature": "t2", "encoder": "free", "head": "ctc"}


def test_a_level_that_differs_from_an_unnamed_base():
    ablation = of({"temperature": {"t4": TEMPERATURE["t4"]}})
    assert variants(ablation) == ["ctc_kd", "ctc_kd+temperature.t4"]
    assert ablation.cells[0].levels == {"temperature": "base"}


@pytest.mark.parametrize(
    ("variant", "control"),
    [
        ("ctc_kd", "hard"),
        ("ctc_kd+temperature.t4", "hard"),
        ("ctc_kd+encoder.frozen", "hard+encoder.frozen"),
        ("ctc_kd+temperature.t4+encoder.frozen", "hard+encoder.frozen"),
        ("ctc_kd+head.decoder", "hard+head.decoder.control"),
    ],
)
def test_the_control_is_the_same_student_without_teachers(variant, control):
    ablation = of({"temperature": TEMPERATURE, "encoder": ENCODER, "head": HEAD}, ("temperature", "encoder"))
    overrides = {"ablation": ablation.model_dump(mode="json")}
    cell, its = (load("params/smoke.yaml", "M08", variant=name, overrides=overrides) for name in (variant, control))
    assert cell.distill.control == control
    assert its.distill.control == control  # it is its own
    assert not its.distill.use_teachers
    assert its.student == cell.student
    assert its.distill.heads == cell.distill.heads


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base": "ctc_kt", "factors": {"temperature": TEMPERATURE}},
            "ablation.base: unknown variant 'ctc_kt'.*ctc_kd",
        ),
        (
            {"factors": {"temperature": TEMPERATURE}, "cross": ["temperatur"]},
            "ablation.cross: unknown factor 'temperatur'",
        ),
        ({"factors": {"temperature": {"t4": {"distill": {"temperatur": 4}}}}}, "unknown parameter"),
    ],
)
def test_a_set_with_a_mistake_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        load("params/smoke.yaml", "M08", variant="ctc_kd+temperature.t4", overrides={"ablation": settings})


SETS = sorted({path.stem for path in (repository_root() / "params/ablations").glob("*.yaml")} - {"set", "collapse"})


@pytest.mark.parametrize("name", SETS)
def test_every_shipped_set_has_valid_cells_with_controls(name):
    recipe = repository_root() / "params/ablations" / f"{name}.yaml"
    graph = Graph({"recipe": str(recipe), "folds": ""})
    assert graph.folds == ["M08", "M05"]
    ablation = graph.first.ablation
    assert len(ablation.cells) == len(graph.variants) > 4
    base = graph.of_variant[ablation.base]
    for cell in ablation.cells:
        params = graph.of_variant[cell.variant]
        same = {"variant": True, "variants": True, "distill": {"control"}}
        changed = params.model_dump(exclude=same) != base.model_dump(exclude=same)
        assert changed or cell.variant == ablation.base, f"{cell.variant} varies nothing"
        control = graph.of_variant[params.distill.control]
        assert control.student == params.student, cell.variant
        assert control.distill.control == params.distill.control
        assert control.distill.heads == params.distill.heads
        assert not control.distill.use_teachers
        assert control.fold == params.fold


def test_snakemake_draws_the_graph_of_a_set():
    """Settings with braces, as PHOENIX's file names have them, are no wildcards of its rules."""
    recipe = repository_root() / "params/ablations/temperature.yaml"
    run = snakemake(recipe, "folds=", "--dry-run", "--quiet", "host", "--", "ablations")
    assert run.returncode == 0, output(run)
    assert "ablation_notebook" in output(run)


# effects, of systems whose words are right by chance


def system(rng, share, *, seeds=2, speakers=("A", "B"), utterances=200):
    rows = [
        (f"{speaker}_{number}", speaker, "WORD", "WORD" if rng.random() < share else "OTHER", seed)
        for seed, speaker, number in itertools.product(range(seeds), speakers, range(utterances))
    ]
    return pd.DataFrame(rows, columns=["utt_id", "speaker", "reference", "hypothesis", "seed"])


@pytest.fixture(scope="module")
def crossed():
    return of({"temperature": TEMPERATURE, "encoder": ENCODER}, ("temperature", "encoder"), folds=("A", "B"))


@pytest.fixture(scope="module")
def systems(crossed):
    """Temperature 4 gains .45 with a free encoder, and nothing with a frozen one."""
    rng = np.random.default_rng(0)
    shares = {(("encoder", "free"), ("temperature", "t4")): 0.95}
    return {
        cell.variant: system(rng, shares.get(tuple(sorted(cell.levels.items())), 0.5)) for cell in crossed.cells
    } | {"hard": system(rng, 0.5), "hard+encoder.frozen": system(rng, 0.5)}


def test_effects_and_interactions_are_those_of_the_means(crossed, systems):
    found = {(one.factor, one.level): one for one in ablations.effects(crossed, systems, "wra")}
    assert set(found) == {("temperature", "t4"), ("encoder", "frozen"), ("temperature x encoder", "t4 x frozen")}
    mean = {tuple(cell.levels.values()): (systems[cell.variant].hypothesis == "WORD").mean() for cell in crossed.cells}
    main = (mean["t4", "free"] + mean["t4", "frozen"] - mean["t2", "free"] - mean["t2", "frozen"]) / 2
    both = (mean["t4", "frozen"] - mean["t2", "frozen"]) - (mean["t4", "free"] - mean["t2", "free"])
    assert found["temperature", "t4"].verdict.difference == pytest.approx(main)
    one = found["temperature x encoder", "t4 x frozen"].verdict
    assert one.difference == pytest.approx(both)
    assert one.these_low < both < one.these_high
    assert one.difference < -0.3
    assert one.p < 0.001
    assert found["temperature", "t4"].verdict.a == "t4"
    assert found["temperature", "t4"].verdict.seeds == 4  # two seeds of two pairs of cells


def test_cells_are_compared_with_their_controls(crossed, systems):
    control = {name: "hard+encoder.frozen" if "frozen" in name else "hard" for name in variants(crossed)}
    found = ablations.against_controls(systems, control, "wra")
    assert found["ctc_kd+temperature.t4"].verdict == "better"
    assert found["ctc_kd+temperature.t4"].b == "hard"
    assert ablations.against_controls(systems, {"hard": "hard"}, "wra") == {}


def test_cells_of_other_utterances_or_seeds_are_refused(systems):
    hard = systems["hard"]
    fewer = hard[~hard.utt_id.isin([f"A_{number}" for number in range(10)])]
    with pytest.raises(UserError, match=r"hard and ctc_kd were scored on different utterances \(10 are in one alone"):
        ablations.check_same_utterances({"ctc_kd": systems["ctc_kd"], "hard": fewer})
    with pytest.raises(UserError, match="hard has 1 seeds, ctc_kd 2"):
        ablations.check_same_utterances({"ctc_kd": systems["ctc_kd"], "hard": hard[hard.seed == 0]})


def curve(values, steps=None):
    steps = steps or range(0, 100 * len(values), 100)
    return pd.DataFrame({"step": list(steps), "name": "dev_wra", "value": values})


def test_a_curve_that_still_rises_is_no_flat_one():
    up, best = ablations.rise(curve([0.1, 0.3, 0.4, 0.4, 0.4, 0.41, 0.5]))
    assert up == pytest.approx(0.1)
    assert best == 600
    assert not ablations.Curve("hard", "M08", 1, up, 96, best, 600).flat
    assert ablations.rise(curve([0.1, 0.5, 0.4, 0.4, 0.4, 0.41, 0.3]))[0] == 0.0
    assert ablations.Curve("hard", "M08", 1, 1 / 96, 96, 600, 600).flat
    logged = np.float32([1 / 96, 58 / 96, 59 / 96]).astype(float)  # TensorBoard's precision
    assert ablations.Curve("hard", "M08", 1, ablations.rise(curve(logged))[0], 96, 600, 600).flat
    assert np.isnan(ablations.rise(curve([0.1]))[0])


class Curves(list):
    """Curves of a study that is not trained."""


def study_of(crossed, rises):
    fold = SimpleNamespace(params=SimpleNamespace(held_out="A"))
    control = {name: "hard+encoder.frozen" if "frozen" in name else "hard" for name in variants(crossed)}
    found = [ablations.Curve("hard", "A", seed, up, 100, 500, 600) for seed, up in enumerate(rises, start=1)]
    return SimpleNamespace(ablation=crossed, folds=[fold], seeds=(1, 2), measure="wra", control=control, curves=found)


@pytest.fixture(scope="module")
def results(crossed, systems):
    study = study_of(crossed, [0.0, 0.03])
    verdicts = ablations.against_controls(systems, study.control, "wra")
    return shown.Results(study, "lexicon", systems, verdicts, ablations.effects(crossed, systems, "wra"))


def test_the_paragraph_names_what_is_shown_and_what_is_not(results, crossed, systems):
    text = results.paragraph()
    assert text.startswith("4 cells over temperature and encoder on A (400 utterances; seeds 1, 2; decoder lexicon).")
    assert "1 of 4 cells are better, 0 worse, and for 3 no difference is shown." in text
    assert "The largest difference is that of ctc_kd+temperature.t4: +" in text
    assert "1 of 2 dev curves of controls still rise" in text
    assert "(by up to 3.0 points: hard, A, seed 2)" in text
    flat = shown.Results(study_of(crossed, [0.0]), "lexicon", systems, results.verdicts, results.effects)
    assert "The dev curves of all 1 controls are flat" in flat.paragraph()


def test_the_tables_have_a_row_per_cell_and_per_effect(results):
    assert list(results.table.index) == variants(results.study.ablation)
    assert results.table.loc["ctc_kd+temperature.t4", "verdict"] == "better"
    assert results.effect_table.verdict.tolist()[-1] in ("shown", "not shown")
    assert results.frame["mean"].max() <= 1
    assert list(results.by_speaker.columns) == ["A", "B"]


def test_figures_have_a_row_per_difference_and_no_ranks_of_few_folds(results):
    forest = results.forest()
    assert len(forest.axes[0].get_yticklabels()) == 4 + 3
    assert results.heat_map().axes[0].get_xlabel().startswith("held-out speaker")
    assert "with 6 systems and 1 folds" in results.why_no_ranks
    plt.close("all")


# a set of the smoke recipe, trained


@pytest.fixture(scope="module")
def trained(with_teachers, outputs, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("set") / "smoke.yaml"
    levels = {"t2": {}, "t4": {"distill": {"temperature": 4.0}}}
    ablation = {"base": "ctc_kd", "folds": ["M08"], "factors": {"temperature": levels}}
    settings = {"extends": str(repository_root() / "params/smoke.yaml"), "outputs": str(outputs), "seeds": [1]}
    recipe.write_text(json.dumps(settings | {"ablation": ablation}))
    for name in ("hard", "ctc_kd", "ctc_kd+temperature.t4"):
        Fold.load(recipe, "M08", name).scores(1)
    return recipe


def test_the_notebook_runs_on_a_trained_set(trained, monkeypatch, capsys):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    notebook = nbformat.read(repository_root() / "notebooks/06_ablations.ipynb", 4)
    space: dict = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "06_ablations", "exec"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space["recipe"] = str(trained)
    printed = capsys.readouterr().out
    assert "2 cells, base ctc_kd, folds M08, seeds 1" in printed
    assert "No critical-difference diagram: with 3 systems and 1 folds" in printed
    assert "2 cells over temperature on M08" in printed
    assert (space["study"].out / "forest_lexicon.png").is_file()


def test_the_command_writes_tidy_tables_and_the_paragraph(trained, capsys):
    shown.print_results(str(trained), [])
    out = shown.Study.load(trained).out
    cells = pd.read_csv(out / "cells.csv")
    assert set(cells.cell) == {"ctc_kd", "ctc_kd+temperature.t4"}
    assert set(cells.decoder) == {"lexicon", "greedy"}
    assert pd.read_csv(out / "effects.csv").level.unique().tolist() == ["t4"]
    assert (out / "paragraph.txt").read_text().count("2 cells over temperature") == 2
    assert "verdict" in capsys.readouterr().out


def test_a_plan_counts_what_is_missing_and_a_budget_refuses(trained, capsys):
    graph = Graph({"recipe": str(trained), "folds": ""})
    assert graph.folds == ["M08"]
    students = {row.stage: row for row in plan.cost(graph).rows}["students"]
    assert (students.runs, students.done, students.left_s) == (3, 3, 0)
    more = Graph({"recipe": str(trained), "folds": "M08,", "seeds": "1,2,3"})
    found = plan.cost(more)
    students = {row.stage: row for row in found.rows}["students"]
    assert (students.runs, students.done, students.how) == (9, 3, "this recipe")
    assert 0 < found.hours < 0.2
    with pytest.raises(UserError, match=r"9 students, 3 of them trained already.*beyond BUDGET_H=0.0001; take fewer"):
        found.require(0.0001)
    shown.print_plan(str(trained), [], ["1", "2", "3"], 100.0)
    assert "ctc_kd+temperature.t4" in capsys.readouterr().out


def test_students_that_are_missing_are_named_with_what_trains_them(trained):
    study = shown.Study([Fold.load(trained, "M08", overrides={"seeds": [9]})])
    with pytest.raises(UserError, match=r"no scores in .*seed9/scores; train the set first: make ablations SET="):
        study.systems("lexicon")
