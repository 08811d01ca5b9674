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
        ("a.pt", [1, 2], "expected a dictionary of utterance id"),
        ("b.pt", {"u": OtherClass()}, "cannot be read as tensors"),
        ("c.pt", {}, "it has no utterances"),
        ("d.bin", {}, r"expected \.pt, \.npz"),
    ],
)
def test_files_without_logits_are_refused(tmp_path, name, content, message):
    torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        import_logits(tmp_path / name, tmp_path / "s", HEADER)


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
