"""Ensembles: means of outputs, and of weights."""

import copy

import pytest
import torch

from kdlib.errors import UserError
from kdlib.models import hybrid
from kdlib.models.averaging import EnsembleSystem, OutputEnsemble, average_weights
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
from kdlib.params import load
from kdlib.pipeline import Fold
from kdlib.settings.targets import METHODS
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
    single = [member(*batch).ctc.logits.double().log_softmax(-1) for member in members]
    combined = OutputEnsemble(members)(*batch)
    expected = sum(single) / 3
    assert torch.allclose(combined.ctc.logits.double(), expected - expected.logsumexp(-1, keepdim=True), atol=1e-5)
    mixed = OutputEnsemble(members, "probabilities")(*batch).ctc.logits.double()
    assert torch.allclose(mixed.exp(), sum(logprobs.exp() for logprobs in single) / 3, atol=1e-6)
    assert combined.encoded.shape[-1] == 3 * 16


@torch.inference_mode()
def test_decoder_outputs_are_averaged(members, batch):
    ensemble = OutputEnsemble(members)
    combined = ensemble(*batch)
    targets = torch.tensor([[0, 5, 6], [0, 7, 9]])
    single = []
    for member in members:
        outputs = member(*batch)
        single.append(member.forward_decoder(outputs.encoded, targets, outputs.lengths).log_softmax(-1))
    expected = (sum(single) / 3).log_softmax(-1)
    assert torch.allclose(ensemble.forward_decoder(combined.encoded, targets, combined.lengths), expected, atol=1e-5)
    assert torch.allclose(ensemble.ctc_head(combined.encoded), combined.ctc.logits, atol=1e-5)
    same = OutputEnsemble([members[0], members[0]])
    alone = members[0](*batch)
    assert same.decode_greedy(same(*batch).encoded, 4, alone.lengths) == members[0].decode_greedy(
        alone.encoded, 4, alone.lengths
    )


def test_every_weight_is_averaged(members):
    models = [copy.deepcopy(member) for member in members]
    mean = average_weights(models).state_dict()
    for name, weight in mean.items():
        parts = [member.state_dict()[name] for member in members]
        if weight.is_floating_point():
            assert torch.allclose(weight, sum(parts) / 3, atol=1e-6), name
        else:
            assert torch.equal(weight, parts[0]), name


def test_saved_models_are_one_system(members, tokens, batch, tmp_path):
    for index, member in enumerate(members):
        (tmp_path / str(index)).mkdir()
        hybrid.save(
            member, tokens, tmp_path / str(index), train_speakers=[f"M0{index}"], heads_trained=["ctc", "decoder"]
        )
    folders = [(tmp_path / str(index), "model.safetensors") for index in range(3)]
    system = EnsembleSystem(folders)
    assert system.record == {
        "train_speakers": ["M00", "M01", "M02"],
        "heads_trained": ["ctc", "decoder"],
        "labels": {"fraction": 1.0},
    }
    with torch.inference_mode():
        expected = OutputEnsemble(members)(*batch).ctc.logits
    assert torch.allclose(system(*batch).ctc.logits, expected, atol=1e-5)
    deeper = model(4, tokens.size, ConformerShape(d_model=16, layers=2, heads=2, ffn=16, kernel=7, mels=20))
    (tmp_path / "deeper").mkdir()
    hybrid.save(deeper, tokens, tmp_path / "deeper", train_speakers=[], heads_trained=["ctc", "decoder"])
    with pytest.raises(UserError, match="has another shape than"):
        EnsembleSystem([folders[0], (tmp_path / "deeper", "model.safetensors")], "weights")
    hybrid.save(deeper, tokens, tmp_path / "deeper", train_speakers=[], heads_trained=["ctc"])
    with pytest.raises(UserError, match="other trained heads"):
        EnsembleSystem([folders[0], (tmp_path / "deeper", "model.safetensors")])


def test_the_mean_of_teachers_weights_is_a_teacher(with_teachers, outputs):
    settings = {"outputs": str(outputs), "teacher": {"average_weights": "all"}}
    fold = Fold.load("params/smoke.yaml", "M08", fold={"dev": None}, overrides=settings)
    assert fold.target_teachers() == ["average"]
    folder = fold.teacher("average")
    mean, _, record = hybrid.load(folder)
    assert record["train_speakers"] == sorted({*hybrid.load(with_teachers.teacher("M04"))[2]["train_speakers"], "M10"})
    each = [hybrid.load(with_teachers.teacher(name))[0].state_dict() for name in ("M04", "M10")]
    name = "ctc_head.weight"
    assert torch.allclose(mean.state_dict()[name], (each[0][name] + each[1][name]) / 2)
    assert fold.methods == [one for one in METHODS if one not in ("own", "same_level", "weighted_similarity")]
    assert fold.of("ctc_kd").combined_teachers()  # its scores on the held-out speaker: one more system
    assert fold.parent() is None


def test_stored_logits_have_no_weights_to_average(outputs):
    with pytest.raises(UserError, match="average_weights needs the models of several teachers"):
        load(
            "params/smoke.yaml",
            "M08",
            overrides={"teacher": {"source": "stores", "folder": "x", "average_weights": "all"}},
        )
