"""The attention decoder: causal, independent of padding, with BOS and EOS in their places."""

import pytest
import torch

from kdlib.models.decoder import AttentionDecoder, teacher_forced
from kdlib.tokens import BOS, EOS

V, D = 20, 16


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return AttentionDecoder(size=V, d_model=D, heads=4, layers=2, ffn=32).eval()


@pytest.fixture(scope="module")
def encoded():
    torch.manual_seed(1)
    return torch.randn(2, 9, D), torch.tensor([9, 5])


def test_outputs_do_not_depend_on_later_inputs(decoder, encoded):
    inputs, _, _ = teacher_forced([[5, 6, 7, 8], [9, 9]])
    before = decoder(*encoded, inputs)
    changed = inputs.clone()
    changed[0, 3] = 11
    after = decoder(*encoded, changed)
    assert tuple(before.shape) == (2, 5, V)
    assert torch.allclose(before[0, :3], after[0, :3], atol=1e-6)
    assert not torch.allclose(before[0, 3], after[0, 3], atol=1e-3)


def test_outputs_do_not_depend_on_padding_of_encodings(decoder, encoded):
    inputs, _, _ = teacher_forced([[5, 6], [9, 4]])
    noisy = encoded[0].clone()
    noisy[1, 5:] = 100.0
    assert torch.allclose(decoder(*encoded, inputs), decoder(noisy, encoded[1], inputs), atol=1e-5)


def test_token_0_is_no_padding(decoder, encoded):
    """SpeechBrain's own masks take id 0 for padding: then the first step, which is BOS, would have no input."""
    assert BOS == 0
    inputs, _, _ = teacher_forced([[5], [9]])
    assert decoder(*encoded, inputs).isfinite().all()


def test_the_head_gives_the_logits_of_the_activations(decoder, encoded):
    inputs, _, _ = teacher_forced([[5, 6], [9, 4]])
    assert torch.equal(decoder.head(decoder.activations(*encoded, inputs)), decoder(*encoded, inputs))


def test_free_running_tokens_are_the_best_under_teacher_forcing(decoder, encoded):
    for row, ids in enumerate(decoder.greedy(*encoded, longest=6)):
        inputs, _, _ = teacher_forced([ids])
        best = decoder(encoded[0][row : row + 1], encoded[1][row : row + 1], inputs)[0].argmax(-1).tolist()
        assert best[: len(ids)] == ids
        assert len(ids) == 6 or best[len(ids)] == EOS


def test_it_can_be_trained_on_two_texts(encoded):
    torch.manual_seed(0)
    decoder = AttentionDecoder(size=V, d_model=D, heads=4, layers=1, ffn=32, dropout=0.0)
    inputs, targets, lengths = teacher_forced([[5, 6, 7], [9, 4]])
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    for _ in range(150):
        losses = torch.nn.functional.cross_entropy(decoder(*encoded, inputs).transpose(1, 2), targets, reduction="none")
        loss = (losses * (torch.arange(targets.shape[1])[None] < lengths[:, None])).sum() / lengths.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert decoder.eval().greedy(*encoded, longest=8) == [[5, 6, 7], [9, 4]]
