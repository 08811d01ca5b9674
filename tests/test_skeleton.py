"""The embedded corpus without sound, PHOENIX's layout, and a corpus's own split."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from kdlib.corpus.embedded import skeleton
from kdlib.errors import UserError
from kdlib.io import repository_root
from kdlib.pipeline import Fold
from kdlib.settings.corpus import Skeleton
from kdlib.show import fold_comparison

SMALL = Skeleton(signers=3, glosses=8, sentences=4)


def test_the_corpus_follows_from_its_seed(tmp_path):
    first, again = (skeleton.generate(SMALL, tmp_path / name) for name in ("a", "b"))
    assert len(first) == 3 * 3 * 4
    for one, other in zip(first, again, strict=True):
        assert one.text == other.text
        values = np.load(one.wav)
        assert np.array_equal(values, np.load(other.wav))
        assert values.shape == (round(one.duration_s / 0.04), 64)
        assert 3 <= len(one.text.split()) <= 6
    other = skeleton.generate(Skeleton(signers=3, glosses=8, sentences=4, seed=2), tmp_path / "c")
    assert [utt.text for utt in other] != [utt.text for utt in first]


def test_a_signer_signs_a_gloss_alike_and_differs_from_others():
    def frames(signer, text, name):
        values = skeleton.render(SMALL, signer, text, name)[:, :32]
        return values[np.linspace(0, len(values) - 1, 30).round().astype(int)]

    one, same, other = frames("S01", ["BAG"], "x"), frames("S01", ["BAG"], "y"), frames("S01", ["CAH"], "z")
    by_other = frames("S02", ["BAG"], "x")
    assert np.abs(one - same).mean() < np.abs(one - other).mean()
    assert np.abs(one - same).mean() < np.abs(one - by_other).mean()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The skeleton recipe at small size."""
    folder = tmp_path_factory.mktemp("skeleton")
    small = {"d_model": 16, "layers": 2, "dropout": 0.0}
    settings = {
        "extends": str(repository_root() / "params/skeleton.yaml"),
        "skeleton": {"signers": 3, "glosses": 6, "sentences": 12},
        "folds": "skeleton",
        "outputs": str(folder),
        "teacher": small | {"base_training": {"steps": 30, "batch_size": 8, "warmup_steps": 2}},
        "student": {"sizes": small, "batch_size": 8, "phases": [{"steps": 30, "warmup_steps": 2}]},
        "variants": {"hybrid": {"distill": {"layers": {2: 2}}}},
        "distill": {"allow": ["target", "pairs", "shift of ctc targets"]},
        "search": {"lm_weights": [0.9], "word_bonuses": [0.0], "beam_sizes": [10]},
        "scoring": {"bootstrap": 200},
        "calibration": {"form": "none"},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    return folder / "mine.yaml"


def test_a_hybrid_student_is_taught_by_frames_references_and_layers(recipe):
    fold = Fold.load(recipe, "S01", "hybrid", fold={"dev": "S02"})
    assert fold.baseline() == fold.of("hard").scores(1)
    scores = fold.scores(1)
    assert {path.name for path in scores.glob("*.ctm")} == {"hypotheses_greedy.ctm", "hypotheses_beam.ctm"}
    assert (scores / "references.stm").read_text().count("\n") == 12
    record = yaml.safe_load((fold.student(1) / "model.json").read_text())
    assert record["encoder"] == "bilstm"
    found = {check.name: check for check in fold.preflight(1)}
    assert found["pieces"].reason.startswith("the tokens are whole words")
    assert "on dev speech the teachers have" in found["teachers on dev"].reason
    assert "the same student without them" in found["teachers on dev"].reason
    assert list(fold.systems(1)) == ["hard", "hybrid"]


@pytest.mark.parametrize("layers", [{1: 1, 2: 2}, {2: 1}])
def test_stored_and_live_layers_give_the_same_loss(recipe, layers):
    import torch

    from kdlib.corpus.inputs import Batch

    losses = []
    for live in (False, True):
        change = {"distill": {"gamma": 1.0, "alpha": 0.5, "layers": layers, "live_teachers": live}}
        fold = Fold.load(recipe, "S01", "hybrid", fold={"dev": "S02"}, overrides=change)
        setup = fold.student_setup(1)
        torch.manual_seed(0)
        objective = setup.objective()
        batch = Batch.of(setup.data.train[:6], setup.tokens)
        setup.model.eval()
        losses.append({name: value.item() for name, value in objective(batch).items()})
    assert losses[0]["features"] == pytest.approx(losses[1]["features"], abs=1e-5)
    assert losses[0]["kd_ctc"] == pytest.approx(losses[1]["kd_ctc"], abs=1e-4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({3: 1}, r"there is no layer 3: the student's encoder has 2, counted from 1"),
        ({1: 5}, r"the teacher model has 2 layers, counted from 1; there is no layer 5"),
    ],
)
def test_a_layer_that_does_not_exist_is_refused(recipe, layers, message):
    fold = Fold.load(recipe, "S01", "hybrid", fold={"dev": "S02"}, overrides={"distill": {"layers": layers}})
    with pytest.raises(UserError, match=message):
        fold.student_setup(1).objective()


def test_a_given_split_trains_on_all_signers(recipe):
    fold = Fold.load(recipe, "given", "hard")
    parts = {name: getattr(fold.splits, name) for name in ("train", "dev", "test")}
    assert {name: {utt.block for utt in part} for name, part in parts.items()} == {
        "train": {"B1"},
        "dev": {"B3"},
        "test": {"B2"},
    }
    assert {utt.speaker for utt in parts["train"]} == {"S01", "S02", "S03"}
    assert (fold.scores(1) / "scores.json").is_file()


def test_a_comparison_says_what_beam_search_alone_gives(recipe, capsys):
    fold = Fold.load(recipe, "given", "hard")
    scores = json.loads((fold.scores(1) / "scores.json").read_text())["decoders"]
    fold_comparison.compare_folds(str(recipe), ["given"], ["hard"], [1], [])
    table = pd.read_csv(fold.layout.compare / "beam_against_greedy.csv")
    assert list(table.a) == ["hard (beam)"]
    by_signer = [scores[name]["by"]["speaker"].values() for name in ("beam", "greedy")]
    beam, greedy = (np.mean([part["wer"] for part in parts]) for parts in by_signer)
    assert table.difference[0] == pytest.approx(beam - greedy)
    assert "hard (beam)" in capsys.readouterr().out


def test_the_given_split_is_compared_by_itself(recipe, monkeypatch):
    folds = []
    monkeypatch.setattr(fold_comparison, "_compare", lambda recipe, names, *_, folder="": folds.append((names, folder)))
    fold_comparison.compare_folds(str(recipe), ["S01", "given", "S02"], ["hard"], [1], [])
    assert folds == [(["S01", "S02"], ""), (["given"], "given")]


def phoenix(folder, rows=10, signers=3):
    """A tree of the published layout: annotations, and an array per video."""
    (folder / "annotations" / "manual").mkdir(parents=True)
    rng = np.random.default_rng(0)
    glosses = ["REGEN", "loc-NORD", "SONNE", "__ON__", "WIND", "S0NNE"]
    for split in ("train", "dev", "test"):
        lines = ["id|folder|signer|annotation"]
        (folder / "features" / split).mkdir(parents=True)
        for number in range(rows):
            name = f"01April_2010_{split}_{number}"
            text = " ".join(rng.choice(glosses, 3))
            lines.append(f"{name}|{name}/1/*.png|Signer{number % signers + 1:02}|{text}")
            np.savez(folder / "features" / split / f"{name}.npz", rng.normal(size=(40, 512)).astype("float32"))
        (folder / "annotations" / "manual" / f"{split}.corpus.csv").write_text("\n".join(lines))
    return folder


def test_a_tree_like_phoenix_is_imported_and_counted(tmp_path):
    folder = phoenix(tmp_path / "phoenix")
    (folder / "features" / "dev" / "01April_2010_dev_3.npz").unlink()
    overrides = {"data_folder": str(folder), "outputs": str(tmp_path / "out")}
    fold = Fold.load("params/bilstm.yaml", "given", overrides=overrides)
    assert [len(part) for part in (fold.splits.train, fold.splits.dev, fold.splits.test)] == [10, 9, 10]
    report = (fold.corpus_folder / "report.txt").read_text()
    assert "PHOENIX-2014, multisigner: 10 train, 10 dev, 10 test sentences, 3 signers, 6 glosses" in report
    assert "left out, 1 x the file is missing" in report
    assert fold.tokens.unknown == 3
    with pytest.raises(UserError, match=r"there is no train.SI5.corpus.csv in .*; expected PHOENIX-2014's annotations"):
        Fold.load("params/bilstm.yaml", "given", overrides=overrides | {"phoenix": {"part": "SI5"}}).prepared_corpus()


def test_annotations_of_another_form_are_refused(tmp_path):
    folder = phoenix(tmp_path / "phoenix", rows=2)
    path = folder / "annotations" / "manual" / "dev.corpus.csv"
    path.write_text("name,video\n")
    overrides = {"data_folder": str(folder), "outputs": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"dev.corpus.csv: the first line is 'name,video'; expected id\|folder\|signer"):
        Fold.load("params/bilstm.yaml", "given", overrides=overrides).prepared_corpus()
