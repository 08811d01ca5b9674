"""The sections of a recipe: names, types, limits and defaults, by package. `params.py` combines them."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML has no tuples
Names = Annotated[tuple[str, ...], AsTuple]


class Section(BaseModel):
    """No unknown names, no silent conversion of types, no change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
