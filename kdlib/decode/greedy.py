"""Greedy CTC decoding: the best token of every frame, with repetitions and blanks removed."""

import torch

from kdlib.models import Emissions


def greedy(emissions: Emissions, blank: int) -> list[list[int]]:
    """Return the token ids of every utterance of a batch."""
    best = emissions.logits.argmax(-1)
    return [
        collapse_repeats(row[:length].tolist(), blank)
        for row, length in zip(best, emissions.lengths.tolist(), strict=True)
    ]


def collapse_repeats(frames: list[int], blank: int) -> list[int]:
    """Merge repetitions, then drop blanks.

    >>> collapse_repeats([9, 4, 4, 9, 4, 7, 7], blank=9)
    [4, 4, 7]
    """
    changes = [token for token, before in zip(frames, [None, *frames], strict=False) if token != before]
    return [token for token in changes if token != blank]


def blank_share(emissions: Emissions, blank: int) -> torch.Tensor:
    """[B]: the share of an utterance's frames whose best token is the blank."""
    frames = torch.arange(emissions.logits.shape[1], device=emissions.lengths.device)
    mask = frames[None] < emissions.lengths[:, None]
    return ((emissions.logits.argmax(-1) == blank) & mask).sum(1) / emissions.lengths
