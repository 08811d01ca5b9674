"""What stays the same is computed once: a frozen encoder's encodings, and the features of unchanged recordings."""

import pytest
import torch
from corpora import utterances

from kdlib.corpus.inputs import Batch
from kdlib.models import encoder_conformer
from kdlib.models.encoder_cache import EncoderCache, FeatureCache
from kdlib.models.encoder_nemo import NeMoEncoder
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.models.nemo_files import conformer_config
from kdlib.objectives.objective import Learner, Objective
from kdlib.objectives.reference_terms import REFERENCE_TERMS
from kdlib.settings.reference_loss import ReferenceLoss


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


def nemo_encoder():
    torch.manual_seed(1)
    shape = conformer_config(d_model=16, layers=1, heads=2, channels=8, mels=20, kernel=7)
    return NeMoEncoder.build(shape).eval()


@pytest.mark.parametrize("build", [encoder, nemo_encoder])
def test_the_gradients_of_a_step_are_those_without_the_cache(build):
    """Without dropout and masks, which are random."""
    model = Hybrid(build(), Heads(6, layers=0)).eval()
    settings = ReferenceLoss(beta=1.0, heads="ctc", use_teachers=False)
    objective = Objective(Learner(model), settings, REFERENCE_TERMS)
    given = batch(a=8000, b=12000, c=9000)
    given = Batch(given.utterances, [[3, 4], [5], [4, 3, 4]], loaded=given.loaded)

    def gradients():
        model.zero_grad()
        objective(given)["loss"].backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    expected, calls = gradients(), []
    objective.cache = FeatureCache(model.encoder)
    objective.cache.compute = lambda *given: (calls.append(1), model.encoder.extract_features(*given))[1]
    for _ in range(2):
        found = gradients()
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-4), name
    assert len(calls) == 3  # of each utterance, in the first step


def test_the_tempo_is_of_the_batch_and_not_cached():
    model = Hybrid(encoder(), Heads(6, layers=0)).eval()
    objective = Objective(Learner(model), ReferenceLoss(beta=1.0, heads="ctc", use_teachers=False), REFERENCE_TERMS)
    given, found = batch(a=16000), {}
    for objective.cache in (None, FeatureCache(model.encoder)):
        for tempo in (1.0, 1.1, 1.0):
            with torch.no_grad():
                outputs = objective.outputs(given.stretched(tempo)).ctc
            assert int(outputs.lengths) == {1.0: 26, 1.1: 28}[tempo]
            assert torch.equal(outputs.logits, found.setdefault(tempo, outputs.logits))
