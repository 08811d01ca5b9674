"""Every encoder keeps the same promises; a new one is one file and one entry."""

import pytest
import torch

from kdlib.errors import UserError
from kdlib.models.encoders import ENCODERS, Entry, name_of
from kdlib.models.hybrid import Heads, Hybrid, TrainedModel, new_model
from kdlib.params import load
from kdlib.pipeline import Fold
from kdlib.settings.encoder import AUDIO, EncoderSizes, InputShape
from kdlib.settings.student import Student
from kdlib.source_code import lazy

SIZES = EncoderSizes(d_model=16, layers=2, heads=2, ffn=32, kernel=7, mels=20, dropout=0.0)


@pytest.fixture
def toy(monkeypatch):
    """The entry of the toy encoder."""
    monkeypatch.setitem(ENCODERS, "toy", Entry(lazy("toy_encoder"), "Toy"))


@pytest.fixture(params=[*ENCODERS, "toy"])
def encoder(request, toy):
    torch.manual_seed(0)
    shape = InputShape(20, 40.0) if ENCODERS[request.param].takes == "features" else AUDIO
    return ENCODERS[request.param].kind.of_sizes(SIZES, shape).eval()


def speech(encoder, *lengths):
    """Noise of so many samples; for an encoder of features as many frames of 40 ms as fit."""
    torch.manual_seed(1)
    width = encoder.config.get("inputs")
    lengths = [length // 640 for length in lengths] if width else lengths
    samples = torch.zeros(len(lengths), max(lengths), *([width] if width else []))
    for row, length in zip(samples, lengths, strict=True):
        row[:length] = torch.randn(row[:length].shape) / 10
    return samples, torch.tensor(lengths)


def test_an_encoder_says_what_it_gives(encoder):
    frames, lengths, hidden = encoder(*speech(encoder, 16000, 9000), layers=(1,))
    assert frames.shape == (2, int(lengths.max()), encoder.width)
    assert [round(1000 * samples / 16000 / encoder.stride_ms) for samples in (16000, 9000)] == pytest.approx(
        lengths.tolist(), abs=1
    )
    assert list(hidden) == [1]
    assert hidden[1].shape == frames.shape
    assert encoder.layers == 2
    assert encoder(*speech(encoder, 16000)).hidden == {}


def test_an_encoder_is_built_again_from_its_configuration(encoder):
    again = type(encoder).build(encoder.config).eval()
    again.load_state_dict(encoder.state_dict())
    given = speech(encoder, 12000, 7000)
    assert torch.equal(again(*given).frames, encoder(*given).frames)
    assert name_of(again) in ENCODERS


def test_padding_does_not_change_an_utterances_frames(encoder):
    samples, lengths = speech(encoder, 16000, 9000)
    together = encoder(samples, lengths)
    alone = encoder(samples[1:, : lengths[1]], lengths[1:])
    count = int(alone.lengths)
    assert int(together.lengths[1]) == count
    assert torch.allclose(together.frames[1, :count], alone.frames[0, :count], atol=1e-5)


def test_new_heads_fit_the_encoder(encoder):
    model = new_model(encoder, 40, Student(decoder_layers=1, heads=3, ffn=32))
    assert model.heads == Heads(40, 1, 2, 32, 0.1)  # two heads divide the width of 16, three do not
    assert isinstance(model, Hybrid)


def test_an_unknown_encoder_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"student.encoder: unknown encoder 'nemoo'.*did you mean 'nemo'"):
        load("params/demo.yaml", "M08", overrides={"student": {"encoder": "nemoo"}})


@pytest.mark.parametrize("name", ["toy", "wav2vec2"])
def test_a_new_encoder_is_one_file_and_one_entry(smoke, tmp_path, toy, name):
    """Teachers and a distilled student with an encoder, from scratch, by the path of `make demo`."""
    overrides = {
        "outputs": str(tmp_path),
        "teacher": {"encoder": name, "parent": "none", "d_model": 16, "adapt": {"steps": 10, "warmup_steps": 1}},
        "student": {"encoder": name, "start": "scratch", "phases": [{"steps": 10, "warmup_steps": 1}]},
        "distill": {"allow": ["target", "pairs", "shift of ctc targets", "spikes"]},
    }
    fold = Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides=overrides)
    assert (fold.scores() / "scores.json").is_file()
    student = TrainedModel(fold.student())
    assert (student.record["encoder"], student.record["steps"]) == (name, 10)
    assert TrainedModel(fold.teacher("M10")).record["encoder"] == name
    assert fold.layout.family == f"{name}-scratch"


def test_one_saved_model_teaches_all(with_teachers, tmp_path):
    """A teacher of another recipe, say a larger one, is the only teacher."""
    folder = with_teachers.base_model()
    overrides = {
        "outputs": with_teachers.params.outputs,
        "teacher": {"source": "model", "model": str(folder)},
        "student": {"encoder": "sb", "phases": [{"steps": 2}]},
        "distill": {"allow": ["target", "pairs", "shift of ctc targets"]},
    }
    fold = Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides=overrides)
    assert fold.teacher_names() == ["model"]
    assert list(fold.targets().stores) == ["model"]
    assert (fold.scores() / "scores.json").is_file()
    wrong = fold.but(teacher={"model": str(tmp_path)})
    with pytest.raises(UserError, match=r"teacher.model: there is no saved model in .*; name the folder of a teacher"):
        wrong.teacher("model")
    with pytest.raises(UserError, match=r"'own' needs teachers of single speakers, but those here are of all speakers"):
        fold.targets("own")
