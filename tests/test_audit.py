"""The audit of logits of other code: a generated study in the original layout, and every other layout."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from kdlib.corpus import manifest
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.io import repository_root
from kdlib.logits import audit, found
from kdlib.logits.audit import kind_of
from kdlib.tokens import Tokens, train_tokenizer

WORDS = ("COMMAND", "DELETE", "ENTER", "NOVEMBER", "SIERRA", "WATER")
TABLE = {  # utterances of seed 003's table, here a fiftieth of them
    **{"F02": 36, "F03": 32, "M04": 25, "M07": 36, "M08": 36, "M12": 31, "M14": 36, "F04": 36},
    **{"M05": 36, "M10": 36, "M11": 31, "F05": 36, "M09": 36, "M16": 31, "M01": 15},
}
FRAMES = 8


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return Tokens.of_file(train_tokenizer(WORDS, 40, tmp_path_factory.mktemp("tokens")))


def logits_of(ids, size, rng, end):
    """Decoder logits whose best tokens are these, and then the end."""
    values = rng.normal(size=(len(ids) + 1, size)).astype(np.float32)
    values[range(len(ids) + 1), [*ids, end]] += 12
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def study(tmp_path_factory, tokens):
    """Fifteen speakers' own recordings: one file truncated, one of probabilities, one of another vocabulary."""
    folder, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    rows = []
    for speaker, count in TABLE.items():
        names = [f"{speaker}_B{1 + number % 3}_W{number // 7}_M{2 + number % 7}" for number in range(count)]
        texts = [WORDS[number // 7 % len(WORDS)] for number in range(count)]
        size = tokens.size + 5 * (speaker == "M14")
        listed = [logits_of(tokens.encode(text), size, rng, tokens.eos) for text in texts]
        if speaker == "F04":
            listed = [values.softmax(-1) for values in listed]
        (folder / speaker).mkdir()
        torch.save(listed, folder / speaker / f"{speaker}_decoder_logits.pt")
        about = {"utterance_ids": names, "vocab_size": size}
        (folder / speaker / f"{speaker}_metadata.json").write_text(json.dumps(about))
        rows += [
            {"ID": name, "duration": 0.05 * (len(tokens.encode(text)) + 1), "wav": f"{name}.wav", "spk_id": speaker}
            | {"wrd": text}
            for name, text in zip(names, texts, strict=True)
        ]
    truncated = folder / "M01" / "M01_decoder_logits.pt"
    truncated.write_bytes(truncated.read_bytes()[:200])
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.csv"
    pd.DataFrame(rows).to_csv(corpus, index=False)
    return folder, corpus


def test_the_original_layout_is_audited(study, tokens):
    folder, corpus = study
    known = manifest.Corpus(
        Utterance(row.ID, row.spk_id, folder, row.duration, row.wrd) for row in pd.read_csv(corpus).itertuples()
    )
    result = audit.audit(folder, known, tokens)
    table = result.table.set_index("teacher")
    assert table.utterances.drop("M01").to_dict() == {name: count for name, count in TABLE.items() if name != "M01"}
    assert (table.output == "decoder").all()
    assert table.vocabulary["F02"] == tokens.size
    assert table.special["F02"].startswith(f"end {tokens.eos} (100 %")
    assert (table.kind["F02"], table.kind["F04"]) == ("logits", "probabilities")
    assert table.wra["F02"] == 1.0
    assert table.speakers["F02"] == "F02 36"
    assert result.own_recordings
    said = "\n".join(result.findings)
    assert "M01: " in said
    assert "cannot be read as tensors" in said
    assert "F04: probabilities, not logits" in said
    assert (
        f"M14: {folder}/M14/M14_decoder_logits.pt: {tokens.size + 5} tokens, but the tokenizer has {tokens.size}"
        in said
    )
    assert "own speaker's recordings alone. An average over teachers, frame by frame, would mix" in said


def test_the_page_is_written(study, tmp_path):
    folder, _ = study
    text = audit.write(audit.audit(folder), folder, tmp_path)
    assert text.startswith(f"{folder}: 15 files of 15 teachers")
    assert "Vocabularies differ" in text
    assert text.count("F04: probabilities, not logits") == 1
    assert re.search(r"M08 +HIGH +93 %", text)
    assert f"teacher: {{source: stores, folder: {folder}, without: [M01, M14]" in text
    assert text.endswith("aggregation: {method: own}")
    assert (tmp_path / "audit.txt").read_text() == text + "\n"
    assert len(pd.read_csv(tmp_path / "audit.csv")) == 15


def test_the_page_says_what_speakers_are_in_the_folds(study):
    folder, _ = study
    text = audit.page(audit.audit(folder), folder, folds=repository_root() / "params/folds/original_study")
    assert re.search(r"M08 +HIGH +93 % +held out", text)
    assert re.search(r"F02 +LOW +29 % +teacher", text)
    found = audit.roles(repository_root() / "params/folds/uaspeech")
    assert found["M10"].startswith("held out; dev of ")
    with pytest.raises(UserError, match="there is no folder"):
        audit.roles(folder / "nothing")


def same(source, expected):
    """The logits that were found are those that were written."""
    assert list(source.items) == list(expected)
    for name, values in expected.items():
        assert np.array_equal(found.as_array(source.items[name](), name, source.path), values)


def test_other_layouts_are_found(tmp_path):
    rng = np.random.default_rng(1)
    h5py = pytest.importorskip("h5py")
    rows = {f"M05_B1_W{number}": rng.normal(size=(5, 7)).astype(np.float32) for number in range(3)}
    tensors = {name: torch.from_numpy(values) for name, values in rows.items()}
    np.savez(tmp_path / "A.npz", **rows)
    torch.save(tensors, tmp_path / "B_ctc.pt")
    with h5py.File(tmp_path / "C.h5", "w") as file:
        for name, values in rows.items():
            file[name] = values
    lines = [json.dumps({"id": name, "logits": values.tolist()}) for name, values in rows.items()]
    (tmp_path / "D.jsonl").write_text("\n".join(lines))
    (tmp_path / "E" / "ctc").mkdir(parents=True)
    (tmp_path / "F").mkdir()
    for name, values in rows.items():
        torch.save(tensors[name][None], tmp_path / "E" / "ctc" / f"{name}.pt")
        np.save(tmp_path / "F" / f"{name}.npy", values)
    sources = {one.teacher: one for one in found.find(tmp_path)}
    assert {name: one.output for name, one in sources.items()} == {
        **dict.fromkeys("ACDF", ""),
        **dict.fromkeys("BE", "ctc"),
    }
    for one in sources.values():
        same(one, rows)
    result = audit.audit(tmp_path)
    assert not result.own_recordings
    assert "3 utterances have outputs of at least two teachers" in result.findings[-1]


def test_files_in_a_teachers_folder_are_found_by_any_name(tmp_path):
    rng = np.random.default_rng(1)
    for speaker in ("M04", "M05"):
        rows = {f"{speaker}_B1_W{number}": rng.normal(size=(5, 7)).astype(np.float32) for number in range(3)}
        (tmp_path / f"teacher_{speaker}").mkdir()
        np.savez(tmp_path / f"teacher_{speaker}" / "logits.npz", **rows)
    torch.save({"M16_B1_W1": torch.zeros(2, 7)}, tmp_path / "M16.pt")
    result = audit.audit(tmp_path)
    assert result.table.utterances.tolist() == [1, 3, 3]
    assert result.own_recordings  # whatever the files are called


def test_kinds_are_told_apart():
    rows = np.random.default_rng(2).normal(size=(50, 9)).astype(np.float32)
    probabilities = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    assert [kind_of(one) for one in (rows, probabilities, np.log(probabilities))] == [
        "logits",
        "probabilities",
        "log-probabilities",
    ]


def test_ctc_and_its_blank_are_found_from_the_data(tmp_path):
    rng = np.random.default_rng(3)
    rows = {}
    for number in range(20):
        values = rng.normal(size=(30, 11)).astype(np.float32)
        values[:, 6] += 8  # a blank in most frames
        values[[5, 6, 15], [1, 1, 2]] += 20
        rows[f"M05_B1_W{number}"] = values
    np.savez(tmp_path / "A.npz", **rows)
    one = audit.audit(tmp_path).files[0]
    assert (one.output, one.special, one.texts) == ("ctc", "blank 6 (90 % of the frames)", 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: torch.save([torch.zeros(2, 3)], folder / "A_ctc.pt"), "1 utterances without their ids"),
        (
            lambda folder: (
                torch.save([torch.zeros(2, 3)], folder / "A_ctc.pt"),
                (folder / "A_metadata.json").write_text('{"utterance_ids": ["a", "b"]}'),
            ),
            "1 utterances, but its metadata names 2",
        ),
        (lambda folder: torch.save(5, folder / "A.pt"), "a int; expected logits by utterance id"),
        (
            lambda folder: np.savez(folder / "A.npz", a=np.zeros(3)),
            r"a has the shape \[3\], expected \[frames, tokens\]",
        ),
        (
            lambda folder: np.savez(folder / "A.npz", a=np.zeros((2, 3)), b=np.zeros((2, 4))),
            "tokens differ between utterances",
        ),
        (lambda folder: np.savez(folder / "A.npz", a=np.full((2, 3), np.nan)), "no utterance of the sample has finite"),
        (lambda folder: (folder / "A.jsonl").write_text('{"id": "a"}'), "line 1: expected"),
        (lambda folder: (folder / "A.pt").write_bytes(b"no tensor"), "cannot be read as tensors"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, make, message):
    make(tmp_path)
    result = audit.audit(tmp_path)
    assert len(result.findings) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(result.findings[0])


def test_batches_without_ids_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "A.h5", "w") as file:
        for number in range(2):
            file[f"train/batch_{number}"] = np.zeros((2, 3))
    (finding,) = audit.audit(tmp_path).findings
    assert "numbers of batches (train/batch_0, ...), not utterance ids" in finding


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no logits in it; expected"):
        audit.audit(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        audit.audit(tmp_path / "nothing")
