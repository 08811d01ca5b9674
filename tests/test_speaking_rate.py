"""The tempo of speakers, and the factors that make one's speech as long as another's."""

from dataclasses import replace

import numpy as np
import pytest
from corpora import utterances

from kdlib.corpus import speaking_rate
from kdlib.errors import UserError
from kdlib.models import augment
from kdlib.pipeline import Fold


def spoken(speaker, slowness, words):
    """A speaker's utterances of words, each with its own length."""
    rows = utterances(*(f"{speaker}_{word}" for word in words), texts=list(words))
    return [replace(utt, speaker=speaker, duration_s=slowness * len(utt.text)) for utt in rows]


def test_a_slow_speaker_is_slow_on_the_same_words():
    rows = [*spoken("A", 1.0, ("GO", "NEVER")), *spoken("B", 2.0, ("GO", "NEVER"))]
    slowness = speaking_rate.log_durations(rows)
    assert slowness["B"] - slowness["A"] == pytest.approx(np.log(2))
    longer = [*rows, *spoken("C", 1.0, ("NEVER",))]  # only long words: not slow for that
    assert speaking_rate.log_durations(longer)["C"] < speaking_rate.log_durations(longer)["B"]


def test_factors_lead_to_the_tempo_of_the_level(smoke):
    corpus = smoke.corpus
    speakers = [name for name in corpus.speakers if not corpus.is_control(name)]
    level = corpus.level(speakers[0])
    like = [name for name in speakers if corpus.level(name) == level]
    rows = [utt for name in corpus.speakers for utt in spoken(name, 2.0 if name in like else 1.0, ("GO", "NEVER"))]
    factors = speaking_rate.matching_factors(corpus, rows, level)
    assert set(factors) == set(corpus.speakers)
    for name in corpus.speakers:
        assert factors[name] == pytest.approx([1.0 if name in like else 2.0] * len(like))


def test_without_a_level_nothing_is_matched(smoke):
    with pytest.raises(UserError, match=r"needs the held-out speaker's level of intelligibility, found 'none'"):
        speaking_rate.nearest_level(smoke.corpus, smoke.corpus.speakers, "")


def test_a_student_is_trained_at_the_tempo_of_the_level(with_teachers, outputs, monkeypatch):
    settings = {"outputs": str(outputs), "student": {"augment": "mask_and_matched_tempo"}}
    settings |= {"distill": {"use_teachers": False, "alpha": 0, "beta": 1}}
    fold = Fold.load("params/smoke.yaml", "M08", overrides=settings)
    drawn, draw = [], augment.draw_matched
    monkeypatch.setattr(augment, "draw_matched", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    setup = fold.student_setup(1)
    assert setup.tempo == {"M04": [1.0]}  # the nearest level to that of M08 is M04's own
    assert (fold.student(1) / "model.safetensors").is_file()
    assert {len(factors) for factors in drawn} <= {1, 2, 3, 4}
    assert all(0.88 <= factor <= 1.12 for factors in drawn for factor in factors)
