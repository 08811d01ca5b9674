import itertools
import math

import pytest
import torch

from kdlib.corpus.synthetic import word_list
from kdlib.decode.greedy import collapse
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.models import Outputs
from kdlib.tokens import Tokens, train


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return Tokens.for_nemo(train(word_list().values(), 64, tmp_path_factory.mktemp("t"), lower=True).read_bytes())


def heard(tokens, frames, utterances=1, lengths=None, seed=0):
    logits = torch.randn(utterances, frames, tokens.size, generator=torch.Generator().manual_seed(seed))
    return Outputs(logits, torch.tensor(lengths or [frames] * utterances), logits)


def by_enumeration(logits, target, blank):
    """The sum over every alignment, one by one."""
    logprobs = logits.double().log_softmax(-1)
    used = sorted({*target, blank})
    paths = [
        path for path in itertools.product(used, repeat=len(logits)) if collapse(list(path), blank) == list(target)
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
