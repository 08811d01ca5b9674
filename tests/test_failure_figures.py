"""Figures of failures: what they show, and that no text is cut off."""

import itertools
import random

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from kdlib.diagnose import causes, collapse_study, examination
from kdlib.diagnose.causes import CAUSES, NO_FAULT, SIGNS, Diagnosis, Fingerprint, Fit
from kdlib.evaluate import predictions
from kdlib.show import failure_figures, format
from kdlib.tokens import Tokens, train_tokenizer

WORDS = ["ONE", "TWO", "SEVEN", "NINE", "COME", "GO", "YALE", "CAN", "THE", "WATER", "OTHER", "PEOPLE"]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def assert_no_text_cut_off(figure):
    """All text lies within the figure."""
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= -0.05
    assert box.x1 <= figure.get_figwidth() + 0.05
    assert box.y1 <= figure.get_figheight() + 0.05


def random_fingerprints(causes, seeds=(1, 2)):
    rng = random.Random(1)
    return [
        Fingerprint(
            cause, f"decoder_kd+own_recordings+no_references+{cause}", seed, {name: rng.random() for name in SIGNS}
        )
        for cause in causes
        for seed in seeds
    ]


def test_examination_is_drawn_on_one_page(tmp_path):
    tokens = Tokens.for_teachers(train_tokenizer(WORDS, 50, tmp_path))
    ids = [tuple(tokens.encode(word)) for word in WORDS * 3]
    texts = [tokens.decode(index - 1 for index in row) for row in ids]
    rows = [(f"u{place}", "", word, text) for place, (word, text) in enumerate(zip(WORDS * 3, texts, strict=True))]
    rows = pd.DataFrame(rows, columns=predictions.COLUMNS).assign(token_ids=ids)
    result = examination.examine(rows, {"a long name of a tokenizer file/tokenizer.model": tokens})
    diagnosis = Diagnosis(("h",), "", [Fit("h", "x", 1.0, ""), Fit(NO_FAULT, "y", 9.0, "")])
    figure = failure_figures.examination(result, diagnosis)
    assert_no_text_cut_off(figure)
    heights = {bar.get_height() for bar in figure.axes[0].patches}
    assert max(heights) == pytest.approx(100)
    assert "-1: as in the file" in figure.axes[0].get_xlabel()


def test_better_decoding_without_special_ids_is_drawn(tmp_path):
    tokens = Tokens.for_teachers(train_tokenizer(WORDS, 50, tmp_path))
    words = WORDS * 3
    ids = [(2, *(index - 3 for index in tokens.encode(word))) for word in words]  # a special id, then ids off by -3
    rows = [(f"u{place}", "", word, "X") for place, word in enumerate(words)]
    table = pd.DataFrame(rows, columns=predictions.COLUMNS).assign(token_ids=ids)
    result = examination.examine(table, {"own": tokens})
    assert (result.severity, result.better_decoding.specials) == ("shifted_ids", False)
    figure = failure_figures.examination(result, Diagnosis((), "", []))
    assert_no_text_cut_off(figure)
    assert "without special ids" in figure.axes[0].get_xlabel()
    assert max(bar.get_height() for bar in figure.axes[0].patches) == pytest.approx(100 * result.better_decoding.wra)


def test_examination_without_ids_or_fingerprints_is_drawn():
    rows = pd.DataFrame([("u", "", word, "") for word in WORDS], columns=predictions.COLUMNS).assign(token_ids=None)
    figure = failure_figures.examination(examination.examine(rows), Diagnosis((), "", []))
    assert_no_text_cut_off(figure)
    assert "no token ids" in figure.axes[0].texts[0].get_text()


def test_without_a_named_cause_no_cause_is_drawn_as_fitting():
    rows = pd.DataFrame([("u", "M08", word, word) for word in WORDS], columns=predictions.COLUMNS).assign(
        token_ids=None
    )
    fits = [Fit(NO_FAULT, "hard", 0.05, ""), Fit("b", "no_references", 0.06, ""), Fit("h", "x", 0.9, "")]
    figure = failure_figures.examination(examination.examine(rows), Diagnosis((), "No fault detected", fits))
    axes = figure.axes[3]
    assert not axes.get_lines()
    assert axes.get_xlabel() == "distance (no cause fits)"
    assert len({bar.get_facecolor() for bar in axes.patches}) == 1
    named = failure_figures.examination(examination.examine(rows), Diagnosis(("b",), "Cause (b)", fits)).axes[3]
    assert len(named.get_lines()) == 1
    assert len({bar.get_facecolor() for bar in named.patches}) == 2


def test_fingerprints_and_confusion_of_causes_are_drawn():
    known = random_fingerprints([*CAUSES])
    assert_no_text_cut_off(failure_figures.fingerprints(causes.frame(known)))
    figure = failure_figures.confusion(causes.confusion(known, random_fingerprints(["ad"], (1,))))
    assert_no_text_cut_off(figure)
    assert {tick.get_text() for tick in figure.axes[0].get_yticklabels()} == {*CAUSES, "ad"}


def test_factorial_has_one_panel_per_student_and_head():
    rows = []
    for base, (student, head) in collapse_study.BASES.items():
        rows.append({"student": student, "head": head, "system": "hard", "verdict": "control", "WRA": 0.8})
        crossed = [itertools.combinations(collapse_study.FACTORS, count) for count in range(4)]
        for factors in itertools.chain.from_iterable(crossed):
            verdict = "collapses" if "shifted_tokens" in factors else "no difference shown"
            wra = 0.0 if "shifted_tokens" in factors else 0.7
            rows.append(
                {
                    "student": student,
                    "head": head,
                    "system": "+".join([base, *factors]),
                    "verdict": verdict,
                    "WRA": wra,
                    "recording": "own" if "own_recordings" in factors else "same",
                    "ground truth": "no" if "no_references" in factors else "yes",
                    "ids": "shifted" if "shifted_tokens" in factors else "aligned",
                }
            )
    table = pd.DataFrame(rows)
    table["low"], table["high"] = (table.WRA - 0.05).clip(lower=0), table.WRA + 0.05
    figure = failure_figures.factorial(table)
    assert_no_text_cut_off(figure)
    assert len(figure.axes) == 4
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()][-1] == "(none)"
    effects = format.effects(collapse_study.effects(table))  # in points
    ids = effects.loc["ids: shifted instead of aligned"]
    assert (ids["mean"] == -70).all()
    assert (effects.loc["recording: own instead of same", "mean"] == 0).all()
