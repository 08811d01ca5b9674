"""What is minimised: weights, heads, annealing, utterances without a target."""

import pytest
import torch

from kdlib.distill import losses
from kdlib.distill.objective import Batch, Learner, Objective
from kdlib.models import supervised
from kdlib.models.conformer import Conformer, Shape
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.settings import Distill
from kdlib.teachers.ensemble import Coverage

SIZE, WIDTH = 12, 6


class Told:
    """An ensemble that says the same of every utterance, and knows only some."""

    def __init__(self, softened=False, without=()):
        self.softened, self.without, self.asked = softened, without, []

    def coverage(self, utt_ids):
        return Coverage([one for one in utt_ids if one not in self.without], 0, {})

    def logits(self, utt_ids, speakers, lengths, temperature):
        self.asked.append((list(utt_ids), temperature))
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(utt_ids), max(lengths) + 1, SIZE, generator=generator), torch.tensor(lengths)

    def to(self, device):
        return self

    def features(self, utt_ids, speakers, lengths):
        return torch.ones(len(utt_ids), max(lengths), WIDTH)


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    encoder = Conformer(Shape(d_model=16, layers=1, heads=2, ffn=16, kernel=7, mels=20, dropout=0.0))
    return Hybrid(encoder, Heads(SIZE, layers=1, heads=2, ffn=16, dropout=0.0)).eval()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return Batch(torch.randn(2, 8000) / 10, torch.tensor([8000, 5000]), [[5, 6, 7], [8, 9]], ["a", "b"], ["S", "S"])


def objective(student, told=None, features=0, **settings):
    told = told or Told()
    return Objective(Learner(student, features), Distill(**settings), {"ctc": told, "decoder": told})


def test_hard_labels_ask_no_teacher(student, batch):
    told = Told()
    found = objective(student, told, alpha=0.0, beta=1.0)(batch)
    outputs = student(batch.wavs, batch.wav_lens)
    assert set(found) == {"loss", "ctc"}
    assert found["loss"].item() == pytest.approx(supervised.ctc(outputs, batch.ids).item(), rel=1e-6)
    assert told.asked == []


def test_the_loss_is_the_weighted_sum_of_its_parts(student, batch):
    found = objective(student, alpha=0.3, beta=0.6, heads="both", ctc_weight=0.75, temperature=2.0)(batch)
    assert set(found) == {"loss", "ctc", "decoder", "kd_ctc", "kd_decoder"}
    weights = {"ctc": 0.6 * 0.75, "decoder": 0.6 * 0.25, "kd_ctc": 0.3 * 0.75, "kd_decoder": 0.3 * 0.25}
    assert found["loss"].item() == pytest.approx(
        sum(one * found[name].item() for name, one in weights.items()), rel=1e-5
    )


def test_the_ctc_part_is_the_kl_of_the_students_frames(student, batch):
    told = Told()
    found = objective(student, told, alpha=1.0, beta=0.0, temperature=3.0)(batch)
    outputs = student(batch.wavs, batch.wav_lens)
    lengths = outputs.lengths
    target = told.logits(["a", "b"], [], lengths.tolist(), 1.0)[0][:, : outputs.ctc_logits.shape[1]]
    weights = losses.taught(target, lengths, "all", 2)
    assert found["kd_ctc"].item() == pytest.approx(losses.soft_kl(outputs.ctc_logits, target, weights, 3.0).item())
    assert found["loss"] == found["kd_ctc"]


def test_weights_and_temperature_go_in_a_straight_line(student, batch):
    one = objective(student, alpha=1.0, alpha_end=0.0, beta=1.0, temperature=4.0, temperature_end=2.0)
    assert [one.parts(batch, done)["kd_ctc"][0] for done in (0.0, 0.25)] == [1.0, 0.75]
    assert "kd_ctc" not in one.parts(batch, 1.0)  # nobody is asked any more
    told = Told(softened=True)
    objective(student, told, temperature=4.0, temperature_end=2.0)(batch, 0.5)
    assert told.asked == [(["a", "b"], 3.0)]


def test_an_utterance_without_a_target_is_learnt_from_its_reference_alone(student, batch):
    some, told = objective(student, whole := Told(without=("b",)), heads="both"), None
    found = some(batch)
    assert [asked for asked, _ in whole.asked] == [["a"], ["a"]]
    assert found["ctc"].item() == pytest.approx(objective(student, told, alpha=0.0)(batch)["ctc"].item(), rel=1e-6)
    alone = Batch(batch.wavs[:1], batch.wav_lens[:1], batch.ids[:1], ["a"], ["S"])
    assert found["kd_ctc"].item() == pytest.approx(objective(student)(alone)["kd_ctc"].item(), rel=1e-4)
    nobody = objective(student, Told(without=("a", "b")), beta=0.0)(batch)
    assert nobody["loss"].item() == 0
    assert nobody["loss"].requires_grad


@pytest.mark.parametrize("how", ["keep", "no_specials", "skip"])
def test_the_decoders_first_step(student, batch, how):
    one = objective(student, alpha=1.0, beta=0.0, heads="decoder", first_token=how)
    logits, target, _, weights = one._soft("decoder", one.answer(batch), batch, [0, 1], 2.0)
    assert weights.tolist() == [[float(how != "skip"), 1, 1, 1], [float(how != "skip"), 1, 1, 0]]
    assert (target[:, 0, :3] == losses.NEVER).all() == (how == "no_specials")
    assert logits.shape == target.shape


def test_features_and_pseudo_labels_are_terms_of_their_own(student, batch):
    pseudo = {"weight": 0.5, "confidence": 0.0}
    one = objective(student, features=WIDTH, alpha=0.0, beta=0.0, gamma=0.2, pseudo=pseudo)
    parts = one.parts(batch)
    assert {name: weight for name, (weight, _) in parts.items()} == {"pl_ctc": 0.5, "features": 0.2}
    parts["features"][1].backward()
    assert one.learner.project.weight.grad.abs().max() > 0


def test_moved_targets_fit_the_student_better(student, batch):
    still = objective(student, alpha=1.0, beta=0.0)
    moved = objective(student, alpha=1.0, beta=0.0, best_shift=3)
    outputs = still.answer(batch)
    fit = {}
    for name, one in (("still", still), ("moved", moved)):
        logits, target, _, _ = one._soft("ctc", outputs, batch, [0, 1], 1.0)
        fit[name] = losses.best_shift(logits, target, outputs.lengths, 0, 2)[1]
    assert (fit["moved"] >= fit["still"] - 0.02).all()  # frames that come in at an end are not silence


def test_pseudo_labels_ask_for_the_teachers_at_temperature_1(student, batch):
    """A mean of probabilities is made at one temperature: what is sure at 1 is not sure at 4."""
    told = Told(softened=True)
    objective(student, told, temperature=4.0, pseudo={"weight": 0.5, "confidence": 0.0})(batch)
    assert [temperature for _, temperature in told.asked] == [4.0, 1.0]
