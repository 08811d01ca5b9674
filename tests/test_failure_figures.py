"""Figures of failures: what they show, and that nothing of it is cut off."""

import itertools
import random

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from kdlib.diagnose import causes, collapse_study, examination
from kdlib.diagnose.causes import CAUSES, NO_FAULT, SIGNS, Diagnosis, Fingerprint, Fit
from kdlib.evaluate import predictions
from kdlib.show import failure_figures
from kdlib.tokens import Tokens, train_tokenizer

WORDS = ["ONE", "TWO", "SEVEN", "NINE", "COME", "GO", "YALE", "CAN", "THE", "WATER", "OTHER", "PEOPLE"]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def whole(figure):
    """All text lies within the figure."""
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= -0.05
    assert box.x1 <= figure.get_figwidth() + 0.05
    assert box.y1 <= figure.get_figheight() + 0.05


def prints(causes, seeds=(1, 2)):
    rng = random.Random(1)
    return [
        Fingerprint(
            cause, f"decoder_kd+own_recordings+no_references+{cause}", seed, {name: rng.random() for name in SIGNS}
        )
        for cause in causes
        for seed in seeds
    ]


def test_an_examination_on_a_page(tmp_path):
    tokens = Tokens.for_teachers(train_tokenizer(WORDS, 50, tmp_path))
    ids = [tuple(tokens.encode(word)) for word in WORDS * 3]
    rows = pd.DataFrame(
        [(f"u{place}", "", word, tokens.decode(one - 1 for one in ids[place])) for place, word in enumerate(WORDS * 3)],
        columns=predictions.COLUMNS,
    ).assign(token_ids=ids)
    found = examination.examine(rows, {"a name of a tokenizer that is long/tokenizer.model": tokens})
    told = Diagnosis(("h",), "", [Fit("h", "x", 1.0, ""), Fit(NO_FAULT, "y", 9.0, "")])
    figure = failure_figures.examination(found, told)
    whole(figure)
    heights = {bar.get_height() for bar in figure.axes[0].patches}
    assert max(heights) == pytest.approx(100)
    assert "-1: as in the file" in figure.axes[0].get_xlabel()


def test_a_cure_without_special_ids_is_the_one_that_is_drawn(tmp_path):
    tokens = Tokens.for_teachers(train_tokenizer(WORDS, 50, tmp_path))
    words = WORDS * 3
    ids = [(2, *(one - 3 for one in tokens.encode(word))) for word in words]  # special before ids that are three short
    rows = [(f"u{place}", "", word, "X") for place, word in enumerate(words)]
    table = pd.DataFrame(rows, columns=predictions.COLUMNS).assign(token_ids=ids)
    found = examination.examine(table, {"own": tokens})
    assert (found.severity, found.better_decoding.specials) == ("wrong_decoding", False)
    figure = failure_figures.examination(found, Diagnosis((), "", []))
    whole(figure)
    assert "special ids left out" in figure.axes[0].get_xlabel()
    assert max(bar.get_height() for bar in figure.axes[0].patches) == pytest.approx(100 * found.better_decoding.wra)


def test_an_examination_without_ids_and_without_fingerprints():
    rows = pd.DataFrame([("u", "", word, "") for word in WORDS], columns=predictions.COLUMNS).assign(token_ids=None)
    figure = failure_figures.examination(examination.examine(rows), Diagnosis((), "", []))
    whole(figure)
    assert "no token ids" in figure.axes[0].texts[0].get_text()


def test_fingerprints_and_who_is_taken_for_whom():
    known = prints([*CAUSES])
    whole(failure_figures.fingerprints(known))
    figure = failure_figures.confusion(causes.confusion(known, prints(["ad"], (1,))))
    whole(figure)
    assert {tick.get_text() for tick in figure.axes[0].get_yticklabels()} == {*CAUSES, "ad"}


def test_the_factorial_has_a_panel_a_student_and_head():
    rows = []
    for base, (student, head) in collapse_study.BASES.items():
        rows.append({"student": student, "head": head, "system": "hard", "verdict": "control", "WRA": 0.8})
        for some in itertools.chain.from_iterable(itertools.combinations(collapse_study.FACTORS, n) for n in range(4)):
            verdict = "collapses" if "shifted_tokens" in some else "no difference shown"
            wra = 0.0 if "shifted_tokens" in some else 0.7
            rows.append(
                {
                    **{
                        "student": student,
                        "head": head,
                        "system": "+".join([base, *some]),
                        "verdict": verdict,
                        "WRA": wra,
                    },
                    "recording": "own" if "own_recordings" in some else "same",
                    "ground truth": "no" if "no_references" in some else "yes",
                    "ids": "shifted" if "shifted_tokens" in some else "aligned",
                }
            )
    table = pd.DataFrame(rows)
    table["low"], table["high"] = (table.WRA - 0.05).clip(lower=0), table.WRA + 0.05
    figure = failure_figures.factorial(table)
    whole(figure)
    assert len(figure.axes) == 4
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()][-1] == "(none)"
    found = collapse_study.effects(table)
    ids = found.loc["ids: shifted instead of aligned"]
    assert (ids["mean"] == -70).all()
    assert (found.loc["recording: own instead of same", "mean"] == 0).all()
