"""The BiLSTM on feature sequences: shapes, sizes, padding, normalisation, attention, memory."""

import numpy as np
import pytest
import torch

from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.models.encoder_bilstm import BiLSTM, BiLSTMShape, BothDirections, reversed_frames
from kdlib.models.hybrid import Heads, Hybrid

SMALL = BiLSTMShape(inputs=12, d_model=8, layers=3, dropout=0.0)


def batch(*lengths, width=12):
    torch.manual_seed(1)
    rows = [torch.randn(length, width) for length in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)


def weights(model):
    return sum(weight.numel() for weight in model.parameters())


def test_the_seeds_models_have_their_shapes_and_sizes():
    student = Hybrid(BiLSTM(BiLSTMShape()), Heads(1229, 0)).eval()
    x, lengths = torch.randn(8, 150, 512), torch.full((8,), 150)
    with torch.inference_mode():
        log_probs, frames, hidden = student.forward_with_hidden_states(x, lengths, [2, 3])
    assert log_probs.shape == (75, 8, 1229)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(75, 8), atol=1e-4)
    assert frames.tolist() == [75] * 8
    assert {layer: tuple(values.shape) for layer, values in hidden.items()} == {2: (8, 75, 512), 3: (8, 75, 512)}
    assert weights(student) == 7_469_005
    assert weights(Hybrid(BiLSTM(BiLSTMShape(d_model=384, layers=5)), Heads(1229, 0))) == 19_763_021


@pytest.mark.parametrize("attention", [False, True])
def test_padding_changes_nothing(attention):
    torch.manual_seed(0)
    encoder = BiLSTM(BiLSTMShape(**SMALL.__dict__ | {"attention": attention})).eval()
    inputs, lengths = batch(21, 9, 2)
    together = encoder(inputs, lengths, layers=(1, 3))
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(inputs[row : row + 1, :length], lengths[row : row + 1], layers=(1, 3))
        count = int(alone.lengths)
        assert count == (length + 1) // 2 == int(together.lengths[row])
        assert (together.frames[row, :count] - alone.frames[0]).abs().max() < 1e-6
        assert not together.frames[row, count:].any()
        for layer, values in alone.hidden.items():
            assert (together.hidden[layer][row, :count] - values[0]).abs().max() < 1e-6


def test_a_layer_is_a_bidirectional_lstm_on_packed_sequences():
    torch.manual_seed(0)
    layer, torchs = BothDirections(12, 8), torch.nn.LSTM(12, 8, batch_first=True, bidirectional=True)
    halves = {"": layer.ahead, "_reverse": layer.back}
    torchs.load_state_dict(
        {f"{name}{end}": weight for end, half in halves.items() for name, weight in half.state_dict().items()}
    )
    inputs, lengths = batch(21, 9, 1)
    packed = torch.nn.utils.rnn.pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(torchs(packed)[0], batch_first=True)
    found = layer(inputs, reversed_frames(lengths, 21)) * (torch.arange(21)[None] < lengths[:, None])[..., None]
    assert (found - expected).abs().max() < 1e-6
    for values in (found, expected):
        values.square().sum().backward()
    for end, half in halves.items():
        for name, weight in half.named_parameters():
            assert torch.allclose(weight.grad, getattr(torchs, name + end).grad, atol=1e-5)


def test_attention_begins_almost_as_the_plain_encoder_and_learns():
    torch.manual_seed(0)
    encoder = BiLSTM(BiLSTMShape(**SMALL.__dict__ | {"attention": True})).eval()
    plain = BiLSTM(SMALL).eval()
    plain.load_state_dict(encoder.state_dict(), strict=False)
    given = batch(20, 20)
    added = (encoder(*given).frames - plain(*given).frames).abs().mean() / plain(*given).frames.abs().mean()
    assert 0 < added < 0.3
    encoder(*given).frames.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in encoder.attention.parameters() if weight.ndim > 1)


def test_recomputed_layers_give_the_same_gradients():
    torch.manual_seed(0)
    first = BiLSTM(SMALL).train()
    again = BiLSTM(BiLSTMShape(**SMALL.__dict__ | {"recompute": True})).train()
    again.load_state_dict(first.state_dict())
    for encoder in (first, again):
        encoder(*batch(20, 7)).frames.square().sum().backward()
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_features_are_normalised_by_the_training_speech_once(tmp_path):
    rng = np.random.default_rng(0)
    utterances = []
    for index in range(5):
        np.save(tmp_path / f"{index}.npy", rng.normal(3, [1, 10, 0.1], (50, 3)).astype("float32"))
        utterances.append(Utterance(str(index), "S", tmp_path / f"{index}.npy", 2.0, "A"))
    encoder = BiLSTM(BiLSTMShape(inputs=3, d_model=4, layers=1))
    encoder.learn_statistics(utterances)
    assert encoder.mean.tolist() == pytest.approx([3, 3, 3], abs=1.5)
    assert encoder.deviation.tolist() == pytest.approx([1, 10, 0.1], rel=0.15)
    before = encoder.mean.clone()
    encoder.learn_statistics(utterances[:1])
    assert torch.equal(encoder.mean, before)
    values = torch.from_numpy(np.load(utterances[0].wav))[None]
    features, _ = encoder.extract_features(values, torch.tensor([40]))
    assert features[0, :40].std(0).tolist() == pytest.approx([1, 1, 1], rel=0.3)
    assert not features[0, 40:].any()
    assert BiLSTM.build(encoder.config).state_dict().keys() == encoder.state_dict().keys()


def test_another_width_is_refused():
    with pytest.raises(UserError, match=r"takes 12 features per frame, found 10; correct features.width"):
        BiLSTM(SMALL)(*batch(5, width=10))
