"""The sections of a recipe: names, types, limits and defaults, by package. `params.py` combines them."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

LARGEST = 10**9  # of whole numbers: more steps, seconds or utterances are a slip
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML has no tuples
Names = Annotated[tuple[str, ...], AsTuple]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[tuple[Seed, ...], AsTuple, Field(min_length=1)]


class Section(BaseModel):
    """No unknown names, no silent conversion of types, no infinite numbers, no change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_possible(cls, value: object) -> object:
        """Refuse whole numbers that no run could reach."""
        if type(value) is int and abs(value) > LARGEST:
            raise PydanticCustomError("too_large", "Input should be at most {most}", {"most": f"{LARGEST:,}"})
        return value
