import numpy as np
import pytest
import torch

from kdlib.corpus.manifest import Utterance
from kdlib.logits import spikes
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
from kdlib.tokens import BLANK, Tokens


@pytest.fixture
def tokens(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(read_tokenizer(SHIPPED_MODEL))
    return Tokens.for_teachers(tmp_path / "tokenizer.model")


def spiking_store(tmp_path, tokens, name, frames, ids, length=20):
    """A store of one utterance with certain tokens in these frames."""
    logits = torch.full((length, tokens.size), -8.0)
    logits[:, BLANK] = 8.0
    for frame, token in zip(frames, ids, strict=True):
        logits[frame, BLANK], logits[frame, token] = -8.0, 8.0
    header = Header(
        teacher=name,
        train_speakers=(name,),
        output="ctc",
        encoding="dense32",
        size=tokens.size,
        width=tokens.size,
        tokens=tokens.fingerprint,
        blank=BLANK,
        bos=0,
        eos=1,
        stride_ms=40.0,
    )
    with Writer(tmp_path / name, header, None) as writer:
        writer.add("one", logits)
    return LogitStore(tmp_path / name)


def test_token_times_of_pairs_of_teachers_are_compared(tmp_path, tokens):
    utt = Utterance("one", "M04", tmp_path / "one.wav", 0.8, "COMMAND")
    ids = tokens.encode(utt.text)
    frames = np.arange(len(ids)) * 2
    stores = {
        name: spiking_store(tmp_path, tokens, name, frames + lag, ids) for name, lag in (("A", 0), ("B", 1), ("C", 4))
    }
    pairs = spikes.compare_times(stores, [utt], tokens).set_index(["one", "other"])
    assert pairs.mean_ms.to_dict() == {("A", "B"): 40.0, ("A", "C"): 160.0, ("B", "C"): 120.0}
    assert pairs.within_a_frame.to_dict() == {("A", "B"): 1.0, ("A", "C"): 0.0, ("B", "C"): 0.0}
    assert "3 pairs of teachers: their tokens are 107 ms apart on average, 33 % of them" in spikes.describe_times(pairs)
    shares = spikes.simultaneous(stores, [utt])
    assert shares.sum() == pytest.approx(1)
    both = len(set(frames) & set(frames + 4))  # A and C share some frames, B none with them
    assert shares[2] == pytest.approx(both / (3 * len(ids) - both))


def test_tokens_that_do_not_fit_have_no_times():
    assert len(spikes.times_ms(torch.zeros(2, 5), [3, 3], 40.0)) == 0


def test_a_single_teacher_is_not_compared(tmp_path, tokens):
    utt = Utterance("one", "M04", tmp_path / "one.wav", 0.8, "COMMAND")
    ids = tokens.encode(utt.text)
    pairs = spikes.compare_times({"A": spiking_store(tmp_path, tokens, "A", range(len(ids)), ids)}, [utt], tokens)
    assert "only one teacher" in spikes.describe_times(pairs)
