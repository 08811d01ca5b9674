"""The training objective: weights, heads, annealing, utterances without a target."""

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
from kdlib.settings.distill import Distill
from kdlib.targets.aggregation import Coverage

SIZE, WIDTH = 12, 6


class FakeEnsemble:
    """An ensemble with the same target for every utterance, except for those `without` one."""

    def __init__(self, fixed_temperature=False, without=()):
        self.fixed_temperature, self.without, self.calls = fixed_temperature, without, []

    def coverage(self, utt_ids):
        return Coverage([utt_id for utt_id in utt_ids if utt_id not in self.without], 0, {})

    def logits(self, utt_ids, speakers, lengths, temperature):
        self.calls.append((list(utt_ids), temperature))
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


def objective(student, ensemble=None, features=0, **settings):
    ensemble = ensemble or FakeEnsemble()
    return Objective(TrainableStudent(student, features), Distill(**settings), {"ctc": ensemble, "decoder": ensemble})


def test_hard_labels_need_no_teacher(student, batch):
    ensemble = FakeEnsemble()
    terms = objective(student, ensemble, alpha=0.0, beta=1.0)(batch)
    outputs = student(batch.wavs, batch.wav_lens)
    assert set(terms) == {"loss", "ctc"}
    assert terms["loss"].item() == pytest.approx(ctc_loss(outputs.ctc, batch.ids).item(), rel=1e-6)
    assert ensemble.calls == []


def test_the_loss_is_the_weighted_sum_of_its_parts(student, batch):
    terms = objective(student, alpha=0.3, beta=0.6, heads="both", ctc_weight=0.75, temperature=2.0)(batch)
    assert set(terms) == {"loss", "ctc", "decoder", "kd_ctc", "kd_decoder"}
    weights = {"ctc": 0.6 * 0.75, "decoder": 0.6 * 0.25, "kd_ctc": 0.3 * 0.75, "kd_decoder": 0.3 * 0.25}
    expected = sum(weight * terms[name].item() for name, weight in weights.items())
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_ctc_part_is_the_kl_of_the_students_frames(student, batch):
    ensemble = FakeEnsemble()
    terms = objective(student, ensemble, alpha=1.0, beta=0.0, temperature=3.0)(batch)
    outputs = student(batch.wavs, batch.wav_lens)
    lengths = outputs.lengths
    target = ensemble.logits(["a", "b"], [], lengths.tolist(), 1.0)[0][:, : outputs.ctc.logits.shape[1]]
    weights = losses.frame_weights(target, lengths, "all", 2)
    assert terms["kd_ctc"].item() == pytest.approx(losses.soft_kl(outputs.ctc.logits, target, weights, 3.0).item())
    assert terms["loss"] == terms["kd_ctc"]


def test_weights_and_temperature_are_annealed_linearly(student, batch):
    annealed = objective(student, alpha=1.0, alpha_end=0.0, beta=1.0, temperature=4.0, temperature_end=2.0)
    assert [annealed.parts(batch, done)["kd_ctc"][0] for done in (0.0, 0.25)] == [1.0, 0.75]
    assert "kd_ctc" not in annealed.parts(batch, 1.0)  # with weight 0 no target is computed
    ensemble = FakeEnsemble(fixed_temperature=True)
    objective(student, ensemble, temperature=4.0, temperature_end=2.0)(batch, 0.5)
    assert ensemble.calls == [(["a", "b"], 3.0)]


def test_an_utterance_without_a_target_is_trained_on_its_reference_alone(student, batch):
    terms = objective(student, ensemble := FakeEnsemble(without=("b",)), heads="both")(batch)
    assert [utt_ids for utt_ids, _ in ensemble.calls] == [["a"], ["a"]]
    assert terms["ctc"].item() == pytest.approx(objective(student, alpha=0.0)(batch)["ctc"].item(), rel=1e-6)
    first = Batch(batch.wavs[:1], batch.wav_lens[:1], batch.ids[:1], ["a"], ["S"])
    assert terms["kd_ctc"].item() == pytest.approx(objective(student)(first)["kd_ctc"].item(), rel=1e-4)
    no_target = objective(student, FakeEnsemble(without=("a", "b")), beta=0.0)(batch)
    assert no_target["loss"].item() == 0
    assert no_target["loss"].requires_grad


@pytest.mark.parametrize("first_token", ["keep", "suppress_specials", "skip"])
def test_the_decoders_first_step(student, batch, first_token):
    decoder = objective(student, alpha=1.0, beta=0.0, heads="decoder", first_token=first_token)
    outputs = decoder.student_outputs(batch)
    logits, target, _, weights = decoder._teacher_target("decoder", outputs, batch, [0, 1], 2.0)
    assert weights.tolist() == [[float(first_token != "skip"), 1, 1, 1], [float(first_token != "skip"), 1, 1, 0]]
    assert (target[:, 0, :3] == losses.MASKED_LOGIT).all() == (first_token == "suppress_specials")
    assert logits.shape == target.shape


def test_features_and_pseudo_labels_are_separate_terms(student, batch):
    pseudo = {"weight": 0.5, "confidence": 0.0}
    separate = objective(student, features=WIDTH, alpha=0.0, beta=0.0, gamma=0.2, pseudo_labels=pseudo)
    parts = separate.parts(batch)
    assert {name: weight for name, (weight, _) in parts.items()} == {"pseudo_ctc": 0.5, "features": 0.2}
    parts["features"][1].backward()
    assert separate.learner.project.weight.grad.abs().max() > 0


def test_shifted_targets_fit_the_student_better(student, batch):
    unshifted = objective(student, alpha=1.0, beta=0.0)
    shifted = objective(student, alpha=1.0, beta=0.0, max_shift=3)
    outputs = unshifted.student_outputs(batch)
    fits = []
    for variant in (unshifted, shifted):
        logits, target, _, _ = variant._teacher_target("ctc", outputs, batch, [0, 1], 1.0)
        fits.append(losses.best_shift(logits, target, outputs.lengths, 0, 2)[1])
    assert (fits[1] >= fits[0] - 0.02).all()  # the frames that are repeated at an end are not blank


def test_pseudo_labels_use_the_teachers_at_temperature_1(student, batch):
    """A mean of probabilities has one temperature: a confident token at 1 is not confident at 4."""
    ensemble = FakeEnsemble(fixed_temperature=True)
    objective(student, ensemble, temperature=4.0, pseudo_labels={"weight": 0.5, "confidence": 0.0})(batch)
    assert [temperature for _, temperature in ensemble.calls] == [4.0, 1.0]


class FakeHypotheses:
    """Hypotheses of two utterances: the words are ids 5 6 7 (high confidence) and 8 (low confidence)."""

    def __init__(self):
        self.lexicon = TwoWords()

    def posterior(self, utt_ids, speakers, temperature):
        return torch.tensor([{"a": [0.9, 0.1], "b": [0.4, 0.6]}[utt_id] for utt_id in utt_ids])

    def texts(self, utt_ids, speakers, count=1, over="lexicon"):
        nbest = {"a": [([5, 6, 7], 0.9), ([8], 0.1)], "b": [([8], 0.6), ([5, 6, 7], 0.4)]}
        return [nbest[utt_id][:count] for utt_id in utt_ids]


class TwoWords(Lexicon):
    """A lexicon of two words, without a tokenizer."""

    def __init__(self):
        self.words, self.sequences = ["X", "Y"], [(5, 6, 7), (8,)]
        self._first, self._trie = np.array([0, 1]), Trie(self.sequences, 2)


class FakeTeachers(FakeEnsemble):
    """An ensemble with the outputs of each of two teachers."""

    def each(self, utt_ids, speakers, lengths):
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            yield torch.randn(len(utt_ids), max(lengths), SIZE, generator=generator), torch.full((len(utt_ids),), 0.5)


def by_words(student, **settings):
    learner, settings = TrainableStudent(student), {"alpha": 0.0, "beta": 0.0} | settings
    ensemble = FakeTeachers()
    return Objective(learner, Distill(**settings), {"ctc": ensemble, "decoder": ensemble}, FakeHypotheses())


def test_words_are_a_separate_term(student, batch):
    words = by_words(student, words={"weight": 0.7, "temperature": 2.0})
    parts = words.parts(batch)
    assert {name: weight for name, (weight, _) in parts.items()} == {"words_ctc": 0.7}
    outputs = student(batch.wavs, batch.wav_lens)
    target = words.hypotheses.posterior(["a", "b"], [], 2.0)
    expected = losses.word_kl(outputs.ctc.logits, outputs.lengths, TwoWords(), target, torch.ones(2), 2.0)
    assert parts["words_ctc"][1].item() == pytest.approx(expected.item(), rel=1e-5)
    parts["words_ctc"][1].backward()
    assert student.ctc_head.weight.grad.abs().max() > 0


def test_a_shortlist_has_the_most_probable_words_of_the_teachers(student, batch):
    best = by_words(student, words={"weight": 1.0, "shortlist": 1})
    lexicon, target = best._shortlist(torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    assert (lexicon.words, target.tolist()) == (["X"], [[1.0], [1.0]])
    both, target = best._shortlist(torch.tensor([[0.9, 0.1], [0.4, 0.6]]))  # each utterance has another best word
    assert both.words == ["X", "Y"]
    assert target.sum(1).tolist() == [1.0, 1.0]
    more = by_words(student, words={"weight": 1.0, "shortlist": 1, "random_words": 2})
    assert more._shortlist(torch.tensor([[0.9, 0.1], [0.8, 0.2]]))[0].words == ["X", "Y"]


@pytest.mark.parametrize(
    ("settings", "rows", "ids", "weights"),
    [
        ({}, [0, 1], [[5, 6, 7], [8]], [0.9, 0.6]),
        ({"weight_by_confidence": False}, [0, 1], [[5, 6, 7], [8]], [1.0, 1.0]),
        ({"confidence": 0.8}, [0], [[5, 6, 7]], [0.9]),
        ({"nbest": 2}, [0, 0, 1, 1], [[5, 6, 7], [8], [8], [5, 6, 7]], [0.9, 0.1, 0.6, 0.4]),
    ],
)
def test_pseudo_labels_are_weighted_by_the_confidence_of_the_teachers(student, batch, settings, rows, ids, weights):
    parts = by_words(student, heads="both", sequence={"weight": 1.0} | settings).parts(batch)
    outputs = student(batch.wavs, batch.wav_lens)
    expected = losses.sequence_ctc(outputs.ctc.logits, outputs.lengths, rows, ids, torch.tensor(weights))
    assert parts["sequence_ctc"][1].item() == pytest.approx(expected.item(), rel=1e-5)
    expected = 0.0
    for row, text, weight in zip(rows, ids, weights, strict=True):
        inputs = torch.tensor([[0, *text]])
        logits = student.forward_decoder(outputs.encoded[[row]], inputs, outputs.lengths[[row]])
        expected += weight * cross_entropy(logits, [text], 0.1) / len(set(rows))
    assert parts["sequence_decoder"][1].item() == pytest.approx(expected.item(), rel=1e-4)


def test_without_confident_teachers_there_is_no_sequence_term(student, batch):
    assert "sequence_ctc" not in by_words(student, sequence={"weight": 1.0, "confidence": 0.95}).parts(batch)


def test_occupancies_follow_the_reference_or_a_confident_hypothesis(student, batch):
    occupancy = by_words(student, occupancy={"weight": 1.0, "confidence": 0.7})
    outputs = student(batch.wavs, batch.wav_lens)
    both = occupancy._occupancy_kl(outputs.ctc.logits, outputs.lengths, batch.ids, (["a", "b"], ["S", "S"]))
    assert occupancy.parts(batch)["occupancy_ctc"][1].item() == pytest.approx(both.item(), rel=1e-5)
    confident = batch._replace(ids=[[], batch.ids[1]])  # the hypothesis of "a" is 5 6 7, the same as its reference
    assert occupancy.parts(confident)["occupancy_ctc"][1].item() == pytest.approx(both.item(), rel=1e-5)
    uncertain = batch._replace(ids=[batch.ids[0], []])
    first = occupancy._occupancy_kl(outputs.ctc.logits[:1], outputs.lengths[:1], batch.ids[:1], (["a"], ["S"]))
    assert occupancy.parts(uncertain)["occupancy_ctc"][1].item() == pytest.approx(first.item(), rel=1e-5)


def test_speech_without_a_transcript_has_no_reference_loss(student, batch):
    terms = objective(student, heads="both")(batch._replace(ids=[batch.ids[0], []]))
    first = Batch(batch.wavs[:1], batch.wav_lens[:1], batch.ids[:1], ["a"], ["S"])
    expected = objective(student, heads="both")(first)
    for name in ("ctc", "decoder"):
        assert terms[name].item() == pytest.approx(expected[name].item(), rel=1e-3)
    unlabelled = objective(student, alpha=0.0)(batch._replace(ids=[[], []]))
    assert unlabelled["loss"].item() == 0


def test_label_smoothing_of_ctc(student, batch):
    plain, smoothed = (
        objective(student, alpha=0.0, beta=1.0, ctc_smoothing=share)(batch)["ctc"] for share in (0, 0.25)
    )
    outputs = student(batch.wavs, batch.wav_lens)
    inside = length_mask(outputs.lengths, outputs.ctc.logits.shape[1]).float()
    expected = 0.75 * plain + 0.25 * losses.uniform_kl(outputs.ctc.logits, inside)
    assert smoothed.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_intermediate_head_is_trained_on_references_and_on_the_last_head(batch):
    torch.manual_seed(0)
    encoder = Conformer(ConformerShape(d_model=16, layers=2, heads=2, ffn=16, kernel=7, mels=20, dropout=0.0))
    student = Hybrid(encoder, Heads(SIZE, layers=0)).eval()
    learner = TrainableStudent(student, 0, 1)
    settings = Distill(alpha=0.0, beta=1.0, intermediate={"weight": 0.3, "layer": 1})
    parts = Objective(learner, settings, {}).parts(batch)
    weights = {name: weight for name, (weight, _) in parts.items()}
    assert weights == {"ctc": 1.0, "intermediate_self": 0.3, "intermediate_ctc": 0.3}
    parts["intermediate_self"][1].backward()
    assert student.ctc_head.weight.grad is None  # the last head is the target and gets no gradient
    assert learner.intermediate_head.weight.grad.abs().max() > 0
    with pytest.raises(UserError, match=r"intermediate\.layer is 2: the encoder has 2 layers"):
        TrainableStudent(student, 0, 2)
