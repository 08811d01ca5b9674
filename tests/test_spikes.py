from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kdlib.corpus.utterances import Utterance
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
    pairs = spikes.compare_times(spikes.token_times(stores, [utt], tokens), 40.0).set_index(["one", "other"])
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
    store = spiking_store(tmp_path, tokens, "A", range(len(ids)), ids)
    pairs = spikes.compare_times(spikes.token_times({"A": store}, [utt], tokens), 40.0)
    assert "only one teacher" in spikes.describe_times(pairs)


def clips(count, seconds):
    """Utterances of these durations in turn."""
    return [Utterance(f"u{place}", "S", Path("x.wav"), seconds[place % len(seconds)], "WORD") for place in range(count)]


def test_times_that_follow_the_speech_mean_something():
    """Each recording begins elsewhere, and both teachers find the place within a frame."""
    starts = [40.0 * (7 * place % 10) for place in range(20)]
    one = [np.array([start, start + 80]) for start in starts]
    times = {"A": one, "B": [row + 40 for row in one]}
    found = spikes.timing(times, clips(20, [0.6, 0.8, 1.1]), 40.0)
    assert found.same_ms == 40
    assert found.other_ms > 100
    assert not found.means_nothing
    assert found.remark == ""
    alone = spikes.timing({"A": one}, clips(20, [0.6, 0.8, 1.1]), 40.0)  # a single teacher agrees with itself
    assert (alone.same_ms, alone.means_nothing) == (0, False)


def test_tokens_in_the_first_frame_of_every_clip_say_nothing():
    times = {name: [np.array([0.0])] * 20 for name in "AB"}
    found = spikes.timing(times, clips(20, [1.0]), 40.0)
    assert found.remark == (
        "these times say nothing about the speech: tokens of different recordings are 0 ms apart, those of one "
        "recording 0 ms; 100 % of the tokens stand in the first 40 ms, and the clips are all of one length "
        "(1.00 s)"
    )
    varied = spikes.timing(times, clips(20, [0.6, 0.8, 1.1]), 40.0)
    assert varied.means_nothing
    assert "of one length" not in varied.remark
    assert spikes.timing({"A": times["A"]}, clips(20, [1.0]), 40.0).means_nothing  # whatever the number of teachers


def test_teachers_that_agree_by_position_alone_say_nothing():
    """Tokens at a fixed place of clips of one length, give or take a frame, whatever is said."""
    rng = np.random.default_rng(0)
    times = {name: [400.0 + 40 * rng.integers(0, 2, 1) for _ in range(200)] for name in "AB"}
    found = spikes.timing(times, clips(200, [1.0, 1.02]), 40.0)
    assert found.means_nothing
    assert found.first_frame == 0
    assert "the clips are all of one length" in found.remark


def test_clips_of_one_length_are_noted_where_times_follow_the_speech():
    one = [np.array([40.0 * (7 * place % 10)]) for place in range(20)]
    found = spikes.timing({"A": one, "B": one}, clips(20, [1.0]), 40.0)
    assert not found.means_nothing
    assert found.remark == "note: the clips are all of one length (1.00 s)"


def test_recordings_that_have_no_other_with_as_many_tokens_are_not_judged():
    times = {name: [np.zeros(count) for count in (1, 2, 3)] for name in "AB"}
    found = spikes.timing(times, clips(3, [1.0, 0.5]), 40.0)
    assert np.isnan(found.other_ms)
    assert not found.means_nothing
    nothing = spikes.timing({"A": [], "B": []}, [], 40.0)  # no utterance that all teachers have
    assert nothing.remark == ""


def test_teachers_of_their_own_recordings_alone_are_not_compared():
    pairs = pd.DataFrame({"mean_ms": [np.nan], "other_ms": [np.nan], "within_a_frame": [np.nan]})
    assert spikes.describe_times(pairs) == "no two teachers have outputs on one recording: nothing to compare"
    assert spikes.simultaneous({"A": None, "B": None}, []).isna().all()
