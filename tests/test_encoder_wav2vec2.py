"""wav2vec 2.0, HuBERT and WavLM: checkpoints give the outputs of torchaudio's and of Hugging Face's own classes."""

import pytest
import torch

from kdlib.errors import UserError
from kdlib.fold_objects import weight_files
from kdlib.models.encoder_wav2vec2 import Wav2Vec2, Wav2Vec2Shape, from_checkpoint
from kdlib.params import load
from kdlib.pipeline import Fold
from kdlib.settings.encoder import AUDIO, EncoderSizes

TINY = {"d_model": 32, "layers": 2, "heads": 2, "ffn": 64, "dropout": 0.0, "mix_layers": False}


def speech():
    torch.manual_seed(1)
    return torch.randn(1, 8000) / 10, torch.tensor([8000])


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert", "WavLM", "large"])
def test_a_folder_of_hugging_face_gives_its_outputs(kind, transformers, tmp_path):
    name = "Wav2Vec2" if kind == "large" else kind
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"conv_dim": [24] * 7, "hidden_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    if kind == "large":
        sizes |= {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_checkpoint(tmp_path, TINY).eval()
    samples, lengths = speech()
    given = torch.nn.functional.layer_norm(samples, samples.shape[1:]) if kind == "large" else samples
    with torch.no_grad():
        expected, found = theirs(given, output_hidden_states=True), ours(samples, lengths, layers=(1, 2))
    assert found.frames.shape == expected.last_hidden_state.shape
    assert torch.allclose(found.hidden[1], expected.hidden_states[1], atol=1e-4)
    assert torch.allclose(found.frames, expected.last_hidden_state, atol=1e-4)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_state_dict_of_torchaudio_is_loaded(ending, tmp_path):
    from safetensors.torch import save_file
    from torchaudio.models import wav2vec2_model

    first = Wav2Vec2(Wav2Vec2Shape(**TINY, channels=24)).eval()
    assert isinstance(first.model, type(wav2vec2_model(*_positional())))
    path = tmp_path / f"model.{ending}"
    weights = {name: value.clone() for name, value in first.model.state_dict().items()}
    torch.save(weights, path) if ending == "pt" else save_file(weights, path)
    sizes = EncoderSizes(d_model=32, layers=2, heads=2, ffn=64, dropout=0.0, checkpoint=str(path))
    again = Wav2Vec2.of_sizes(sizes, AUDIO).eval()
    with torch.no_grad():
        assert torch.allclose(again(*speech()).frames, first(*speech()).frames)
    wrong = sizes.model_copy(update={"d_model": 48})
    with pytest.raises(UserError, match=r"has the shape \[.*\], the recipe's sizes \[.*\]"):
        Wav2Vec2.of_sizes(wrong, AUDIO)


def _positional():
    convolutions = [(8, 10, 5)]
    return "group_norm", convolutions, False, 16, 0.0, 8, 1, 1, 2, 0.0, 16, 0.0, 0.0, False, 0.0, None


def test_layers_are_mixed_by_learned_weights():
    torch.manual_seed(0)
    encoder = Wav2Vec2(Wav2Vec2Shape(**TINY | {"mix_layers": True}, channels=24)).eval()
    found = encoder(*speech(), layers=(1, 2))
    assert torch.allclose(found.frames, (found.hidden[1] + found.hidden[2]) / 2, atol=1e-5)
    found.frames.sum().backward()
    assert encoder.mix.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in encoder.model.feature_extractor.parameters())  # frozen


def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"there is no file or folder .*nowhere"):
        from_checkpoint(tmp_path / "nowhere", TINY)
    with pytest.raises(UserError, match=r"needs config.json, and model.safetensors"):
        from_checkpoint(tmp_path, TINY)
    (tmp_path / "x.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"x.pt is no file of weights"):
        from_checkpoint(tmp_path / "x.pt", TINY)
    torch.save({"a": torch.zeros(1)}, tmp_path / "y.pt")
    with pytest.raises(UserError, match=r"is not a torchaudio wav2vec2 state dict"):
        from_checkpoint(tmp_path / "y.pt", TINY)
    params = load("params/demo.yaml", "M08", overrides={"student": {"encoder": "wav2vec2", "start": "scratch"}})
    assert params.student.encoder == "wav2vec2"


def test_the_files_of_a_checkpoint_make_models_that_start_from_them_anew(tmp_path):
    settings = {"teacher": {"encoder": "wav2vec2", "parent": "none", "checkpoint": str(tmp_path / "x.pt")}}
    fold = Fold.load("params/smoke.yaml", "M08", overrides=settings)
    assert fold._teacher_start() == [tmp_path / "x.pt"]
    named = {path.name for path in weight_files(EncoderSizes(checkpoint=str(tmp_path)))}
    assert named == {"config.json", "model.safetensors", "pytorch_model.bin"}  # those that are missing count as such
    assert weight_files(EncoderSizes()) == []
