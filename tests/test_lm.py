import itertools
import json
import math
import random
import shutil
from pathlib import Path

import pytest
from systems import text_logprob

from kdlib.decode import lm
from kdlib.errors import UserError

FIXTURE = Path(__file__).parent / "lmplz.json"  # lmplz's models of the same texts


TAILS = [[], [], ["AND", "GO", "UP"], ["AND", "GO", "DOWN"]]


def sentences(count, seed=1):
    rng = random.Random(seed)
    verbs, things = ["DELETE", "COPY", "PASTE", "CUT"], ["LINE", "WORD", "SENTENCE", "PARAGRAPH", "PART"]
    numbers = ["ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX"]
    heads = [["THE"], [""], ["THE", "FIRST"]]
    texts = []
    for _ in range(count):
        head = [word or rng.choice(numbers) for word in rng.choice(heads)]
        texts.append(" ".join([rng.choice(verbs), *head, rng.choice(things), *rng.choice(TAILS)]))
    return texts


@pytest.mark.parametrize(("count", "order"), [(400, 1), (400, 2), (400, 3), (400, 4), (3, 3)])
def test_the_probabilities_of_all_next_words_sum_to_one(count, order):
    model = lm.estimate(sentences(count), order)
    contexts = {gram[:size] for gram in model.logprobs for size in range(len(gram))} | {("NEVER", "SEEN")}
    for context in contexts:
        if lm.END not in context and len(context) < order:
            total = sum(10 ** model.logprob(word, context) for word in model.words)
            assert total == pytest.approx(1, abs=1e-9), context


def test_bigrams_by_hand():
    """Chen & Goodman's equations on four texts.

    A, B and the end each follow two different words. No count is 1, so the discounts are lmplz's fallback: 1 of each 2
    is taken off, and the 3 of 6 go to the uniform distribution over A, B, the end and the unknown word.
    Of the bigrams three occur once, two twice, one three times: Y = 3 / (3 + 2 * 2), D1 = 1 - 2 Y 2/3 = 3/7,
    D2 = 2 - 3 Y 1/2 = 19/14. After A come A and B once and the end twice: 4, of which 2 D1 + D2 = 31/14 go down.
    """
    model = lm.estimate(["A B", "A A", "B", "A"], 2)
    unigram = 1 / 6 + 3 / 6 / 4
    for word in ("A", "B", lm.END):
        assert 10 ** model.logprob(word) == pytest.approx(unigram)
    assert 10 ** model.logprob(lm.UNKNOWN) == pytest.approx(3 / 6 / 4)
    down = 31 / 14 / 4 * unigram
    assert 10 ** model.logprob("A", ["A"]) == pytest.approx((1 - 3 / 7) / 4 + down)
    assert 10 ** model.logprob("B", ["A"]) == pytest.approx((1 - 3 / 7) / 4 + down)
    assert 10 ** model.logprob(lm.END, ["A"]) == pytest.approx((2 - 19 / 14) / 4 + down)
    assert 10 ** model.logprob("XYLOPHONE", ["A"]) == pytest.approx(31 / 14 / 4 * 3 / 6 / 4)


def test_the_estimates_equal_those_of_lmplz():
    """To the seven digits that lmplz writes."""
    for case in json.loads(FIXTURE.read_text(encoding="utf-8")):
        model = lm.estimate(sentences(case["sentences"]), case["order"])
        expected = {tuple(gram.split()): tuple(values) for gram, values in case["grams"].items()}
        assert set(model.logprobs) == set(expected)
        for gram, (prob, backoff) in expected.items():
            assert model.logprobs[gram] == pytest.approx(prob, abs=2e-6), gram
            assert model.backoffs.get(gram, 0.0) == pytest.approx(backoff, abs=2e-6), gram


def test_an_arpa_file_keeps_the_probabilities(tmp_path):
    model = lm.estimate(sentences(50), 3)
    lm.write(model, tmp_path / "lm.arpa")
    again = lm.read(tmp_path / "lm.arpa")
    assert again.order == 3
    for text in sentences(10, seed=9):
        assert text_logprob(again, text) == pytest.approx(text_logprob(model, text), abs=1e-5)


def test_training_sentences_are_more_probable_than_shuffled_ones():
    model = lm.estimate(sentences(200), 3)
    text = sentences(1, seed=5)[0].split()
    shuffled = [" ".join(words) for words in itertools.permutations(text) if list(words) != text]
    assert text_logprob(model, " ".join(text)) > max(text_logprob(model, words) for words in shuffled)


def test_kenlm_gives_a_sentence_the_same_score(tmp_path):
    """flashlight's KenLM scores a sentence as the sum of our conditional probabilities."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    model = lm.estimate(sentences(100), 3)
    lm.write(model, tmp_path / "lm.arpa")
    words = [word for word in model.words if word not in (lm.END, lm.UNKNOWN)]
    (tmp_path / "words.txt").write_text("\n".join([*words, lm.UNKNOWN]) + "\n")
    kenlm = KenLM(str(tmp_path / "lm.arpa"), Dictionary(str(tmp_path / "words.txt")))
    for text in [*sentences(5, seed=7), "DELETE DELETE UP"]:
        state, total = kenlm.start(False), 0.0
        for word in text.split():
            state, score = kenlm.score(state, words.index(word))
            total += score
        total += kenlm.finish(state)[1]
        assert total == pytest.approx(text_logprob(model, text), abs=1e-4)


def test_lmplz_is_used_if_it_is_installed(tmp_path, monkeypatch):
    """A script that stores its input stands in for lmplz; without it kdlib estimates the model."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert lm.build(sentences(20), 2, tmp_path / "ours.arpa") == "kdlib"
    program = tmp_path / "lmplz"
    program.write_text(
        f'#!/bin/sh\nwhile [ "$1" != --arpa ]; do shift; done\ncp {tmp_path}/ours.arpa "$2"\ncat > {tmp_path}/text\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    assert lm.build(sentences(20), 2, tmp_path / "lmplz.arpa") == "lmplz"
    assert (tmp_path / "text").read_text().split("\n")[:-1] == sentences(20)
    assert (tmp_path / "lmplz.arpa").read_text() == (tmp_path / "ours.arpa").read_text()


def test_no_text_and_no_arpa_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="no text"):
        lm.build(["", " "], 3, tmp_path / "lm.arpa")
    with pytest.raises(UserError, match="contains the mark"):
        lm.estimate(["A <s> B"], 2)
    (tmp_path / "x.arpa").write_text("nothing\n")
    with pytest.raises(UserError, match="not an ARPA file"):
        lm.read(tmp_path / "x.arpa")


def test_a_word_that_was_never_seen_has_the_probability_of_the_unknown_word():
    model = lm.estimate(sentences(100), 3)
    assert model.logprob("XYLOPHONE", ["DELETE"]) == model.logprob(lm.UNKNOWN, ["DELETE"])
    assert math.isfinite(text_logprob(model, "XYLOPHONE"))


def test_white_space_other_than_a_space_is_part_of_a_word(tmp_path):
    """NeMo writes a piece as the character of its id + 100, and two of these are a new line and a space to Python."""
    model = lm.estimate(["\x85 \xa0", "\x85 A"], 2)
    assert ("\x85", "\xa0") in model.logprobs
    lm.write(model, tmp_path / "lm.arpa")
    assert lm.read(tmp_path / "lm.arpa").logprobs.keys() == model.logprobs.keys()
