import matplotlib.pyplot as plt
import pandas as pd
import pytest
from pydantic import ValidationError

from kdlib.errors import UserError
from kdlib.evaluate import milestones
from kdlib.params import load
from kdlib.settings.milestone import Milestone
from kdlib.show import advice, live_curves

# After 20, 50 and 80 epochs of 3 steps, as seed 002 states them.
PLAN = [
    Milestone(after_epochs=20, wer=47.5),
    Milestone(after_epochs=50, wer=47.0),
    Milestone(after_epochs=80, wer=46.5),
]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def curves(*points):
    rows = [(step, "dev_wer", wer) for step, wer in points]
    rows += [(step, "dev_wra", 1 - wer) for step, wer in points]
    rows += [(step, "dev_score", 1 - wer) for step, wer in points]
    return pd.DataFrame(rows, columns=["step", "name", "value"])


def test_a_milestone_is_judged_by_the_last_validation_up_to_its_step():
    found = curves((0, 0.9), (57, 0.48), (60, 0.474), (150, 0.475), (200, 0.46))
    outcomes = [milestones.on_curve(one, found, epoch_steps=3) for one in PLAN]
    assert [outcome.step for outcome in outcomes] == [60, 150, 240]
    assert [outcome.value for outcome in outcomes[:2]] == pytest.approx([47.4, 47.5])
    assert [outcome.status for outcome in outcomes] == ["met", "missed", "not reached yet"]
    assert milestones.missed(outcomes) == [outcomes[1]]
    assert (
        outcomes[1].text
        == "after 50 epochs: WER at most 47 % is expected on dev speech, greedy, 47.5 % was reached: missed"
    )


def test_without_a_step_the_best_validation_counts():
    outcome = milestones.on_curve(Milestone(wra=60.0), curves((0, 0.9), (10, 0.3), (20, 0.5)), epoch_steps=1)
    assert outcome.value == pytest.approx(70)
    assert milestones.on_curve(Milestone(wra=60.0), curves(), epoch_steps=1).status == "not reached yet"


@pytest.mark.parametrize(
    ("milestone", "value", "status", "words"),
    [
        (Milestone(wra=(45.0, 55.0)), 0.44, "missed", "missed"),
        (Milestone(wra=(45.0, 55.0)), 0.50, "met", "met"),
        (Milestone(wra=(45.0, 55.0)), 0.60, "met", "better than expected"),
        (Milestone(wer=(46.5, 47.5)), 0.48, "missed", "missed"),
        (Milestone(wer=(46.5, 47.5)), 0.40, "met", "better than expected"),
        (Milestone(wer=47.5), 0.40, "met", "met"),
        (Milestone(wra=45.0), 0.44, "missed", "missed"),
    ],
)
def test_a_range_is_missed_on_the_worse_side_alone(milestone, value, status, words):
    scores = {"decoders": {"greedy": {milestone.measure: value}}}
    outcome = milestones.on_scores(milestone, scores)
    assert outcome.status == status
    assert outcome.text.endswith(words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs either wer or wra"),
        ({"wer": 40.0, "wra": 60.0}, "needs either wer or wra"),
        ({"wer": 40.0, "after_epochs": 3, "after_steps": 5}, "not both"),
        ({"wer": 40.0, "after_epochs": 3, "speech": "test"}, "of the finished student"),
        ({"wer": (50.0, 40.0)}, "the smaller one"),
        ({"wer": (50.0,)}, "at least 2 items"),
        ({"wer": -1.0}, "greater than or equal to 0"),
    ],
)
def test_impossible_milestones_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Milestone(**settings)


def test_a_recipe_names_the_milestone_that_is_wrong():
    with pytest.raises(UserError, match=r"milestones.0.*needs either wer or wra"):
        load("params/demo.yaml", "M08", overrides={"milestones": [{"after_steps": 3}]})
    found = load("params/demo.yaml", "M08", overrides={"milestones": [{"after_steps": 3, "wra": [45, 55]}]}).milestones
    assert (found[0].low, found[0].high, found[0].expects) == (45, 55, "WRA 45 to 55 %")


def test_curves_show_milestones_in_the_colour_of_their_status():
    found = curves((0, 0.9), (60, 0.474), (150, 0.475))
    outcomes = [milestones.on_curve(one, found, epoch_steps=3) for one in PLAN]
    figure = live_curves.training(found, outcomes)
    dev = figure.axes[1]
    assert dev.get_ylabel() == "dev WER (%)"
    marks = [line for line in dev.lines if line.get_marker() == "v"]
    assert [(float(mark.get_xdata()[0]), float(mark.get_ydata()[0])) for mark in marks] == [
        (60, 47.5),
        (150, 47),
        (240, 46.5),
    ]
    assert [mark.get_color() for mark in marks] == ["C2", "C3", "0.45"]
    assert dev.get_xlim()[1] > 240
    bars = live_curves.training(found, [milestones.on_curve(Milestone(wra=(45.0, 55.0)), found, 1)]).axes[1]
    assert bars.get_ylabel() == "dev WRA (%)"
    assert [list(line.get_ydata()) for line in bars.lines[-1:]] == [[45, 55]]


def test_advice_has_the_values_of_the_recipe():
    params = load("params/demo.yaml", "M08", variant="ctc_kd")
    found = {one.setting: (one.now, one.value) for one in advice.advise(params, *advice.NOT_IMPROVING)}
    assert found == {
        "distill.alpha": ("0.5", "0.6"),
        "distill.beta": ("0.5", "0.25"),
        "student.phases: lr": ("0.001", "0.0005"),
        "distill.temperature": ("2", "3.0"),
    }
    hard = advice.advise(params, *advice.NOT_IMPROVING, taught=False)
    assert [one.setting for one in hard] == ["student.phases: lr"]
    assert [one.value for one in advice.advise(params, *advice.STILL_RISING)] == ["900"]
    slow = {one.setting: one.value for one in advice.advise(params, *advice.SLOW_TEACHER)}
    assert slow == {
        "teacher.adapt.steps": "140",
        "teacher.adapt.patience": "6",
        "teacher.dropout": "0.067",
        "teacher.adapt.lr": "0.00067",
    }
