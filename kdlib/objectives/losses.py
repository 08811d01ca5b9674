"""Losses of distillation. B utterances, T frames of CTC or steps of a decoder, V tokens, D dimensions.

Every loss is a mean over the rows that count, said by weights [B, T] in which padding is 0; no row counts where the
weights are all 0, and the loss is 0. Targets are the teachers' logits or log-probabilities (the normaliser cancels).
Losses against references are in `models/supervised.py`.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from kdlib.decode.lexicon import Lexicon
from kdlib.models import Outputs
from kdlib.models.encoder_conformer import length_mask
from kdlib.tokens import BLANK

MASKED_LOGIT = -1e4  # a logit that no softmax sees; infinity would make 0 x infinity of it
CHUNK = {"cpu": 2**18, "cuda": 2**24}  # elements in work: what a processor's cache holds, or what keeps a GPU busy


class _SoftKL(torch.autograd.Function):
    """Sum of w KL(p || q) over rows, p = softmax(target / T_p), q = softmax(logits / T_q); d/dlogits = w (q - p) / T_q.

    Row by row in parts that stay in the cache; kept is the gradient alone, and rows of weight 0 are not looked at.
    """

    @staticmethod
    def forward(
        ctx, logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, divide_q: float, divide_p: float
    ) -> torch.Tensor:
        size = logits.shape[-1]
        flat, wanted, counts = logits.reshape(-1, size), target.reshape(-1, size), weights.reshape(-1).float()
        chosen, learns = counts.nonzero()[:, 0], ctx.needs_input_grad[0]
        alike = bool((counts[chosen] == counts[chosen[:1]]).all())  # then one factor serves all rows, at the end
        kept = torch.empty_like(logits, memory_format=torch.contiguous_format) if learns else None
        grad = kept.view(-1, size) if learns else None
        if learns:
            grad[counts == 0] = 0
        total = torch.zeros((), dtype=torch.float64, device=flat.device)
        at_once = max(1, CHUNK.get(flat.device.type, 2**18) // size)
        for part in chosen.split(at_once) if len(chosen) else ():
            begin, end = int(part[0]), int(part[-1]) + 1
            rows = slice(begin, end) if end - begin == len(part) else part  # of neighbours nothing is copied
            z, u, w = flat[rows].float() / divide_q, wanted[rows].float() / divide_p, counts[rows]
            q, p = z.softmax(1), u.softmax(1)
            normalisers = _logsumexp(z, q) - _logsumexp(u, p)
            total += ((torch.linalg.vecdot(p, u.sub_(z)) + normalisers) * w).sum()
            if learns:
                difference = torch.sub(q, p, out=grad[rows] if isinstance(rows, slice) and grad.dtype == q.dtype else q)
                if not alike:
                    difference.mul_(w[:, None])
                if difference is q:
                    grad[rows] = q.to(grad.dtype)
        ctx.grad = kept
        ctx.factor = (float(counts[chosen[0]]) if alike and len(chosen) else 1.0) / divide_q
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple:
        grad, ctx.grad = ctx.grad, None  # given away: it is scaled in place, and no second buffer is needed
        if grad is None:
            raise RuntimeError("soft_kl: backward a second time through the same loss; compute the loss again")
        return grad.mul_((upstream * ctx.factor).to(grad.dtype)), None, None, None, None


def _logsumexp(logits: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The logarithm of rows' normalisers, from their softmax: its kernel is the fastest way through a row."""
    return logits.amax(1) - probs.amax(1).log()


def soft_kl(
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    temperature: float = 1.0,
    *,
    temperature_on: str = "both",
    fixed_temperature: bool = False,
) -> torch.Tensor:
    """Mean KL(teacher || student) of rows [B, T, V], in nats (Hinton et al. 2015).

    The temperature divides both sides' logits, or one's as `temperature_on` says. Only where both are divided is the loss
    multiplied by T ** 2, which keeps its gradient as large as at T = 1. `fixed_temperature` targets were made at the temperature
    already.

    >>> zero = torch.zeros(1, 1, 4)
    >>> sure = torch.tensor([[[9.0, 0.0, 0.0, 0.0]]])
    >>> bool(soft_kl(sure, sure, torch.ones(1, 1), 2.0).abs() < 1e-6)
    True
    >>> bool(soft_kl(zero, sure, torch.ones(1, 1)) > 1.3)  # log 4 = 1.386
    True
    """
    divide_q = 1.0 if temperature_on == "teacher" else temperature
    divide_p = 1.0 if temperature_on == "student" or fixed_temperature else temperature
    scale = temperature**2 if temperature_on == "both" else 1.0
    shares = weights.float() * (scale / weights.sum().clamp_min(1e-9))
    return _SoftKL.apply(logits, target, shares, divide_q, divide_p)


def frame_weights(
    target: torch.Tensor, lengths: torch.Tensor, blanks: str, blank: int, context_frames: int = 0
) -> torch.Tensor:
    """Weights [B, T]: which frames of a CTC target are taught.

    `all`; `drop_blank`: only those where the teacher's best token is none (as the seeds' code did: the student is never
    taught the blank); `symmetric`: those and `context_frames` frames on each side (Hilmes et al. 2025, arXiv 2506.01503).
    """
    inside = length_mask(lengths, target.shape[1])
    if blanks == "all":
        return inside.float()
    spikes = ((target.argmax(-1) != blank) & inside).float()
    if blanks == "symmetric":
        spikes = nn.functional.max_pool1d(spikes[:, None], 2 * context_frames + 1, stride=1, padding=context_frames)[
            :, 0
        ]
    return spikes * inside


def best_shift(
    logits: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor, at_most: int, blank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [B] by which a target is to be moved so that its spikes fit the student's, and how well they do then [B].

    A spike is the probability that a frame is no blank; the fit is the cosine of the two tracks. Of equal shifts the
    smallest counts; positive is later.
    """
    inside = length_mask(lengths, logits.shape[1])
    mine, theirs = ((1 - side.detach().float().log_softmax(-1)[..., blank].exp()) * inside for side in (logits, target))
    order = sorted(range(-at_most, at_most + 1), key=lambda shift: (abs(shift), shift))
    fits = torch.stack([_cosine(mine, _moved(theirs, shift) * inside) for shift in order])  # [S, B]
    best = (fits > fits.amax(0) - 1e-6).float().argmax(0)  # the first of equals
    return torch.tensor(order, device=best.device)[best], fits.gather(0, best[None])[0]


def shift_frames(target: torch.Tensor, shifts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A target [B, T, V] moved by frames [B]; what comes in at an end is the frame that stood there."""
    frames = torch.arange(target.shape[1], device=target.device)[None] - shifts[:, None]
    frames = torch.minimum(frames.clamp_min(0), (lengths[:, None] - 1).clamp_min(0))
    return target.gather(1, frames[..., None].expand_as(target))


def mask_specials(target: torch.Tensor, ids: Iterable[int]) -> torch.Tensor:
    """A decoder's target [B, L, V] whose first step does not speak of some ids, such as EOS and the blank."""
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
    """Cross-entropy with the target's best token, where it is sure of it and sure enough that it is no blank."""
    probs = target.detach().float().softmax(-1)
    sure, best = probs.max(-1)
    counted = weights * (sure >= confidence)
    if blank is not None and min_nonblank > 0:
        counted = counted * (1 - probs[..., blank] >= min_nonblank)
    each = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), best, reduction="none", label_smoothing=smoothing
    )
    return (each * counted).sum() / counted.sum().clamp_min(1e-9)


class _WordKL(torch.autograd.Function):
    """Sum of w KL(p || q) over utterances, q the student's posterior over a lexicon's words at a temperature."""

    @staticmethod
    def forward(
        ctx,
        logits: torch.Tensor,
        lengths: torch.Tensor,
        lexicon: Lexicon,
        target: torch.Tensor,
        weights: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        wanted, counts = target.double().cpu().numpy(), weights.double().cpu().numpy()
        total = 0.0

        def slopes(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
            nonlocal total
            possible = scores > -np.inf  # a word that needs more frames than there are has no part in it
            q = _softmax(np.where(possible, scores / temperature, -np.inf))
            p = np.where(possible, wanted[rows], 0.0)
            there = p.sum(1, keepdims=True)
            p = np.divide(p, there, out=np.zeros_like(p), where=there > 0)
            some = p > 0
            each = np.zeros_like(p)
            each[some] = p[some] * (np.log(p[some]) - np.log(np.maximum(q[some], 1e-300)))
            factor = counts[rows, None] * (there > 0)
            total += float((each * factor).sum())
            return factor * (q - p) / temperature

        columns, grad = lexicon.with_gradient(Outputs(logits, lengths, logits), slopes)
        ctx.columns, ctx.shape = columns, logits.shape
        ctx.save_for_backward(grad.to(logits))
        return logits.new_tensor(total, dtype=torch.float32)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple:
        (part,) = ctx.saved_tensors
        grad = part.new_zeros(ctx.shape)
        grad[..., ctx.columns] = part * upstream.to(part.dtype)
        return grad, None, None, None, None, None


def word_kl(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    lexicon: Lexicon,
    target: torch.Tensor,
    weights: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Mean KL(teachers || student) of utterances between posteriors over the words of a lexicon, in nats.

    `target` [B, W] is the teachers' posterior at the temperature. The student's follows from the exact CTC probability
    of every word (all alignments), so where in time a teacher writes does not matter. The loss is multiplied by the
    square of the temperature, as by frame.
    """
    shares = weights.float() * (temperature**2 / weights.sum().clamp_min(1e-9))
    return _WordKL.apply(logits, lengths, lexicon, target, shares, temperature)


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Of rows, in numpy; zeros where a row is all -inf."""
    largest = scores.max(1, keepdims=True)
    powers = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    return powers / np.maximum(powers.sum(1, keepdims=True), 1e-300)


def sequence_ctc(
    logits: torch.Tensor, lengths: torch.Tensor, rows: Iterable[int], ids: list[list[int]], weights: torch.Tensor
) -> torch.Tensor:
    """-log P(ids | frames) a token, by CTC, of sequences [N] that stand for utterances `rows` [N], each with a weight.

    It is a mean over the utterances that have a sequence: weights below one make what is unsure count less.
    """
    rows = list(rows)
    flat = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], batch_first=True).to(logits.device)
    sizes = torch.tensor([len(one) for one in ids], device=logits.device)
    logprobs = logits.float().log_softmax(-1)[rows].transpose(0, 1)
    each = nn.functional.ctc_loss(
        logprobs, flat, lengths[rows], sizes, blank=BLANK, reduction="none", zero_infinity=True
    )
    return (each / sizes * weights.to(logits.device)).sum() / max(1, len(set(rows)))


def occupancy(logits: torch.Tensor, lengths: torch.Tensor, ids: list[list[int]]) -> torch.Tensor:
    """P(token at a frame | frames, ids) [B, T, V]: where a model puts the tokens of a text, over all alignments.

    The derivative of log P(ids | frames) by log-probabilities (Graves et al. 2006, eq. 15), which torch gives by
    logits, as softmax - occupancy. Zeros where the frames cannot hold the text.
    """
    with torch.enable_grad():
        asked = logits.detach().float().requires_grad_()
        flat = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], batch_first=True).to(asked.device)
        sizes = torch.tensor([len(one) for one in ids], device=asked.device)
        logprobs = asked.log_softmax(-1)
        each = nn.functional.ctc_loss(
            logprobs.transpose(0, 1), flat, lengths, sizes, blank=BLANK, reduction="none", zero_infinity=False
        )
        fits = torch.isfinite(each)
        (grad,) = torch.autograd.grad(each[fits].sum(), asked) if fits.any() else (torch.zeros_like(asked),)
    found = (logprobs.detach().exp() - torch.nan_to_num(grad)).clamp(0.0, 1.0)
    return found * (length_mask(lengths, logits.shape[1]) & fits[:, None])[..., None]


def uniform_kl(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean KL(uniform || student) of rows: what label smoothing adds to CTC."""
    logprobs = logits.float().log_softmax(-1)
    each = -logprobs.mean(-1) - float(np.log(logits.shape[-1]))
    return (each * weights).sum() / weights.sum().clamp_min(1e-9)


def feature_mse(encoded: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor, project: nn.Module) -> torch.Tensor:
    """Mean squared distance of projected encodings from the teachers' [B, T, D] (FitNets, Romero et al. 2015)."""
    each = (project(encoded).float() - wanted).pow(2).mean(-1)
    return (each * weights).sum() / weights.sum().clamp_min(1e-9)


def _moved(track: torch.Tensor, shift: int) -> torch.Tensor:
    """A track [B, T] moved later by `shift` frames, with silence coming in."""
    if shift == 0:
        return track
    silence = track.new_zeros(len(track), min(abs(shift), track.shape[1]))
    return torch.cat([silence, track[:, :-shift]] if shift > 0 else [track[:, -shift:], silence], 1)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1)).clamp_min(1e-9)
