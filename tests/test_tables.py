import json
from pathlib import Path

import pytest

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import published_speakers
from kdlib.corpus.utterances import Utterance
from kdlib.evaluate import score, tables
from kdlib.evaluate.hypotheses import Hypothesis
from kdlib.evaluate.score import About
from kdlib.show import format

CORPUS = Corpus(
    tuple(Utterance(name, name, Path("x"), 1.0, "ONE") for name in ("M08", "M10", "M04", "CM01")),
    people=published_speakers(),
)


@pytest.fixture
def folder(tmp_path):
    def rows(speaker, level, correct, total):
        return [
            Hypothesis(
                f"{speaker}{index}",
                speaker,
                level,
                "digit",
                "yes" if index % 2 else "no",
                "ONE",
                greedy="ONE" if index < correct else "TWO",
                lexicon="ONE",
            )
            for index in range(total)
        ]

    decoders = ("greedy", "lexicon")
    options = {"about": About("x", checkpoint="c"), "tokenizer": "t"}
    score.write(
        rows("M08", "HIGH", 6, 10) + rows("M10", "HIGH", 4, 10) + rows("M04", "VERY_LOW", 1, 10),
        decoders,
        tmp_path,
        **options,
    )
    (tmp_path / "controls").mkdir()
    score.write(rows("CM01", "CONTROL", 9, 10), decoders, tmp_path / "controls", **options)
    return tmp_path


def test_speakers_are_ordered_by_intelligibility_with_controls_last(folder):
    scores = tables.by_speaker(folder, CORPUS)
    assert list(dict.fromkeys(scores.speaker)) == ["M04", "M08", "M10", "CM01"]
    assert scores[scores.decoder == "greedy"].wra.tolist() == [0.1, 0.6, 0.4, 0.9]


def test_scores_by_level_are_means_over_speakers(folder):
    levels = format.by_level(tables.by_speaker(folder, CORPUS))
    assert levels.index.tolist() == ["CONTROL", "HIGH", "VERY_LOW"]
    assert levels.loc["HIGH"].tolist() == [2, 50.0, 100.0]


def test_headline_and_breakdown_are_in_per_cent(folder):
    scores = json.loads((folder / "scores.json").read_text())
    assert format.headline(scores).loc["greedy", "WRA"] == round(100 * 11 / 30, 1)
    assert format.breakdown(scores).loc["seen in training: yes", "n"] == 15
