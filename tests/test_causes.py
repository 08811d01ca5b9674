"""Causes by fingerprints: named only if they fit, and clearly better than students without a fault."""

import random

import pandas as pd
import pytest

from kdlib.diagnose import causes, examination, sound
from kdlib.diagnose.causes import CAUSES, NO_FAULT, SIGNS, Fingerprint
from kdlib.evaluate import predictions
from kdlib.tokens import Tokens, train_tokenizer

WORDS = "ONE TWO SEVEN NINE COME GO YALE CAN THE WATER OTHER PEOPLE ALPHA BRAVO SIERRA COMMAND DELETE ENTER"
WORDS = WORDS.split(" ")
MIDDLES = {
    NO_FAULT: {"wra": 0.7, "empty": 0.0, "wrong_decoding": 0.0, "information": 0.8, "distinct": 0.9},
    "h": {"wra": 0.0, "empty": 0.0, "wrong_decoding": 1.0, "information": 0.8, "distinct": 0.9},
    "f": {"wra": 0.0, "empty": 0.9, "wrong_decoding": 0.0, "information": 0.1, "distinct": 0.1},
    "i": {"wra": 0.0, "empty": 0.0, "wrong_decoding": 0.0, "information": 0.0, "distinct": 1.0},
    "b": {"wra": 0.68, "empty": 0.0, "wrong_decoding": 0.0, "information": 0.79, "distinct": 0.9},  # as good as healthy
}


OTHERS = {  # letters right, and tokens that occur in no reference
    NO_FAULT: (0.8, 0.02),
    "h": (0.0, 0.02),
    "f": (0.0, 0.0),
    "i": (0.0, 0.6),
    "b": (0.8, 0.02),
}
for cause, values in OTHERS.items():
    MIDDLES[cause] |= dict(zip(("letter_similarity", "tokens_unknown"), values, strict=True))


def near(cause, seed, rng, spread=0.03):
    signs = {name: value + rng.uniform(-spread, spread) for name, value in MIDDLES[cause].items()}
    return Fingerprint(cause, f"case_{cause}", seed, signs, (f"check of {cause}",))


@pytest.fixture
def known():
    rng = random.Random(1)
    return [near(cause, seed, rng) for cause in MIDDLES for seed in (1, 2, 3)]


def test_a_cause_that_fits_is_named_with_its_evidence_and_its_check(known):
    rng = random.Random(2)
    for cause in "hfi":
        found = causes.diagnose(near(cause, 9, rng).signs, known)
        assert found.named == (cause,)
        assert found.fits[0].distance < 0.1
        assert f"Preflight checks that detect it: check of {cause}." in found.text
    assert (
        "the token ids, decoded as they are, recognise more than the texts"
        in causes.diagnose(near("h", 9, rng).signs, known).text
    )


def test_no_cause_is_named_for_healthy_or_unknown_results(known):
    rng = random.Random(3)
    assert causes.diagnose(near(NO_FAULT, 9, rng).signs, known).named == ()
    weak = MIDDLES[NO_FAULT] | {"wra": 0.6, "information": 0.7}
    assert causes.diagnose(weak, known).named == ()
    unknown = {"wra": 0.45, "empty": 0.5, "wrong_decoding": 0.0, "information": 0.9, "distinct": 0.1}
    found = causes.diagnose(unknown, known)
    assert found.named == ()
    assert "Cause unknown" in found.text
    assert causes.diagnose({}, known).named == ()  # without any sign


def test_the_table_lists_as_fitting_what_the_text_names_and_nothing_else():
    """Of every shipped student, 24 of them without a fault: a table has no cause that fits where the text has none."""
    shipped = causes.known_fingerprints()
    near, unnamed = 0, 0
    for student in shipped:
        found = causes.diagnose(student.signs, causes.of_other_seeds(shipped, student.seed))
        if not found.fits:  # a constant output
            continue
        table = causes.table(found, count=len(CAUSES))
        fitting = table.index[table.fits == "yes"].drop(NO_FAULT, errors="ignore")
        assert set(fitting) == set(found.named)
        unnamed += not found.named
        if found.text.startswith("No fault detected"):
            assert table.fits[NO_FAULT] == "yes"
            near += (table.fits == "no: no fault is as near").any()
    assert unnamed > 24
    assert near > 5  # within the distance that would fit


def test_a_wrong_decoding_shown_by_the_second_decoding_is_named_at_any_distance(known):
    distant = {"wra": 0.0, "empty": 0.6, "wrong_decoding": 1.0, "information": 0.3, "distinct": 0.1}
    found = causes.diagnose(distant, known)
    assert found.fits[0].distance > causes.FITS
    assert found.named == ("h",)
    assert "alone shows it" in found.text
    shifted = causes.diagnose(distant | {"wrong_decoding": 0.0, "offset_decoding": 1.0}, known)
    assert shifted.named == ("d",)  # no fingerprint has it here


def test_verdict_and_cause_never_contradict_each_other(tmp_path):
    """Over all severities: a fault of decoding has that cause and no other, a sound result has none."""
    tokens = Tokens.for_teachers(train_tokenizer(WORDS, 50, tmp_path))
    rng = random.Random(5)
    said = WORDS * 8
    ids = [tokens.encode(word) for word in said]
    weak = [row if rng.random() < 0.2 else tokens.encode(rng.choice(WORDS)) for row in ids]
    others = [tokens.encode(rng.choice(WORDS)) for _ in said]
    kinds = {
        "healthy": (ids, 0),
        "wrong_decoding": (ids, -1),
        "wrong_decoding, weak": (weak, -1),
        "shifted_ids": ([[index + 1 for index in row] for row in ids], 0),
        "constant": ([tokens.encode("COME")] * len(said), 0),
        "empty": ([[]] * len(said), 0),
        "input_independent": (others, 0),
    }
    allowed = {"healthy": {()}, "wrong_decoding": {("h",)}, "shifted_ids": {("d",)}}
    for name, (rows, offset) in kinds.items():
        texts = [tokens.decode(index + offset for index in row) for row in rows]
        table = pd.DataFrame({"utt_id": [f"u{place}" for place in range(len(said))], "speaker": "", "reference": said})
        table = table.assign(hypothesis=texts, token_ids=[tuple(row) for row in rows])
        found = examination.examine(table, {"own": tokens})
        named = causes.diagnose(causes.signs(found)).named
        assert found.severity == name.split(",")[0]
        assert named in allowed.get(found.severity, {named}), name
        assert found.severity in ("wrong_decoding", "shifted_ids") or not {"h"} & set(named), name


def test_what_the_record_of_a_training_shows_is_no_sound_result():
    weak = sound.rows().iloc[10].dropna().to_dict()
    shipped = causes.known_fingerprints()
    case = next(one for one in shipped if one.cause == "g")
    assert causes.diagnose(case.signs | {"wra": 0.55}).named == ("g",)  # few words, and many of them recognised
    for sign in ("better_checkpoint", "lost_after_training"):
        assert sound.expected(weak | {sign: 0.6}).distance > sound.expected(weak | {sign: 0.0}).distance + 0.05


def test_a_small_gain_of_another_decoding_is_no_verdict(tmp_path):
    tokens = Tokens.for_teachers(train_tokenizer(WORDS, 50, tmp_path))
    said = WORDS * 100
    ids = [tuple(tokens.encode(word)) for word in said]
    texts = [word + "S" if place < 12 else word for place, word in enumerate(said)]
    table = pd.DataFrame({"utt_id": [f"u{place}" for place in range(len(said))], "speaker": "", "reference": said})
    found = examination.examine(table.assign(hypothesis=texts, token_ids=ids), {"own": tokens})
    assert found.severity == "healthy"


def test_weak_results_without_a_fault_are_compared_with_others_as_weak():
    known = sound.rows()
    assert len(known) > 80
    weak = known[(known.wra > 0.05) & (known.wra < 0.4)]
    for _, signs in weak.iterrows():
        assert causes.diagnose(signs.dropna().to_dict()).named == ()
    first = weak.iloc[0].to_dict()
    assert sound.expected(first).distance < sound.expected(first | {"letter_similarity": -0.1, "length": 1.0}).distance


def test_a_constant_output_has_no_known_cause_without_frames(known):
    empty = MIDDLES["f"] | {"most_frequent": 1.0, "empty": 1.0}
    found = causes.diagnose(empty, known)
    assert found.named == ()
    assert "all hypotheses are the same" in found.text
    assert causes.diagnose(empty | {"blank_frames": 1.0}, known).named == ("f",)
    assert causes.diagnose(empty | {"wrong_decoding": 1.0}, known).named == ("h",)  # shown by ids, whatever the texts
    right = MIDDLES[NO_FAULT] | {"most_frequent": 1.0, "wra": 1.0}  # one word alone, and always recognised
    assert "Cause unknown" not in causes.diagnose(right, known).text


def test_a_harmless_cause_is_not_named(known):
    assert causes.diagnose(near("b", 9, random.Random(4)).signs, known).named == ()


def test_the_confusion_counts_every_case_once_by_the_fingerprints_of_other_seeds(known):
    mixed = [Fingerprint("fh", "both", 1, MIDDLES["f"] | {"wrong_decoding": 1.0})]
    table = causes.confusion(known, mixed)
    assert table.sum(axis=1).to_dict() == pytest.approx({NO_FAULT: 3, "h": 3, "f": 3, "i": 3, "b": 3, "fh": 1})
    assert table.loc["h", "h"] == 3
    assert table.loc[NO_FAULT, "-"] == 3


def test_every_cause_and_sign_has_a_description():
    assert {fingerprint.cause for fingerprint in causes.known_fingerprints()} <= set(CAUSES)
    assert all(set(fingerprint.signs) <= set(SIGNS) for fingerprint in causes.known_fingerprints())


def test_training_curves_add_signs_of_their_own():
    rows = pd.DataFrame([("u", "M08", word, word) for word in WORDS], columns=predictions.COLUMNS)
    rows = rows.assign(token_ids=None)
    curves = pd.DataFrame(
        [
            (step, name, value)
            for step, wra, score in ((1, 0.2, -3), (2, 0.8, -2), (3, 0.5, -1))
            for name, value in (("dev_wra", wra), ("dev_score", score))
        ],
        columns=["step", "name", "value"],
    )
    found = causes.signs(examination.examine(rows), curves, dev_wra=0.1)
    assert found["lost_after_training"] == pytest.approx(0.4)  # of the selected checkpoint, with the best score, 0.5
    assert found["better_checkpoint"] == pytest.approx(0.3)
    assert "lost_after_training" not in causes.signs(examination.examine(rows), curves)  # without dev scores
    assert "wrong_decoding" not in found  # without ids
    assert "lost_after_training" not in causes.signs(examination.examine(rows))
