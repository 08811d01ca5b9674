"""Several models as one: means of what they say, and of their weights."""

import copy

import pytest
import torch

from kdlib.errors import UserError
from kdlib.models import hybrid
from kdlib.models.averaging import EnsembleSystem, OutputEnsemble, average_weights
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
from kdlib.tokens import Tokens

TINY = ConformerShape(d_model=16, layers=1, heads=2, ffn=16, kernel=7, mels=20)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    path.write_bytes(read_tokenizer(SHIPPED_MODEL))
    return Tokens.for_teachers(path)


def model(seed, size, shape=TINY):
    torch.manual_seed(seed)
    return hybrid.Hybrid(Conformer(shape), hybrid.Heads(size, layers=1, heads=2, ffn=16)).eval()


@pytest.fixture(scope="module")
def members(tokens):
    return [model(seed, tokens.size) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return torch.randn(2, 16_000) / 10, torch.tensor([16_000, 9_000])


@torch.inference_mode()
def test_log_probabilities_and_probabilities_are_averaged(members, batch):
    apart = [one(*batch).ctc_logits.double().log_softmax(-1) for one in members]
    together = OutputEnsemble(members)(*batch)
    expected = sum(apart) / 3
    assert torch.allclose(together.ctc_logits.double(), expected - expected.logsumexp(-1, keepdim=True), atol=1e-5)
    mixed = OutputEnsemble(members, "probabilities")(*batch).ctc_logits.double()
    assert torch.allclose(mixed.exp(), sum(one.exp() for one in apart) / 3, atol=1e-6)
    assert together.encoded.shape[-1] == 3 * 16


@torch.inference_mode()
def test_the_decoders_speak_together(members, batch):
    committee = OutputEnsemble(members)
    heard = committee(*batch)
    said = torch.tensor([[0, 5, 6], [0, 7, 9]])
    apart = []
    for one in members:
        outputs = one(*batch)
        apart.append(one.forward_decoder(outputs.encoded, said, outputs.lengths).log_softmax(-1))
    expected = (sum(apart) / 3).log_softmax(-1)
    assert torch.allclose(committee.forward_decoder(heard.encoded, said, heard.lengths), expected, atol=1e-5)
    assert torch.allclose(committee.ctc_head(heard.encoded), heard.ctc_logits, atol=1e-5)
    same = OutputEnsemble([members[0], members[0]])
    alone = members[0](*batch)
    assert same.decode_greedy(same(*batch).encoded, 4, alone.lengths) == members[0].decode_greedy(
        alone.encoded, 4, alone.lengths
    )


def test_weights_are_averaged_one_by_one(members):
    models = [copy.deepcopy(one) for one in members]
    mean = average_weights(models).state_dict()
    for name, weight in mean.items():
        parts = [one.state_dict()[name] for one in members]
        if weight.is_floating_point():
            assert torch.allclose(weight, sum(parts) / 3, atol=1e-6), name
        else:
            assert torch.equal(weight, parts[0]), name


def test_saved_models_are_one_system(members, tokens, batch, tmp_path):
    for index, one in enumerate(members):
        (tmp_path / str(index)).mkdir()
        hybrid.save(one, tokens, tmp_path / str(index), train_speakers=[f"M0{index}"], heads_trained=["ctc", "decoder"])
    folders = [(tmp_path / str(index), "model.safetensors") for index in range(3)]
    together = EnsembleSystem(folders)
    assert together.record == {
        "train_speakers": ["M00", "M01", "M02"],
        "heads_trained": ["ctc", "decoder"],
        "labels": {"fraction": 1.0},
    }
    with torch.inference_mode():
        expected = OutputEnsemble(members)(*batch).ctc_logits
    assert torch.allclose(together(*batch).ctc_logits, expected, atol=1e-5)
    other = model(4, tokens.size, ConformerShape(d_model=16, layers=2, heads=2, ffn=16, kernel=7, mels=20))
    (tmp_path / "other").mkdir()
    hybrid.save(other, tokens, tmp_path / "other", train_speakers=[], heads_trained=["ctc", "decoder"])
    with pytest.raises(UserError, match="has another shape than"):
        EnsembleSystem([folders[0], (tmp_path / "other", "model.safetensors")], "weights")
    hybrid.save(other, tokens, tmp_path / "other", train_speakers=[], heads_trained=["ctc"])
    with pytest.raises(UserError, match="other trained heads"):
        EnsembleSystem([folders[0], (tmp_path / "other", "model.safetensors")])
