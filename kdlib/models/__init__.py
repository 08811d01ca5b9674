"""The models' room: every student and teacher returns `Outputs`; nothing else knows which backbone made it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch. B utterances, T frames, V tokens, D dimensions, L decoder steps."""

    ctc_logits: "torch.Tensor"  # [B, T, V]; log-softmax of them is the same thing
    lengths: "torch.Tensor"  # [B], frames that are not padding
    encoded: "torch.Tensor"  # [B, T, D]
    hidden: dict[int, "torch.Tensor"] = field(default_factory=dict)  # layer -> [B, T, D]
    decoder_logits: "torch.Tensor | None" = None  # [B, L, V]
