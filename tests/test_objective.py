"""The training objective: weights, heads, schedules, utterances without a target, and every term of the loss."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from corpora import utterances

from kdlib.corpus.inputs import Batch
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.lexicon import Lexicon
from kdlib.decode.trie import Trie
from kdlib.errors import UserError
from kdlib.models import Emissions, Outputs
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.models.masks import length_mask
from kdlib.objectives import losses, terms, word_losses
from kdlib.objectives.objective import START, Learner, Objective
from kdlib.objectives.reference_losses import cross_entropy, ctc_loss, uniform_kl
from kdlib.objectives.reference_terms import reference_word
from kdlib.objectives.step import Sources, Step
from kdlib.objectives.terms import TERMS, target_of
from kdlib.settings.distill import Distill
from kdlib.settings.schedule import Progress
from kdlib.tokens import Tokens, train_words

SIZE, WIDTH = 12, 6


class FakeTargets:
    """The same target for every utterance, except for those `without` one."""

    width = WIDTH

    def __init__(self, without=()):
        self.without, self.calls = without, []

    def rows(self, batch):
        return [row for row, utt_id in enumerate(batch.utt_ids) if utt_id not in self.without]

    def logits(self, batch, lengths, temperature=1.0):
        self.calls.append((batch.utt_ids, temperature))
        return Emissions(drawn(batch, lengths, 0) / temperature, lengths)

    def each(self, batch, lengths):
        """The outputs of each of two teachers."""
        for seed in (0, 1):
            yield str(seed), drawn(batch, lengths, seed), torch.full((len(batch),), 0.5)

    def hidden(self, batch, lengths):
        return torch.ones(len(batch), int(lengths.max()), WIDTH)


def drawn(batch, lengths, seed):
    """Random logits of a batch."""
    return torch.randn(len(batch), int(lengths.max()), SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    encoder = Conformer(ConformerShape(d_model=16, layers=1, heads=2, ffn=16, kernel=7, mels=20, dropout=0.0))
    return Hybrid(encoder, Heads(SIZE, layers=1, heads=2, ffn=16, dropout=0.0)).eval()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    made_up = [torch.randn(2, 8000) / 10, torch.tensor([8000, 5000])]
    return Batch(utterances("a", "b", texts=["X", "Y"]), [[5, 6, 7], [8, 9]], loaded=made_up)


def objective(student, target=None, features=0, **settings):
    target = target or FakeTargets()
    sources = Sources({"ctc": target, "decoder": target})
    return Objective(Learner(student, {0: features} if features else None), Distill(**settings), TERMS, sources)


def test_hard_labels_need_no_teacher(student, batch):
    target = FakeTargets()
    found = objective(student, target, alpha=0.0, beta=1.0)(batch)
    outputs = student(batch.inputs, batch.lengths)
    assert set(found) == {"loss", "ctc"}
    assert found["loss"].item() == pytest.approx(ctc_loss(outputs.ctc, batch.ids).item(), rel=1e-6)
    assert target.calls == []


def test_the_loss_is_the_weighted_sum_of_its_parts(student, batch):
    found = objective(student, alpha=0.3, beta=0.6, heads="both", ctc_weight=0.75, temperature=2.0)(batch)
    assert set(found) == {"loss", "ctc", "decoder", "kd_ctc", "kd_decoder"}
    weights = {"ctc": 0.6 * 0.75, "decoder": 0.6 * 0.25, "kd_ctc": 0.3 * 0.75, "kd_decoder": 0.3 * 0.25}
    expected = sum(weight * found[name].item() for name, weight in weights.items())
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_ctc_part_is_the_kl_of_the_students_frames(student, batch):
    found = objective(student, alpha=1.0, beta=0.0, temperature=3.0)(batch)
    outputs = student(batch.inputs, batch.lengths)
    target = drawn(batch, outputs.lengths, 0)
    weights = losses.frame_weights(target, outputs.lengths, "all", 2)
    expected = losses.soft_kl(outputs.ctc.logits, target / 3, weights, 3.0)
    assert found["kd_ctc"].item() == pytest.approx(expected.item())
    assert found["loss"] == found["kd_ctc"]


@pytest.mark.parametrize(("side", "temperatures"), [("both", [3.0]), ("student", [1.0]), ("teacher", [3.0])])
def test_the_temperature_divides_the_named_sides(student, batch, side, temperatures):
    target = FakeTargets()
    settings = {"alpha": 1.0, "beta": 0.0, "temperature": 3.0, "temperature_on": side}
    found = objective(student, target, **settings)(batch)["kd_ctc"].item()
    assert [temperature for _, temperature in target.calls] == temperatures
    outputs = student(batch.inputs, batch.lengths)
    q = (outputs.ctc.logits.double() / (1 if side == "teacher" else 3)).log_softmax(-1)
    p = (drawn(batch, outputs.lengths, 0).double() / (1 if side == "student" else 3)).log_softmax(-1)
    by_frame = (p.exp() * (p - q)).sum(-1)[length_mask(outputs.lengths, q.shape[1])]
    assert found == pytest.approx((9 if side == "both" else 1) * by_frame.mean().item(), rel=1e-5)


def test_weights_and_temperature_are_annealed_linearly(student, batch):
    target, falling = FakeTargets(), {"from": 4.0, "to": 2.0}
    annealed = objective(student, target, alpha={"from": 1.0, "to": 0.0}, beta=1.0, temperature=falling)
    assert [annealed.parts(batch, Progress(done))["kd_ctc"][0] for done in (0.0, 0.25)] == [1.0, 0.75]
    target.calls.clear()
    assert "kd_ctc" not in annealed.parts(batch, Progress(1.0))
    assert target.calls == []  # with weight 0 no target is computed
    annealed(batch, Progress(0.5))
    assert target.calls == [(["a", "b"], 3.0)]


def test_a_temperature_by_epoch_reaches_the_targets_and_the_loss(student, batch):
    target = FakeTargets()
    stepwise = objective(student, target, alpha=1.0, beta=0.0, temperature=[[1, 4.0], [31, 3.5], [71, 3.0]])
    outputs = student(batch.inputs, batch.lengths)
    logits, weights = drawn(batch, outputs.lengths, 0), length_mask(outputs.lengths, outputs.ctc.logits.shape[1])
    for passed, temperature in ((0.0, 4.0), (29.9, 4.0), (30.0, 3.5), (69.9, 3.5), (70.0, 3.0), (500.0, 3.0)):
        found = stepwise(batch, Progress(0.5, passed))["kd_ctc"]
        assert target.calls.pop() == (["a", "b"], temperature)
        expected = losses.soft_kl(outputs.ctc.logits, logits / temperature, weights.float(), temperature)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_an_utterance_without_a_target_is_trained_on_its_reference_alone(student, batch):
    found = objective(student, target := FakeTargets(without=("b",)), heads="both")(batch)
    assert [utt_ids for utt_ids, _ in target.calls] == [["a"], ["a"]]
    assert found["ctc"].item() == pytest.approx(objective(student, alpha=0.0)(batch)["ctc"].item(), rel=1e-6)
    first = objective(student)(batch.select([0]))
    assert found["kd_ctc"].item() == pytest.approx(first["kd_ctc"].item(), rel=1e-4)
    no_target = objective(student, FakeTargets(without=("a", "b")), beta=0.0)(batch)
    assert no_target["loss"].item() == 0
    assert no_target["loss"].requires_grad


@pytest.mark.parametrize("first_token", ["keep", "suppress_specials", "skip"])
def test_the_decoders_first_step(student, batch, first_token):
    decoder = objective(student, alpha=1.0, beta=0.0, heads="decoder", first_token=first_token)
    target = target_of(decoder.step(batch), "decoder")
    first = float(first_token != "skip")
    assert target.weights.tolist() == [[first, 1, 1, 1], [first, 1, 1, 0]]
    assert (target.teachers[:, 0, :3] == losses.MASKED_LOGIT).all() == (first_token == "suppress_specials")
    assert target.student.shape == target.teachers.shape


def test_features_and_pseudo_labels_are_separate_terms(student, batch):
    pseudo = {"weight": 0.5, "confidence": 0.0}
    separate = objective(student, features=WIDTH, alpha=0.0, beta=0.0, gamma=0.2, pseudo_labels=pseudo)
    parts = separate.parts(batch)
    assert {name: weight for name, (weight, _) in parts.items()} == {"pseudo_ctc": 0.5, "features": 0.2}
    parts["features"][1].backward()
    assert separate.learner.project["0"].weight.grad.abs().max() > 0


def test_shifted_targets_fit_the_student_better(student, batch):
    fits = []
    for max_shift in (0, 3):
        step = objective(student, alpha=1.0, beta=0.0, temperature=1.0, max_shift=max_shift).step(batch)
        target = target_of(step, "ctc")
        fits.append(losses.best_shift(target.student, target.teachers, step.outputs.lengths, 0, 2)[1])
    assert (fits[1] >= fits[0] - 0.02).all()  # the frames that are repeated at an end are not blank


def test_pseudo_labels_use_the_teachers_at_temperature_1(student, batch):
    """A mean of probabilities has one temperature: a confident token at 1 is not confident at 4."""
    target = FakeTargets()
    found = objective(student, target, temperature=4.0, pseudo_labels={"weight": 0.5, "confidence": 0.0})(batch)
    assert [temperature for _, temperature in target.calls] == [4.0, 1.0]
    outputs = student(batch.inputs, batch.lengths)
    inside = length_mask(outputs.lengths, outputs.ctc.logits.shape[1]).float()
    expected = losses.pseudo_label(outputs.ctc.logits, drawn(batch, outputs.lengths, 0), inside)
    assert found["pseudo_ctc"].item() == pytest.approx(expected.item(), rel=1e-5)


class FakeHypotheses:
    """Hypotheses of two utterances: the words are ids 5 6 7 (high confidence) and 8 (low confidence)."""

    def __init__(self):
        self.lexicon = TWO_WORDS

    def posterior(self, batch, temperature=1.0):
        return torch.tensor([{"a": [0.9, 0.1], "b": [0.4, 0.6]}[utt_id] for utt_id in batch.utt_ids])

    def texts(self, batch, count=1, over="lexicon"):
        nbest = {"a": [([5, 6, 7], 0.9), ([8], 0.1)], "b": [([8], 0.6), ([5, 6, 7], 0.4)]}
        return [nbest[utt_id][:count] for utt_id in batch.utt_ids]


class FakeLexicon(Lexicon):
    """A lexicon of words with the ids of their spellings, without a tokenizer."""

    def __init__(self, **spellings):
        self.words, self.sequences = list(spellings), [ids for found in spellings.values() for ids in found]
        self._first = np.cumsum([0, *map(len, spellings.values())])[:-1]
        self._trie = Trie(self.sequences, 2)


TWO_WORDS = FakeLexicon(X=[(5, 6, 7)], Y=[(8,)])


def by_words(student, **settings):
    settings, target = Distill(**{"alpha": 0.0, "beta": 0.0} | settings), FakeTargets()
    return Objective(Learner(student), settings, TERMS, Sources({"ctc": target, "decoder": target}, FakeHypotheses()))


def test_words_are_a_separate_term(student, batch):
    words = by_words(student, words={"weight": 0.7, "temperature": 2.0})
    parts = words.parts(batch)
    assert {name: weight for name, (weight, _) in parts.items()} == {"words_ctc": 0.7}
    outputs = student(batch.inputs, batch.lengths)
    target = FakeHypotheses().posterior(batch, 2.0)
    expected = word_losses.word_kl(outputs.ctc.logits, outputs.lengths, TWO_WORDS, target, torch.ones(2), 2.0)
    assert parts["words_ctc"][1].item() == pytest.approx(expected.item(), rel=1e-5)
    parts["words_ctc"][1].backward()
    assert student.ctc_head.weight.grad.abs().max() > 0


def test_the_entropy_over_words_has_its_exact_gradient(student, batch):
    torch.manual_seed(0)
    logits = torch.randn(3, 6, student.heads.size, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([6, 5, 4])
    for diversity in (0.0, 1.0, 2.5):
        loss = word_losses.word_entropy(logits, lengths, TWO_WORDS, diversity)
        (found,) = torch.autograd.grad(loss, logits)

        def value(changed, diversity=diversity):
            q = TWO_WORDS.posterior(Emissions(changed, lengths)).double()
            each = -(q * q.log()).sum(1).mean()
            return float(each + diversity * (q.mean(0) * q.mean(0).log()).sum())

        assert loss.item() == pytest.approx(value(logits.detach()), abs=1e-5)
        direction = torch.randn_like(logits)
        with torch.no_grad():
            expected = (value(logits + 1e-2 * direction) - value(logits - 1e-2 * direction)) / 2e-2
        assert float((found * direction).sum()) == pytest.approx(expected, rel=0.02, abs=2e-4)


def test_the_entropy_over_words_is_that_of_speech_without_transcripts(student, batch):
    settings = {"use_teachers": False, "alpha": 0, "beta": 1, "word_entropy": {"weight": 0.3}}
    learner = Objective(Learner(student), Distill(**settings), TERMS, Sources({}, None, TWO_WORDS))
    assert "word_entropy" not in learner.parts(batch)
    half = replace(batch, ids=[batch.ids[0], []])
    assert {name: weight for name, (weight, _) in learner.parts(half).items()} == {"ctc": 1.0, "word_entropy": 0.3}


def test_a_shortlist_has_the_most_probable_words_of_the_teachers():
    same, differing = torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    lexicon, target = word_losses.shortlist(TWO_WORDS, same, same, 1, 0)
    assert (lexicon.words, target.tolist()) == (["X"], [[1.0], [1.0]])
    both, target = word_losses.shortlist(TWO_WORDS, differing, differing, 1, 0)  # each utterance has another best word
    assert both.words == ["X", "Y"]
    assert target.sum(1).tolist() == [1.0, 1.0]
    assert word_losses.shortlist(TWO_WORDS, same, same, 1, 2)[0].words == ["X", "Y"]


def test_the_shortlist_of_the_words_term_is_of_the_teachers(student, batch, monkeypatch):
    found = []
    monkeypatch.setattr(word_losses, "word_kl", lambda *args: found.append(args[2].words) or torch.zeros(()))
    for shortlist, random_words in ((1, 0), (1, 2), (0, 0)):
        words = {"weight": 1.0, "shortlist": shortlist, "random_words": random_words}
        by_words(student, words=words)(batch.select([0]))
    assert found == [["X"], ["X", "Y"], ["X", "Y"]]


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
    outputs = student(batch.inputs, batch.lengths)
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
    outputs = student(batch.inputs, batch.lengths)

    def expected(rows):
        """KL from the mean of both teachers' occupancies of the references."""
        logits, lengths, ids = outputs.ctc.logits[rows], outputs.lengths[rows], [batch.ids[row] for row in rows]
        teachers = occupancy.sources.targets["ctc"].each(batch.select(rows), lengths)
        mean = sum(losses.occupancy(logits, lengths, ids) for _, logits, _ in teachers) / 2
        inside = length_mask(lengths, logits.shape[1]).float()
        return losses.soft_kl(logits, mean.clamp_min(1e-12).log(), inside).item()

    def found(ids):
        step = occupancy.step(replace(batch, ids=ids))
        return terms.occupancy(step, "").item()

    assert found(batch.ids) == pytest.approx(expected([0, 1]), rel=1e-5)
    assert occupancy.parts(batch)["occupancy_ctc"][1].item() == pytest.approx(expected([0, 1]), rel=1e-5)
    confident = [[], batch.ids[1]]  # the hypothesis of "a" is 5 6 7, the same as its reference
    assert found(confident) == pytest.approx(expected([0, 1]), rel=1e-5)
    uncertain = [batch.ids[0], []]
    assert found(uncertain) == pytest.approx(expected([0]), rel=1e-5)


def test_speech_without_a_transcript_has_no_reference_loss(student, batch):
    found = objective(student, heads="both")(replace(batch, ids=[batch.ids[0], []]))
    expected = objective(student, heads="both")(batch.select([0]))
    for name in ("ctc", "decoder"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-3)
    unlabelled = objective(student, alpha=0.0)(replace(batch, ids=[[], []]))
    assert unlabelled["loss"].item() == 0


def test_label_smoothing_of_ctc(student, batch):
    plain, smoothed = (
        objective(student, alpha=0.0, beta=1.0, ctc_smoothing=share)(batch)["ctc"] for share in (0, 0.25)
    )
    outputs = student(batch.inputs, batch.lengths)
    inside = length_mask(outputs.lengths, outputs.ctc.logits.shape[1]).float()
    expected = 0.75 * plain + 0.25 * uniform_kl(outputs.ctc.logits, inside)
    assert smoothed.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_intermediate_head_is_trained_on_references_and_on_the_last_head(batch):
    torch.manual_seed(0)
    encoder = Conformer(ConformerShape(d_model=16, layers=2, heads=2, ffn=16, kernel=7, mels=20, dropout=0.0))
    student = Hybrid(encoder, Heads(SIZE, layers=0)).eval()
    learner = Learner(student, 0, 1)
    settings = Distill(alpha=0.0, beta=1.0, intermediate={"weight": 0.3, "layer": 1})
    parts = Objective(learner, settings, TERMS).parts(batch)
    weights = {name: weight for name, (weight, _) in parts.items()}
    assert weights == {"ctc": 1.0, "intermediate_self": 0.3, "intermediate_ctc": 0.3}
    parts["intermediate_self"][1].backward()
    assert student.ctc_head.weight.grad is None  # the last head is the target and gets no gradient
    assert learner.intermediate_head.weight.grad.abs().max() > 0
    with pytest.raises(UserError, match=r"intermediate\.layer is 2: the encoder has 2 layers"):
        Learner(student, 0, 2)


def test_an_intermediate_head_may_be_the_last_one(batch):
    encoder = Conformer(ConformerShape(d_model=16, layers=2, heads=2, ffn=16, kernel=7, mels=20, dropout=0.0))
    student = Hybrid(encoder, Heads(SIZE, layers=0)).eval()
    learner = Learner(student, 0, 1, shares_head=True)
    assert {name for name, _ in learner.named_parameters()} == {
        f"student.{name}" for name, _ in student.named_parameters()
    }
    settings = Distill(alpha=0.0, beta=1.0, intermediate={"weight": 0.3, "layer": 1, "shared": True})
    step = Objective(learner, settings, TERMS).step(batch)
    assert torch.equal(step.inner_logits, student.ctc_head(step.outputs.hidden[1]))


def test_expected_errors_are_those_of_the_texts_by_their_probability():
    torch.manual_seed(0)
    logits = (2 * torch.randn(2, 5, 6)).requires_grad_()
    lengths, texts, errors = torch.tensor([5, 4]), [[3], [4], [3, 4], [5], [3]], [0.0, 1.0, 2.0, 0.0, 1.0]
    rows = [0, 0, 0, 1, 1]
    loss = losses.expected_errors(Emissions(logits, lengths), rows, texts, errors)
    logprob = [
        -ctc_loss(Emissions(logits[row : row + 1], lengths[row : row + 1]), [text]) * len(text)
        for row, text in zip(rows, texts, strict=True)
    ]
    expected = []
    for own in ([0, 1, 2], [3, 4]):
        shares = torch.stack([logprob[place] for place in own]).softmax(0)
        expected.append((shares * torch.tensor([errors[place] for place in own])).sum())
    assert loss.item() == pytest.approx(float(sum(expected) / 2), rel=1e-5)
    loss.backward()
    more = Emissions(logits.detach() - 0.5 * logits.grad, lengths)
    assert losses.expected_errors(more, rows, texts, errors) < loss


def test_word_errors_are_those_of_the_students_own_texts(tmp_path):
    tokens = Tokens.for_teachers(train_words(["GO UP", "NO UP"], tmp_path))
    go, up, no, blank = *tokens.encode("GO UP NO"), tokens.blank
    logits = torch.nn.functional.one_hot(torch.tensor([[go, blank, up, blank]]), tokens.size).float() * 4
    logits[0, 0, no] = 4.0  # GO or NO
    logits.requires_grad_()
    batch = Batch(utterances("a", texts=["GO UP"]), [[go, up]])
    emissions = Emissions(logits, torch.tensor([4]))
    settings = Distill(alpha=0.0, beta=0.0, word_errors={"weight": 1.0, "nbest": 2})
    search = BeamSearch(tokens, None, None, BeamSettings(0.0, 0.0, 10))
    step = Step(None, settings, Sources({}, search=search), batch, START, Outputs(emissions, logits))
    loss = terms.word_errors(step, "ctc")
    assert loss.item() == pytest.approx(0.25, abs=0.05)  # half of the probability has one error in two words
    loss.backward()
    assert logits.grad[0, 0, go] < 0 < logits.grad[0, 0, no]


def test_two_views_of_an_utterance_are_to_be_alike(student, batch):
    twice = batch.select([0, 1, 0, 1])
    settings = {"alpha": 0.0, "beta": 0.0, "consistency": {"weight": 1.0}}
    assert objective(student, **settings)(twice)["consistency"].abs() < 1e-6  # without masks and dropout they are
    found = objective(student, **settings)
    step = found.step(twice)
    moved = torch.randn(step.outputs.ctc.logits.shape, generator=torch.Generator().manual_seed(1))
    logits = (step.outputs.ctc.logits + moved).detach().requires_grad_()
    step.outputs = replace(step.outputs, ctc=Emissions(logits, step.outputs.lengths))
    loss = found.total(step)["consistency"]
    total, frames = 0.0, 0
    for row, other in ((0, 2), (1, 3), (2, 0), (3, 1)):
        count = int(step.outputs.lengths[row])
        p, q = (logits[place, :count].log_softmax(-1) for place in (other, row))
        total, frames = total + (p.exp() * (p - q)).sum().item(), frames + count
    assert loss.item() == pytest.approx(total / frames, rel=1e-5)
    loss.backward()
    assert logits.grad[0].abs().sum() > 0  # both views are moved
    assert logits.grad[2].abs().sum() > 0


def test_the_average_of_the_weights_follows_them_and_is_a_target(student, batch):
    learner = Learner(copy.deepcopy(student), averages=True).train()
    assert not learner.average.training
    first = learner.student.ctc_head.weight.detach().clone()
    with torch.no_grad():
        learner.student.ctc_head.weight.add_(1.0)
    learner.update_average(0.5)  # 1 of 10 at first: nine tenths are new
    assert torch.allclose(learner.average.ctc_head.weight, first + 0.9, atol=1e-5)
    with torch.no_grad():
        learner.student.ctc_head.weight.add_(1.0)
    for _ in range(20):
        learner.update_average(0.5)
    assert torch.allclose(learner.average.ctc_head.weight, first + 2, atol=1e-4)
    settings = Distill(alpha=0.0, beta=0.0, average={"weight": 1.0})
    with torch.no_grad():
        learner.average.ctc_head.weight.mul_(2.0)
    loss = Objective(learner.eval(), settings, TERMS)(batch)["average"]
    outputs, target = (model(batch.inputs, batch.lengths).ctc for model in (learner.student, learner.average))
    inside = length_mask(outputs.lengths, outputs.logits.shape[1]).float()
    assert loss.item() == pytest.approx(losses.soft_kl(outputs.logits, target.logits, inside).item(), rel=1e-5)
    loss.backward()
    assert all(weight.grad is None for weight in learner.average.parameters())


# the reference among the words of the closed lexicon

WORDS = FakeLexicon(GO=[(4,)], NO=[(5, 5)], ONE=[(6, 7, 8)], SO=[(9,), (3, 9)], TWO=[(6, 7)], YES=[(10, 11, 3)])


def hard_words(texts, lengths=(9, 6, 9), scale=3.0, **settings):
    """A step of a student with made-up outputs on utterances of these texts, and its logits; "" has no transcript."""
    batch = Batch(utterances(*map(str, range(len(texts))), texts=texts), [[4] if text else [] for text in texts])
    generator = torch.Generator().manual_seed(3)
    logits = (scale * torch.randn(len(texts), max(lengths), SIZE, generator=generator)).requires_grad_()
    outputs = Outputs(Emissions(logits, torch.tensor(lengths[: len(texts)])))
    distill = Distill(alpha=0.0, beta=0.0, hard_words={"weight": 1.0} | settings)
    return Step(None, distill, Sources({}, lexicon=WORDS), batch, 1.0, outputs), logits


def naive_hard_words(logits, lengths, texts, lexicon=WORDS):
    """-log P(reference | frames) over the sum of all words' P, by torch's CTC loss of every spelling in float64."""
    total = 0.0
    for row, length, text in zip(logits, lengths, texts, strict=True):
        logprobs, scores = row[:length].log_softmax(-1), []
        for ids in lexicon.sequences:
            sizes = torch.tensor(length), torch.tensor(len(ids))
            scores.append(-torch.nn.functional.ctc_loss(logprobs, torch.tensor(ids), *sizes, 2, "sum"))
        bounds = [*lexicon._first, len(scores)]
        spelled = [scores[first:last] for first, last in itertools.pairwise(bounds)]
        fitting = {
            word: torch.stack(fit).logsumexp(0)
            for word, found in zip(lexicon.words, spelled, strict=True)
            if (fit := [score for score in found if score.isfinite()])
        }
        total = total - torch.stack(list(fitting.values())).log_softmax(0)[list(fitting).index(text)]
    return total / len(texts)


@pytest.mark.parametrize(
    ("lengths", "scale"), [((9, 6, 9), 3.0), ((40, 25, 12), 8.0), ((9, 3, 2), 3.0)], ids=["words", "long", "short"]
)
def test_hard_words_and_their_gradient_match_the_definition(lengths, scale):
    """Even where some words need more frames than there are."""
    texts = ["ONE", "NO", "SO"]
    step, logits = hard_words(texts, lengths, scale)
    loss = reference_word(step, "ctc")
    exact = logits.detach().double().requires_grad_()
    expected = naive_hard_words(exact, lengths, texts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,), (exact_grad,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, exact)
    assert exact_grad.abs().max() > 1e-2
    assert torch.allclose(grad.double(), exact_grad, atol=1e-6, rtol=0)


def test_hard_words_are_of_utterances_with_a_transcript_in_the_lexicon():
    step, logits = hard_words(["ONE", "ELEVEN", "", "GO"], (9, 8, 9, 7))
    loss = reference_word(step, "ctc")
    rows = [0, 3]
    expected = naive_hard_words(logits.double()[rows], (9, 7), ["ONE", "GO"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, logits)
    assert [bool(row.any()) for row in grad] == [True, False, False, True]
    withheld = replace(step.batch, ids=[[4], [4], [], []])  # the transcript of the last one is known, but not used
    step = Step(None, step.settings, Sources({}, lexicon=WORDS), withheld, 1.0, step.outputs)
    expected = naive_hard_words(logits.double()[:1], (9,), ["ONE"])
    assert reference_word(step, "ctc").item() == pytest.approx(expected.item(), rel=1e-5)
    none, _ = hard_words(["ELEVEN", "", "TWELVE"])
    assert reference_word(none, "ctc") is None


def test_the_reference_is_always_on_the_shortlist_of_hard_words(monkeypatch):
    lengths, scores = (9, 6, 9), WORDS.scores(hard_words(["ONE"] * 3)[0].outputs.ctc)
    texts = [WORDS.words[place] for place in scores.argmin(1).tolist()]  # the least likely word of each
    best = {WORDS.words[place] for place in scores.argmax(1).tolist()}
    assert len(set(texts)) > 1
    step, logits = hard_words(texts, shortlist=1)
    found, word_kl = [], word_losses.word_kl

    def seen(*args):
        found.append(args)
        return word_kl(*args)

    monkeypatch.setattr(word_losses, "word_kl", seen)
    alone = reference_word(step, "ctc")
    (_, _, listed, target, _), *_ = found
    assert listed.words == sorted(set(texts))  # before any likelier word
    assert [listed.words[place] for place in target.argmax(1).tolist()] == texts
    assert target.sum(1).tolist() == [1.0, 1.0, 1.0]
    assert alone.item() == pytest.approx(naive_hard_words(logits.double(), lengths, texts, listed).item(), rel=1e-5)
    step, logits = hard_words(texts, shortlist=2)
    more = reference_word(step, "ctc")
    listed = found[-1][2]
    assert set(listed.words) == best | set(texts)
    assert more.item() == pytest.approx(naive_hard_words(logits.double(), lengths, texts, listed).item(), rel=1e-5)
    step, _ = hard_words(texts, shortlist=1, random_words=len(WORDS.words))
    reference_word(step, "ctc")
    assert found[-1][2].words == WORDS.words


def test_hard_words_are_a_term_of_the_references_alone(student, batch):
    settings = Distill(alpha=0.0, beta=0.0, hard_words={"weight": 0.7})
    parts = Objective(Learner(student), settings, TERMS, Sources({}, lexicon=TWO_WORDS)).parts(batch)
    assert {name: weight for name, (weight, _) in parts.items()} == {"hard_words": 0.7}
    outputs = student(batch.inputs, batch.lengths)
    expected = naive_hard_words(outputs.ctc.logits.double(), outputs.lengths.tolist(), ["X", "Y"], TWO_WORDS)
    assert parts["hard_words"][1].item() == pytest.approx(expected.item(), rel=1e-5)
    parts["hard_words"][1].backward()
    assert student.ctc_head.weight.grad.abs().max() > 0
