"""A frozen encoder encodes every utterance once, and cached encodings equal its outputs."""

import torch
from corpora import utterances

from kdlib.corpus.inputs import Batch
from kdlib.models import encoder_conformer
from kdlib.models.encoder_cache import EncoderCache


def encoder():
    torch.manual_seed(1)
    shape = encoder_conformer.ConformerShape(d_model=16, layers=1, heads=2, ffn=32, kernel=7, mels=20, dropout=0.1)
    return encoder_conformer.Conformer(shape).eval()


def batch(**lengths):
    torch.manual_seed(2)
    wavs = torch.zeros(len(lengths), max(lengths.values()))
    for row, length in enumerate(lengths.values()):
        wavs[row, :length] = torch.randn(length)
    return Batch(utterances(*lengths), loaded=[wavs, torch.tensor(list(lengths.values()))])


def test_cached_encodings_equal_the_encoders_and_are_computed_once():
    model, calls = encoder(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    cache, three = EncoderCache(model), batch(a=8000, b=12000, c=4000)
    with torch.no_grad():
        encoded, frames, _ = model(three.inputs, three.lengths)
    first, count, *_ = cache(three)
    again, *_ = cache(three.select([2, 0]))
    assert len(calls) == 4  # the test's, and the cache's first of each utterance
    assert count.tolist() == frames.tolist()
    for row, length in enumerate(frames.tolist()):
        assert torch.allclose(first[row, :length], encoded[row, :length], atol=1e-5)
        assert not first[row, length:].any()
    assert torch.equal(again[1, : frames[0]], first[0, : frames[0]])


def test_the_cache_stays_within_its_size():
    model = encoder()
    two = batch(a=8000, b=8000)
    cache = EncoderCache(model, max_bytes=1)
    first, *_ = cache(two)
    second, *_ = cache(two)
    assert not cache.cached
    assert torch.equal(first, second)
