"""A search of settings on the dev speaker: `make tune`."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from kdlib.settings import AsTuple, Section, Seed


class Range(Section):
    """The values between two numbers; whole ones between whole numbers."""

    low: int | float
    high: int | float
    log: bool = False  # equal steps of the logarithm, as for learning rates

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise PydanticCustomError("range", "Input should have low below high, and above 0 with log: true")
        return self

    @property
    def is_whole(self) -> bool:
        """True if only whole numbers are tried."""
        return type(self.low) is int and type(self.high) is int


Values = Annotated[tuple[Any, ...], AsTuple, Field(min_length=2)]


class Tune(Section):
    """What `make tune` varies: the settings of one variant, by their dotted names."""

    variant: str = "hard"
    runs: int = Field(12, ge=1)  # trainings; those that are stopped early count, too
    seed: Seed = 1  # of every training
    full_runs: int = Field(4, ge=1)  # before one may be stopped early: below the median of the others at the same step
    settings: dict[Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")], Range | Values] = Field({})
