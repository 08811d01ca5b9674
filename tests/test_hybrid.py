"""Encoder, CTC head and decoder: sizes, saving, and one interface for both encoders."""

import pytest
import torch

from kdlib.errors import UserError
from kdlib.models import hybrid
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.encoder_nemo import NeMoEncoder, remap_head
from kdlib.models.nemo_files import SHIPPED_MODEL, NeMoCTC, conformer_config, read_tokenizer, restore_model
from kdlib.settings.student import Student
from kdlib.tokens import BLANK, Tokens

TINY = ConformerShape(d_model=32, layers=2, heads=4, ffn=64, kernel=7, mels=40)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    path.write_bytes(read_tokenizer(SHIPPED_MODEL))
    return Tokens.for_teachers(path, 80)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return hybrid.Hybrid(Conformer(TINY), hybrid.Heads(80, layers=1, ffn=64)).eval()


@pytest.fixture(scope="module")
def pretrained():
    source = restore_model(SHIPPED_MODEL)
    source.eval()
    encoder = NeMoEncoder.of(source)
    return source, hybrid.Hybrid(encoder, hybrid.Heads(80, layers=1)).eval()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    waves = [torch.randn(length) / 10 for length in (16_000, 9_123)]
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([16_000, 9_123])


def test_outputs_have_their_documented_shapes(model, batch):
    outputs = model(*batch, torch.tensor([[0, 5, 6], [0, 7, 1]]))
    assert tuple(outputs.ctc.logits.shape) == (2, 26, 80)
    assert tuple(outputs.decoder_logits.shape) == (2, 3, 80)
    assert len(model.decode_greedy(outputs.encoded, 5, outputs.lengths)) == 2


def test_the_original_studys_shape():
    """d_model 144 and 5,000 tokens: the CTC head alone has 144 x 5,000 weights and 5,000 biases."""
    model = hybrid.Hybrid(Conformer(ConformerShape()), hybrid.Heads(5000))
    assert sum(weight.numel() for weight in model.ctc_head.parameters()) == 725_000


def test_ctc_only_has_no_decoder():
    assert hybrid.Hybrid(Conformer(TINY), hybrid.Heads(80, layers=0)).decoder is None


def test_a_loaded_model_has_the_same_outputs(model, tokens, batch, tmp_path):
    hybrid.save(model, tokens, tmp_path, train_speakers=["M08"])
    loaded = hybrid.TrainedModel(tmp_path)
    assert loaded.record["train_speakers"] == ["M08"]
    assert loaded.tokens.fingerprint == tokens.fingerprint
    assert torch.equal(loaded(*batch).ctc.logits, model(*batch).ctc.logits)


def test_a_damaged_model_has_one_message(model, tokens, tmp_path):
    hybrid.save(model, tokens, tmp_path, train_speakers=[])
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        hybrid.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no complete model"):
        hybrid.load(tmp_path)


def test_a_model_with_another_tokenizer_is_rejected(model, tokens, tmp_path):
    hybrid.save(model, tokens, tmp_path, train_speakers=[])
    content = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(content.replace(tokens.fingerprint, "0" * 16))
    with pytest.raises(UserError, match="the ids would mean other words"):
        hybrid.load(tmp_path)


def test_the_pretrained_head_has_the_same_outputs_over_the_teachers_tokens(pretrained, tokens, batch):
    """NeMo's blank is last, ours is 2; pieces keep their ids."""
    source, model = pretrained
    head = source.decoder.decoder_layers[0]
    model.ctc_head.load_state_dict(remap_head(head.weight.detach()[:, :, 0], head.bias.detach(), tokens))
    with torch.inference_mode():
        outputs = model(*batch)
        expected = NeMoCTC.__call__(type("Whole", (), {"model": source, "device": "cpu"})(), *batch)
    probs, nemo_probs = outputs.ctc.logits.softmax(-1), expected.ctc.logits.softmax(-1)
    for index, length in enumerate(expected.lengths.tolist()):
        assert torch.allclose(probs[index, :length, BLANK], nemo_probs[index, :length, 64], atol=1e-3)
        assert torch.allclose(probs[index, :length, 3:64], nemo_probs[index, :length, 3:64], atol=1e-3)
        assert probs[index, :length, 64:].max() < 1e-3  # tokens that no piece has


def test_neighbours_do_not_change_nemos_encoder(pretrained, batch):
    _, model = pretrained
    samples, lengths = batch
    with torch.inference_mode():
        both = model(samples, lengths)
        alone = model(samples[1:, : int(lengths[1])], lengths[1:])
    length = int(alone.lengths[0])
    assert int(both.lengths[1]) == length
    assert (both.encoded[1, :length] - alone.encoded[0, :length]).abs().max() < 1e-3


def test_nemos_encoder_is_built_again_from_a_saved_model(pretrained, tokens, batch, tmp_path):
    _, model = pretrained
    hybrid.save(model, tokens, tmp_path, train_speakers=[])
    with torch.inference_mode():
        assert torch.allclose(hybrid.TrainedModel(tmp_path)(*batch).encoded, model(*batch).encoded, atol=1e-5)
    assert model.encoder.stride_ms == 40


def test_a_frozen_encoder_is_not_trained(pretrained):
    _, model = pretrained
    model.freeze()
    model.train()
    assert not model.encoder.encoder.training
    assert not any(weight.requires_grad for weight in model.encoder.parameters())
    assert model.ctc_head.training


def count(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.fixture(scope="module")
def full_size():
    """Seed 001's student: the encoder of stt_en_conformer_ctc_small, 5,000 tokens, a decoder of four layers."""
    torch.manual_seed(0)
    encoder = NeMoEncoder.build(conformer_config())
    return hybrid.new_model(encoder, 5000, Student(decoder_layers=4)).eval()


def test_the_full_size_student_has_the_seeds_parameters(full_size):
    """Encoder 12.97 M, CTC head 0.9 M, decoder 3-4 M without its own 5,000-way output, 18.3 M in all: within 5 %.

    The CTC head is 176 x 5,000 + 5,000. A decoder layer of width d and FFN f has 8 d^2 + 8 d (two attentions),
    2 d f + d + f and three norms of 2 d; around the layers are an embedding, a last norm and an output layer.
    """
    d, f = 176, 1024
    layer = 8 * d * d + 8 * d + 2 * d * f + d + f + 6 * d
    output = 5000 * d + 5000
    assert count(full_size.ctc_head) == output == 885_000
    assert count(full_size.decoder) == 4 * layer + 5000 * d + 2 * d + output == 4_213_032
    assert count(full_size.encoder) == pytest.approx(12.97e6, rel=0.05)
    assert 3e6 < count(full_size.decoder) - output < 4e6
    assert count(full_size) == pytest.approx(18.3e6, rel=0.05)


def test_the_full_size_students_interface(full_size):
    """Audio of 2 s at 16 kHz: 100 features per second, a quarter of that in the encoder."""
    wavs, wav_lens = torch.randn(2, 32_000) / 10, torch.tensor([32_000, 20_000])
    with torch.inference_mode():
        outputs = full_size(wavs, wav_lens)
        frames = outputs.encoded.shape[1]
        assert outputs.encoded.shape == (2, frames, 176)
        assert outputs.ctc.logits.shape == (2, frames, 5000)
        assert 50 <= frames <= 51
        assert outputs.lengths.tolist() == [frames, round(20_000 / 32_000 * 50) + 1]
        targets = torch.tensor([[0, 7, 8], [0, 9, 1]])
        assert full_size.forward_decoder(outputs.encoded, targets, outputs.lengths).shape == (2, 3, 5000)
        hypotheses = full_size.decode_greedy(outputs.encoded, 4)
    assert all(len(ids) <= 4 for ids in hypotheses)


@pytest.mark.parametrize("layers", [0, 2, 4, 6])
def test_the_decoders_depth(layers):
    model = hybrid.Hybrid(Conformer(TINY), hybrid.Heads(80, layers=layers, ffn=64))
    assert (0 if model.decoder is None else len(model.decoder.decoder.layers)) == layers


def test_freezing_and_unfreezing(pretrained):
    _, model = pretrained
    model.freeze()
    assert not any(weight.requires_grad for weight in model.encoder.parameters())
    model.freeze(False)
    model.train()
    assert model.encoder.encoder.training
    assert all(weight.requires_grad for weight in model.encoder.encoder.parameters())
    assert not model.encoder.preprocessor.training  # features without noise
    model.encoder.preprocessor_frozen = False
    assert model.train().encoder.preprocessor.training
    model.encoder.preprocessor_frozen = True
    model.eval()
