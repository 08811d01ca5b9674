"""Values that may change during a training: a number, `{from: 4, to: 2}`, or `[[1, 4.0], [31, 3.5]]` by epoch."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer
from pydantic_core import PydanticCustomError

FORMS = "a number, {from: 4, to: 2}, or [[1, 4.0], [31, 3.5]]: values from an epoch on, the first from epoch 1"


@dataclass(frozen=True)
class Progress:
    """A point of a training."""

    done: float = 0.0  # share of all steps
    epoch: float = 0.0  # epochs that have passed


@dataclass(frozen=True)
class Schedule:
    """A value over a training; true if it is ever other than 0.

    >>> Schedule((4.0, 2.0)).at(Progress(0.5)), Schedule((4.0, 3.5), (1, 31)).at(Progress(0.2, 30.0))
    (3.0, 3.5)
    """

    values: tuple[float, ...]  # one; or the first and the last, with a line between them; or one for each of the
    epochs: tuple[int, ...] = ()  # epochs from which they apply, counted from 1

    def at(self, point: Progress) -> float:
        """The value at a point of the training."""
        if self.epochs:
            return [value for first, value in zip(self.epochs, self.values, strict=True) if first - 1 <= point.epoch][
                -1
            ]
        first, last = self.values[0], self.values[-1]
        return first if first == last else first + (last - first) * min(1.0, max(0.0, point.done))

    def __bool__(self) -> bool:
        return any(self.values)

    def __str__(self) -> str:
        if self.epochs:
            parts = zip(self.epochs, self.values, strict=True)
            return ", ".join(f"{value:g} from epoch {first}" for first, value in parts)
        return " to ".join(f"{value:g}" for value in dict.fromkeys(self.values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parse(value: Any) -> Schedule:
    match value:
        case Schedule():
            return value
        case str():
            raise PydanticCustomError("float_type", "Input should be a valid number")
        case number if _is_number(number):
            return Schedule((float(number),))
        case {"from": first, "to": last, **more} if not more and _is_number(first) and _is_number(last):
            return Schedule((float(first), float(last)))
        case [*steps] if steps and all(isinstance(step, list | tuple) and len(step) == 2 for step in steps):
            epochs, values = zip(*steps, strict=True)
            if (
                all(type(epoch) is int for epoch in epochs)
                and all(map(_is_number, values))
                and epochs[0] == 1
                and list(epochs) == sorted(set(epochs))
            ):
                return Schedule(tuple(map(float, values)), tuple(epochs))
    raise PydanticCustomError("schedule", "Input should be {forms}", {"forms": FORMS})


def _short(schedule: Schedule) -> float | dict[str, float] | list[list[float]]:
    """A schedule as a recipe writes it."""
    if schedule.epochs:
        return [list(step) for step in zip(schedule.epochs, schedule.values, strict=True)]
    first, last = schedule.values[0], schedule.values[-1]
    return first if first == last else {"from": first, "to": last}


def _not_negative(schedule: Schedule) -> Schedule:
    if min(schedule.values) < 0:
        raise PydanticCustomError("schedule", "Input should be greater than or equal to 0")
    return schedule


def _positive(schedule: Schedule) -> Schedule:
    if min(schedule.values) <= 0:
        raise PydanticCustomError("schedule", "Input should be greater than 0")
    return schedule


_Scheduled = Annotated[Schedule, BeforeValidator(_parse), PlainSerializer(_short, return_type=Any)]
Weight = Annotated[_Scheduled, AfterValidator(_not_negative)]
Temperature = Annotated[_Scheduled, AfterValidator(_positive)]


def constant(value: float) -> Schedule:
    """A schedule that does not change."""
    return Schedule((value,))
