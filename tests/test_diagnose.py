"""Causes by fingerprints: named where they fit and are clearly nearer than what is sound, and not otherwise."""

import random

import pandas as pd
import pytest

from kdlib.evaluate import answers, collapse, diagnose
from kdlib.evaluate.diagnose import CAUSES, SIGNS, SOUND, Fingerprint

WORDS = "ONE TWO SEVEN NINE COME GO YALE CAN THE WATER OTHER PEOPLE ALPHA BRAVO SIERRA COMMAND DELETE ENTER"
WORDS = WORDS.split(" ")
MIDDLES = {
    SOUND: {"wra": 0.7, "empty": 0.0, "misread": 0.0, "hears": 0.8, "distinct": 0.9},
    "h": {"wra": 0.0, "empty": 0.0, "misread": 1.0, "hears": 0.8, "distinct": 0.9},
    "f": {"wra": 0.0, "empty": 0.9, "misread": 0.0, "hears": 0.1, "distinct": 0.1},
    "i": {"wra": 0.0, "empty": 0.0, "misread": 0.0, "hears": 0.0, "distinct": 1.0},
    "b": {"wra": 0.68, "empty": 0.0, "misread": 0.0, "hears": 0.79, "distinct": 0.9},  # as good as sound
}


def near(cause, seed, rng, spread=0.03):
    made = {name: value + rng.uniform(-spread, spread) for name, value in MIDDLES[cause].items()}
    return Fingerprint(cause, f"case_{cause}", seed, made, (f"check of {cause}",))


@pytest.fixture
def known():
    rng = random.Random(1)
    return [near(cause, seed, rng) for cause in MIDDLES for seed in (1, 2, 3)]


def test_a_cause_that_fits_is_named_with_its_evidence_and_its_check(known):
    rng = random.Random(2)
    for cause in "hfi":
        found = diagnose.diagnose(near(cause, 9, rng).signs, known)
        assert found.named == (cause,)
        assert found.fits[0].distance < 0.1
        assert f"The preflight would have said so: check of {cause}." in found.text
    assert "token ids decoded as they are" in diagnose.diagnose(near("h", 9, rng).signs, known).text


def test_what_is_sound_or_unlike_anything_known_is_given_no_cause(known):
    rng = random.Random(3)
    assert diagnose.diagnose(near(SOUND, 9, rng).signs, known).named == ()
    weak = MIDDLES[SOUND] | {"wra": 0.6, "hears": 0.7}
    assert diagnose.diagnose(weak, known).named == ()
    strange = {"wra": 0.5, "empty": 0.5, "misread": 0.0, "hears": 0.9, "distinct": 0.1}
    found = diagnose.diagnose(strange, known)
    assert found.named == ()
    assert "Cannot tell" in found.text
    assert diagnose.diagnose({}, known).named == ()  # nothing is known of it


def test_what_the_second_decoding_shows_needs_no_likeness(known):
    unlike = {"wra": 0.0, "empty": 0.6, "misread": 1.0, "hears": 0.3, "distinct": 0.1}
    found = diagnose.diagnose(unlike, known)
    assert found.fits[0].distance > diagnose.FITS
    assert found.named == ("h",)
    assert "shows it by itself" in found.text
    assert diagnose.diagnose(unlike | {"misread": 0.5}, known).named == ()  # less than ten points


def test_one_answer_for_all_tells_no_cause_unless_there_are_frames(known):
    silent = MIDDLES["f"] | {"commonest": 1.0, "empty": 1.0}
    found = diagnose.diagnose(silent, known)
    assert found.named == ()
    assert "all answers are the same" in found.text
    assert diagnose.diagnose(silent | {"blank": 1.0}, known).named == ("f",)
    assert diagnose.diagnose(silent | {"misread": 1.0}, known).named == ("h",)  # which ids show, whatever the texts
    right = MIDDLES[SOUND] | {"commonest": 1.0, "wra": 1.0}  # one word alone, and always recognised
    assert "Cannot tell" not in diagnose.diagnose(right, known).text


def test_a_cause_that_does_no_harm_is_not_told_from_what_is_sound(known):
    assert diagnose.diagnose(near("b", 9, random.Random(4)).signs, known).named == ()


def test_the_confusion_counts_every_case_once_told_by_other_seeds(known):
    mixed = [Fingerprint("fh", "both", 1, MIDDLES["f"] | {"misread": 1.0})]
    table = diagnose.confusion(known, mixed)
    assert table.sum(axis=1).to_dict() == pytest.approx({SOUND: 3, "h": 3, "f": 3, "i": 3, "b": 3, "fh": 1})
    assert table.loc["h", "h"] == 3
    assert table.loc[SOUND, "-"] == 3


def test_every_cause_and_sign_is_said_in_words():
    assert {one.cause for one in diagnose.recorded()} <= set(CAUSES)
    assert all(set(one.signs) <= set(SIGNS) for one in diagnose.recorded())


def test_training_says_what_answers_alone_do_not():
    rows = pd.DataFrame([("u", "M08", word, word) for word in WORDS], columns=answers.COLUMNS).assign(token_ids=None)
    curves = pd.DataFrame(
        [
            (step, name, value)
            for step, wra, score in ((1, 0.2, -3), (2, 0.8, -2), (3, 0.5, -1))
            for name, value in (("dev_wra", wra), ("dev_score", score))
        ],
        columns=["step", "name", "value"],
    )
    found = diagnose.signs(collapse.examine(rows), curves, dev_wra=0.1)
    assert found["lost"] == pytest.approx(0.4)  # kept is the look with the best score, 0.5
    assert found["passed_over"] == pytest.approx(0.3)
    assert "lost" not in diagnose.signs(collapse.examine(rows), curves)  # without dev scores
    assert "misread" not in found  # without ids
    assert "lost" not in diagnose.signs(collapse.examine(rows))
