"""Models: every student and teacher returns `Outputs`, whatever its encoder."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kdlib.errors import UserError
from kdlib.io import read_json

if TYPE_CHECKING:
    import torch


class Emissions(NamedTuple):
    """The CTC outputs of a batch of B utterances: what decoders and CTC losses need. T frames, V tokens."""

    logits: "torch.Tensor"  # [B, T, V]; may be log-probabilities
    lengths: "torch.Tensor"  # [B], frames without padding


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for a batch of B utterances: T frames, V tokens, D dimensions, L decoder steps."""

    ctc: Emissions
    encoded: "torch.Tensor | None" = None  # [B, T, D]
    hidden: dict[int, "torch.Tensor"] = field(default_factory=dict)  # layer -> [B, T, D]
    decoder_logits: "torch.Tensor | None" = None  # [B, L, V]

    @property
    def lengths(self) -> "torch.Tensor":
        """[B], frames without padding."""
        return self.ctc.lengths

    def cut(self, lengths: "torch.Tensor") -> "Outputs":
        """The same outputs of fewer frames [B]: what follows counts as padding."""
        return replace(self, ctc=Emissions(self.ctc.logits, lengths))


def nearest_divisor(width: int, heads: int) -> int:
    """Return the number of attention heads that divides the width and is nearest to `heads`; on ties the smaller.

    >>> [nearest_divisor(176, heads) for heads in (4, 8, 9, 10, 12)]
    [4, 8, 8, 11, 11]
    """
    return min((count for count in range(1, width + 1) if width % count == 0), key=lambda count: abs(count - heads))


def read_record(folder: Path) -> dict:
    """Read the `model.json` of a saved model; one written by an earlier version of kdlib is rejected."""
    try:
        record = read_json(folder / "model.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no complete model ({error}); train it again") from None
    if "train_speakers" not in record or "backbone" in record:
        raise UserError(f"{folder} was written by an earlier version of kdlib, with other names; train it again")
    return record
