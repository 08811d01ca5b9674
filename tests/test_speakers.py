from pathlib import Path

import pytest

from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import is_control, level, split, table, teachers
from kdlib.errors import UserError
from kdlib.params import load

SPEAKERS = [name for name in table() if not is_control(name)]


def everybody(names=("CM01", *SPEAKERS)):
    """Each speaker says a common word in every block and another word in each block."""
    return Corpus(
        tuple(
            Utterance(f"{name}_{block}_{word}", name, Path("x.wav"), 1.0, word, block)
            for name in names
            for block in ("B1", "B2", "B3")
            for word in ("ONE", f"ONLY{block}")
        ),
        "test",
    )


def fold(held_out="M08", **settings):
    return load("params/demo.yaml", held_out, fold={"dev": "M10"} | settings)


def test_the_table_holds_15_speakers_and_13_controls():
    assert len(SPEAKERS) == 15
    assert len(table()) == 28


def test_nobody_is_on_two_sides():
    splits = split(everybody(), fold())
    trained, dev, test = ({utt.speaker for utt in part} for part in (splits.train, splits.dev, splits.test))
    assert test == {"M08"}
    assert dev == {"M10"}
    assert trained == set(SPEAKERS) - {"M08", "M10", "M01"}
    assert {utt.speaker for utt in splits.controls} == {"CM01"}


def test_blocks_of_training_and_test():
    splits = split(everybody(), fold())
    assert {utt.block for utt in splits.train} == {"B1", "B3"}
    assert {utt.block for utt in splits.test} == {"B2"}
    assert sorted((utt.text, splits.seen(utt)) for utt in splits.test) == [("ONE", True), ("ONLYB2", False)]


def test_an_excluded_speaker_still_teaches_and_may_be_held_out():
    assert "M01" in teachers(fold(), SPEAKERS)
    params = fold("M01", exclude=["M01"])
    assert {utt.speaker for utt in split(everybody(), params).test} == {"M01"}


def test_teachers_of_all_others_leave_out_held_out_and_dev():
    assert teachers(fold(), SPEAKERS) == [name for name in SPEAKERS if name not in ("M08", "M10")]


def test_without_a_dev_speaker_the_seeds_fourteen_teachers():
    assert len(teachers(fold(dev=None), SPEAKERS)) == 14


@pytest.mark.parametrize(
    ("labels", "expected"), [("seed", ["F03", "M04", "M07", "M12", "M14", "F02"]), ("published", ["F05", "M09", "M14"])]
)
def test_same_level_by_either_labels(labels, expected):
    assert sorted(teachers(fold(teachers="same_level", levels=labels), SPEAKERS)) == sorted(expected)


def test_same_level_with_nobody_in_it_falls_back_with_a_warning():
    params = fold("M01", teachers="same_level", levels="seed", dev="M12")
    with pytest.warns(UserWarning, match="no other speaker is VERY_LOW by the seed labels: all 13 others teach M01"):
        assert len(teachers(params, SPEAKERS)) == 13


def test_levels_of_both_labels():
    assert (level("M04"), level("M04", "seed"), level("NOBODY")) == ("VERY_LOW", "HIGH", "")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("M10", "M09"), "the held-out speaker 'M08' has no utterances"),
        (("M08", "M09"), "the dev speaker 'M10' has no utterances"),
        (("M08", "M10"), "no training speaker is left"),
    ],
)
def test_missing_speakers_are_named(names, message):
    with pytest.raises(UserError, match=message):
        split(everybody(names), fold())


def test_blocks_that_the_corpus_does_not_have_are_named():
    params = load("params/demo.yaml", "M08", overrides={"blocks": {"test": ["B7"]}})
    with pytest.raises(UserError, match=r"there is no block 'B7' in this corpus; it has B1, B2, B3"):
        split(everybody(), params)
