"""Losses against references, for teachers and students: CTC (Graves et al. 2006), and cross-entropy of the decoder.

CTC is normalised per token and averaged over utterances; cross-entropy is averaged over all tokens. Padding is ignored.
"""

import math
from collections.abc import Sequence

import torch

from kdlib.models import Emissions
from kdlib.models.decoder import teacher_forced
from kdlib.models.masks import length_mask
from kdlib.tokens import BLANK


def ctc_loss(emissions: Emissions, ids: Sequence[Sequence[int]], blank: int = BLANK) -> torch.Tensor:
    """-log P(ids | frames) per token, mean over utterances; 0 for ids that do not fit into the frames."""
    return ctc_losses(emissions, ids, blank).mean()


def ctc_losses(emissions: Emissions, ids: Sequence[Sequence[int]], blank: int = BLANK) -> torch.Tensor:
    """[B]: -log P(ids | frames) per token, by utterance; 0 for ids that do not fit into the frames."""
    device = emissions.logits.device
    flat = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in ids], batch_first=True).to(device).long()
    sizes = torch.tensor([len(text) for text in ids], device=device)
    logprobs = emissions.logits.float().log_softmax(-1).transpose(0, 1)
    each = torch.nn.functional.ctc_loss(
        logprobs, flat, emissions.lengths, sizes, blank=blank, reduction="none", zero_infinity=True
    )
    return each / sizes.clamp_min(1)


def uniform_kl(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean KL(uniform || student) of rows: the label smoothing term of CTC."""
    logprobs = logits.float().log_softmax(-1)
    each = -logprobs.mean(-1) - math.log(logits.shape[-1])
    return (each * weights).sum() / weights.sum().clamp_min(1e-9)


def cross_entropy(logits: torch.Tensor, ids: Sequence[Sequence[int]], smoothing: float = 0.0) -> torch.Tensor:
    """-log P(next token | previous tokens) of decoder logits [B, L, V] on BOS and ids; the tokens include EOS."""
    targets, _ = _next_tokens(logits, ids)
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, label_smoothing=smoothing)


def cross_entropies(logits: torch.Tensor, ids: Sequence[Sequence[int]], smoothing: float = 0.0) -> torch.Tensor:
    """[B]: the same per token, by utterance."""
    targets, steps = _next_tokens(logits, ids)
    each = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, reduction="none", label_smoothing=smoothing
    )
    return each.sum(1) / steps


def _next_tokens(logits: torch.Tensor, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder's targets, with -100 for padding, and their numbers of steps."""
    _, targets, steps = (part.to(logits.device) for part in teacher_forced([list(text) for text in ids]))
    return targets.masked_fill(~length_mask(steps, targets.shape[1]), -100), steps
