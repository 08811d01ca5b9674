"""A set of ablations: factors and their levels over a base variant, and the cells that they make.

A level is a variant of its own, `<factor>.<level>`, joined to the base: `ctc_kd+temperature.t4`. The control of a cell
is the control of the base with everything of the level that a student without teachers has, too: `hard+encoder.frozen`.
So cells that differ in their teachers alone share one control.
"""

import itertools
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from kdlib.settings import Names, Section

Name = Annotated[str, Field(pattern=r"^\w[\w-]*$")]
OF_TEACHERS = ("teacher", "aggregation", "logit_student")  # sections that a student without teachers does not have
OF_STUDENT = ("heads", "ctc_weight", "label_smoothing")  # of the loss, what it has
CONTROL = "control"


@dataclass(frozen=True)
class Cell:
    """One student of a set: its level of every factor, and its variant."""

    levels: dict[str, str]
    variant: str


class Ablation(Section):
    """What is varied; a level without settings is that of the base."""

    base: str = "ctc_kd"  # a variant
    factors: dict[Name, dict[Name, dict[str, Any]]] = Field({})  # factor -> level -> settings
    cross: Names = ()  # factors whose levels are combined; the others are varied one at a time
    folds: Names = ()  # held-out speakers

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """The levels as variants, with the parts of them that controls have."""
        found = {}
        for factor, levels in self.factors.items():
            for level, settings in levels.items():
                name, of_control = f"{factor}.{level}", _of_control(settings)
                if settings:
                    found[name] = settings
                if of_control and of_control != settings:
                    found[f"{name}.{CONTROL}"] = of_control
        return found

    @property
    def cells(self) -> list[Cell]:
        """The base, every other level of every factor, and the combinations of the crossed factors."""
        same = {factor: self.own_level(factor) for factor in self.factors}
        chosen = [same]
        crossed = [factor for factor in self.factors if factor in self.cross]
        for factor in self.factors:
            if factor not in crossed:
                chosen += [same | {factor: level} for level in self.factors[factor]]
        chosen += [
            same | dict(zip(crossed, levels, strict=True))
            for levels in itertools.product(*(self.factors[factor] for factor in crossed))
        ]
        cells = {}
        for levels in chosen:
            parts = [f"{factor}.{level}" for factor, level in levels.items() if self.factors[factor].get(level)]
            variant = "+".join([self.base, *parts])
            cells.setdefault(variant, Cell(levels, variant))
        return list(cells.values())

    def own_level(self, factor: str) -> str:
        """The level of the base: that without settings; "base" where none is named."""
        return next((level for level, settings in self.factors[factor].items() if not settings), "base")

    def control(self, variant: str, of_base: str) -> str:
        """The control of a joined variant, from that of its base."""
        parts, known = of_base.split("+"), self.variants
        for name in variant.split("+"):
            if name in known and (of_control := _of_control(known[name])):
                part = name if of_control == known[name] else f"{name}.{CONTROL}"
                parts += [part] if part not in parts else []
        return "+".join(parts)


def _of_control(settings: dict[str, Any]) -> dict[str, Any]:
    """What a student without teachers has of the settings of a level."""
    kept = {name: value for name, value in settings.items() if name not in (*OF_TEACHERS, "distill")}
    loss = {name: value for name, value in settings.get("distill", {}).items() if name in OF_STUDENT}
    return kept | ({"distill": loss} if loss else {})
