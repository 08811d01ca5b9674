"""Losses against references, for teachers and students: CTC (Graves et al. 2006), and cross-entropy of the decoder.

Both are means a token, over utterances of CTC and over all tokens of cross-entropy; padding counts for nothing.
"""

from collections.abc import Sequence

import torch

from kdlib.models import Outputs
from kdlib.models.decoder import teacher_forced
from kdlib.models.encoder_conformer import length_mask
from kdlib.tokens import BLANK

REFERENCE_LOSS_CODE = ("objectives/reference_losses.py", "models/decoder.py", "models/encoder_conformer.py")


def ctc_loss(outputs: Outputs, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """-log P(ids | frames) a token, mean over utterances; 0 for what the frames cannot hold."""
    return ctc_losses(outputs, ids).mean()


def ctc_losses(outputs: Outputs, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """[B]: -log P(ids | frames) a token of every utterance; 0 for what the frames cannot hold."""
    device = outputs.ctc_logits.device
    flat = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], batch_first=True).to(device).long()
    sizes = torch.tensor([len(one) for one in ids], device=device)
    logprobs = outputs.ctc_logits.float().log_softmax(-1).transpose(0, 1)
    each = torch.nn.functional.ctc_loss(
        logprobs, flat, outputs.lengths, sizes, blank=BLANK, reduction="none", zero_infinity=True
    )
    return each / sizes.clamp_min(1)


def cross_entropy(logits: torch.Tensor, ids: Sequence[Sequence[int]], smoothing: float = 0.0) -> torch.Tensor:
    """-log P(next token | those before) of decoder logits [B, L, V] that were given BOS and ids; EOS is one of them."""
    targets, _ = _following(logits, ids)
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, label_smoothing=smoothing)


def cross_entropies(logits: torch.Tensor, ids: Sequence[Sequence[int]], smoothing: float = 0.0) -> torch.Tensor:
    """[B]: the same a token of every utterance."""
    targets, steps = _following(logits, ids)
    each = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, reduction="none", label_smoothing=smoothing
    )
    return each.sum(1) / steps


def _following(logits: torch.Tensor, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a decoder is to say, padding being -100, and in how many steps."""
    _, targets, steps = (part.to(logits.device) for part in teacher_forced([list(one) for one in ids]))
    return targets.masked_fill(~length_mask(steps, targets.shape[1]), -100), steps
