"""What calibration changed: tables and the figure, from the saved scores of a system."""

import matplotlib.pyplot as plt
import pytest

from kdlib.evaluate import score
from kdlib.evaluate.hypotheses import Hypothesis
from kdlib.evaluate.score import About
from kdlib.show import calibration

FITTED = {"form": "per_word", "utterances": 1200, "speakers": 12, "strength": 0.75, "temperature": 5.04}


def save(folder, plain, calibrated, confidence, level="LOW", settings=None):
    """The scores of a system that was asked for ONE and TEN alternately."""
    rows = [
        Hypothesis(
            f"u{place}", "M08", level, "", "", ("ONE", "TEN")[place % 2], "ONE", word, value, lexicon_plain=before
        )
        for place, (before, word, value) in enumerate(zip(plain, calibrated, confidence, strict=True))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"lexicon": FITTED | {"chosen_on": "M10"}} if settings is None else settings
    score.write(rows, ("greedy", "lexicon", "lexicon_plain"), folder, About("pretrained", "M08", settings=settings))


@pytest.fixture
def system(tmp_path):
    folder = tmp_path / "baseline"
    words = ["ONE", "TEN"] * 20
    save(folder, ["I"] * 20 + words[20:], words, [0.9] * 40)
    save(folder / "dev", words, ["ONE"] * 40, [0.5] * 40, level="MID")
    return folder


def test_plain_and_calibrated_scores_stand_side_by_side(system):
    table = calibration.side_by_side({"pretrained": system})
    assert table.loc[("pretrained", "held out")].tolist() == [40, 50.0, 100.0, "+50.0"]
    assert table.loc[("pretrained", "dev")].tolist() == [40, 100.0, 50.0, "-50.0"]


def test_a_sentence_says_how_a_system_was_calibrated(system, tmp_path):
    assert calibration.how_calibrated(system) == (
        "Calibrated (per_word) on 1,200 utterances of 12 training speakers; strength 0.75 and temperature 5, chosen on "
        "M10."
    )
    save(tmp_path / "plain", ["ONE"], ["ONE"], [0.5], settings={})
    assert "not calibrated" in calibration.how_calibrated(tmp_path / "plain")


def test_the_words_that_were_over_and_under_recognised(system):
    table = calibration.answers(system)
    assert list(table.index[:3]) == ["I", "ONE", "TEN"]
    assert table.loc["I"].tolist() == [0, 20, 0]
    assert table.loc["ONE"].tolist() == [20, 10, 20]


def test_confidences_by_level(system):
    table = calibration.confidence_table({"pretrained": system})
    assert table.loc[("pretrained", "held out", "LOW"), "mean confidence"] == 90.0
    assert table.loc[("pretrained", "held out", "all"), "right"] == 100.0
    assert table.loc[("pretrained", "held out", "all"), "ECE"] == pytest.approx(10.0)
    assert table.loc[("pretrained", "dev", "MID"), "ECE"] == pytest.approx(0.0)


def test_what_a_confidence_means_on_dev_speech(system, tmp_path):
    assert calibration.meaning_of(0.9, system) == "of the 30 dev words nearest to a confidence of 0.9, 15 are right"
    save(tmp_path / "alone", ["ONE"], ["ONE"], [0.5])
    assert calibration.meaning_of(0.9, tmp_path / "alone") == ""


def test_the_figure_has_a_panel_per_kind_of_speech_and_a_line_per_system(system):
    figure = calibration.reliability_figure({"pretrained": system, "hard": system})
    assert [axes.get_title() for axes in figure.axes] == ["held out speech", "dev speech"]
    assert all(len(axes.containers) == 2 for axes in figure.axes)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["pretrained (ECE 10.0 %)", "hard (ECE 10.0 %)"]
    plt.close(figure)
