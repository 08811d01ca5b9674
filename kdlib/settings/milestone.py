"""Expected values of a training, as a plan or a paper states them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from kdlib.settings import AsTuple, Section

Percent = Annotated[float, Field(ge=0)]
Expected = Annotated[tuple[Percent, ...], AsTuple, Field(min_length=2, max_length=2)] | Percent


class Milestone(Section):
    """An expected value in per cent: `{after_epochs: 20, wer: 47.5}`, `{speech: test, wra: [45, 55]}`.

    One number is the most that is expected of a WER, and the least of a WRA; two are a range.
    """

    name: str = ""  # in figures and tables
    of: Literal["student", "teacher", "base_model"] = "student"
    after_epochs: float | None = Field(None, gt=0)  # on the curve of the dev speech
    after_steps: int | None = Field(None, ge=1)  # the same; neither: of the model that is kept
    speech: Literal["dev", "test"] = "dev"
    held_out: str | None = None  # only in the fold of this speaker
    decoder: str = "greedy"  # of test speech; dev curves are greedy
    wer: Expected | None = None
    wra: Expected | None = None

    @model_validator(mode="after")
    def _is_one_value(self) -> Self:
        if (self.wer is None) == (self.wra is None):
            raise PydanticCustomError("milestone", "A milestone needs either wer or wra")
        if self.after_epochs and self.after_steps:
            raise PydanticCustomError("milestone", "A milestone needs after_epochs or after_steps, not both")
        if self.speech == "test" and (self.after_epochs or self.after_steps or self.of != "student"):
            raise PydanticCustomError(
                "milestone",
                "A milestone of test speech is of the finished student: remove after_epochs, after_steps, of",
            )
        if self.low > self.high:
            raise PydanticCustomError("milestone", "The first number of a range should be the smaller one")
        return self

    @property
    def measure(self) -> str:
        """WER or WRA."""
        return "wer" if self.wra is None else "wra"

    @property
    def low(self) -> float:
        """The least that is expected, in per cent."""
        value = self._value
        return value[0] if isinstance(value, tuple) else value if self.measure == "wra" else 0.0

    @property
    def high(self) -> float:
        """The most that is expected, in per cent; infinite for one WRA."""
        value = self._value
        return value[1] if isinstance(value, tuple) else value if self.measure == "wer" else float("inf")

    @property
    def _value(self) -> float | tuple[float, ...]:
        return self.wer if self.wra is None else self.wra

    @property
    def expects(self) -> str:
        """What is expected, in words."""
        name = self.measure.upper()
        if isinstance(self._value, tuple):
            return f"{name} {self.low:g} to {self.high:g} %"
        return f"{name} {'at most' if self.measure == 'wer' else 'at least'} {self._value:g} %"

    @property
    def when(self) -> str:
        """At which point of a training, in words."""
        if self.after_epochs:
            return f"after {self.after_epochs:g} epochs"
        return f"after {self.after_steps} steps" if self.after_steps else "at the end"
