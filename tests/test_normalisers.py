"""What counts as the same gloss: by hand, as the corpus's own evaluation counts it."""

import pytest

from kdlib.evaluate.normalisers import EMPTY, phoenix2014, phoenix2014t
from kdlib.evaluate.score import score

RULES = [
    ("loc-ALPEN cl-KOMMEN qu-WANN poss-SEIN lh-REGEN", "ALPEN KOMMEN WANN SEIN REGEN"),
    ("S0NNE HABEN2", "SONNE HABEN"),
    ("__ON__ MORGEN __EMOTION__ __PU__ WETTER __LEFTHAND__ __OFF__", "MORGEN WETTER"),
    ("WIE AUSSEHEN", "WIE-AUSSEHEN"),
    ("ZEIGEN", "ZEIGEN-BILDSCHIRM"),
    ("ZEIGEN-BILDSCHIRM", "ZEIGEN-BILDSCHIRM"),
    ("A B", "A+B"),
    ("TIEF A B C KOMMEN", "TIEF A+B+C KOMMEN"),
    ("NORDRAUM RAUM", "NORD RAUM"),
    ("REGION-PLUSPLUS REGION", "REGION"),
    ("WIND WIND WIND SCHWACH", "WIND SCHWACH"),
    ("__EMOTION__", EMPTY),
    ("", EMPTY),
]


@pytest.mark.parametrize(("text", "expected"), RULES)
def test_the_rules_of_phoenix_2014(text, expected):
    assert phoenix2014(text) == expected
    assert phoenix2014(expected.replace(EMPTY, "")) == expected  # once is enough


def test_phoenix_2014_t_has_fewer_rules():
    assert phoenix2014t("loc-NORD HABEN2 ZEIGEN __PU__ qu-WO") == "NORD HABEN2 ZEIGEN QU-WO"


# Ten sentences, counted by hand as sclite does: substitutions, deletions, insertions of the aligned glosses.
SENTENCES = [
    ("__ON__ LIEB ZUSCHAUER ABEND __OFF__", "LIEB ZUSCHAUER ABEND", (0, 0, 0), 3),
    ("loc-NORD REGEN", "NORD SCHNEE", (1, 0, 0), 2),
    ("MORGEN SONNE", "MORGEN", (0, 1, 0), 2),
    ("WIND WIND SCHWACH", "WIND SCHWACH MAESSIG", (0, 0, 1), 2),
    ("WIE AUSSEHEN WETTER", "WIE-AUSSEHEN WETTER", (0, 0, 0), 2),
    ("A B KOMMEN", "A KOMMEN", (1, 0, 0), 2),
    ("HABEN2 S0NNE", "HABEN SONNE", (0, 0, 0), 2),
    ("__EMOTION__", "REGEN", (1, 0, 0), 1),
    ("ZEIGEN KARTE", "", (1, 1, 0), 2),
    ("TAG NACHT", "TAG ABEND NACHT MORGEN", (0, 0, 2), 2),
]


def test_ten_sentences_by_hand():
    for reference, hypothesis, (subs, dels, ins), words in SENTENCES:
        found = score([reference], [hypothesis], normaliser="phoenix2014")
        counted = found.substitutions, found.deletions, found.insertions, found.reference_words
        assert counted == (subs, dels, ins, words), reference
    total = score(*zip(*[(a, b) for a, b, *_ in SENTENCES], strict=True), normaliser="phoenix2014")
    assert total.wer == pytest.approx((4 + 2 + 3) / 20)


def test_insertions_count_and_nothing_is_capped():
    assert score(["REGEN"], ["WIND SCHNEE NEBEL SONNE"], normaliser="phoenix2014").wer == 4
