import itertools
import math

import numpy as np
import pytest
import torch
from systems import text_logprob
from torchaudio.models import decoder

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.decode import beam as search
from kdlib.decode import lm
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.errors import UserError
from kdlib.models import Emissions
from kdlib.settings.evaluation import BeamSearchSettings
from kdlib.tokens import Tokens, train_tokenizer, train_words

LN10 = math.log(10)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return Tokens.for_nemo(
        train_tokenizer(word_list().values(), 64, tmp_path_factory.mktemp("t"), lower=True).read_bytes()
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "lm.arpa"
    lm.write(lm.estimate(["DELETE THE LINE"] * 5 + ["COPY THE LINE", "GO UP", "THE LINE", "UP"], 2), path)
    return path


def spiking(tokens, texts, loud=6.0, noise=0.0, twice=False):
    """Outputs in which the pieces of the texts spike, for one or two frames each, with blanks between."""
    rows = []
    for text in texts:
        ids = [token for piece in tokens.encode(text) for token in (*([piece] * (1 + twice)), tokens.blank)]
        rows.append(torch.nn.functional.one_hot(torch.tensor([tokens.blank, *ids]), tokens.size).float() * loud)
    logits = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logits += noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return Emissions(logits, torch.tensor([len(row) for row in rows]))


@pytest.mark.parametrize("twice", [False, True])
def test_it_decodes_the_text_of_the_outputs(tokens, model, twice):
    """Also where the last token of a word lasts two frames."""
    texts = ["DELETE THE LINE", "GO UP", "THE LINE", "UP UP"]
    beam = BeamSearch(tokens, ["DELETE", "THE", "LINE", "GO", "UP"], model)
    assert beam(spiking(tokens, texts, twice=twice)) == texts


def ctc(logprobs, ids, blank):
    """CTC's forward sum over all alignments of a text."""
    in_token, in_blank = np.full(len(ids) + 1, -np.inf), np.full(len(ids) + 1, -np.inf)
    in_blank[0] = 0.0
    for frame in logprobs:
        for place in range(len(ids), 0, -1):
            entered = in_blank[place - 1]
            if place > 1 and ids[place - 2] != ids[place - 1]:
                entered = np.logaddexp(entered, in_token[place - 1])
            in_blank[place] = frame[blank] + np.logaddexp(in_blank[place], in_token[place])
            in_token[place] = frame[ids[place - 1]] + np.logaddexp(entered, in_token[place])
        in_blank[0] += frame[blank]
    return np.logaddexp(in_token[-1], in_blank[-1])


def test_the_score_is_that_of_ctc_and_of_the_language_model(tokens, model):
    """Compared with all texts of up to three words: their CTC probability, the model's, and a bonus per word."""
    words, setting = ["THE", "LINE", "UP"], BeamSettings(lm_weight=0.7, word_bonus=0.4, size=500)
    outputs = spiking(tokens, ["THE LINE"], loud=3.0, noise=0.5)
    ngrams, logprobs = lm.read(model), outputs.logits[0].double().log_softmax(-1).numpy()
    expected = {}
    for text in (text for size in (1, 2, 3) for text in itertools.product(words, repeat=size)):
        score = ctc(logprobs, [token for word in text for token in tokens.encode(word)], tokens.blank)
        expected[text] = score + 0.7 * LN10 * text_logprob(ngrams, " ".join(text)) + 0.4 * len(text)
    beam = BeamSearch(tokens, words, model, setting, tokens_at_once=100, threshold=1e9)
    found = beam._exact(beam.search_input(outputs)[0])
    best = max(expected, key=expected.get)
    assert max(found, key=found.get) == best
    for text in sorted(expected, key=expected.get)[-5:]:
        assert found[text] == pytest.approx(expected[text], abs=1e-3)
    assert beam(outputs) == [" ".join(best)]


def test_a_token_that_lasts_is_one_token(tokens, model):
    """Flashlight alone finds UP GO UP, or worse, where the last token of UP lasts three frames."""
    ids = tokens.encode("UP")
    frames = [tokens.blank, *ids, ids[-1], ids[-1], tokens.blank, tokens.blank]
    logits = torch.nn.functional.one_hot(torch.tensor([frames]), tokens.size).float() * 8
    emissions = Emissions(logits, torch.tensor([len(frames)]))
    search = BeamSearch(tokens, ["DELETE", "THE", "LINE", "GO", "UP"], None, BeamSettings(0.0, 0.0, 20))
    assert search(emissions) == ["UP"]
    (((best, share), *_),) = search.nbest(emissions, 3)
    assert best == ids
    assert share > 0.9


def test_whole_words_are_searched_as_pieces(tmp_path):
    words = Tokens.for_teachers(train_words(["GO UP", "UP THE LINE"], tmp_path))
    path = tmp_path / "words.arpa"
    lm.write(lm.estimate(search.in_pieces(["GO UP", "UP THE LINE"] * 3, words), 2), path)
    up, line, blank = *words.encode("UP LINE"), words.blank
    logits = torch.nn.functional.one_hot(torch.tensor([[blank, up, up, up, blank, up, line, line]]), words.size) * 8.0
    found = BeamSearch(words, ["GO", "UP", "THE", "LINE"], path, BeamSettings(0.1, 0.0, 20))
    assert found.words is None
    assert found(Emissions(logits, torch.tensor([8]))) == ["UP UP LINE"]


def test_the_language_model_decides_between_words_of_equal_probability(tokens, model):
    outputs = spiking(tokens, ["GO UP"])
    logits = outputs.logits.clone()
    place = int(logits[0].argmax(-1).eq(tokens.encode("GO")[0]).nonzero()[0])
    logits[0, place] = 0
    logits[0, place, tokens.encode("UP")[0]] = logits[0, place, tokens.encode("GO")[0]] = 3.0
    unsure = Emissions(logits, outputs.lengths)
    for weight in (0.0, 1.0):
        text = BeamSearch(tokens, ["GO", "UP", "THE"], model, BeamSettings(weight, 0.0, 50))(unsure)[0]
        assert weight == 0.0 or text == "GO UP"


def test_the_language_model_scores_the_decoded_pieces(tokens, tmp_path, monkeypatch):
    """The trap: without a list of names flashlight gives pieces the indices of other pieces in the language model."""
    texts = ["DELETE THE LINE", "COPY THE LINE", "GO UP", "PASTE THE WORD"]
    path = tmp_path / "pieces.arpa"
    lm.write(lm.estimate(search.in_pieces(texts * 3, tokens), 4), path)
    noisy = spiking(tokens, texts, loud=4.0, noise=1.6)
    mapped = BeamSearch(tokens, None, path, BeamSettings(1.0, 0.0, 50))
    right = sum(hyp == text for hyp, text in zip(mapped(noisy), texts, strict=True))
    pieces, expected = search.in_pieces(["DELETE THE"], tokens)[0].split(), lm.read(path)
    state, lm_logprob = mapped._search.lm.start(False), 0.0
    for index in tokens.encode("DELETE THE"):
        state, score = mapped._search.lm.score(state, mapped.columns.index(index))
        lm_logprob += score
    total = sum(expected.logprob(piece, ["<s>", *pieces[:place]]) for place, piece in enumerate(pieces))
    assert lm_logprob == pytest.approx(total, abs=1e-4)
    original = decoder.ctc_decoder
    unmapped = {"lm_dict": None, "lm": str(path)}
    monkeypatch.setattr("torchaudio.models.decoder.ctc_decoder", lambda **settings: original(**settings | unmapped))
    trapped = BeamSearch(tokens, None, path, BeamSettings(1.0, 0.0, 50))
    wrong = sum(hyp == text for hyp, text in zip(trapped(noisy), texts, strict=True))
    assert wrong < right


def test_tuning_finds_the_setting_of_the_lowest_wer(tokens, model):
    texts = ["DELETE THE LINE", "GO UP", "THE LINE", "COPY THE LINE"]
    words = ["DELETE", "THE", "LINE", "GO", "UP", "COPY", "WORD", "PASTE"]
    beam = BeamSearch(tokens, words, model)
    outputs = spiking(tokens, texts, loud=3.0, noise=1.3)
    table = search.tune(
        beam,
        beam.search_input(outputs),
        texts,
        BeamSearchSettings(lm_weights=(0.0, 0.9), word_bonuses=(0.0, 1.0), beam_sizes=(10, 20)),
    )
    assert len(table) == 8
    best = search.best_settings(table)
    row = table[
        (table.lm_weight == best.lm_weight) & (table.word_bonus == best.word_bonus) & (table["size"] == best.size)
    ]
    assert row.wer.item() == table.wer.min()
    alike = table[table.wer == table.wer.min()]
    assert best.size == alike["size"].min()
    assert np.isfinite(table.wra).all()


def test_an_empty_input_has_an_empty_output(tokens, model):
    empty = Emissions(torch.zeros(1, 4, tokens.size), torch.tensor([0]))
    assert BeamSearch(tokens, ["UP"], model)(empty) == [""]
    with pytest.raises(UserError, match="expected at least one word"):
        BeamSearch(tokens, [], model)


def test_a_word_is_found_by_any_of_its_spellings(tokens):
    """And an entry of several words is split."""
    beam = BeamSearch(tokens, {"FOUR": ["FOUR", "FOR"], "GO UP": ["GO UP"], "ONE": ["ONE"]}, None)
    assert list(beam.words) == ["FOUR", "GO", "ONE", "UP"]
    assert beam(spiking(tokens, ["FOR", "FOUR", "UP ONE FOR"])) == ["FOUR", "FOUR", "UP ONE FOUR"]


def test_it_finds_the_same_wherever_its_hypotheses_lie_in_memory(tokens, tmp_path):
    """Scores that tie at the margin of the beam were told apart by addresses: processes gave different texts."""
    words = sorted(set(word_list().values()))
    lm.write(lm.estimate(words, 2), tmp_path / "lm.arpa")
    logits = torch.randn(60, 25, tokens.size, generator=torch.Generator().manual_seed(7))
    logits[..., tokens.blank] += 2
    emissions, runs = Emissions(logits, torch.full((60,), 25)), []
    for seed in range(4):
        blocks = [bytearray(size) for size in np.random.default_rng(seed).integers(16, 400, 20_000)]
        del blocks[::2]
        beam = BeamSearch(tokens, words, tmp_path / "lm.arpa", BeamSettings(1.5, 0.0, 20))
        runs.append(beam.nbest(emissions, 20))
    differing = [index for index, ranked in enumerate(zip(*runs, strict=True)) if ranked[1:] != ranked[:-1]]
    assert not differing
