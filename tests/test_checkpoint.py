"""`make evaluate`: score any saved model on any manifest."""

import subprocess
import sys

import pandas as pd
import pytest

from kdlib.decode import lm
from kdlib.errors import UserError
from kdlib.evaluate import checkpoint
from kdlib.evaluate.checkpoint import Options
from kdlib.io import read_json, repository_root
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer


@pytest.fixture(scope="module")
def manifest(with_teachers):
    return with_teachers.corpus_folder / "manifest.csv"


def test_a_teacher_is_scored_on_a_manifest_from_the_command_line(with_teachers, manifest, tmp_path):
    folder = with_teachers.layout.recipe / "teachers/sb/M04"
    command = [
        sys.executable,
        "-m",
        "kdlib",
        "evaluate",
        str(folder),
        str(manifest),
        "--out",
        str(tmp_path / "o"),
    ]
    command += ["--tokenizer", str(folder / "tokenizer.model"), "--max-decode-len", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=repository_root())
    assert result.returncode == 0, result.stderr
    assert "attention_lexicon" in result.stdout
    scores = read_json(tmp_path / "o/scores.json")
    assert scores["n"] == len(pd.read_csv(manifest))
    attention = {"attention", "attention_beam", "attention_lexicon", "joint", "joint_lexicon"}
    assert set(scores["decoders"]) == {"greedy", "lexicon"} | attention
    assert read_json(tmp_path / "o/evaluation_greedy.json")["num_samples"] == scores["n"]


def test_a_nemo_file_is_scored(with_teachers, manifest, tmp_path):
    lm.write(lm.estimate(set(pd.read_csv(manifest).wrd), 2), tmp_path / "lm.arpa")
    scores = checkpoint.evaluate(SHIPPED_MODEL, manifest, tmp_path, Options(lm=tmp_path / "lm.arpa", lm_weight=0.5))
    assert set(scores["decoders"]) == {"greedy", "lexicon", "beam"}
    assert scores["settings"]["beam"]["lm_weight"] == 0.5
    assert scores["decoders"]["beam"]["wra"] > 0.3
    assert scores["decoders"]["lexicon"]["wra"] > 0.3  # the shipped model was trained on these words


@pytest.fixture(scope="module")
def two_manifests(with_teachers, manifest, tmp_path_factory):
    """The manifest's speech of two speakers, and of the third."""
    folder, table = tmp_path_factory.mktemp("manifests"), pd.read_csv(manifest)
    table["wav"] = table.wav.str.replace("$data_folder", str(manifest.parent), regex=False)
    paths = folder / "training.csv", folder / "scored.csv"
    for path, part in zip(paths, (table.spk_id != "M08", table.spk_id == "M08"), strict=True):
        table[part].to_csv(path, index=False)
    return paths


def test_other_peoples_model_is_calibrated_on_a_manifest_of_training_speech(two_manifests, tmp_path):
    training, scored = two_manifests
    scores = checkpoint.evaluate(SHIPPED_MODEL, scored, tmp_path / "a", Options(calibrate_on=training))
    assert set(scores["decoders"]) == {"greedy", "lexicon", "lexicon_plain"}
    assert scores["settings"]["lexicon"]["utterances"] > 20
    assert "remark" not in scores
    fitted = tmp_path / "a" / "calibration.json"
    again = checkpoint.evaluate(SHIPPED_MODEL, scored, tmp_path / "b", Options(calibration=fitted))
    assert again["decoders"]["lexicon"] == scores["decoders"]["lexicon"]
    same = checkpoint.evaluate(SHIPPED_MODEL, training, tmp_path / "c", Options(calibration=fitted))
    assert same["remark"].startswith("the closed lexicon was calibrated on other speech of ")


def test_a_calibration_that_does_not_belong_to_a_model_is_refused(two_manifests, with_teachers, tmp_path):
    training, scored = two_manifests
    with pytest.raises(UserError, match="of its utterances are in the manifest that is scored, first"):
        checkpoint.evaluate(SHIPPED_MODEL, scored, tmp_path / "a", Options(calibrate_on=scored))
    checkpoint.evaluate(SHIPPED_MODEL, scored, tmp_path / "b", Options(calibrate_on=training))
    teacher, fitted = with_teachers.layout.recipe / "teachers/sb/M04", tmp_path / "b/calibration.json"
    with pytest.raises(UserError, match="fitted with the tokens"):
        checkpoint.evaluate(teacher, scored, tmp_path / "c", Options(calibration=fitted))
    with pytest.raises(UserError, match="calibration: there is no file"):
        checkpoint.evaluate(teacher, scored, tmp_path / "c", Options(calibration=tmp_path / "none.json"))


def test_a_tokenizer_other_than_the_models_is_refused(with_teachers, manifest, tmp_path):
    """The WRA of 0 % in the original study: correct tokens, decoded with the wrong tokenizer."""
    folder = with_teachers.layout.recipe / "teachers/sb/M04"
    other = tmp_path / "other.model"
    other.write_bytes(read_tokenizer(SHIPPED_MODEL))
    with pytest.raises(UserError, match=r"is not the one that .* was trained with: its ids are other pieces"):
        checkpoint.evaluate(folder, manifest, tmp_path / "o", Options(tokenizer=other))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "checkpoint: there is no .*nowhere"), ("none.nemo", "is not a complete .nemo file")],
)
def test_a_missing_or_incomplete_checkpoint_is_refused(manifest, tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        checkpoint.evaluate(tmp_path / path, manifest, tmp_path / "o")
