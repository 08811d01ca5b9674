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
