"""Feature sequences: what is read, what is refused, and what is made of recordings."""

import gzip
import pickle

import numpy as np
import pytest
import torch
import yaml

from kdlib.corpus import feature_checks, features, inputs
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.io import repository_root
from kdlib.params import load
from kdlib.pipeline import Fold
from kdlib.settings.corpus import FeatureSequences
from kdlib.training.validation import Recognised

SETTINGS = FeatureSequences(width=4, stride_ms=40)
VALUES = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")


def utterance(path, utt_id="u1", text="A B"):
    return Utterance(utt_id, "S1", path, 1.0, text)


def write(path, values=VALUES):
    match path.suffix:
        case ".npy":
            np.save(path, values)
        case ".npz":
            np.savez(path, u1=values, other=values * 2)
        case ".pt":
            torch.save({"u1": torch.from_numpy(values), "other": torch.zeros(3, 4)}, path)
        case ".h5":
            h5py = pytest.importorskip("h5py")
            with h5py.File(path, "w") as file:
                file["u1"], file["other"] = values, values * 2
    return path


@pytest.mark.parametrize("kind", [".npy", ".npz", ".pt", ".h5"])
def test_every_kind_of_file_is_read_by_the_utterances_id(kind, tmp_path):
    utt = utterance(write(tmp_path / f"x{kind}"))
    assert np.array_equal(features.load(utt), VALUES)
    padded, lengths = inputs.collate([utt, utt])
    assert padded.shape == (2, 12, 4)
    assert lengths.tolist() == [12, 12]
    corpus, report = feature_checks.check_features(Corpus((utt,), "mine"), SETTINGS)
    assert corpus.utterances[0].duration_s == 0.48
    assert not report.problems


def test_a_tensor_and_a_single_array_need_no_id(tmp_path):
    torch.save(torch.from_numpy(VALUES).half(), tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", features=VALUES)
    for name in ("a.pt", "b.npz"):
        assert features.load(utterance(tmp_path / name)).shape == (12, 4)


BROKEN = {
    "width": (lambda: VALUES[:, :3], "3 features per frame, not 4 (features.width)"),
    "nan": (lambda: np.where(VALUES > 1, np.nan, VALUES), "NaN or infinite values"),
    "empty": (lambda: VALUES[:0], "no frames"),
    "flat": (lambda: VALUES[0], "it is no array [frames, features]"),
    "still": (lambda: np.ones((12, 4), "float32"), "all its frames are the same"),
    "short": (lambda: VALUES[:3], "fewer frames than words"),
    "object": (lambda: np.array([{"a": 1}], dtype=object), "an object array"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_used_are_named_and_left_out(name, tmp_path):
    values, reason = BROKEN[name]
    np.save(tmp_path / "bad.npy", values(), allow_pickle=True)
    good = utterance(write(tmp_path / "good.npy"), "u2")
    corpus, report = feature_checks.check_features(Corpus((utterance(tmp_path / "bad.npy"), good), "mine"), SETTINGS)
    assert [utt.utt_id for utt in corpus] == ["u2"]
    assert [problem.reason for problem in report.problems] == [reason]
    assert "bad.npy" in str(report)
    with pytest.raises(UserError, match=r"none of its 1 feature files can be used; the first, .*bad.npy: "):
        feature_checks.check_features(Corpus((utterance(tmp_path / "bad.npy"),), "mine"), SETTINGS)


def test_missing_files_damaged_files_and_ids_that_are_not_there(tmp_path):
    (tmp_path / "damaged.npz").write_bytes(b"PK not a zip")
    np.savez(tmp_path / "others.npz", a=VALUES, b=VALUES)
    utterances = [utterance(tmp_path / name, name) for name in ("none.npy", "damaged.npz", "others.npz")]
    utterances.append(utterance(write(tmp_path / "good.npy"), "u2"))
    _, report = feature_checks.check_features(Corpus(tuple(utterances), "mine"), SETTINGS)
    assert [problem.reason for problem in report.problems] == [
        "the file is missing",
        "the file cannot be read",
        "several arrays in the file, none of this id",
    ]


def test_pickles_are_refused_with_the_line_that_converts_them(tmp_path):
    with gzip.open(tmp_path / "phoenix.train", "wb") as file:
        pickle.dump([{"name": "train/u1", "sign": VALUES}], file)
    with pytest.raises(UserError, match=r"is a pickle; a pickle can run any code: .*convert it once with python -c"):
        feature_checks.check_features(Corpus((utterance(tmp_path / "phoenix.train"),), "mine"), SETTINGS)
    with pytest.raises(UserError, match=r"x.wav is no file of features; expected one of .npy, .npz, .pt"):
        feature_checks.check_features(Corpus((utterance(tmp_path / "x.wav"),), "mine"), SETTINGS)


def test_a_torch_file_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"u1": Evil()}, tmp_path / "x.pt")
    good = utterance(write(tmp_path / "good.npy"), "u2")
    _, report = feature_checks.check_features(Corpus((utterance(tmp_path / "x.pt"), good), "mine"), SETTINGS)
    assert [problem.reason for problem in report.problems] == ["the file cannot be read"]


def test_features_of_recordings_are_stacked_log_mels():
    samples = np.random.default_rng(0).normal(0, 0.1, 16000).astype("float32")
    values = features.stacked_mels(samples, 64, 8, 4)
    assert values.shape == (26, 512)  # 101 frames of 10 ms, eight side by side, every four
    assert np.isfinite(values).all()
    assert np.array_equal(values[1, :256], values[0, 256:])  # they overlap by four


def test_a_manifest_of_features_is_a_corpus(tmp_path):
    rows = ["ID,duration,features,spk_id,wrd,block"]
    for speaker in ("ANN", "BEN", "CLEO"):
        for number in range(6):
            path = tmp_path / f"{speaker}{number}.npy"
            np.save(path, np.random.default_rng(number).normal(size=(12, 4)))
            rows.append(f"{speaker}{number},0.5,{path.name},{speaker},A B,{'train' if number < 4 else 'test'}")
    (tmp_path / "corpus.csv").write_text("\n".join(rows))
    settings = {
        "extends": str(repository_root() / "params/skeleton.yaml"),
        "corpus": "features",
        "manifest": str(tmp_path / "corpus.csv"),
        "features": {"width": 4},
        "blocks": {"train": ["train"], "dev": [], "test": ["test"]},
        "outputs": str(tmp_path / "out"),
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    fold = Fold.load(tmp_path / "mine.yaml", "ANN", fold={"dev": "BEN"})
    assert [len(part) for part in (fold.splits.train, fold.splits.dev, fold.splits.test)] == [4, 2, 2]
    assert fold.tokens.pieces[4:] == ["\u2581A", "\u2581B"]
    assert "18 recordings checked, 0 left out" in (fold.corpus_folder / "report.txt").read_text()


def test_encoders_and_inputs_must_fit():
    with pytest.raises(UserError, match=r"'nemo' takes audio, but the inputs of this corpus are features"):
        load("params/skeleton.yaml", "S01", overrides={"student": {"encoder": "nemo"}})
    with pytest.raises(UserError, match=r"pretrained models take audio, and the inputs are features"):
        load("params/skeleton.yaml", "S01", overrides={"pretrained": "shipped"})
    with pytest.raises(UserError, match=r"a given split needs the blocks of its dev speech"):
        load("params/skeleton.yaml", "given", overrides={"blocks": {"dev": []}})
    for blocks in ({"dev": ["B2"]}, {"train": ["B1", "B2"]}):
        with pytest.raises(UserError, match=r"the block B2 of a given split is test speech, and named in"):
            load("params/skeleton.yaml", "given", overrides={"blocks": blocks})


def test_an_unknown_word_is_one_token_and_an_error(tmp_path):
    fold = Fold.load("params/skeleton.yaml", "S01", overrides={"outputs": str(tmp_path), "skeleton": {"sentences": 4}})
    tokens = fold.tokens
    assert tokens.unknown == 3
    known = tokens.pieces[4].removeprefix("\u2581")
    assert tokens.encode(f"{known} NEVER {known} EVER") == [4, 3, 4, 3]
    assert tokens.decode([3]) not in ("NEVER", "")
    utt = Utterance("u", "S", tmp_path / "u.npy", 1.0, f"{known} NEVER")
    recognised = Recognised(tokens, "wer")
    recognised.add(inputs.Batch.of([utt], tokens), [tokens.encode(utt.text)], 0.0)  # says "unknown" where it is
    found = recognised.metrics()
    assert (found["dev_wra"], found["dev_wer"]) == (0, 0.5)
