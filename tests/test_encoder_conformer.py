"""SpeechBrain's Conformer: shapes, sizes, and outputs that do not depend on the neighbours in a batch."""

import pytest
import torch

from kdlib.models.augment import SpecAugment
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.settings.augment import Masks

TINY = ConformerShape(d_model=32, layers=2, heads=4, ffn=64, kernel=7, mels=40)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Conformer(TINY).eval()


@pytest.fixture(scope="module")
def waves():
    torch.manual_seed(1)
    return [torch.randn(length) / 10 for length in (16_000, 9_123, 3_200)]


def batch(waves):
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(wave) for wave in waves])


def test_a_frame_takes_40_ms(model, waves):
    encoded, frames, hidden = model(*batch(waves), layers=(1, 2))
    assert frames.tolist() == [26, 15, 6]  # 101, 58 and 21 features of 10 ms, halved twice and rounded up
    assert tuple(encoded.shape) == (3, 26, 32)
    assert sorted(hidden) == [1, 2]


def test_outputs_do_not_depend_on_neighbours_in_the_batch(model, waves):
    """SpeechBrain masks padding after the depthwise convolution: without our mask it leaks into the last frames."""
    batched, _, layers = model(*batch(waves), layers=(1, 2))
    for index, wave in enumerate(waves):
        alone, frames, hidden = model(*batch([wave]), layers=(1, 2))
        length = int(frames[0])
        assert (batched[index, :length] - alone[0]).abs().max() < 1e-4
        for layer, output in hidden.items():
            assert (layers[layer][index, :length] - output[0]).abs().max() < 1e-4


def test_outputs_hardly_depend_on_loudness(model, waves):
    quiet, loud = model(*batch(waves[:1]))[0], model(*batch([waves[0] * 4]))[0]
    assert (quiet - loud).abs().max() < 1e-2


def test_spec_augment_only_in_training_and_only_if_it_is_enabled(model, waves):
    expected = model(*batch(waves))[0]
    model.spec_augment = SpecAugment(Masks(warmup=0))
    assert torch.equal(model(*batch(waves))[0], expected)
    model.train()
    assert not torch.allclose(model(*batch(waves))[0], expected, atol=1e-2)
    model.eval()
    model.spec_augment = None


def test_every_weight_has_a_gradient(waves):
    model = Conformer(TINY)
    (model(*batch(waves))[0] ** 2).mean().backward()
    idle = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert idle == []
