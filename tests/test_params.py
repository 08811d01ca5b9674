import pytest
import yaml

from kdlib.corpus.fold_files import fold_file
from kdlib.corpus.speakers import published_speakers, speaker_info
from kdlib.errors import UserError
from kdlib.io import repository_root
from kdlib.params import load

RECIPES = sorted(path.name for path in (repository_root() / "params").glob("*.yaml") if path.name != "base.yaml")
FOLDS = sorted(path.stem for path in (repository_root() / "params" / "folds" / "uaspeech").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads(recipe):
    params = load(f"params/{recipe}", "M08", fold={"exclude": []})
    assert params.name == recipe.removesuffix(".yaml")
    own = {"bilstm.yaml": ("train",), "original_study.yaml": ("B3",)}
    assert params.blocks.train == own.get(recipe, ("B1", "B3"))  # from base.yaml


def test_a_fold_file_is_read_where_no_fold_is_given():
    assert load("params/demo.yaml", "M08").fold.dev == "M10"
    assert load("params/torgo.yaml", "M03").fold.dev == "F04"


def test_there_is_a_fold_file_for_each_of_the_15_speakers():
    assert sorted(name for name, speaker in published_speakers().items() if not speaker.control) == FOLDS
    assert len(FOLDS) == 15


@pytest.mark.parametrize("held_out", FOLDS)
def test_fold_files_follow_their_rule(held_out):
    path = repository_root() / "params/folds/uaspeech" / f"{held_out}.yaml"
    assert path.read_text() == fold_file(held_out, FOLDS, published_speakers(), exclude=["M01"])


def test_fold_files_of_torgo_follow_the_rule():
    folder = repository_root() / "params/folds/torgo"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    info = speaker_info(load("params/torgo.yaml", "nobody", {"exclude": []}), names)
    assert {name: (folder / f"{name}.yaml").read_text() for name in names} == {
        name: fold_file(name, names, info) for name in names
    }


def test_precedence_is_base_recipe_fold_overrides(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 2\nscoring: {bootstrap: 300, batch_size: 4}\n")
    params = load(tmp_path / "mine.yaml", "M08", {"dev": "F05"}, {"scoring": {"bootstrap": 500}})
    assert (params.seed, params.scoring.bootstrap, params.scoring.batch_size) == (2, 500, 4)
    assert (params.fold.dev, params.fold_set) == ("F05", "uaspeech")


def test_extends_reads_the_parent_first(tmp_path):
    (tmp_path / "parent.yaml").write_text("seed: 5\nscoring: {bootstrap: 300}\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\nscoring: {bootstrap: 400}\n")
    params = load(tmp_path / "child.yaml", "M08")
    assert (params.seed, params.scoring.bootstrap) == (5, 400)


def test_extends_in_a_circle_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match="leads back"):
        load(tmp_path / "a.yaml", "M08")


BAD_OVERRIDES = {
    "unknown parameter": ({"sead": 3}, "unknown parameter 'sead'; did you mean 'seed'"),
    "unknown nested parameter": (
        {"synthetic": {"words": {"digit": 1}}},
        "'synthetic.words.digit'; did you mean 'digits'",
    ),
    "number as text": ({"pretraining": {"lr": "1e-4"}}, "found '1e-4'; YAML reads 1e-4 as text: write 1.0e-4"),
    "quoted number": ({"seed": "1"}, "seed: input should be a valid integer, found '1'; remove the quotes"),
    "impossible value": (
        {"synthetic": {"repetitions": 0}},
        "synthetic.repetitions: input should be greater than or equal",
    ),
    "unknown choice": (
        {"pretrained": "shiped"},
        "'from_corpus', 'nemo' or 'none', found 'shiped'",
    ),
    "heads do not divide": ({"pretraining": {"heads": 5}}, "d_model 96 cannot be divided among 5 heads"),
    "teacher heads": ({"teacher": {"heads": 5}}, "teacher.d_model 96 cannot be divided among 5 heads"),
    "even kernel": ({"teacher": {"kernel": 8}}, "teacher.kernel must be odd and teacher.d_model even, found 8 and 96"),
    "no manifest": ({"corpus": "manifest"}, "no manifest is named"),
}


@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_bad_overrides_are_refused_with_a_clear_error(case):
    overrides, message = BAD_OVERRIDES[case]
    with pytest.raises(UserError) as caught:
        load("params/demo.yaml", "M08", overrides=overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FOLDS = {
    "held-out speaker is dev": ({"dev": "M08"}, "fold.dev is M08, the held-out speaker itself"),
    "held-out speaker is a teacher too": (
        {"dev": "M10", "teachers": ["M08"]},
        "held-out speaker M08 is also in fold.teachers",
    ),
    "held-out speaker is trained on too": (
        {"dev": "M10", "train": ["M08", "M09"]},
        "held-out speaker M08 is also in fold.train",
    ),
    "dev speaker is trained on too": (
        {"dev": "M10", "train": ["M10"]},
        "dev speaker M10 is also in fold.train",
    ),
    "unknown speaker": ({"dev": "M80"}, "fold.dev: unknown speaker 'M80'"),
    "a speaker instead of a list": (
        {"exclude": "M01"},
        "fold.exclude: input should be a list, such as [M04, F03], found 'M01'",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDS)
def test_bad_folds_are_refused_with_a_clear_error(case):
    fold, message = BAD_FOLDS[case]
    with pytest.raises(UserError) as caught:
        load("params/demo.yaml", "M08", fold=fold)
    assert message in str(caught.value)


def test_the_error_for_an_unknown_held_out_speaker_names_the_valid_ones():
    with pytest.raises(UserError, match=r"unknown speaker 'M99'.*M08"):
        load("params/demo.yaml", "M99")


def test_the_error_for_a_missing_recipe_names_those_that_exist():
    with pytest.raises(UserError, match=r"demos\.yaml: no such file; recipes there: .*demo\.yaml"):
        load("params/demos.yaml", "M08")


def test_an_error_names_its_file(tmp_path):
    (tmp_path / "parent.yaml").write_text("sed: 5\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\n")
    with pytest.raises(UserError, match=r"parent\.yaml: unknown parameter 'sed'"):
        load(tmp_path / "child.yaml", "M08")


def test_invalid_yaml_is_a_one_line_error(tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: [1\n")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML") as caught:
        load(tmp_path / "bad.yaml", "M08")
    assert "\n" not in str(caught.value)


def test_papermill_passes_a_fold_file_unchanged():
    content = yaml.safe_load((repository_root() / "params/folds/uaspeech/M05.yaml").read_text())
    assert load("params/demo.yaml", content["held_out"], content["fold"]) == load("params/demo.yaml", "M05")


def test_the_held_out_speaker_cannot_be_an_override():
    with pytest.raises(UserError, match="held_out does not belong here"):
        load("params/demo.yaml", "M08", overrides={"held_out": "M05"})


def test_a_name_that_leaves_the_outputs_is_refused():
    with pytest.raises(UserError, match="name: string should match"):
        load("params/demo.yaml", "M08", overrides={"name": "../x"})


def test_the_word_term_needs_a_trained_ctc_head():
    settings = {"student": {"decoder_layers": 1}, "distill": {"heads": "decoder", "words": {"weight": 0.5}}}
    with pytest.raises(UserError, match=r"distill\.words is a loss of a CTC head, but distill\.heads is 'decoder'"):
        load("params/smoke.yaml", "M08", overrides=settings)
