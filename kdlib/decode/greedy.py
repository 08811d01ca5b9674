"""Greedy CTC decoding: the best token of every frame, with repetitions and blanks removed."""

import torch

from kdlib.models import Outputs


def greedy(outputs: Outputs, blank: int) -> list[list[int]]:
    """Return the token ids of every utterance of a batch."""
    best = outputs.ctc_logits.argmax(-1)
    return [
        collapse_repeats(row[:length].tolist(), blank)
        for row, length in zip(best, outputs.lengths.tolist(), strict=True)
    ]


def collapse_repeats(frames: list[int], blank: int) -> list[int]:
    """Merge repetitions, then drop blanks.

    >>> collapse_repeats([9, 4, 4, 9, 4, 7, 7], blank=9)
    [4, 4, 7]
    """
    changes = [token for token, before in zip(frames, [None, *frames], strict=False) if token != before]
    return [token for token in changes if token != blank]


def blank_share(outputs: Outputs, blank: int) -> torch.Tensor:
    """[B]: the share of an utterance's frames whose best token is the blank."""
    frames = torch.arange(outputs.ctc_logits.shape[1], device=outputs.lengths.device)
    mask = frames[None] < outputs.lengths[:, None]
    return ((outputs.ctc_logits.argmax(-1) == blank) & mask).sum(1) / outputs.lengths
