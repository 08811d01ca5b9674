"""Masks of padding."""

import torch


def length_mask(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """[B, T]: True if a frame is not padding."""
    return torch.arange(longest, device=lengths.device)[None] < lengths[:, None]
