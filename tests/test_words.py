"""Losses on words and sequences: posteriors over a lexicon, pseudo-labels, occupancies, each against its definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_lexicon import by_enumeration, loop, random_outputs, tokens  # noqa: F401 (a fixture)

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.decode.greedy import collapse_repeats
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Emissions
from kdlib.objectives import losses, reference_losses, word_losses
from kdlib.tokens import BLANK

LENGTHS = [40, 4, 17, 40, 20, 25, 9, 30, 33, 12, 1]


def by_autograd(lexicon, logits, lengths, target, weights, temperature, blank):
    """The definition in float64: torch's CTC loss word by word, softmax, KL; only words that fit."""
    logprobs, total = logits.log_softmax(-1), 0.0
    for row, length in enumerate(lengths):
        scores = []
        for ids in lexicon.sequences:
            fits = len(ids) + sum(a == b for a, b in itertools.pairwise(ids)) <= length
            arguments = torch.tensor([ids]), torch.tensor([length]), torch.tensor([len(ids)])
            loss = torch.nn.functional.ctc_loss(logprobs[row, :length, None], *arguments, blank=blank, reduction="none")
            scores.append(-loss[0] if fits else None)
        fitting = [place for place, score in enumerate(scores) if score is not None]
        if not fitting or not target[row, fitting].sum():
            continue
        log_q = torch.stack([scores[place] for place in fitting]).div(temperature).log_softmax(0)
        p = target[row, fitting].double() / target[row, fitting].sum()
        positive = p > 0
        total = total + weights[row] * (p[positive] * (p[positive].log() - log_q[positive])).sum()
    return temperature**2 * total / weights.sum()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_kl_over_words_and_its_gradient_match_float64_autograd(tokens, temperature, scale):  # noqa: F811
    lexicon = Lexicon(sorted(set(word_list().values()))[:70], tokens)
    logits = scale * random_outputs(tokens, 40, len(LENGTHS)).logits
    target = torch.rand(len(LENGTHS), len(lexicon.words)).pow(8)
    target /= target.sum(1, keepdim=True)
    weights = torch.rand(len(LENGTHS))
    weights[3] = 0
    tested, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = word_losses.word_kl(tested, torch.tensor(LENGTHS), lexicon, target, weights, temperature)
    expected = by_autograd(lexicon, exact, LENGTHS, target, weights.double(), temperature, tokens.blank)
    (2 * loss).backward()
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (tested.grad - exact.grad).abs().max() < 1e-5 * exact.grad.abs().max()
    assert tested.grad[3].abs().max() == tested.grad[1, 4:].abs().max() == 0


def test_a_word_of_several_spellings_is_one_word(tokens):  # noqa: F811
    lexicon = Lexicon({"SEVEN": ["SEVEN", "SE VEN"], "TWO": ["TWO"], "TOO": ["TOO", "TO"]}, tokens)
    logits = random_outputs(tokens, 12, 2).logits.requires_grad_()
    lengths, target = torch.tensor([12, 9]), torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])
    loss = word_losses.word_kl(logits, lengths, lexicon, target, torch.ones(2))
    posterior = lexicon.posterior(Emissions(logits, lengths)).double()
    p = target.double()
    expected = (p * (p.clamp_min(1e-30).log() - posterior.log())).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    step = 1e-2 * logits.grad / logits.grad.norm()
    with torch.no_grad():
        ahead, back = (
            word_losses.word_kl(logits + sign * step, lengths, lexicon, target, torch.ones(2)).item()
            for sign in (1, -1)
        )
    assert (ahead - back) / 2 == pytest.approx(1e-2 * logits.grad.norm().item(), rel=2e-2)


def test_the_posterior_does_not_depend_on_the_normalisation_of_frames(tokens):  # noqa: F811
    lexicon, logits = Lexicon(["ONE", "TWO", "THREE"], tokens), random_outputs(tokens, 20).logits
    target, lengths = torch.tensor([[0.1, 0.2, 0.7]]), torch.tensor([20])
    weights = torch.ones(1)
    loss = word_losses.word_kl(logits, lengths, lexicon, target, weights)
    normalised = word_losses.word_kl(logits.log_softmax(-1), lengths, lexicon, target, weights)
    assert loss.item() == pytest.approx(normalised.item(), rel=1e-6)
    leaf = logits.clone().requires_grad_()
    word_losses.word_kl(leaf, lengths, lexicon, target, weights).backward()
    unused = sorted(set(range(tokens.size)) - {tokens.blank, *itertools.chain(*lexicon.sequences)})
    assert leaf.grad[..., unused].abs().max() == 0


def test_long_silence_does_not_underflow(tokens):  # noqa: F811
    """Half a minute of noise: every word's probability is far below the smallest float64."""
    lexicon = Lexicon(["ONE", "TWO", "SEVEN"], tokens)
    logits = (0.3 * random_outputs(tokens, 750).logits).requires_grad_()
    target, lengths = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([750])
    word_losses.word_kl(logits, lengths, lexicon, target, torch.ones(1)).backward()
    exact = logits.detach().double().requires_grad_()
    by_autograd(lexicon, exact, [750], target, torch.ones(1).double(), 1.0, tokens.blank).backward()
    assert (logits.grad - exact.grad).abs().max() < 1e-4 * exact.grad.abs().max()


def test_a_part_of_a_lexicon_has_the_same_scores(tokens):  # noqa: F811
    whole = Lexicon({"ONE": ["ONE", "WON"], "TWO": ["TWO"], "SIX": ["SIX"], "TEN": ["TEN"]}, tokens)
    part = whole.among([0, 3])
    assert part.words == ["ONE", "TWO"]
    outputs = random_outputs(tokens, 12, 2)
    assert torch.allclose(part.scores(outputs), whole.scores(outputs)[:, [0, 3]])


def test_the_sequence_loss_is_a_weighted_mean_of_ctc_losses_over_utterances():
    logits, lengths = torch.randn(3, 9, 8, requires_grad=True), torch.tensor([9, 7, 9])
    rows, ids, weights = [0, 0, 2], [[4, 5], [4], [6, 6, 7]], torch.tensor([0.6, 0.3, 0.5])
    loss = losses.sequence_ctc(logits, lengths, rows, ids, weights)
    logprobs, expected = logits.double().log_softmax(-1), 0.0
    for row, text, weight in zip(rows, ids, weights.double(), strict=True):
        arguments = torch.tensor([text]), lengths[row : row + 1], torch.tensor([len(text)])
        each = torch.nn.functional.ctc_loss(logprobs[row][:, None], *arguments, blank=BLANK, reduction="sum")
        expected = expected + weight * each / len(text) / 2  # two utterances
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert logits.grad[1].abs().max() == 0


def test_an_occupancy_is_the_share_of_alignments_through_a_token():
    """All alignments of a short text, one by one."""
    logits = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    texts, lengths = [[3, 4, 4], [4]], [6, 4]
    occupancy = losses.occupancy(logits, torch.tensor(lengths), texts)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        logprobs, expected = logits[row].log_softmax(-1), np.zeros((6, 5))
        for path in itertools.product([BLANK, *set(text)], repeat=length):
            if collapse_repeats(list(path), BLANK) == text:
                share = math.exp(sum(logprobs[t, token] for t, token in enumerate(path)))
                expected[range(length), path] += share
        expected[:length] /= expected[:length].sum(1, keepdims=True)
        assert np.abs(occupancy[row].numpy() - expected).max() < 1e-5
    assert losses.occupancy(logits, torch.tensor([2, 4]), texts)[0].abs().max() == 0  # too short for the text


def test_label_smoothing_is_the_kl_from_the_uniform_distribution():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    weights = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    loss = reference_losses.uniform_kl(logits, weights)
    uniform = torch.full((7,), 1 / 7)
    each = (uniform * (uniform.log() - logits.log_softmax(-1))).sum(-1)
    assert loss.item() == pytest.approx(((each * weights).sum() / 7).item(), rel=1e-5)
    assert reference_losses.uniform_kl(torch.zeros(1, 2, 7), torch.ones(1, 2)).item() == pytest.approx(0, abs=1e-6)


def test_scores_with_and_without_gradient_agree(tokens):  # noqa: F811
    lexicon, outputs = Lexicon(["A", "SO", "SEE"], tokens), random_outputs(tokens, 7)
    calls = []
    lexicon.with_gradient(outputs, lambda scores, rows: calls.append(scores) or np.zeros_like(scores))
    differences = torch.from_numpy(calls[0] - calls[0][:, :1])
    expected = loop(lexicon, outputs, tokens.blank)
    assert torch.allclose(differences, expected - expected[:, :1], atol=1e-5)
    assert by_enumeration(outputs.logits[0], tokens.encode("A"), tokens.blank) == pytest.approx(
        expected[0, lexicon.words.index("A")].item(), abs=1e-4
    )
