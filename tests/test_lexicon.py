import itertools
import math

import pytest
import torch

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.decode import trie
from kdlib.decode.greedy import collapse_repeats
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.models import Outputs
from kdlib.tokens import Tokens, train_tokenizer


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return Tokens.for_nemo(
        train_tokenizer(word_list().values(), 64, tmp_path_factory.mktemp("t"), lower=True).read_bytes()
    )


def heard(tokens, frames, utterances=1, lengths=None, seed=0):
    logits = torch.randn(utterances, frames, tokens.size, generator=torch.Generator().manual_seed(seed))
    return Outputs(logits, torch.tensor(lengths or [frames] * utterances), logits)


def by_enumeration(logits, target, blank):
    """The sum over every alignment, one by one."""
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
    outputs = heard(tokens, frames=6)
    score = Lexicon([word], tokens).scores(outputs)[0, 0]
    expected = by_enumeration(outputs.ctc_logits[0], tokens.encode(word), tokens.blank)
    assert float(score) == pytest.approx(expected, abs=1e-4)


def test_padding_does_not_count(tokens):
    lexicon = Lexicon(["ONE", "TWO", "THREE"], tokens)
    long = heard(tokens, 30, utterances=2, lengths=[30, 12])
    short = Outputs(long.ctc_logits[1:, :12], torch.tensor([12]), long.encoded[1:, :12])
    assert torch.allclose(lexicon.scores(long)[1], lexicon.scores(short)[0], atol=1e-4)


def test_a_word_that_needs_more_frames_than_there_are_is_impossible(tokens):
    lexicon = Lexicon(["A", "NATURALIZATION"], tokens)
    scores = lexicon.scores(heard(tokens, frames=3))[0]
    assert torch.isfinite(scores[0])
    assert scores[1] == -math.inf
    assert lexicon.best(heard(tokens, frames=3)) == ["A"]


def test_the_best_word_is_the_one_that_was_written(tokens):
    words = sorted(set(word_list().values()))[:40]
    ids = tokens.encode(words[17])
    frames = [token for one in ids for token in (tokens.blank, one)] + [tokens.blank]
    logits = 9 * torch.nn.functional.one_hot(torch.tensor([frames]), tokens.size).float()
    assert Lexicon(words, tokens).best(Outputs(logits, torch.tensor([len(frames)]), logits)) == [words[17]]


def test_a_word_that_cannot_be_written_is_refused(tokens):
    with pytest.raises(UserError, match="cannot write 'Ü'"):
        Lexicon(["ONE", "FÜNF"], tokens)


def test_where_no_word_fits_nothing_is_heard(tokens):
    assert Lexicon(["NATURALIZATION", "PSYCHOLOGICAL"], tokens).best(heard(tokens, frames=2)) == [""]


def loop(lexicon, outputs, blank):
    """The same by a loop of torch's CTC loss, a word at a time, in double precision."""
    logprobs = outputs.ctc_logits.double().log_softmax(-1)
    found = torch.empty(len(logprobs), len(lexicon.sequences), dtype=torch.float64)
    for row, length in enumerate(outputs.lengths.tolist()):
        for column, ids in enumerate(lexicon.sequences):
            arguments = logprobs[row, :length], torch.tensor(ids), torch.tensor(length), torch.tensor(len(ids))
            found[row, column] = -torch.nn.functional.ctc_loss(*arguments, blank=blank, reduction="none")
    return found


def test_all_words_of_the_list_have_the_scores_of_torchs_ctc_loss(tokens):
    lexicon = Lexicon(word_list().values(), tokens)
    outputs = heard(tokens, 40, utterances=11, lengths=[40, 3, 17, 25, 40, 1, 8, 33, 12, 29, 21])
    expected = loop(lexicon, outputs, tokens.blank)
    found = lexicon.scores(outputs)
    assert (found.isinf() == expected.isinf()).all()  # too few frames for the word
    finite = expected.isfinite()
    assert (found[finite] - expected[finite]).abs().max() < 1e-3


def test_words_far_below_the_smallest_number_are_scored_all_the_same(tokens):
    """A sure model and a long recording: e^-1000 is no float64, and its logarithm is as exact as any."""
    words = ["ONE", "SEE", "NATURALIZATION", "PENNSYLVANIA"]
    ids = tokens.encode("SEE")
    said = [token for one in ids for token in (one, tokens.blank)]
    frames = [tokens.blank] * 150 + said + [tokens.blank] * 150
    logits = 120 * torch.nn.functional.one_hot(torch.tensor([frames]), tokens.size).float()
    outputs = Outputs(logits, torch.tensor([len(frames)]), logits)
    lexicon = Lexicon(words, tokens)
    found, expected = lexicon.scores(outputs), loop(lexicon, outputs, tokens.blank)
    assert expected.min() < trie.LEAST - 100
    assert torch.allclose(found, expected, atol=1e-3)
    assert lexicon.best(outputs) == ["SEE"]


def test_noise_for_half_a_minute_has_a_score(tokens):
    """Every word is far below the smallest number: none may come out as impossible, as underflow would have it."""
    outputs = Outputs(torch.zeros(1, 750, tokens.size), torch.tensor([750]), torch.zeros(1))
    lexicon = Lexicon(["ONE", "TWO"], tokens)
    assert torch.allclose(lexicon.scores(outputs), loop(lexicon, outputs, tokens.blank), rtol=1e-6)


def test_a_word_of_several_spellings_has_the_sum_of_their_probabilities(tokens):
    outputs = heard(tokens, 9)
    one, other, both = (
        Lexicon(words, tokens).scores(outputs)[0, 0]
        for words in ({"FOUR": ["FOUR"]}, {"FOUR": ["FOR"]}, {"FOUR": ["FOUR", "FOR", "four"]})
    )
    assert float(both) == pytest.approx(float(torch.logaddexp(one, other)), abs=1e-9)  # and one spelling counts once
    lexicon = Lexicon({"FOUR": ["FOUR", "FOR"], "ONE": ["ONE"]}, tokens)
    assert lexicon.words == ["FOUR", "ONE"]


def test_the_posterior_is_a_softmax_over_the_words_and_the_best_come_first(tokens):
    lexicon = Lexicon(["ONE", "TWO", "THREE", "FOUR"], tokens)
    outputs = heard(tokens, 20, utterances=3)
    posterior = lexicon.posterior(outputs)
    assert torch.allclose(posterior.sum(-1), torch.ones(3, dtype=torch.float64))
    for row, ranked in zip(posterior, lexicon.nbest(outputs, 3), strict=True):
        assert [one.posterior for one in ranked] == pytest.approx(sorted(row.tolist(), reverse=True)[:3])
        assert ranked[0].word == lexicon.words[int(row.argmax())]


def test_threads_change_nothing(tokens):
    lexicon = Lexicon(word_list().values(), tokens)
    outputs = heard(tokens, 20, utterances=30)
    one = lexicon.scores(outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(lexicon.scores(outputs), one)
    finally:
        torch.set_num_threads(before)


def test_five_thousand_words(tokens):
    """Made of two words each; the one that was written is found among them."""
    words = sorted(set(word_list().values()))
    many = [f"{a} {b}" for a, b in itertools.islice(itertools.product(words, words), 5000)]
    ids = tokens.encode(many[4321])
    frames = [token for one in ids for token in (tokens.blank, one)] + [tokens.blank]
    logits = 9 * torch.nn.functional.one_hot(torch.tensor([frames]), tokens.size).float()
    assert Lexicon(many, tokens).best(Outputs(logits, torch.tensor([len(frames)]), logits)) == [many[4321]]


def test_an_empty_lexicon_is_refused(tokens):
    with pytest.raises(UserError, match="needs a word"):
        Lexicon([], tokens)
