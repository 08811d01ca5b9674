"""`make evaluate`: any saved model, any manifest."""

import subprocess
import sys

import pandas as pd
import pytest

from kdlib.corpus import prepare
from kdlib.decode import lm
from kdlib.errors import UserError
from kdlib.evaluate import checkpoint
from kdlib.io import read_json, repository_root
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer


@pytest.fixture(scope="module")
def manifest(taught):
    return prepare.corpus_folder(taught) / "manifest.csv"


def test_a_teacher_is_scored_on_a_manifest_from_the_command_line(taught, manifest, tmp_path):
    folder = taught.folder / "teachers/speechbrain/M04"
    command = [
        sys.executable,
        "-m",
        "kdlib.evaluate.checkpoint",
        str(folder),
        str(manifest),
        "--out",
        str(tmp_path / "o"),
    ]
    command += ["--tokenizer", str(folder / "tokenizer.model"), "--max-decode-len", "3"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=repository_root())
    assert run.returncode == 0, run.stderr
    assert "attention_lexicon" in run.stdout
    scores = read_json(tmp_path / "o/scores.json")
    assert scores["n"] == len(pd.read_csv(manifest))
    spoken = {"attention", "attention_beam", "attention_lexicon", "joint", "joint_lexicon"}
    assert set(scores["decoders"]) == {"greedy", "lexicon"} | spoken
    assert read_json(tmp_path / "o/evaluation_greedy.json")["num_samples"] == scores["n"]


def test_a_nemo_file_is_scored_too(taught, manifest, tmp_path):
    lm.write(lm.estimate(set(pd.read_csv(manifest).wrd), 2), tmp_path / "lm.arpa")
    scores = checkpoint.evaluate(SHIPPED_MODEL, manifest, tmp_path, lm=tmp_path / "lm.arpa", lm_weight=0.5)
    assert set(scores["decoders"]) == {"greedy", "lexicon", "beam"}
    assert scores["settings"]["beam"]["lm_weight"] == 0.5
    assert scores["decoders"]["beam"]["wra"] > 0.3
    assert scores["decoders"]["lexicon"]["wra"] > 0.3  # the shipped model knows these words


def test_another_tokenizer_is_refused_and_not_used(taught, manifest, tmp_path):
    """The original study's 0 %: right tokens, read with other pieces."""
    folder = taught.folder / "teachers/speechbrain/M04"
    other = tmp_path / "other.model"
    other.write_bytes(read_tokenizer(SHIPPED_MODEL))
    with pytest.raises(UserError, match=r"is not the one that .* was trained with: its ids mean other pieces"):
        checkpoint.evaluate(folder, manifest, tmp_path / "o", tokenizer=other)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "checkpoint: there is no .*nowhere"), ("none.nemo", "is not a complete .nemo file")],
)
def test_no_checkpoint(manifest, tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        checkpoint.evaluate(tmp_path / path, manifest, tmp_path / "o")
