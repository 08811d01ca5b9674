"""What is minimised: weights, heads, annealing, utterances without a target."""

import numpy as np
import pytest
import torch

from kdlib.decode.lexicon import Lexicon
from kdlib.decode.trie import Trie
from kdlib.errors import UserError
from kdlib.models.encoder_conformer import Conformer, ConformerShape, length_mask
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.objectives import losses
from kdlib.objectives.objective import Batch, Objective, TrainableStudent
from kdlib.objectives.reference_losses import cross_entropy, ctc_loss
from kdlib.settings import Distill
from kdlib.targets.aggregation import Coverage

SIZE, WIDTH = 12, 6


class Told:
    """An ensemble that says the same of every utterance, and knows only some."""

    def __init__(self, fixed_temperature=False, without=()):
        self.fixed_temperature, self.without, self.asked = fixed_temperature, without, []

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
    encoder = Conformer(ConformerShape(d_model=16, layers=1, heads=2, ffn=16, kernel=7, mels=20, dropout=0.0))
    return Hybrid(encoder, Heads(SIZE, layers=1, heads=2, ffn=16, dropout=0.0)).eval()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return Batch(torch.randn(2, 8000) / 10, torch.tensor([8000, 5000]), [[5, 6, 7], [8, 9]], ["a", "b"], ["S", "S"])


def objective(student, told=None, features=0, **settings):
    told = told or Told()
    return Objective(TrainableStudent(student, features), Distill(**settings), {"ctc": told, "decoder": told})


def test_hard_labels_ask_no_teacher(student, batch):
    told = Told()
    found = objective(student, told, alpha=0.0, beta=1.0)(batch)
    outputs = student(batch.wavs, batch.wav_lens)
    assert set(found) == {"loss", "ctc"}
    assert found["loss"].item() == pytest.approx(ctc_loss(outputs, batch.ids).item(), rel=1e-6)
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
    weights = losses.frame_weights(target, lengths, "all", 2)
    assert found["kd_ctc"].item() == pytest.approx(losses.soft_kl(outputs.ctc_logits, target, weights, 3.0).item())
    assert found["loss"] == found["kd_ctc"]


def test_weights_and_temperature_go_in_a_straight_line(student, batch):
    one = objective(student, alpha=1.0, alpha_end=0.0, beta=1.0, temperature=4.0, temperature_end=2.0)
    assert [one.parts(batch, done)["kd_ctc"][0] for done in (0.0, 0.25)] == [1.0, 0.75]
    assert "kd_ctc" not in one.parts(batch, 1.0)  # nobody is asked any more
    told = Told(fixed_temperature=True)
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


@pytest.mark.parametrize("how", ["keep", "suppress_specials", "skip"])
def test_the_decoders_first_step(student, batch, how):
    one = objective(student, alpha=1.0, beta=0.0, heads="decoder", first_token=how)
    logits, target, _, weights = one._soft("decoder", one.answer(batch), batch, [0, 1], 2.0)
    assert weights.tolist() == [[float(how != "skip"), 1, 1, 1], [float(how != "skip"), 1, 1, 0]]
    assert (target[:, 0, :3] == losses.MASKED_LOGIT).all() == (how == "suppress_specials")
    assert logits.shape == target.shape


def test_features_and_pseudo_labels_are_terms_of_their_own(student, batch):
    pseudo = {"weight": 0.5, "confidence": 0.0}
    one = objective(student, features=WIDTH, alpha=0.0, beta=0.0, gamma=0.2, pseudo_labels=pseudo)
    parts = one.parts(batch)
    assert {name: weight for name, (weight, _) in parts.items()} == {"pseudo_ctc": 0.5, "features": 0.2}
    parts["features"][1].backward()
    assert one.learner.project.weight.grad.abs().max() > 0


def test_moved_targets_fit_the_student_better(student, batch):
    still = objective(student, alpha=1.0, beta=0.0)
    moved = objective(student, alpha=1.0, beta=0.0, max_shift=3)
    outputs = still.answer(batch)
    fit = {}
    for name, one in (("still", still), ("moved", moved)):
        logits, target, _, _ = one._soft("ctc", outputs, batch, [0, 1], 1.0)
        fit[name] = losses.best_shift(logits, target, outputs.lengths, 0, 2)[1]
    assert (fit["moved"] >= fit["still"] - 0.02).all()  # frames that come in at an end are not silence


def test_pseudo_labels_ask_for_the_teachers_at_temperature_1(student, batch):
    """A mean of probabilities is made at one temperature: what is sure at 1 is not sure at 4."""
    told = Told(fixed_temperature=True)
    objective(student, told, temperature=4.0, pseudo_labels={"weight": 0.5, "confidence": 0.0})(batch)
    assert [temperature for _, temperature in told.asked] == [4.0, 1.0]


class Said:
    """Hypotheses of two utterances: the words are ids 5 6 7 (surely) and 8 (hardly)."""

    def __init__(self):
        self.lexicon, self.asked = Words(), []

    def posterior(self, utt_ids, speakers, temperature):
        self.asked.append(temperature)
        return torch.tensor([{"a": [0.9, 0.1], "b": [0.4, 0.6]}[one] for one in utt_ids])

    def texts(self, utt_ids, speakers, count=1, over="lexicon"):
        self.asked.append(over)
        known = {"a": [([5, 6, 7], 0.9), ([8], 0.1)], "b": [([8], 0.6), ([5, 6, 7], 0.4)]}
        return [known[one][:count] for one in utt_ids]


class Words(Lexicon):
    """A lexicon of two words, without a tokenizer."""

    def __init__(self):
        self.words, self.sequences = ["X", "Y"], [(5, 6, 7), (8,)]
        self._first, self._trie = np.array([0, 1]), Trie(self.sequences, 2)


class Told2(Told):
    """An ensemble whose two teachers are asked one by one."""

    def each(self, utt_ids, speakers, lengths):
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            yield torch.randn(len(utt_ids), max(lengths), SIZE, generator=generator), torch.full((len(utt_ids),), 0.5)


def by_words(student, tap=0, **settings):
    settings = {"alpha": 0.0, "beta": 0.0} | settings
    told, said = Told2(), Said()
    return Objective(TrainableStudent(student, 0, tap), Distill(**settings), {"ctc": told, "decoder": told}, said)


def test_words_are_a_term_of_their_own(student, batch):
    one = by_words(student, words={"weight": 0.7, "temperature": 2.0})
    parts = one.parts(batch)
    assert {name: weight for name, (weight, _) in parts.items()} == {"words_ctc": 0.7}
    outputs = student(batch.wavs, batch.wav_lens)
    target = one.hypotheses.posterior(["a", "b"], [], 2.0)
    expected = losses.word_kl(outputs.ctc_logits, outputs.lengths, Words(), target, torch.ones(2), 2.0)
    assert parts["words_ctc"][1].item() == pytest.approx(expected.item(), rel=1e-5)
    parts["words_ctc"][1].backward()
    assert student.ctc_head.weight.grad.abs().max() > 0


def test_a_shortlist_holds_what_the_teachers_think_of(student, batch):
    one = by_words(student, words={"weight": 1.0, "shortlist": 1})
    lexicon, target = one._listed(torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    assert (lexicon.words, target.tolist()) == (["X"], [[1.0], [1.0]])
    both, target = one._listed(torch.tensor([[0.9, 0.1], [0.4, 0.6]]))  # of each its own
    assert both.words == ["X", "Y"]
    assert target.sum(1).tolist() == [1.0, 1.0]
    more = by_words(student, words={"weight": 1.0, "shortlist": 1, "random_words": 2})
    assert more._listed(torch.tensor([[0.9, 0.1], [0.8, 0.2]]))[0].words == ["X", "Y"]


@pytest.mark.parametrize(
    ("settings", "rows", "ids", "weights"),
    [
        ({}, [0, 1], [[5, 6, 7], [8]], [0.9, 0.6]),
        ({"weight_by_confidence": False}, [0, 1], [[5, 6, 7], [8]], [1.0, 1.0]),
        ({"confidence": 0.8}, [0], [[5, 6, 7]], [0.9]),
        ({"nbest": 2}, [0, 0, 1, 1], [[5, 6, 7], [8], [8], [5, 6, 7]], [0.9, 0.1, 0.6, 0.4]),
    ],
)
def test_texts_are_taught_as_far_as_the_teachers_are_sure(student, batch, settings, rows, ids, weights):
    one = by_words(student, heads="both", sequence={"weight": 1.0} | settings)
    found = one.parts(batch)
    outputs = student(batch.wavs, batch.wav_lens)
    expected = losses.sequence_ctc(outputs.ctc_logits, outputs.lengths, rows, ids, torch.tensor(weights))
    assert found["sequence_ctc"][1].item() == pytest.approx(expected.item(), rel=1e-5)
    expected = 0.0
    for row, text, weight in zip(rows, ids, weights, strict=True):
        inputs = torch.tensor([[0, *text]])
        said = student.forward_decoder(outputs.encoded[[row]], inputs, outputs.lengths[[row]])
        expected += weight * cross_entropy(said, [text], 0.1) / len(set(rows))
    assert found["sequence_decoder"][1].item() == pytest.approx(expected.item(), rel=1e-4)


def test_where_nobody_is_sure_nothing_is_taught(student, batch):
    assert "sequence_ctc" not in by_words(student, sequence={"weight": 1.0, "confidence": 0.95}).parts(batch)


def test_occupancies_follow_the_reference_or_a_word_that_teachers_are_sure_of(student, batch):
    one = by_words(student, occupancy={"weight": 1.0, "confidence": 0.7})
    outputs = student(batch.wavs, batch.wav_lens)
    both = one._occupied(outputs.ctc_logits, outputs.lengths, batch.ids, (["a", "b"], ["S", "S"]))
    assert one.parts(batch)["occupancy_ctc"][1].item() == pytest.approx(both.item(), rel=1e-5)
    without = batch._replace(ids=[[], batch.ids[1]])  # "a" is sure of 5 6 7, which is its reference anyway
    assert one.parts(without)["occupancy_ctc"][1].item() == pytest.approx(both.item(), rel=1e-5)
    unsure = batch._replace(ids=[batch.ids[0], []])
    first = one._occupied(outputs.ctc_logits[:1], outputs.lengths[:1], batch.ids[:1], (["a"], ["S"]))
    assert one.parts(unsure)["occupancy_ctc"][1].item() == pytest.approx(first.item(), rel=1e-5)


def test_speech_without_a_transcript_has_no_reference_to_learn(student, batch):
    without = batch._replace(ids=[batch.ids[0], []])
    found = objective(student, heads="both")(without)
    alone = Batch(batch.wavs[:1], batch.wav_lens[:1], batch.ids[:1], ["a"], ["S"])
    expected = objective(student, heads="both")(alone)
    for name in ("ctc", "decoder"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-3)
    nobody = objective(student, alpha=0.0)(batch._replace(ids=[[], []]))
    assert nobody["loss"].item() == 0


def test_smoothed_references_of_ctc(student, batch):
    plain, smoothed = (
        objective(student, alpha=0.0, beta=1.0, ctc_smoothing=share)(batch)["ctc"] for share in (0, 0.25)
    )
    outputs = student(batch.wavs, batch.wav_lens)
    inside = length_mask(outputs.lengths, outputs.ctc_logits.shape[1]).float()
    expected = 0.75 * plain + 0.25 * losses.uniform_kl(outputs.ctc_logits, inside)
    assert smoothed.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_head_within_the_encoder_learns_from_references_and_from_the_last(batch):
    torch.manual_seed(0)
    encoder = Conformer(ConformerShape(d_model=16, layers=2, heads=2, ffn=16, kernel=7, mels=20, dropout=0.0))
    student = Hybrid(encoder, Heads(SIZE, layers=0)).eval()
    one = Objective(
        TrainableStudent(student, 0, 1), Distill(alpha=0.0, beta=1.0, intermediate={"weight": 0.3, "layer": 1}), {}
    )
    parts = one.parts(batch)
    assert {name: weight for name, (weight, _) in parts.items()} == {"ctc": 1.0, "last": 0.3, "within": 0.3}
    parts["intermediate_self"][1].backward()
    assert student.ctc_head.weight.grad is None  # the last head teaches, and does not follow
    assert one.learner.within.weight.grad.abs().max() > 0
    with pytest.raises(UserError, match=r"intermediate\.layer is 2: the encoder has 2 layers"):
        TrainableStudent(student, 0, 2)
