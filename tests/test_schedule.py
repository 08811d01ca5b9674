"""Values that change during a training: linearly, or by epoch."""

import pytest

from kdlib.errors import UserError
from kdlib.params import Params, load
from kdlib.settings.distill import Distill
from kdlib.settings.schedule import Progress, Schedule, constant

BY_EPOCH = [[1, 4.0], [31, 3.5], [71, 3.0]]


def temperature(value):
    return load("params/demo.yaml", "M08", overrides={"distill": {"temperature": value}}).distill.temperature


@pytest.mark.parametrize("value", [2.0, 2])
def test_a_number_never_changes(value):
    schedule = temperature(value)
    assert schedule == constant(2.0)
    assert {schedule.at(Progress(done, epoch)) for done in (0.0, 0.3, 1.0) for epoch in (0.0, 99.0)} == {2.0}


def test_from_and_to_are_joined_by_a_line_over_the_steps():
    schedule = temperature({"from": 4, "to": 2.0})
    shares = (-0.1, 0.0, 0.25, 0.5, 1.0, 1.1)
    assert [schedule.at(Progress(done, 7.0)) for done in shares] == [4.0, 4.0, 3.5, 3.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("passed", "expected"),
    [(0.0, 4.0), (29.0, 4.0), (29.99, 4.0), (30.0, 3.5), (69.99, 3.5), (70.0, 3.0), (1000.0, 3.0)],
)
def test_by_epoch_a_value_applies_from_the_start_of_its_epoch(passed, expected):
    """In epoch 30, the first value still does: 30 epochs have passed when epoch 31 begins."""
    schedule = temperature(BY_EPOCH)
    assert [schedule.at(Progress(done, passed)) for done in (0.0, 1.0)] == [expected, expected]


def test_a_weight_counts_if_it_is_ever_other_than_0():
    assert [bool(Schedule(values)) for values in ((0.0,), (0.5,), (0.0, 0.1), (0.1, 0.0))] == [False, True, True, True]
    assert Schedule((0.0, 0.1), (1, 5))
    assert not Schedule((0.0, 0.0), (1, 5))


def test_a_schedule_is_shown_in_words():
    shown = [str(temperature(value)) for value in (4, {"from": 4, "to": 2.5}, BY_EPOCH)]
    assert shown == ["4", "4 to 2.5", "4 from epoch 1, 3.5 from epoch 31, 3 from epoch 71"]


FORM = "input should be a number, {from: 4, to: 2}, or [[1, 4.0], [31, 3.5]]: values from an epoch on, the first from"
REFUSED = {
    "text": ({"temperature": "1e-4"}, "found '1e-4'; YAML reads 1e-4 as text: write 1.0e-4"),
    "quoted": ({"alpha": "0.5"}, "distill.alpha: input should be a valid number, found '0.5'; remove the quotes"),
    "true": ({"alpha": True}, f"distill.alpha: {FORM}"),
    "nothing": ({"alpha": None}, f"distill.alpha: {FORM}"),
    "negative weight": ({"alpha": -0.1}, "distill.alpha: input should be greater than or equal to 0, found -0.1"),
    "negative end": ({"alpha": {"from": 0.5, "to": -1}}, "distill.alpha: input should be greater than or equal to 0"),
    "negative epoch's": ({"beta": [[1, 0.5], [2, -1.0]]}, "distill.beta: input should be greater than or equal to 0"),
    "negative temperature": ({"temperature": -2.0}, "distill.temperature: input should be greater than 0, found -2.0"),
    "temperature of 0": (
        {"temperature": {"from": 2.0, "to": 0}},
        "distill.temperature: input should be greater than 0",
    ),
    "not from epoch 1": ({"temperature": [[2, 4.0], [31, 3.5]]}, f"distill.temperature: {FORM}"),
    "not ascending": ({"temperature": [[1, 4.0], [31, 3.5], [11, 3.0]]}, f"distill.temperature: {FORM}"),
    "an epoch twice": ({"temperature": [[1, 4.0], [1, 3.5]]}, f"distill.temperature: {FORM}"),
    "half an epoch": ({"temperature": [[1, 4.0], [1.5, 3.5]]}, f"distill.temperature: {FORM}"),
    "no values": ({"temperature": []}, f"distill.temperature: {FORM}"),
    "no pairs": ({"temperature": [4.0, 3.5]}, f"distill.temperature: {FORM}"),
    "from alone": ({"temperature": {"from": 4.0}}, f"distill.temperature: {FORM}"),
    "to alone": ({"temperature": {"to": 4.0}}, f"distill.temperature: {FORM}"),
    "another name": ({"temperature": {"from": 4.0, "to": 2.0, "by": 10}}, f"distill.temperature: {FORM}"),
    "text within": ({"temperature": {"from": 4.0, "to": "2"}}, f"distill.temperature: {FORM}"),
    "a term's weight": ({"words": {"weight": {"from": 1.0}}}, f"distill.words.weight: {FORM}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_forms_are_refused_with_one_clear_message(case):
    settings, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        load("params/demo.yaml", "M08", overrides={"distill": settings})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.5, 0.5), (1, 1.0), ({"from": 1.0, "to": 0.25}, {"from": 1.0, "to": 0.25}), (BY_EPOCH, BY_EPOCH)],
)
def test_a_recipes_schedule_is_written_as_it_is_read(value, written):
    distill = {"alpha": value, "temperature": value, "words": {"weight": value}}
    params = load("params/demo.yaml", "M08", overrides={"distill": distill})
    content = params.model_dump(mode="json")
    assert content["distill"]["temperature"] == content["distill"]["words"]["weight"] == written
    assert Distill.model_validate(content["distill"]) == params.distill
    assert Params.model_validate(content) == params
