"""Curriculum and mixup: easy utterances first, and two utterances at once."""

import math
from pathlib import Path

import pytest
import torch

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.models import augment
from kdlib.models.encoder_bilstm import BiLSTM, BiLSTMShape
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.objectives import losses
from kdlib.objectives.objective import Learner, Objective
from kdlib.objectives.reference_losses import ctc_loss
from kdlib.objectives.reference_terms import REFERENCE_TERMS
from kdlib.params import load
from kdlib.settings.distill import Distill
from kdlib.settings.student import Curriculum
from kdlib.targets import difficulty
from kdlib.training.sampling import easiest


def utterances(*lengths, speaker="S"):
    return [
        Utterance(f"u{place}", speaker, Path(f"u{place}.npy"), length / 25, "A B" if length < 15 else "C D E")
        for place, length in enumerate(lengths)
    ]


def test_the_pool_grows_from_the_easiest_to_all():
    speech = utterances(5, 50, 20, 9)
    hard = {utt.utt_id: utt.duration_s for utt in speech}
    pools = [
        [utt.utt_id for utt in easiest(speech, hard, Curriculum(start=0.25, until=0.5), done)]
        for done in (0, 0.2, 0.3, 0.5, 0.9)
    ]
    assert pools == [["u0"], ["u0", "u2", "u3"], ["u0", "u2", "u3"], ["u0", "u1", "u2", "u3"], ["u0", "u1", "u2", "u3"]]


def test_difficulty_by_length_loss_and_speaker(with_teachers):
    tokens, speech = with_teachers.tokens, with_teachers.splits.train
    lengths = difficulty.by_length(speech, tokens)
    assert all(int(lengths[utt.utt_id]) == len(tokens.encode(utt.text)) for utt in speech)
    outputs = [with_teachers.outputs(name, "training") for name in ("M04", "M10")]
    by_loss = difficulty.by_loss(speech, outputs)
    assert set(by_loss) == {utt.utt_id for utt in speech}
    assert all(math.isfinite(value) and value > 0 for value in by_loss.values())
    two = [*speech[:4], *utterances(5, 6, speaker="OTHER")]
    values = difficulty.by_speaker(two, {utt.utt_id: float(place) for place, utt in enumerate(two)})
    assert max(values[utt.utt_id] for utt in two[:4]) < min(values[utt.utt_id] for utt in two[4:])
    entropies = difficulty.by_entropy(speech, with_teachers.targets("logprob_mean"))
    assert all(0 < value <= math.log(tokens.size) for value in entropies.values())


def test_difficulty_composed_of_all_orders(with_teachers):
    fold = with_teachers.but(student={"curriculum": Curriculum(by="composite")})
    values = fold._difficulty()
    assert set(values) == {utt.utt_id for utt in fold.splits.train}
    assert all(0 <= value <= 1 for value in values.values())
    assert fold._asks_teachers


@pytest.fixture
def learner():
    torch.manual_seed(0)
    encoder = BiLSTM(BiLSTMShape(inputs=3, d_model=4, layers=1, dropout=0.0))
    return Learner(Hybrid(encoder, Heads(8, 0)).eval())


def batch(*lengths):
    torch.manual_seed(1)
    rows = [torch.randn(length, 3) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = [[4, 5] if length < 15 else [5, 6, 7] for length in lengths]
    return Batch(utterances(*lengths), ids, loaded=[padded, torch.tensor(lengths)])


def test_a_mixed_batch_has_the_losses_of_both_by_their_shares(learner):
    objective = Objective(learner, Distill(alpha=0.0, beta=1.0), REFERENCE_TERMS)
    given = batch(20, 11)
    mixed = objective(given.mixed([1, 0], 0.25))["loss"]
    values = given.inputs
    both = 0.75 * values + 0.25 * values[[1, 0]]
    logits = learner.student(both, torch.tensor([20, 20])).ctc.logits
    frames = torch.tensor([10, 6])  # of each utterance's own
    expected = 0.75 * ctc_loss(type(learner.student(values, given.lengths).ctc)(logits, frames), given.ids)
    swapped = torch.tensor([6, 10])
    expected += 0.25 * ctc_loss(type(learner.student(values, given.lengths).ctc)(logits, swapped), given.ids[::-1])
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-5)
    alone = objective(given)["loss"]
    assert objective(given.mixed([0, 1], 0.5))["loss"].item() == pytest.approx(alone.item(), rel=1e-5)


def test_the_other_share_is_at_most_a_half():
    torch.manual_seed(0)
    shares = [augment.draw_mix(5, 0.2)[1] for _ in range(200)]
    assert 0 <= min(shares) <= max(shares) <= 0.5
    assert sum(share < 0.05 for share in shares) > 80  # Beta(0.2, 0.2) is nearly one of both, most of the time
    rows, _ = augment.draw_mix(5, 0.2)
    assert sorted(rows) == [0, 1, 2, 3, 4]


def test_mixup_is_for_ctc_alone():
    change = {"student": {"mixup": 0.2, "decoder_layers": 1}, "distill": {"heads": "both", "allow_decoder_kd": True}}
    with pytest.raises(UserError, match=r"student.mixup mixes the losses of two utterances"):
        load("params/demo.yaml", "M08", overrides=change)


def test_soft_kl_is_the_mean_over_frames_and_not_over_time():
    """`batchmean` of [T, B, V] divides by T alone: the loss then grows with the batch."""
    student, teacher = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    weights = torch.ones(3, 7)
    by_hand = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean()
    assert float(losses.soft_kl(student, teacher, weights)) == pytest.approx(float(by_hand), rel=1e-5)
