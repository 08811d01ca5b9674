"""SpeechBrain's Conformer: shapes, sizes, and outputs that do not depend on the neighbours in a batch."""

import pytest
import torch

from kdlib.models.conformer import Conformer, Shape

TINY = Shape(d_model=32, layers=2, heads=4, ffn=64, kernel=7, mels=40)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Conformer(TINY, 50).eval()


@pytest.fixture(scope="module")
def waves():
    torch.manual_seed(1)
    return [torch.randn(length) / 10 for length in (16_000, 9_123, 3_200)]


def batch(waves):
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(wave) for wave in waves])


def test_a_frame_takes_40_ms(model, waves):
    outputs = model(*batch(waves))
    assert outputs.lengths.tolist() == [26, 15, 6]  # 101, 58 and 21 features of 10 ms, halved twice and rounded up
    assert tuple(outputs.ctc_logits.shape) == (3, 26, 50)
    assert tuple(outputs.encoded.shape) == (3, 26, 32)
    assert sorted(outputs.hidden) == [1, 2]


def test_neighbours_in_a_batch_change_nothing(model, waves):
    together = model(*batch(waves))
    for index, wave in enumerate(waves):
        alone = model(*batch([wave]))
        length = int(alone.lengths[0])
        assert (together.ctc_logits[index, :length] - alone.ctc_logits[0]).abs().max() < 1e-4
        for layer, hidden in alone.hidden.items():
            assert (together.hidden[layer][index, :length] - hidden[0]).abs().max() < 1e-4


def test_loudness_changes_nothing_that_matters(model, waves):
    quiet, loud = model(*batch(waves[:1])), model(*batch([waves[0] * 4]))
    assert (quiet.ctc_logits - loud.ctc_logits).abs().max() < 1e-2


def test_the_original_studys_shape():
    """d_model 144 and 5,000 tokens: the CTC head alone has 144 x 5,000 weights and 5,000 biases."""
    model = Conformer(Shape(), 5000)
    head = sum(weight.numel() for weight in model.ctc_head.parameters())
    assert head == 725_000
    assert model(torch.randn(1, 16_000), torch.tensor([16_000])).ctc_logits.shape == (1, 26, 5000)


def test_every_weight_learns(waves):
    model = Conformer(TINY, 50)
    outputs = model(*batch(waves))
    (outputs.ctc_logits**2).mean().backward()
    idle = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert idle == []
