"""What the jobs of a run wait for, so that no two of them make one thing."""

import os
import re
import shutil

import pytest
import yaml

from kdlib.errors import UserError
from kdlib.graph import FOLD_STAGES, STAGES, Graph
from kdlib.io import repository_root


@pytest.fixture
def graph(tmp_path):
    """Runs of the smoke recipe that write into a temporary folder."""

    def of(settings=None, **config):
        recipe = tmp_path / "mine.yaml"
        smoke = yaml.safe_load((repository_root() / "params/smoke.yaml").read_text())
        recipe.write_text(yaml.safe_dump(smoke | {"outputs": str(tmp_path)} | (settings or {})))
        return Graph({"recipe": str(recipe)} | config)

    return of


@pytest.fixture
def fold_files():
    """Fold files of some speakers; they lie in the repository while a test runs."""
    folder = repository_root() / "params/folds" / f"test-graph-{os.getpid()}"

    def of(*names):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.yaml").write_text("fold: {dev: null, exclude: []}\n")
        return folder.name

    yield of
    shutil.rmtree(folder, ignore_errors=True)


def test_a_student_waits_for_its_control_which_waits_for_the_baseline(graph):
    run = graph(folds="M08")
    before = run.before_student("M08", "ctc_kd", "1")
    assert run.student("M08", "hard", 1) in before
    assert set(run.marks("outputs", "M08")) <= set(before)
    assert run.notebook("M08", "03_logits") not in before  # it may be made at the same time
    selected = graph({"aggregation": {"method": "auto"}}, folds="M08")
    assert selected.notebook("M08", "03_logits") in selected.before_student("M08", "ctc_kd", "1")
    assert run.before_student("M08", "hard", "1") == [run.notebook("M08", "01_baseline")]


def test_the_members_of_ensembles_are_trained_too(graph):
    group = {
        "ensembles": {"five": {"variants": ["hard", "ctc_kd"], "seeds": [1, 2]}},
        "compare": ["hard"],
        "seeds": [1],
    }
    assert graph(group, folds="M08").students("M08") == graph(group, folds="M08", ensembles="").students("M08")
    run = graph(group, folds="M08", ensembles="five")
    pairs = [("hard", 1), ("hard", 2), ("ctc_kd", 1), ("ctc_kd", 2)]
    assert run.students("M08") == [run.student("M08", *pair) for pair in pairs]
    assert set(run.marks("outputs", "M08")) <= set(run.before_student("M08", "ctc_kd", "2"))
    assert (
        graph(group, folds="M08", variants=None, seeds=None, ensembles=None).students("M08") == run.students("M08")[:1]
    )
    with pytest.raises(UserError, match="unknown ensemble 'fiv'"):
        graph(group, folds="M08", ensembles="fiv")


def test_a_student_waits_for_the_one_that_it_continues(graph):
    more = {"variants": {"more": {"student": {"resume": "hard"}}}, "compare": ["more"]}
    run = graph(more, folds="M08")
    assert run.student("M08", "hard", 2) in run.before_student("M08", "more", "2")
    more["variants"]["more"]["student"]["resume"] = "outputs/demo/M08/students/hard/seed1"
    params = graph(more, folds="M08").of_variant["more"]
    assert not params.resumes_variant
    assert params.learns_from(2) == []


def test_students_that_teach_come_first(graph):
    born_again = {"teacher": {"source": "students", "students": ["hard"], "student_seeds": [1, 2]}}
    run = graph({"variants": {"again": born_again}, "compare": ["again"]}, folds="M08")
    before = run.before_student("M08", "again", "1")
    assert {run.student("M08", "hard", seed) for seed in (1, 2)} <= set(before)
    assert run.notebook("M08", "03_logits") not in before
    assert run.with_teachers == []


def test_shared_teachers_are_made_by_jobs_of_all_folds_and_own_ones_by_jobs_of_each(graph):
    run = graph(folds="M08,M10", parts=2)
    assert run.owners == ["all"]
    assert run.marks("teachers", "M08") == run.marks("teachers", "M10")
    own = graph({"pretrained": "from_corpus", "teacher": {"encoder": "nemo", "parent": "from_corpus"}}, folds="M08,M10")
    assert own.owners == ["M08", "M10"]
    assert not set(own.marks("teachers", "M08")) & set(own.marks("teachers", "M10"))


def test_a_share_of_the_outputs_waits_for_the_same_share_of_the_teachers(graph):
    run = graph(folds="M08", parts=3)
    assert run.before_command("outputs", "all", "2") == [f"{run.out}/jobs/teachers_all_2"]
    assert run.before_command("teachers", "all", "2") == [f"{run.out}/jobs/base_all_1"]
    assert run.before_command("prepare", "all", "1") == [f"{run.out}/corpus/00_corpus.ipynb"]


def test_a_study_waits_for_its_jobs_and_any_other_run_for_its_students(graph):
    run, study = graph(folds="M08"), graph(folds="M08", study=1, parts=2)
    assert run.before_notebook("05_collapse", "M08") == run.students("M08")
    assert study.before_notebook("05_collapse", "M08") == [f"{study.out}/jobs/students_M08_{part}" for part in (1, 2)]


def test_another_value_changes_what_a_job_depends_on(graph):
    run, other = graph(folds="M08"), graph({"scoring": {"bootstrap": 999}}, folds="M08")
    assert run.settings_of("M08") != other.settings_of("M08")
    assert run.corpus == other.corpus  # the corpus does not depend on it
    assert run.code_of("01_baseline") != run.code_of("02_teachers")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"folds": "M99"}, "no fold of 'M99'; expected one of F02,"),
        ({"folds": "M80"}, "no fold of 'M80'"),
        ({"folds": ","}, "none named; name its folds: FOLDS=F02,F03 or FOLDS=all"),
        (
            {"folds": "M08", "until": "basline"},
            "UNTIL: there is no stage 'basline'; did you mean 'baseline'? The stages are",
        ),
        ({"folds": "M08", "until": "01_baseline"}, "did you mean 'baseline'?"),
        (
            {"folds": "M08", "until": "x"},
            "no stage 'x'; expected one of baseline, collapse, corpus, logits, students, tea",
        ),
        ({"variants": "hrad"}, "unknown variant 'hrad'; did you mean 'hard'?"),
    ],
)
def test_mistakes_are_refused_before_any_work(graph, config, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        graph(**config)


def test_a_fold_that_nobody_named_is_refused_with_the_names_that_there_are(graph, fold_files):
    """Without FOLDS the Makefile's default ones are asked for, which are UA-Speech's."""
    own = {"folds": fold_files("07", "Alma")}
    with pytest.raises(UserError, match=r"no fold of 'M08'.*name its folds: FOLDS=07,Alma or FOLDS=all .*HELD_OUT=07"):
        graph(own, folds="M08,M05")
    with pytest.raises(UserError, match=r"no folds: there are no fold files .* make folds-for RECIPE="):
        graph({"folds": "nowhere"}, folds="M08,M05")


def test_every_stage_of_a_run_can_be_its_last(graph):
    rules = set(re.findall(r"^rule (\w+):", (repository_root() / "Snakefile").read_text(), re.MULTILINE))
    rules |= {name[3:] for name in FOLD_STAGES}
    assert set(STAGES) <= rules
    for stage in STAGES:
        assert graph(folds="M08", until=stage).folds == ["M08"]
