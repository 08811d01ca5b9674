"""Every setting with every kind of wrong value: refused before any work, in a line that names it."""

import math
import types
import typing

import annotated_types
import pytest
from pydantic import BaseModel

from kdlib.errors import UserError
from kdlib.params import Params, load
from kdlib.settings.messages import model_in
from kdlib.settings.schedule import Schedule

FREE = {"variants", "speakers", "replace", "ensembles", "settings"}  # mappings whose names are the user's
NOT_IN_A_RECIPE = {"held_out", "variant"}


def kinds(annotation):
    """The plain types that an annotation allows."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) for kind in kinds(part)}
    if origin is typing.Literal:
        return {"name"}
    if origin in (tuple, dict, list):
        return {origin}
    return {annotation}


def limits(field):
    """Values just outside of a field's limits."""
    for part in field.metadata:
        if isinstance(part, annotated_types.Ge):
            yield part.ge - 1
        elif isinstance(part, annotated_types.Gt):
            yield part.gt
        elif isinstance(part, annotated_types.Le):
            yield part.le + 1
        elif isinstance(part, annotated_types.Lt):
            yield part.lt
        elif isinstance(part, annotated_types.MultipleOf):
            yield part.multiple_of + 1


def wrong_values(field):
    allowed = kinds(field.annotation)
    if Schedule in allowed:
        yield from ("1e-4", -1, math.inf, math.nan, [], [[2, 1.0]], {"from": 1}, True)
        return
    if str not in allowed and "name" not in allowed:
        yield "no such value"
    if "name" in allowed:
        yield "no_such_name"
    if not allowed & {int, float}:
        yield 7.5
    if int in allowed and float not in allowed:
        yield from (1.5, 10**30, "3")
    if float in allowed:
        yield from ("1e-4", math.inf, math.nan)
    if bool not in allowed:
        yield True
    if tuple not in allowed and list not in allowed:
        yield [1, 2]
    if dict not in allowed and not any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in allowed):
        yield {"a": 1}
    for value in limits(field):
        yield float(value) if float in allowed else value


def settings(model=Params, place=()):
    """Every setting: its place and its field."""
    for name, field in model.model_fields.items():
        if name in NOT_IN_A_RECIPE and not place:
            continue
        yield (*place, name), field
        below = model_in(field.annotation)
        if below and name not in FREE and tuple not in kinds(field.annotation):
            yield from settings(below, (*place, name))


def nested(place, value):
    return {place[0]: nested(place[1:], value) if place[1:] else value}


CASES = [(place, value) for place, field in settings() for value in wrong_values(field)]


def test_there_are_hundreds_of_cases():
    assert len(CASES) > 900
    assert len({place for place, _ in CASES}) > 170


@pytest.mark.parametrize("section", sorted({place[0] for place, _ in CASES}))
def test_a_wrong_value_is_refused_in_a_line_that_names_the_setting(section):
    passed = []
    for place, value in CASES:
        if place[0] != section:
            continue
        name = ".".join(place)
        try:
            load("params/demo.yaml", "M08", overrides=nested(place, value))
        except UserError as error:
            lines = str(error).splitlines()
            if not any(name in line and "found" in line for line in lines) or len(lines) > 3:
                passed.append((name, value, str(error)))
        else:
            passed.append((name, value, "accepted"))
    assert passed == []


@pytest.mark.parametrize("section", sorted({place[0] for place, _ in CASES if len(place) > 1}))
def test_a_misspelt_setting_is_refused_with_the_nearest_name(section):
    names = [place for place, _ in settings() if place[0] == section and len(place) > 1]
    for *above, last in names:
        typo = last[:-1] + ("x" if last[-1] != "x" else "y")
        with pytest.raises(UserError, match=r"unknown parameter|was renamed"):
            load("params/demo.yaml", "M08", overrides=nested((*above, typo), 1))
