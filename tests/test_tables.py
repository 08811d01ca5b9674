from pathlib import Path

import pytest

from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import published_speakers
from kdlib.evaluate import score, tables
from kdlib.evaluate.score import Hypothesis

PEOPLE = Corpus(
    tuple(Utterance(name, name, Path("x"), 1.0, "ONE") for name in ("M08", "M10", "M04", "CM01")),
    people=published_speakers(),
)


@pytest.fixture
def folder(tmp_path):
    def rows(speaker, level, right, total):
        return [
            Hypothesis(
                f"{speaker}{index}",
                speaker,
                level,
                "digit",
                "yes" if index % 2 else "no",
                "ONE",
                greedy="ONE" if index < right else "TWO",
                lexicon="ONE",
            )
            for index in range(total)
        ]

    decoders = ("greedy", "lexicon")
    options = {"system": "x", "held_out": "", "tokenizer": "t", "checkpoint": "c"}
    score.write(
        rows("M08", "HIGH", 6, 10) + rows("M10", "HIGH", 4, 10) + rows("M04", "VERY_LOW", 1, 10),
        decoders,
        tmp_path,
        **options,
    )
    (tmp_path / "controls").mkdir()
    score.write(rows("CM01", "CONTROL", 9, 10), decoders, tmp_path / "controls", **options)
    return tmp_path


def test_speakers_stand_from_least_to_most_intelligible_and_controls_last(folder):
    people = tables.by_speaker(folder, PEOPLE)
    assert list(dict.fromkeys(people.speaker)) == ["M04", "M08", "M10", "CM01"]
    assert people[people.decoder == "greedy"].wra.tolist() == [0.1, 0.6, 0.4, 0.9]


def test_levels_are_means_over_speakers(folder):
    levels = tables.by_level(tables.by_speaker(folder, PEOPLE))
    assert levels.index.tolist() == ["CONTROL", "HIGH", "VERY_LOW"]
    assert levels.loc["HIGH"].tolist() == [2, 50.0, 100.0]


def test_headline_and_breakdown_are_in_per_cent(folder):
    import json

    scores = json.loads((folder / "scores.json").read_text())
    assert tables.headline(scores).loc["greedy", "WRA"] == round(100 * 11 / 30, 1)
    assert tables.breakdown(scores).loc["among the training words: yes", "n"] == 15
