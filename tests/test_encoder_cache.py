"""A frozen encoder is asked once an utterance, and what is remembered is what it says."""

import torch

from kdlib.models import encoder_conformer
from kdlib.models.encoder_cache import EncoderCache


def encoder():
    torch.manual_seed(1)
    shape = encoder_conformer.ConformerShape(d_model=16, layers=1, heads=2, ffn=32, kernel=7, mels=20, dropout=0.1)
    return encoder_conformer.Conformer(shape).eval()


def batch(*lengths):
    torch.manual_seed(2)
    wavs = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        wavs[row, :length] = torch.randn(length)
    return wavs, torch.tensor(lengths)


def test_what_is_remembered_is_what_the_encoder_says_and_it_is_asked_once():
    model, asked = encoder(), []
    model.register_forward_hook(lambda *_: asked.append(1))
    remembered, (wavs, lengths) = EncoderCache(model), batch(8000, 12000, 4000)
    with torch.no_grad():
        encoded, frames, _ = model(wavs, lengths)
    first, count = remembered(["a", "b", "c"], wavs, lengths)
    again, _ = remembered(["c", "a"], wavs[[2, 0], :8000], lengths[[2, 0]])
    assert len(asked) == 2  # ours, and its first
    assert count.tolist() == frames.tolist()
    for row, length in enumerate(frames.tolist()):
        assert torch.allclose(first[row, :length], encoded[row, :length], atol=1e-5)
        assert not first[row, length:].any()
    assert torch.equal(again[1, : frames[0]], first[0, : frames[0]])


def test_no_more_is_remembered_than_is_allowed():
    model = encoder()
    wavs, lengths = batch(8000, 8000)
    remembered = EncoderCache(model, most_bytes=1)
    one, _ = remembered(["a", "b"], wavs, lengths)
    other, _ = remembered(["a", "b"], wavs, lengths)
    assert not remembered.known
    assert torch.equal(one, other)
