"""Teachers that run in every step give the targets of their stores; augmented recordings have targets of their own."""

import pytest
import torch

from kdlib.corpus.inputs import Batch
from kdlib.errors import UserError
from kdlib.models import hybrid
from kdlib.models.masks import length_mask
from kdlib.objectives import losses
from kdlib.params import load
from kdlib.pipeline import Fold
from kdlib.targets.live import LiveModel, live_ensemble


@pytest.fixture(scope="module")
def batch(with_teachers):
    return Batch.of(with_teachers.splits.train[:12], with_teachers.tokens)


def both(fold, output, method="logprob_mean"):
    """The stored and the live ensemble."""
    stored = fold.targets(method, output)
    models = {name: LiveModel(hybrid.load(fold.teacher(name))[0]) for name in stored.stores}
    return stored, live_ensemble(stored, models)


def lengths_of(batch, stored, output):
    return stored.frames(batch) if output == "ctc" else torch.tensor([len(ids) + 1 for ids in batch.ids])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize(("output", "method"), [("ctc", "logprob_mean"), ("ctc", "prob_mean"), ("decoder", "own")])
def test_live_targets_are_the_stored_ones(with_teachers, batch, output, method, temperature):
    stored, live = both(with_teachers, output, method)
    lengths = lengths_of(batch, stored, output)
    kept, computed = (one.log_probs(batch, lengths, temperature).logits.double() for one in (stored, live))
    inside = length_mask(lengths, kept.shape[1])
    divergence = (computed.exp() * (computed - kept)).sum(-1)[inside]
    assert divergence.max() < 1e-5  # nats, in the worst frame
    assert (computed.exp() - kept.exp())[inside].abs().max() < 1e-3  # the stores have half precision
    torch.manual_seed(0)
    student, weights = torch.randn_like(kept, dtype=torch.float32), inside.float()
    stored_loss, live_loss = (
        losses.soft_kl(student, one.logits(batch, lengths, temperature).logits, weights, temperature).item()
        for one in (stored, live)
    )
    assert live_loss == pytest.approx(stored_loss, abs=1e-5 * temperature**2)  # nats


def test_encodings_are_the_stored_ones(with_teachers, batch):
    stored, live = both(with_teachers, "ctc")
    lengths = stored.frames(batch)
    assert torch.allclose(stored.hidden(batch, lengths), live.hidden(batch, lengths), atol=2e-3)


def test_a_teacher_runs_once_per_batch(with_teachers, batch, monkeypatch):
    stored, live = both(with_teachers, "ctc")
    calls = []
    for teacher in live.stores.values():
        encoder = teacher._live.model.encoder
        monkeypatch.setattr(encoder, "encode", lambda *given, of=encoder.encode: (calls.append(1), of(*given))[1])
    lengths = stored.frames(batch)
    for temperature in (2.0, 1.0):
        live.logits(batch, lengths, temperature)
    assert len(calls) == len(live.stores)


def test_a_recording_played_slower_has_more_frames(with_teachers, batch):
    stored, live = both(with_teachers, "ctc")
    changed = batch.stretched(1.1)
    counts = next(iter(live.stores.values())).activations(changed)
    assert [len(one) for one in counts] != stored.frames(batch).tolist()
    with pytest.raises(UserError, match="another stride or another recording"):
        stored.logits(changed, torch.tensor([len(one) + 5 for one in counts]))


def test_only_live_teachers_allow_a_changed_tempo(with_teachers):
    student = {"encoder": "sb", "augment": "mask_and_tempo", "phases": [{"steps": 2}]}
    with pytest.raises(UserError, match=r"stored outputs are those of the unchanged recording.*live_teachers: true"):
        load("params/smoke.yaml", "M08", variant="ctc_kd", overrides={"student": student})
    overrides = {
        "outputs": with_teachers.params.outputs,
        "student": student,
        "distill": {"live_teachers": True, "allow": ["target", "pairs", "shift of ctc targets"]},
    }
    fold = Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides=overrides)
    assert hybrid.TrainedModel(fold.student()).record["steps"] == 2
