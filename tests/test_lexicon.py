import dataclasses
import itertools
import math

import pytest
import torch

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.decode import trie
from kdlib.decode.greedy import collapse_repeats
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.models import Emissions
from kdlib.tokens import Tokens, train_tokenizer


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return Tokens.for_nemo(
        train_tokenizer(word_list().values(), 64, tmp_path_factory.mktemp("t"), lower=True).read_bytes()
    )


def random_outputs(tokens, frames, utterances=1, lengths=None, seed=0):
    logits = torch.randn(utterances, frames, tokens.size, generator=torch.Generator().manual_seed(seed))
    return Emissions(logits, torch.tensor(lengths or [frames] * utterances))


def by_enumeration(logits, target, blank):
    """The sum over all alignments, by enumeration."""
    logprobs = logits.double().log_softmax(-1)
    used = sorted({*target, blank})
    paths = [
        path
        for path in itertools.product(used, repeat=len(logits))
        if collapse_repeats(list(path), blank) == list(target)
    ]
    return math.log(sum(math.exp(sum(logprobs[t, token] for t, token in enumerate(path))) for path in paths))


@pytest.mark.parametrize("word", ["A", "I", "THE", "SO", "SEE"])
def test_scores_are_the_sum_over_all_alignments(tokens, word):
    outputs = random_outputs(tokens, frames=6)
    score = Lexicon([word], tokens).scores(outputs)[0, 0]
    expected = by_enumeration(outputs.logits[0], tokens.encode(word), tokens.blank)
    assert float(score) == pytest.approx(expected, abs=1e-4)


def test_padding_changes_no_score(tokens):
    lexicon = Lexicon(["ONE", "TWO", "THREE"], tokens)
    long = random_outputs(tokens, 30, utterances=2, lengths=[30, 12])
    short = Emissions(long.logits[1:, :12], torch.tensor([12]))
    assert torch.allclose(lexicon.scores(long)[1], lexicon.scores(short)[0], atol=1e-4)


def test_a_word_that_needs_more_frames_than_there_are_is_impossible(tokens):
    lexicon = Lexicon(["A", "NATURALIZATION"], tokens)
    scores = lexicon.scores(random_outputs(tokens, frames=3))[0]
    assert torch.isfinite(scores[0])
    assert scores[1] == -math.inf
    assert lexicon.best(random_outputs(tokens, frames=3)) == ["A"]


def test_the_best_word_is_the_one_of_the_outputs(tokens):
    words = sorted(set(word_list().values()))[:40]
    ids = tokens.encode(words[17])
    frames = [token for piece in ids for token in (tokens.blank, piece)] + [tokens.blank]
    logits = 9 * torch.nn.functional.one_hot(torch.tensor([frames]), tokens.size).float()
    assert Lexicon(words, tokens).best(Emissions(logits, torch.tensor([len(frames)]))) == [words[17]]


def test_a_word_that_the_tokenizer_cannot_encode_is_rejected(tokens):
    with pytest.raises(UserError, match="cannot encode 'Ü'"):
        Lexicon(["ONE", "FÜNF"], tokens)


def test_the_output_is_empty_if_no_word_fits(tokens):
    assert Lexicon(["NATURALIZATION", "PSYCHOLOGICAL"], tokens).best(random_outputs(tokens, frames=2)) == [""]


def loop(lexicon, outputs, blank):
    """The scores by torch's CTC loss, one word at a time, in double precision."""
    logprobs = outputs.logits.double().log_softmax(-1)
    scores = torch.empty(len(logprobs), len(lexicon.sequences), dtype=torch.float64)
    for row, length in enumerate(outputs.lengths.tolist()):
        for column, ids in enumerate(lexicon.sequences):
            arguments = logprobs[row, :length], torch.tensor(ids), torch.tensor(length), torch.tensor(len(ids))
            scores[row, column] = -torch.nn.functional.ctc_loss(*arguments, blank=blank, reduction="none")
    return scores


def test_all_words_of_the_list_have_the_scores_of_torchs_ctc_loss(tokens):
    lexicon = Lexicon(word_list().values(), tokens)
    outputs = random_outputs(tokens, 40, utterances=11, lengths=[40, 3, 17, 25, 40, 1, 8, 33, 12, 29, 21])
    expected = loop(lexicon, outputs, tokens.blank)
    found = lexicon.scores(outputs)
    assert (found.isinf() == expected.isinf()).all()  # too few frames for the word
    finite = expected.isfinite()
    assert (found[finite] - expected[finite]).abs().max() < 1e-3


def test_words_far_below_the_smallest_float_have_exact_scores(tokens):
    """A confident model and a long recording: e^-1000 is no float64, but its logarithm is exact."""
    words = ["ONE", "SEE", "NATURALIZATION", "PENNSYLVANIA"]
    ids = tokens.encode("SEE")
    spikes = [token for piece in ids for token in (piece, tokens.blank)]
    frames = [tokens.blank] * 150 + spikes + [tokens.blank] * 150
    logits = 120 * torch.nn.functional.one_hot(torch.tensor([frames]), tokens.size).float()
    outputs = Emissions(logits, torch.tensor([len(frames)]))
    lexicon = Lexicon(words, tokens)
    found, expected = lexicon.scores(outputs), loop(lexicon, outputs, tokens.blank)
    assert expected.min() < trie.LEAST - 100
    assert torch.allclose(found, expected, atol=1e-3)
    assert lexicon.best(outputs) == ["SEE"]


@pytest.mark.parametrize("spread", [5, 20, 50, 100])
@pytest.mark.parametrize("frames", [1, 7, 25])
def test_scores_of_sharp_models_are_those_of_double_precision(tokens, spread, frames):
    """Logits of 5,000 tokens, some of them e^-88 and less likely than the best: single precision would call them 0."""
    generator = torch.Generator().manual_seed(spread + frames)
    logits = torch.randn(20, frames, 5000, generator=generator) * spread
    sharp = dataclasses.replace(tokens, size=5000)
    lexicon = Lexicon([*list(word_list().values())[::3], "SEE", "BOOKKEEPER"], sharp)
    scores = lexicon.scores(Emissions(logits, torch.full((20,), frames)))
    logprobs = logits.double().log_softmax(-1).transpose(0, 1)
    for place, ids in enumerate(lexicon.sequences):
        sizes = torch.full((20,), len(ids))
        target = torch.tensor([ids] * 20)
        lengths = torch.full((20,), frames)
        each = -torch.nn.functional.ctc_loss(
            logprobs, target, lengths, sizes, blank=sharp.blank, reduction="none", zero_infinity=False
        )
        assert torch.allclose(scores[:, place].double(), each, rtol=1e-5, atol=1e-2)


def test_half_a_minute_of_noise_has_a_score(tokens):
    """Every word is far below the smallest float: underflow would make it impossible."""
    outputs = Emissions(torch.zeros(1, 750, tokens.size), torch.tensor([750]))
    lexicon = Lexicon(["ONE", "TWO"], tokens)
    assert torch.allclose(lexicon.scores(outputs), loop(lexicon, outputs, tokens.blank), rtol=1e-6)


def test_a_word_of_several_spellings_has_the_sum_of_their_probabilities(tokens):
    outputs = random_outputs(tokens, 9)
    first, second, both = (
        Lexicon(words, tokens).scores(outputs)[0, 0]
        for words in ({"FOUR": ["FOUR"]}, {"FOUR": ["FOR"]}, {"FOUR": ["FOUR", "FOR", "four"]})
    )
    assert float(both) == pytest.approx(float(torch.logaddexp(first, second)), abs=1e-9)  # and a spelling counts once
    lexicon = Lexicon({"FOUR": ["FOUR", "FOR"], "ONE": ["ONE"]}, tokens)
    assert lexicon.words == ["FOUR", "ONE"]


def test_the_posterior_is_a_softmax_over_the_words_and_the_best_come_first(tokens):
    lexicon = Lexicon(["ONE", "TWO", "THREE", "FOUR"], tokens)
    outputs = random_outputs(tokens, 20, utterances=3)
    posterior = lexicon.posterior(outputs)
    assert torch.allclose(posterior.sum(-1), torch.ones(3, dtype=torch.float64))
    for row, ranked in zip(posterior, lexicon.nbest(outputs, 3), strict=True):
        assert [word.posterior for word in ranked] == pytest.approx(sorted(row.tolist(), reverse=True)[:3])
        assert ranked[0].word == lexicon.words[int(row.argmax())]


def test_scores_do_not_depend_on_threads(tokens):
    lexicon = Lexicon(word_list().values(), tokens)
    outputs = random_outputs(tokens, 20, utterances=30)
    expected = lexicon.scores(outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(lexicon.scores(outputs), expected)
    finally:
        torch.set_num_threads(before)


def test_the_right_word_is_best_of_five_thousand(tokens):
    """Each entry is made of two words."""
    words = sorted(set(word_list().values()))
    many = [f"{a} {b}" for a, b in itertools.islice(itertools.product(words, words), 5000)]
    ids = tokens.encode(many[4321])
    frames = [token for piece in ids for token in (tokens.blank, piece)] + [tokens.blank]
    logits = 9 * torch.nn.functional.one_hot(torch.tensor([frames]), tokens.size).float()
    assert Lexicon(many, tokens).best(Emissions(logits, torch.tensor([len(frames)]))) == [many[4321]]


def test_an_empty_lexicon_is_rejected(tokens):
    with pytest.raises(UserError, match="expected at least one word"):
        Lexicon([], tokens)
