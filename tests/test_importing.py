"""Imported logits of other code: stored at their rank, or dense."""

import h5py
import numpy as np
import pytest
import torch

from kdlib.errors import UserError
from kdlib.logits.importing import factorise, import_logits
from kdlib.logits.store import Header

V, D = 200, 12
HEADER = Header(
    **{"teacher": "M10", "train_speakers": ("M10",), "output": "decoder", "encoding": "dense32", "size": 0, "width": 0},
    **{"tokens": "t", "blank": 2, "bos": 0, "eos": 1, "stride_ms": 0.0},
)


@pytest.fixture(scope="module")
def logits():
    """Logits of a head of width 12 on 40 utterances."""
    torch.manual_seed(0)
    weight, bias = torch.randn(V, D), torch.randn(V)
    return {f"M08_B1_UW{index}_M5": torch.randn(6 + index % 5, D) @ weight.T + bias for index in range(40)}


def write(folder, kind, logits):
    arrays = {name: values.numpy() for name, values in logits.items()}
    if kind == "pt":
        torch.save(logits, folder / "logits.pt")
    elif kind == "npz":
        np.savez(folder / "logits.npz", **arrays)
    elif kind == "h5":
        with h5py.File(folder / "logits.h5", "w") as file:
            for name, values in arrays.items():
                file[name] = values
    else:  # one file per utterance, a batch of one as in the original study
        (folder / "logits").mkdir()
        for name, values in logits.items():
            path = folder / "logits" / name
            np.save(f"{path}.npy", values.numpy()) if kind == "npy" else torch.save(values[None], f"{path}.pt")
        return folder / "logits"
    return folder / f"logits.{kind}"


def kl(p, q):
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["pt", "npz", "h5", "npy", "pt per utterance"])
def test_every_format_is_stored_at_its_rank(tmp_path, logits, kind):
    store = import_logits(write(tmp_path, kind, logits), tmp_path / "s", HEADER)
    assert (store.header.encoding, store.header.size, store.header.width) == ("fp16", V, D)
    assert set(store) == set(logits)
    assert max(kl(values, store.logits(name)) for name, values in logits.items()) < 1e-4


def test_log_probabilities_have_one_dimension_more(tmp_path, logits):
    normalised = {name: values.log_softmax(-1) for name, values in logits.items()}
    store = import_logits(write(tmp_path, "npz", normalised), tmp_path / "s", HEADER)
    assert store.header.width == D + 1
    assert max(kl(values, store.logits(name)) for name, values in logits.items()) < 1e-4


def test_logits_without_a_low_rank_stay_dense(tmp_path):
    torch.manual_seed(0)
    full = {f"u{index}": torch.randn(30, V) for index in range(20)}
    store = import_logits(write(tmp_path, "pt", full), tmp_path / "s", HEADER)
    assert (store.header.encoding, store.header.width) == ("dense16", V)
    assert max(kl(values, store.logits(name)) for name, values in full.items()) < 1e-5


def test_too_few_frames_give_no_rank(logits):
    assert factorise(next(iter(logits.values())).numpy()) is None


def test_probabilities_are_refused(tmp_path, logits):
    probabilities = {name: values.softmax(-1) for name, values in logits.items()}
    with pytest.raises(UserError, match="these are probabilities"):
        import_logits(write(tmp_path, "npz", probabilities), tmp_path / "s", HEADER)
    assert not (tmp_path / "s/header.json").exists()


def test_the_error_names_an_utterance_of_another_size(tmp_path, logits):
    odd = logits | {"M08_B1_UW3_M5": torch.randn(5, V + 1)}
    with pytest.raises(UserError, match=r"M08_B1_UW3_M5 has the shape \[5, 201\], expected \[frames, 200\]"):
        import_logits(write(tmp_path, "pt", odd), tmp_path / "s", HEADER)


class OtherClass:
    """A class in a pickle."""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", [1, 2], "a list of 2 utterances without their ids"),
        ("b.pt", {"u": OtherClass()}, "cannot be read as tensors"),
        ("c.pt", {}, "it has no utterances"),
        ("d.bin", {}, r"expected \.pt, \.pth, \.npz"),
    ],
)
def test_files_without_logits_are_refused(tmp_path, name, content, message):
    torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        import_logits(tmp_path / name, tmp_path / "s", HEADER)


def test_another_source_is_never_added_to_a_store(tmp_path, logits):
    """The same file again changes nothing; another one is refused, whatever its utterances are called."""
    source = write(tmp_path, "npz", logits)
    import_logits(source, tmp_path / "s", HEADER)
    content = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    import_logits(source, tmp_path / "s", HEADER)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == content
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", "npz", {name: values + 1 for name, values in logits.items()})
    with pytest.raises(UserError, match=r"stored before, of other contents .*source"):
        import_logits(other, tmp_path / "s", HEADER)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == content


def test_two_utterances_of_one_id_are_refused(tmp_path):
    rows = torch.randn(4, V)
    torch.save({1: rows, "1": rows + 1}, tmp_path / "twice.pt")
    with pytest.raises(UserError, match=r"twice.pt: 1 and '1' are both the utterance 1; rename one"):
        import_logits(tmp_path / "twice.pt", tmp_path / "s", HEADER)
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "twice.h5", "w") as file:
        file["a/b"], file["a_b"] = rows.numpy(), rows.numpy()
    with pytest.raises(UserError, match=r"a/b and a_b are both the utterance a_b"):
        import_logits(tmp_path / "twice.h5", tmp_path / "s", HEADER)


WRONG = {
    "missing.npz": (None, "there is no such file"),
    "noise.npz": (b"PK\x03\x04 no archive", "cannot be read as tensors"),
    "noise.h5": (b"no HDF5", "cannot be read as tensors"),
    "noise.pt": (b"no tensors", "cannot be read as tensors"),
    "empty.npz": (b"", "cannot be read as tensors"),
    "scalar.pt": ({"u": torch.tensor(1.0)}, r"u has the shape \[\], expected \[frames, tokens\]"),
    "text.pt": ({"u": "logits"}, "u holds a str, expected numbers"),
    "vector.pt": ({"u": torch.zeros(5)}, r"u has the shape \[5\]"),
    "no_frames.pt": ({"u": torch.zeros(0, 5)}, "none of its utterances has a frame"),
    "no_tokens.pt": ({"u": torch.zeros(5, 0)}, r"u has the shape \[5, 0\]"),
    "nan.pt": ({"u": torch.full((5, 4), torch.nan)}, "NaN or infinite logits"),
    "lists.pt": ({"u": [[1.0, 2.0], [3.0]]}, "u holds a list, expected numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_or_strange_source_is_one_sentence(tmp_path, name):
    content, message = WRONG[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        import_logits(tmp_path / name, tmp_path / "s", HEADER)


def test_half_precision_logits_are_imported(tmp_path):
    torch.save({"u": torch.randn(30, V).bfloat16()}, tmp_path / "half.pt")
    assert import_logits(tmp_path / "half.pt", tmp_path / "s", HEADER).frames("u") == 30


def test_the_error_names_an_utterance_of_another_model(tmp_path):
    """Enough frames of one head to find its rank, and one utterance of another head outside of the sample."""
    torch.manual_seed(0)
    weight, bias = torch.randn(V, D), torch.randn(V)
    mixed = {f"u{index:03}": torch.randn(20, D) @ weight.T + bias for index in range(80)}
    mixed["u076"] = torch.randn(20, D) @ torch.randn(V, D).T + bias
    source = write(tmp_path, "npz", mixed)
    with pytest.raises(UserError, match="u076 does not lie in the 12 dimensions of the sampled frames"):
        import_logits(source, tmp_path / "s", HEADER)
    store = import_logits(source, tmp_path / "d", HEADER, dense=True)
    assert kl(mixed["u076"], store.logits("u076")) < 1e-5
