"""Distillation losses. B utterances, T CTC frames or decoder steps, V tokens, D dimensions.

Every loss is a mean over rows with weights [B, T], in which padding is 0; if all weights are 0, the loss is 0. Targets
are the teachers' logits or log-probabilities (the normaliser cancels) at the loss's temperature. Losses against
references are in `objectives/reference_losses.py`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from kdlib.models import Emissions
from kdlib.models.masks import length_mask
from kdlib.objectives.reference_losses import ctc_losses
from kdlib.tokens import BLANK

MASKED_LOGIT = -1e4  # its softmax is 0; with infinity the KL would be 0 x infinity
CHUNK = {"cpu": 2**18, "cuda": 2**24}  # elements per chunk: what a CPU's cache holds, or what keeps a GPU busy


class _SoftKL(torch.autograd.Function):
    """Sum of w KL(p || q) over rows, p = softmax(target), q = softmax(logits / T); d/dlogits = w (q - p) / T.

    It works in chunks of rows that stay in the cache, keeps only the gradient, and skips rows of weight 0.
    """

    @staticmethod
    def forward(
        ctx, logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        size = logits.shape[-1]
        flat, teacher, counts = logits.reshape(-1, size), target.reshape(-1, size), weights.reshape(-1).float()
        chosen, needs_grad = counts.nonzero()[:, 0], ctx.needs_input_grad[0]
        equal = bool((counts[chosen] == counts[chosen[:1]]).all())  # then one factor scales all rows, in the backward
        kept = torch.empty_like(logits, memory_format=torch.contiguous_format) if needs_grad else None
        grad = kept.view(-1, size) if needs_grad else None
        if needs_grad:
            grad[counts == 0] = 0
        total = torch.zeros((), dtype=torch.float64, device=flat.device)
        chunk = max(1, CHUNK.get(flat.device.type, 2**18) // size)  # rows
        for part in chosen.split(chunk) if len(chosen) else ():
            begin, end = int(part[0]), int(part[-1]) + 1
            rows = slice(begin, end) if end - begin == len(part) else part  # a slice copies nothing
            z, u, w = flat[rows].float() / temperature, teacher[rows].float(), counts[rows]
            q, p = z.softmax(1), u.softmax(1)
            normalisers = _logsumexp(z, q) - _logsumexp(u, p)
            apart = torch.sub(u, z, out=z).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-1e30)  # masked tokens: p is 0
            total += ((torch.linalg.vecdot(p, apart) + normalisers) * w).sum()
            if needs_grad:
                difference = torch.sub(q, p, out=grad[rows] if isinstance(rows, slice) and grad.dtype == q.dtype else q)
                if not equal:
                    difference.mul_(w[:, None])
                if difference is q:
                    grad[rows] = q.to(grad.dtype)
        ctx.grad = kept
        ctx.factor = (float(counts[chosen[0]]) if equal and len(chosen) else 1.0) / temperature
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple:
        grad, ctx.grad = ctx.grad, None  # released: it is scaled in place, without a second buffer
        if grad is None:
            raise RuntimeError("soft_kl: second backward through the same loss; compute the loss again")
        return grad.mul_((upstream * ctx.factor).to(grad.dtype)), None, None, None


def _logsumexp(logits: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The log-normalisers of rows, from their softmax, whose kernel is the fastest pass over a row."""
    return logits.amax(1) - probs.amax(1).log()


def soft_kl(
    logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, temperature: float = 1.0, *, squared: bool = True
) -> torch.Tensor:
    """Mean KL(teacher || student) of rows [B, T, V], in nats (Hinton et al. 2015).

    The temperature divides the student's logits; the target is at its temperature already. `squared`: the loss is
    multiplied by T ** 2, which keeps its gradient as large as at T = 1, where the target is at the same temperature.

    >>> zero = torch.zeros(1, 1, 4)
    >>> peaked = torch.tensor([[[9.0, 0.0, 0.0, 0.0]]])
    >>> bool(soft_kl(peaked, peaked / 2, torch.ones(1, 1), 2.0).abs() < 1e-6)
    True
    >>> bool(soft_kl(zero, peaked, torch.ones(1, 1)) > 1.3)  # log 4 = 1.386
    True
    """
    shares = weights.float() * ((temperature**2 if squared else 1.0) / weights.sum().clamp_min(1e-9))
    return _SoftKL.apply(logits, target, shares, temperature)


def expected_errors(
    emissions: Emissions, rows: Sequence[int], ids: Sequence[Sequence[int]], errors: Sequence[float]
) -> torch.Tensor:
    """Mean over utterances of the errors of their texts, each by its CTC probability among the utterance's texts.

    Text i, of `ids`, is one of utterance `rows[i]`, and has `errors[i]`.
    """
    which = torch.tensor(rows, device=emissions.logits.device)
    sizes = torch.tensor([max(1, len(text)) for text in ids], device=which.device)
    scores = -ctc_losses(Emissions(emissions.logits[which], emissions.lengths[which]), ids) * sizes
    scores = scores.masked_fill(scores == 0, -1e4)  # it does not fit into the frames
    padded = scores.new_full((int(which.max()) + 1, len(rows)), -torch.inf)
    padded[which, torch.arange(len(rows), device=which.device)] = scores
    present = padded[which.unique()]
    return (present.softmax(1) * torch.tensor(errors, device=which.device)).sum(1).mean()


def frame_weights(
    target: torch.Tensor, lengths: torch.Tensor, blanks: str, blank: int, context_frames: int = 0
) -> torch.Tensor:
    """Weights [B, T] of the frames of a CTC target.

    `all`; `drop_blank`: only frames whose best teacher token is not the blank (as in the seeds' code: the student is
    never trained on the blank); `symmetric`: those and `context_frames` frames on each side (Hilmes et al. 2025, arXiv
    2506.01503).
    """
    inside = length_mask(lengths, target.shape[1])
    if blanks == "all":
        return inside.float()
    spikes = ((target.argmax(-1) != blank) & inside).float()
    if blanks == "symmetric":
        width = 2 * context_frames + 1
        spikes = nn.functional.max_pool1d(spikes[:, None], width, stride=1, padding=context_frames)[:, 0]
    return spikes * inside


def best_shift(
    logits: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor, max_shift: int, blank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shifts [B], in frames, that best align a target's spikes with the student's, and their fits [B].

    The spike track is the probability of not being blank, per frame; the fit is the cosine of the two tracks. Of equal
    fits the smallest shift wins; positive is later.
    """
    inside = length_mask(lengths, logits.shape[1])
    q, p = ((1 - side.detach().float().log_softmax(-1)[..., blank].exp()) * inside for side in (logits, target))
    order = sorted(range(-max_shift, max_shift + 1), key=lambda shift: (abs(shift), shift))
    fits = torch.stack([_cosine(q, _shift_track(p, shift) * inside) for shift in order])  # [S, B]
    best = (fits > fits.amax(0) - 1e-6).float().argmax(0)  # the first of equals
    return torch.tensor(order, device=best.device)[best], fits.gather(0, best[None])[0]


def shift_frames(target: torch.Tensor, shifts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A target [B, T, V] shifted by frames [B]; the frame at an end is repeated to fill the gap."""
    frames = torch.arange(target.shape[1], device=target.device)[None] - shifts[:, None]
    frames = torch.minimum(frames.clamp_min(0), (lengths[:, None] - 1).clamp_min(0))
    return target.gather(1, frames[..., None].expand_as(target))


def mask_specials(target: torch.Tensor, ids: Iterable[int]) -> torch.Tensor:
    """A decoder's target [B, L, V] without probability for some ids, such as EOS and the blank, in the first step."""
    changed = target.clone()
    changed[:, 0, list(ids)] = MASKED_LOGIT
    return changed


def pseudo_label(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    *,
    confidence: float = 0.0,
    min_nonblank: float = 0.0,
    smoothing: float = 0.0,
    blank: int | None = None,
) -> torch.Tensor:
    """Cross-entropy with the target's best token, on frames with enough confidence in it and in not being blank."""
    probs = target.detach().float().softmax(-1)
    top, best = probs.max(-1)
    counted = weights * (top >= confidence)
    if blank is not None and min_nonblank > 0:
        counted = counted * (1 - probs[..., blank] >= min_nonblank)
    each = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), best, reduction="none", label_smoothing=smoothing
    )
    return (each * counted).sum() / counted.sum().clamp_min(1e-9)


def sequence_ctc(
    logits: torch.Tensor, lengths: torch.Tensor, rows: Iterable[int], ids: list[list[int]], weights: torch.Tensor
) -> torch.Tensor:
    """-log P(ids | frames) per token, by CTC, of pseudo-labels [N] of the utterances `rows` [N], each with a weight.

    It is a mean over the utterances that have a pseudo-label: weights below one make uncertain ones count less.
    """
    rows = list(rows)
    flat = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in ids], batch_first=True).to(logits.device)
    sizes = torch.tensor([len(text) for text in ids], device=logits.device)
    logprobs = logits.float().log_softmax(-1)[rows].transpose(0, 1)
    each = nn.functional.ctc_loss(
        logprobs, flat, lengths[rows], sizes, blank=BLANK, reduction="none", zero_infinity=True
    )
    return (each / sizes * weights.to(logits.device)).sum() / max(1, len(set(rows)))


def occupancy(logits: torch.Tensor, lengths: torch.Tensor, ids: list[list[int]]) -> torch.Tensor:
    """P(token at a frame | frames, ids) [B, T, V]: a model's alignment of the tokens of a text, over all alignments.

    It is the derivative of log P(ids | frames) by log-probabilities (Graves et al. 2006, eq. 15); torch's derivative by
    logits is softmax - occupancy. Zeros if the text does not fit into the frames.
    """
    with torch.enable_grad():
        leaf = logits.detach().float().requires_grad_()
        flat = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in ids], batch_first=True).to(leaf.device)
        sizes = torch.tensor([len(text) for text in ids], device=leaf.device)
        logprobs = leaf.log_softmax(-1)
        each = nn.functional.ctc_loss(
            logprobs.transpose(0, 1), flat, lengths, sizes, blank=BLANK, reduction="none", zero_infinity=False
        )
        fits = torch.isfinite(each)
        (grad,) = torch.autograd.grad(each[fits].sum(), leaf) if fits.any() else (torch.zeros_like(leaf),)
    probs = (logprobs.detach().exp() - torch.nan_to_num(grad)).clamp(0.0, 1.0)
    return probs * (length_mask(lengths, logits.shape[1]) & fits[:, None])[..., None]


def feature_mse(encoded: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, project: nn.Module) -> torch.Tensor:
    """Mean squared distance of projected encodings from the teachers' [B, T, D] (FitNets, Romero et al. 2015)."""
    each = (project(encoded).float() - target).pow(2).mean(-1)
    return (each * weights).sum() / weights.sum().clamp_min(1e-9)


def _shift_track(track: torch.Tensor, shift: int) -> torch.Tensor:
    """A track [B, T] shifted later by `shift` frames; zeros fill the gap."""
    if shift == 0:
        return track
    zeros = track.new_zeros(len(track), min(abs(shift), track.shape[1]))
    return torch.cat([zeros, track[:, :-shift]] if shift > 0 else [track[:, -shift:], zeros], 1)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-9)
