import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from kdlib.corpus.manifest import Corpus, Speaker
from kdlib.corpus.speakers import Splits, dev_speaker, published_speakers, speaker_info
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.pipeline import Fold

SPEAKERS = sorted(name for name, speaker in published_speakers().items() if not speaker.control)


def all_speakers(names=("CM01", *SPEAKERS)):
    """A corpus with a common word in every block of a speaker, and another word in each block."""
    return Corpus(
        tuple(
            Utterance(f"{name}_{block}_{word}", name, Path("x.wav"), 1.0, word, block)
            for name in names
            for block in ("B1", "B2", "B3")
            for word in ("ONE", f"ONLY{block}")
        ),
        "test",
        published_speakers(),
    )


def settings(held_out="M08", **fold):
    return Fold.load("params/demo.yaml", held_out, fold={"dev": "M10", "exclude": ["M01"]} | fold).split_settings


def splits_of(held_out="M08", corpus=None, **fold):
    return Splits(corpus or all_speakers(), settings(held_out, **fold))


def test_the_table_holds_15_speakers_and_13_controls():
    assert len(SPEAKERS) == 15
    assert len(published_speakers()) == 28


def test_no_speaker_is_in_two_splits():
    splits = splits_of()
    train, dev, test = ({utt.speaker for utt in part} for part in (splits.train, splits.dev, splits.test))
    assert test == {"M08"}
    assert dev == {"M10"}
    assert train == set(SPEAKERS) - {"M08", "M10", "M01"}
    assert {utt.speaker for utt in splits.controls} == {"CM01"}


def test_blocks_of_training_and_test():
    splits = splits_of()
    assert {utt.block for utt in splits.train} == {"B1", "B3"}
    assert {utt.block for utt in splits.test} == {"B2"}
    assert sorted((utt.text, splits.seen(utt)) for utt in splits.test) == [("ONE", True), ("ONLYB2", False)]


def test_an_excluded_speaker_still_has_a_teacher_and_may_be_held_out():
    assert "M01" in splits_of().teachers()
    assert {utt.speaker for utt in splits_of("M01", exclude=["M01"]).test} == {"M01"}


def test_teachers_of_all_others_leave_out_held_out_and_dev():
    assert splits_of().teachers() == [name for name in SPEAKERS if name not in ("M08", "M10")]


def test_without_a_dev_speaker_the_seeds_fourteen_teachers():
    assert len(splits_of(dev=None).teachers()) == 14


@pytest.mark.parametrize(
    ("labels", "expected"), [("seed", ["F03", "M04", "M07", "M12", "M14", "F02"]), ("published", ["F05", "M09", "M14"])]
)
def test_same_level_by_either_labels(labels, expected):
    assert sorted(splits_of(teachers="same_level", levels=labels).teachers()) == sorted(expected)


def test_an_empty_same_level_falls_back_to_all_with_a_warning():
    splits = splits_of("M01", teachers="same_level", levels="seed", dev="M12")
    message = "no other speaker is VERY_LOW by the seed labels: the teachers of M01 are all 13 others"
    with pytest.warns(UserWarning, match=message):
        assert len(splits.teachers()) == 13


def test_speakers_of_the_same_level_are_none_where_it_is_not_known():
    splits = splits_of("M01", levels="seed", dev="M12")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody asked for them
        assert splits.same_level == []
        assert len(splits.teachers()) == 13
    assert sorted(splits_of(levels="published").same_level) == ["F05", "M09", "M14"]


def test_levels_of_both_labels():
    corpus = all_speakers()
    assert (corpus.level("M04"), corpus.level("M04", "seed"), corpus.level("NOBODY")) == ("VERY_LOW", "HIGH", "")


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
        splits_of(corpus=all_speakers(names))


def test_blocks_that_the_corpus_does_not_have_are_named():
    fold = Fold.load("params/demo.yaml", "M08", overrides={"blocks": {"test": ["B7"]}})
    with pytest.raises(UserError, match=r"there is no block 'B7' in this corpus; it has B1, B2, B3"):
        Splits(all_speakers(), fold.split_settings)


def test_the_same_name_is_another_person_in_another_corpus():
    ua, torgo = (Fold.load(f"params/{name}.yaml", "M05").corpus_settings for name in ("uaspeech", "torgo"))
    assert speaker_info(ua, ["M05"])["M05"].level == "MID"
    assert speaker_info(torgo, ["M05"])["M05"].level == "LOW"
    own = Fold.load("params/own.yaml", "M05", fold={"exclude": []}).corpus_settings
    assert speaker_info(own, ["M05", "CM01"])["M05"].level == ""
    assert not speaker_info(own, ["M05", "CM01"])["CM01"].control


def test_a_recipe_may_have_metadata_of_its_speakers():
    metadata = {"ANNA": {"level": "LOW", "sex": "F"}, "CARL": {"level": "CONTROL"}}
    fold = Fold.load("params/own.yaml", "ANNA", fold={"exclude": []}, overrides={"speakers": metadata, "folds": "none"})
    info = speaker_info(fold.corpus_settings, ["ANNA", "BEN", "CARL"])
    assert (info["ANNA"].level, info["ANNA"].sex, info["BEN"].level, info["CARL"].control) == ("LOW", "F", "", True)
    published = Fold.load("params/own.yaml", "M08", fold={"dev": "M10"}, overrides={"speakers": "uaspeech"})
    assert speaker_info(published.corpus_settings, ["M08"]) == {"M08": published_speakers()["M08"]}
    assert published.params.fold_set == "uaspeech"


def test_without_metadata_every_speaker_is_the_dev_speaker_of_a_fold():
    names = ["A", "B", "C", "D"]
    assert [dev_speaker(name, names, {})[0] for name in names] == ["B", "C", "D", "A"]


@pytest.mark.parametrize("role", ["train", "teachers"])
def test_a_speaker_of_the_fold_who_is_not_in_the_corpus_is_named(role):
    corpus = all_speakers(["M08", "M10", "M09"])
    with pytest.raises(UserError, match=f"fold.{role} names 'M05', who has no utterances"):
        splits_of(corpus=corpus, **{role: ["M09", "M05"]})


def test_another_microphones_recordings_are_trained_on_and_never_tested_on():
    corpus = all_speakers(["M08", "M10", "M09"])
    copies = tuple(utt.replace(utt_id=f"{utt.utt_id}_M3", copy_of=utt.utt_id) for utt in corpus)
    before, after = (
        splits_of(corpus=data) for data in (corpus, replace(corpus, utterances=corpus.utterances + copies))
    )
    assert (len(after.train), len(after.dev), len(after.test)) == (
        2 * len(before.train),
        len(before.dev),
        len(before.test),
    )


def test_per_cents_precede_levels_and_unknown_speakers_are_last():
    info = {
        "A": Speaker("A", intelligibility_pct=50),
        "B": Speaker("B", intelligibility_pct=44),
        "C": Speaker("C"),
        "D": Speaker("D", level="MID"),
    }
    assert dev_speaker("A", "BCD", info) == ("B", dev_speaker("M08", ["M10"], published_speakers())[1])
    assert dev_speaker("A", "CD", info)[1] == "the next by name, since nothing else is known of the speakers"
    assert dev_speaker("D", "ABC", info)[0] == "A"
