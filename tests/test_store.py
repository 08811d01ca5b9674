"""The store: exact, small, resumable, and checked against damage and misuse."""

import dataclasses
import hashlib
import json
import multiprocessing

import numpy as np
import pytest
import torch

from kdlib.errors import UserError
from kdlib.logits import index
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.tokens import Tokens, train_tokenizer

V, D = 500, 16


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Tokens:
    return Tokens.for_teachers(train_tokenizer(["ONE", "TWO", "SEVEN"], 24, tmp_path_factory.mktemp("tokens")), V)


def header(tokens, encoding="fp16", **changes) -> Header:
    width = V if encoding.startswith("dense") else D
    fields = {
        "teacher": "M10",
        "train_speakers": ("CM01", "M10"),
        "output": "ctc",
        "encoding": encoding,
        "size": V,
        "width": width,
    }
    fields |= {"tokens": tokens.fingerprint, "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0}
    return Header(**fields | changes)


@pytest.fixture(scope="module")
def activations():
    """Activations of utterances of several lengths, one of them empty, and a head."""
    torch.manual_seed(0)
    hidden = {f"u{index}": torch.randn(length, D) for index, length in enumerate((7, 1, 0, 31, 12))}
    return hidden, (torch.randn(V, D) / 4, torch.randn(V) / 4)


def write(folder, tokens, activations, encoding="fp16", **changes):
    hidden, head = activations
    dense = encoding.startswith("dense")
    with Writer(folder, header(tokens, encoding, **changes), None if dense else head) as writer:
        for utt_id, values in hidden.items():
            writer.add(utt_id, values @ head[0].T + head[1] if dense else values)
    return LogitStore(folder)


@pytest.mark.parametrize(("encoding", "nats"), [("fp16", 1e-6), ("int8", 1e-3), ("dense16", 1e-5), ("dense32", 1e-12)])
@pytest.mark.parametrize("temperature", [1, 2, 4])
def test_distributions_hold_at_every_temperature(tmp_path, tokens, activations, encoding, nats, temperature):
    """Mean KL from the teacher's distribution to the stored one, per frame, in float64."""
    hidden, (weight, bias) = activations
    store = write(tmp_path, tokens, activations, encoding)
    for utt_id, values in hidden.items():
        expected = ((values @ weight.T + bias).double() / temperature).log_softmax(-1)
        found = (store.logits(utt_id).double() / temperature).log_softmax(-1)
        assert found.shape == (len(values), V)
        if len(values):
            assert (expected.exp() * (expected - found)).sum(-1).mean() < nats


@pytest.mark.parametrize(
    ("encoding", "bytes_per_row"), [("fp16", 2 * D), ("int8", D + 2), ("dense16", 2 * V), ("dense32", 4 * V)]
)
def test_rows_have_the_expected_size(tmp_path, tokens, activations, encoding, bytes_per_row):
    write(tmp_path, tokens, activations, encoding)
    rows = sum(map(len, activations[0].values()))
    assert (tmp_path / "frames.bin").stat().st_size == rows * bytes_per_row


def test_with_5000_tokens_fp16_is_69_and_int8_137_times_smaller(tokens):
    """5,000 tokens and 144 dimensions: 20,000 bytes per frame in float32, 288 and 146 in the store."""
    sizes = [header(tokens, encoding, size=5000, width=144).row.itemsize for encoding in ("fp16", "int8")]
    assert sizes == [288, 146]


def test_batches_are_padded_with_their_lengths(tmp_path, tokens, activations):
    store = write(tmp_path, tokens, activations)
    hidden, lengths = store.batch(["u3", "u1"])
    assert (tuple(hidden.shape), lengths.tolist()) == ((2, 31, D), [31, 1])
    assert torch.equal(hidden[1, :1], activations[0]["u1"].half().float())
    assert hidden[1, 1:].abs().max() == 0
    assert (len(store), list(store)) == (5, ["u0", "u1", "u2", "u3", "u4"])
    assert store.frames("u4") == 12
    assert "u9" not in store


def test_a_killed_and_resumed_writer_writes_the_same_bytes(tmp_path, tokens, activations):
    """The kill leaves half a row of frames and half a line of the index behind."""
    write(tmp_path / "whole", tokens, activations)
    hidden, head = activations
    writer = Writer(tmp_path / "killed", header(tokens), head)
    for utt_id in ("u0", "u1", "u2"):
        writer.add(utt_id, hidden[utt_id])
    writer.flush()
    with (tmp_path / "killed/frames.bin").open("ab") as file:
        file.write(b"12345")
    with (tmp_path / "killed/index.csv").open("a") as file:
        file.write("u3,8,3")
    with pytest.raises(UserError, match="no complete store"):
        LogitStore(tmp_path / "killed")
    with Writer(tmp_path / "killed", header(tokens), head) as resumed:
        done = [utt_id for utt_id in hidden if utt_id in resumed]
        for utt_id in hidden:
            if utt_id not in resumed:
                resumed.add(utt_id, hidden[utt_id])
    assert done == ["u0", "u1", "u2"]
    names = {"frames.bin", "index.npy", "header.json", "head.safetensors"}
    for folder in ("killed", "whole"):
        assert {file.name for file in (tmp_path / folder).iterdir()} == names
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "named"), [("head", "head"), ("header", "teacher"), ("source", "source"), ("nothing", "")]
)
def test_a_folder_with_other_outputs_is_never_continued(tmp_path, tokens, activations, finished, change, named):
    """Else a store would have the outputs of two models, with every checksum right."""
    hidden, (weight, bias) = activations
    writer = Writer(tmp_path, header(tokens), (weight, bias), "one file")
    writer.add("u0", hidden["u0"])
    writer.close(complete=finished)
    before = (tmp_path / "frames.bin").read_bytes()
    other = header(tokens, teacher="M11") if change == "header" else header(tokens)
    head = (weight + 1, bias) if change == "head" else (weight, bias)
    source = "another" if change == "source" else "one file"
    if change == "nothing":
        with Writer(tmp_path, other, head, source) as again:
            assert "u0" in again
            again.add("u1", hidden["u1"])
        assert list(LogitStore(tmp_path)) == ["u0", "u1"]
        return
    with pytest.raises(UserError, match=rf"stored before, of other contents \({named}\); name another folder"):
        Writer(tmp_path, other, head, source)
    assert (tmp_path / "frames.bin").read_bytes() == before
    assert (tmp_path / "header.json").exists() == finished


def test_an_utterance_is_found_on_disk_among_thousands(tmp_path, tokens):
    """More rows than are read at once; written in another order than sorted, ids of several lengths, non-ASCII too."""
    names = [f"{prefix}{number}" for number in range(700) for prefix in ("b", "É", "aa_")]
    with Writer(tmp_path, header(tokens, "dense32"), None) as writer:
        for number, name in enumerate(names):
            writer.add(name, torch.full((1 + number % 2, V), float(number)))
    store = LogitStore(tmp_path)
    assert list(store) == sorted(names, key=str.encode)
    assert len(store) == len(names)
    for number, name in enumerate(names):
        assert store.hidden(name)[:, 0].tolist() == [number] * (1 + number % 2)
        assert not any(other in store for other in (name + "0x", "0", "zz", name[:-1] + "!"))


def test_an_empty_store_has_no_utterance(tmp_path, tokens):
    with Writer(tmp_path, header(tokens, "dense32"), None):
        pass
    assert (len(LogitStore(tmp_path)), list(LogitStore(tmp_path)), "u0" in LogitStore(tmp_path)) == (0, [], False)


def test_a_store_of_the_last_version_is_read(tmp_path, tokens, activations):
    """Schema 3 kept its index as text."""
    store = write(tmp_path, tokens, activations)
    rows = index.read_rows(tmp_path)
    index.start_journal(tmp_path, rows).close()
    (tmp_path / "index.npy").unlink()
    content = json.loads((tmp_path / "header.json").read_text())
    sums = content.pop("checksums")
    content["schema"] = 3
    sums["header"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    sums["index"] = hashlib.sha256((tmp_path / "index.csv").read_bytes()).hexdigest()
    (tmp_path / "header.json").write_text(json.dumps(content | {"checksums": sums}))
    old = LogitStore(tmp_path)
    assert list(old) == list(store)
    for utt_id in activations[0]:
        assert torch.equal(old.hidden(utt_id), store.hidden(utt_id))
    with Writer(tmp_path, header(tokens), activations[1]) as writer:  # continued as one of this version
        writer.add("u9", activations[0]["u3"])
    assert LogitStore(tmp_path).header.schema == 4
    assert list(LogitStore(tmp_path)) == [*store, "u9"]


@pytest.mark.parametrize("left", [("index.csv", "begun.json"), ("index.csv", "begun.json", "header.json"), ()])
def test_a_writer_killed_while_it_closes_loses_nothing(tmp_path, tokens, activations, left):
    """Killed with the index written, with the header written too, and none of both: after it reopened a store."""
    hidden, head = activations
    write(tmp_path, tokens, activations)
    about = json.loads((tmp_path / "header.json").read_text())
    sums = about.pop("checksums")
    if "index.csv" in left:
        index.start_journal(tmp_path, index.read_rows(tmp_path)).close()
    (tmp_path / "begun.json").write_text(json.dumps(about | {name: sums[name] for name in ("head", "source")}))
    if "header.json" not in left:
        (tmp_path / "header.json").unlink()
    with Writer(tmp_path, header(tokens), head) as again:
        assert all(utt_id in again for utt_id in hidden)
        again.add("u9", hidden["u3"])
    store = LogitStore(tmp_path)
    assert len(store) == 6
    assert torch.equal(store.hidden("u9"), store.hidden("u3"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "index.npy").write_bytes(b""), r"index\.npy is missing or has changed"),
        (lambda folder: (folder / "index.npy").unlink(), r"index\.npy is missing or has changed"),
        (lambda folder: (folder / "frames.bin").write_bytes(b"1"), r"frames\.bin has 1 bytes, expected at least"),
        (
            lambda folder: ((folder / "header.json").unlink(), (folder / "index.npy").write_bytes(b"")),
            r"index\.npy is damaged",
        ),
    ],
)
def test_a_writer_never_shortens_a_damaged_store(tmp_path, tokens, activations, damage, message):
    write(tmp_path, tokens, activations)
    damage(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        Writer(tmp_path, header(tokens), activations[1])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_error_while_writing_leaves_no_header(tmp_path, tokens, activations):
    with pytest.raises(RuntimeError), Writer(tmp_path, header(tokens), activations[1]) as writer:  # noqa: PT012
        writer.add("u0", activations[0]["u0"])
        raise RuntimeError
    assert not (tmp_path / "header.json").exists()


def flip_bit(name, place):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return damage


def edit_header(**changes):
    def damage(folder):
        content = json.loads((folder / "header.json").read_text())
        (folder / "header.json").write_text(json.dumps(content | changes))

    return damage


DAMAGE = {
    "truncated": (
        lambda folder: (folder / "frames.bin").write_bytes((folder / "frames.bin").read_bytes()[:-1]),
        "truncated",
    ),
    "a bit of a frame": (flip_bit("frames.bin", 3), "u0 is damaged"),
    "a bit of the last frame": (flip_bit("frames.bin", -1), "u4 is damaged"),
    "a bit of the head": (flip_bit("head.safetensors", -1), r"head\.safetensors is missing or damaged"),
    "a bit of the index": (flip_bit("index.npy", -4), r"index\.npy is missing or has changed"),
    "no index": (lambda folder: (folder / "index.npy").unlink(), r"index\.npy is missing"),
    "another schema": (edit_header(schema=7), "schema 7, expected 4"),
    "a letter of a training speaker": (edit_header(train_speakers=["CM01", "M11"]), r"header\.json has changed"),
    "half of the header": (
        lambda folder: (folder / "header.json").write_bytes((folder / "header.json").read_bytes()[:90]),
        r"header\.json is damaged",
    ),
    "no frames": (lambda folder: (folder / "frames.bin").unlink(), "has 0 bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_the_error_names_the_damage(tmp_path, tokens, activations, case):
    damage, message = DAMAGE[case]
    write(tmp_path, tokens, activations)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):  # noqa: PT012
        store = LogitStore(tmp_path)
        for utt_id in store:
            store.hidden(utt_id)


def test_the_error_names_a_missing_utterance(tmp_path, tokens, activations):
    with pytest.raises(UserError, match="no utterance 'u44' among its 5; did you mean 'u4'"):
        write(tmp_path, tokens, activations).hidden("u44")


def test_leaks_other_tokens_and_analysis_stores_are_refused(tmp_path, tokens, activations):
    store = write(tmp_path / "a", tokens, activations)
    store.check(tokens=tokens, held_out=["M08"])
    with pytest.raises(UserError, match="its teacher M10 was trained on M10, held out in this fold"):
        store.check(tokens=tokens, held_out=["M08", "M10"])
    for other_tokens in (dataclasses.replace(tokens, size=V + 1), dataclasses.replace(tokens, blank=3)):
        with pytest.raises(UserError, match="the same id would mean another token"):
            store.check(tokens=other_tokens)
    analysis = write(tmp_path / "b", tokens, activations, purpose="analysis")
    analysis.check(tokens=tokens, training=False)
    with pytest.raises(UserError, match="it is no training target"):
        analysis.check(tokens=tokens)


def test_probabilities_in_place_of_logits_are_refused(tmp_path, tokens):
    with Writer(tmp_path, header(tokens, "dense32"), None) as writer:
        writer.add("logits", torch.randn(4, V))
        writer.add("log-probabilities", torch.randn(4, V).log_softmax(-1))
        with pytest.raises(UserError, match="the outputs on softmaxed are probabilities"):
            writer.add("softmaxed", torch.randn(4, V).softmax(-1))


def test_invalid_outputs_are_refused(tmp_path, tokens, activations):
    with Writer(tmp_path, header(tokens), activations[1]) as writer:
        with pytest.raises(UserError, match="M10: NaN or infinite outputs on u0"):
            writer.add("u0", torch.full((2, D), torch.nan))
        with pytest.raises(UserError, match="too large for fp16 on u1"):
            writer.add("u1", torch.full((2, D), 1e6))
        with pytest.raises(ValueError, match=r"expected \[T, 16\], found \[2, 17\]"):
            writer.add("u2", torch.zeros(2, D + 1))
        writer.add("u3", torch.zeros(2, D))
        with pytest.raises(ValueError, match="in the store already"):
            writer.add("u3", torch.zeros(2, D))


def _sum(folder, utt_id):
    return float(LogitStore(folder).hidden(utt_id).sum())


def test_several_workers_read_one_store(tmp_path, tokens, activations):
    store = write(tmp_path, tokens, activations)
    jobs = [(tmp_path, utt_id) for utt_id in ("u0", "u3", "u4")] * 3
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.starmap(_sum, jobs)
    assert sums == [float(store.hidden(utt_id).sum()) for _, utt_id in jobs]


def test_head_header_and_frames_are_read_as_written(tmp_path, tokens, activations):
    store = write(tmp_path, tokens, activations)
    assert all(torch.equal(read, written) for read, written in zip(store.head, activations[1], strict=True))
    assert store.header == header(tokens)
    assert np.array_equal(store.hidden("u3").numpy(), activations[0]["u3"].half().float().numpy())
