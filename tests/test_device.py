"""One `device` for every forward pass: nothing is made on another, and a GPU gives what the CPU gives."""

from dataclasses import replace

import pytest
import torch
from fake_device import fake_device

from kdlib.corpus.inputs import Batch
from kdlib.distill import preflight
from kdlib.errors import UserError
from kdlib.evaluate.transcribe import Evaluation, recordings, transcribe
from kdlib.logits import extract
from kdlib.logits.store import LogitStore
from kdlib.models import averaging, hybrid, nemo_files
from kdlib.objectives.terms import TERMS
from kdlib.pipeline import Fold
from kdlib.runtime import torch_device

CPU = torch.device("cpu")

CHECKS = "decoding", "heads", "target", "pseudo-labels", "pairs", "shift of ctc targets", "shift of decoder targets"
EVERY_TERM = {
    "heads": "both",
    "alpha": 0.3,
    "gamma": 0.1,
    "blanks": "symmetric",
    "max_shift": 1,
    "ctc_smoothing": 0.1,
    **{name: {"weight": 0.1} for name in ("pseudo_labels", "words", "hard_words", "sequence", "occupancy")},
    **{name: {"weight": 0.1} for name in ("average", "word_errors", "consistency", "word_entropy")},
    "intermediate": {"weight": 0.1, "layer": 1},
}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that only this test has; every model is loaded onto it."""
    with fake_device() as device:
        for module in (hybrid, nemo_files, averaging):
            monkeypatch.setattr(module, "torch_device", lambda setting: device)
        yield device


@pytest.fixture(scope="module")
def taught(with_teachers):
    """A student with everything that any term needs."""
    overrides = {
        "outputs": with_teachers.params.outputs,
        "student": {
            "encoder": "sb",
            "start": "scratch",
            "sizes": {"d_model": 16, "layers": 2, "heads": 2, "ffn": 16, "kernel": 7, "mels": 20},
            "decoder_layers": 1,
            "phases": [{"steps": 2}],
        },
        "distill": EVERY_TERM | {"allow_decoder_kd": True, "allow": list(CHECKS)},
    }
    return Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides=overrides)


def live(fold):
    """The same with teachers that run in every step."""
    return fold.but(distill={"live_teachers": True})


def test_a_gpu_that_is_missing_is_one_sentence():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"device is 'cuda', but there is no CUDA GPU here; write device: auto"):
            torch_device("cuda")
        assert torch_device("auto").type == "cpu"


def test_a_tensor_of_the_cpu_is_noticed(with_teachers):
    """The check itself: what would fail on a GPU fails here."""
    model = hybrid.load(with_teachers.teacher("M04"))[0].eval()
    with fake_device() as device, pytest.raises(AssertionError, match="of the CPU meet tensors on the device"):
        model.to(device)(torch.zeros(1, 8000), torch.tensor([8000]))


def test_extraction(with_teachers, tmp_path, elsewhere):
    utterances = with_teachers.splits.speech_of_all()[:6]
    teacher = hybrid.TrainedModel(with_teachers.teacher("M04"))
    job = extract.Extraction("M04", "training", "fp16")
    extract.extract(tmp_path, teacher, utterances, with_teachers.lexicon, job)
    for output in ("ctc", "decoder"):
        made, stored = LogitStore(tmp_path / output), with_teachers.store("M04", "training", output)
        for utt in utterances:
            assert torch.allclose(made.logits(utt.utt_id), stored.logits(utt.utt_id), atol=2e-2)


def systems(fold, device):
    """One of each kind of system."""
    folder = fold.student()
    members = [(folder, "model.safetensors"), (folder, "latest.safetensors")]
    return {
        "saved model": hybrid.TrainedModel(folder, device),
        "pretrained": nemo_files.NeMoCTC(nemo_files.SHIPPED_MODEL, device),
        "ensemble": averaging.EnsembleSystem(members, "outputs", device),
    }


def transcribed(fold, system):
    """The hypotheses of every decoder that a system has."""
    heads = ("ctc",) if isinstance(system, nemo_files.NeMoCTC) else ("ctc", "decoder")
    decoders = replace(fold.decoder_setup(), tokens=system.tokens).decoders(system.model, heads)
    return transcribe(recordings(system), fold.splits.test[:4], Evaluation(decoders))


def step(fold, device):
    """The losses of a batch with every term, and the largest gradient."""
    setup = fold.student_setup(1)
    objective = setup.objective()
    objective.learner.eval().to(device)
    speech = [*setup.data.train[:5], setup.data.dev[0].replace(text="")]  # one without transcript and teachers
    losses = objective(Batch.of(speech, setup.tokens).to(device))
    losses["loss"].backward()
    found = {name: float(loss) for name, loss in losses.items()}
    return found | {
        "gradient": max(float(one.grad.abs().max()) for one in objective.learner.parameters() if one.requires_grad)
    }


def checked(fold, device):
    """Verdicts and reasons of the preflight."""
    teachers = fold._preflight_teachers(1)
    setup = replace(teachers.setup(), device=device)
    return preflight._check_teachers(fold._preflight_plan(), replace(teachers, setup=lambda: setup))


@pytest.fixture(scope="module")
def on_cpu(taught):
    """What the CPU gives."""
    found = {name: transcribed(taught, system) for name, system in systems(taught, "cpu").items()}
    return found | {"step": step(taught, "cpu"), "live": step(live(taught), "cpu"), "checks": checked(taught, CPU)}


@pytest.mark.parametrize("kind", ["saved model", "pretrained", "ensemble"])
def test_transcription_with_every_decoder(taught, on_cpu, elsewhere, kind):
    assert transcribed(taught, systems(taught, "auto")[kind]) == on_cpu[kind]


def test_a_training_step_with_every_term(taught, on_cpu, elsewhere):
    found = step(taught, elsewhere)
    assert set(on_cpu["step"]) == {"loss", "gradient", *TERMS}
    assert found == pytest.approx(on_cpu["step"], rel=1e-5)


def test_a_training_step_with_live_teachers(taught, on_cpu, elsewhere):
    assert step(live(taught), elsewhere) == pytest.approx(on_cpu["live"], rel=1e-5)


def test_the_preflight(taught, on_cpu, elsewhere):
    assert checked(taught, elsewhere) == on_cpu["checks"]


@GPU
def test_a_gpu_gives_what_the_cpu_gives(taught, on_cpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default: gradients differ by some 0.1 %
    for kind, system in systems(taught, "cuda").items():
        for row, expected in zip(transcribed(taught, system), on_cpu[kind], strict=True):
            assert (row.greedy, row.lexicon) == (expected.greedy, expected.lexicon)
    for name, fold in (("step", taught), ("live", live(taught))):
        # a model's divergence from its own average is 0 on the CPU
        assert step(fold, "cuda") == pytest.approx(on_cpu[name], rel=1e-3, abs=1e-6)
    pairs = zip(checked(taught, torch.device("cuda")), on_cpu["checks"], strict=True)
    assert all(check.verdict == expected.verdict for check, expected in pairs)
