"""What a term of the training loss is; the terms themselves are in `reference_terms.py` and `terms.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Literal

from kdlib.settings.reference_loss import ReferenceLoss
from kdlib.settings.schedule import Schedule, constant

if TYPE_CHECKING:
    from torch import Tensor

    from kdlib.objectives.step import Step


@dataclass(frozen=True)
class Term:
    """A loss of the objective."""

    setting: str  # place of its weight in `distill:`
    side: Literal["reference", "teachers", "self"]
    head: Literal["ctc", "decoder", ""]  # takes the head's share of the weight, where the head is trained
    needs: frozenset[str]  # "frames", "steps", "texts" of teachers; "layer", "lexicon", "views", "average", "search"
    loss: Callable[[Step, str], Tensor | None]  # of a step and the head; None if no utterance has what it needs

    def weight(self, settings: ReferenceLoss) -> Schedule:
        """Its weight, of which a head has a share."""
        schedule = reduce(getattr, self.setting.split("."), settings)
        return schedule if settings.use_teachers or self.side != "teachers" else constant(0.0)

    def is_active(self, settings: ReferenceLoss) -> bool:
        """True if the loss has this term at any time."""
        return bool(self.weight(settings)) and (not self.head or self.head in heads(settings))


def heads(settings: ReferenceLoss) -> tuple[str, ...]:
    """The heads that are trained."""
    return ("ctc", "decoder") if settings.heads == "both" else (settings.heads,)


def active_among(terms: Mapping[str, Term], settings: ReferenceLoss) -> dict[str, Term]:
    """Those of some terms that a loss has."""
    return {name: term for name, term in terms.items() if term.is_active(settings)}
