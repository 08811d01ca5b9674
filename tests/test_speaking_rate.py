"""The tempo of speakers, and the factors that make one's speech as long as another's."""

from dataclasses import replace

import numpy as np
import pytest
from corpora import utterances

from kdlib.corpus import speaking_rate
from kdlib.corpus.manifest import Corpus, Speaker
from kdlib.errors import UserError
from kdlib.models import augment
from kdlib.pipeline import Fold


def spoken(speaker, slowness, words):
    """A speaker's utterances of words, each with its own length."""
    rows = utterances(*(f"{speaker}_{word}" for word in words), texts=list(words))
    return [utt.replace(speaker=speaker, duration_s=slowness * len(utt.text)) for utt in rows]


def test_a_slow_speaker_is_slow_on_the_same_words():
    rows = [*spoken("A", 1.0, ("GO", "NEVER")), *spoken("B", 2.0, ("GO", "NEVER"))]
    slowness = speaking_rate.log_durations(rows)
    assert slowness["B"] - slowness["A"] == pytest.approx(np.log(2))
    longer = [*rows, *spoken("C", 1.0, ("NEVER",))]  # only long words: not slow for that
    assert speaking_rate.log_durations(longer)["C"] < speaking_rate.log_durations(longer)["B"]


def known(**shares):
    """A corpus whose speakers have an intelligibility; without one, no share."""
    rows = [utt for name in shares for utt in spoken(name, 2.0 if (shares[name] or 0) < 50 else 1.0, ("GO", "NEVER"))]
    rows = [utt.replace(utt_id=f"{utt.speaker}_{utt.text}") for utt in rows]
    people = {name: Speaker(name, intelligibility_pct=share) for name, share in shares.items() if share is not None}
    return Corpus(tuple(rows), "made", people)


SHARES = {"A": 2, "B": 15, "C": 28, "D": 43, "E": 58, "F": 86, "G": None}


def test_the_most_alike_are_the_nearest_by_intelligibility():
    corpus = known(**SHARES)
    assert speaking_rate.most_alike(corpus, "ACDEFG", "B") == ["A", "C", "D", "E"]
    assert speaking_rate.most_alike(corpus, "ABCDE", "F") == ["B", "C", "D", "E"]
    assert speaking_rate.most_alike(corpus, "AF", "D") == ["A", "F"]


def test_factors_lead_to_the_tempo_of_the_most_alike():
    corpus = known(**SHARES)
    factors = speaking_rate.matching_factors(corpus, [utt for utt in corpus if utt.speaker != "B"], "B")
    assert set(factors) == {*SHARES} - {"B"}
    assert factors["F"] == pytest.approx([2.0, 2.0, 2.0, 1.0])  # A, C and D are slow, E is not
    assert factors["A"] == pytest.approx([1.0, 1.0, 1.0, 0.5])


def test_a_level_stands_for_an_unknown_share():
    corpus = known(**SHARES)
    people = {**corpus.people, "G": Speaker("G", level="LOW")}  # at most 50 %
    assert speaking_rate.most_alike(replace(corpus, people=people), "ABCDEF", "G") == ["B", "C", "D", "E"]


def test_without_intelligibility_nothing_is_matched():
    with pytest.raises(UserError, match=r"needs the intelligibility of the held-out speaker G, .* found none"):
        speaking_rate.most_alike(known(**SHARES), "ABC", "G")
    with pytest.raises(UserError, match=r"no training speaker's intelligibility is known"):
        speaking_rate.most_alike(known(**SHARES), "G", "A")


def test_a_student_is_trained_at_the_tempo_of_the_level(with_teachers, outputs, monkeypatch):
    settings = {"outputs": str(outputs), "student": {"augment": "mask_and_matched_tempo"}}
    settings |= {"distill": {"use_teachers": False, "alpha": 0, "beta": 1}}
    fold = Fold.load("params/smoke.yaml", "M08", overrides=settings)
    drawn, draw = [], augment.draw_matched
    monkeypatch.setattr(augment, "draw_matched", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    setup = fold.student_setup(1)
    assert setup.tempo == {"M04": [1.0]}  # M04 alone has training speech
    assert (fold.student(1) / "model.safetensors").is_file()
    assert {len(factors) for factors in drawn} <= {1, 2, 3, 4}
    assert all(0.88 <= factor <= 1.12 for factors in drawn for factor in factors)
