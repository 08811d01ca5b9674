"""Losses over the words of a closed lexicon, each scored by exact CTC. B utterances, T frames, V tokens, W words."""

import numpy as np
import torch

from kdlib.decode.lexicon import Lexicon
from kdlib.models import Emissions


def shortlist(
    lexicon: Lexicon, target: torch.Tensor, likely: torch.Tensor, size: int, at_random: int
) -> tuple[Lexicon, torch.Tensor]:
    """The lexicon and the target [B, W] over it: all words, or each utterance's `size` likeliest and some at random."""
    if not size or size >= len(lexicon.words):
        return lexicon, target
    places = likely.topk(size, 1).indices.unique()
    if at_random:
        places = torch.cat([places, torch.randperm(len(lexicon.words))[:at_random]]).unique()
    part = target[:, places]
    return lexicon.among(places.tolist()), part / part.sum(1, keepdim=True).clamp_min(1e-9)


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
        teacher, counts = target.double().cpu().numpy(), weights.double().cpu().numpy()
        total = 0.0

        def gradient(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
            nonlocal total
            possible = scores > -np.inf  # words that need more frames than there are do not count
            q = _softmax(np.where(possible, scores / temperature, -np.inf))
            p = np.where(possible, teacher[rows], 0.0)
            mass = p.sum(1, keepdims=True)
            p = np.divide(p, mass, out=np.zeros_like(p), where=mass > 0)
            positive = p > 0
            each = np.zeros_like(p)
            each[positive] = p[positive] * (np.log(p[positive]) - np.log(np.maximum(q[positive], 1e-300)))
            factor = counts[rows, None] * (mass > 0)
            total += float((each * factor).sum())
            return factor * (q - p) / temperature

        columns, grad = lexicon.with_gradient(Emissions(logits, lengths), gradient)
        ctx.columns, ctx.shape = columns, logits.shape
        ctx.save_for_backward(grad.to(logits))
        return logits.new_tensor(total, dtype=torch.float32)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple:
        return _scattered(ctx, upstream), None, None, None, None, None


class _WordEntropy(torch.autograd.Function):
    """Mean entropy of utterances' posteriors over a lexicon's words, less a share of that of their mean."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, lengths: torch.Tensor, lexicon: Lexicon, diversity: float) -> torch.Tensor:
        q = _softmax(lexicon.scores(Emissions(logits, lengths)).double().numpy() / lexicon.temperature)
        mean = q.mean(0)
        log_q, log_mean = np.log(np.maximum(q, 1e-300)), np.log(np.maximum(mean, 1e-300))
        own, of_mean = (q * log_q).sum(1, keepdims=True), (q * log_mean).sum(1, keepdims=True)
        slopes = q * (diversity * (log_mean - of_mean) - (log_q - own)) / (len(q) * lexicon.temperature)
        columns, grad = lexicon.with_gradient(Emissions(logits, lengths), lambda scores, rows: slopes[rows])
        ctx.columns, ctx.shape = columns, logits.shape
        ctx.save_for_backward(grad.to(logits))
        return logits.new_tensor(-own.mean() + diversity * (mean * log_mean).sum(), dtype=torch.float32)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple:
        return _scattered(ctx, upstream), None, None, None


def word_entropy(logits: torch.Tensor, lengths: torch.Tensor, lexicon: Lexicon, diversity: float = 1.0) -> torch.Tensor:
    """Mean entropy of the posteriors over a lexicon's words, in nats, less `diversity` times that of their mean.

    Each utterance is to be sure of a word, and all together not of the same one. A calibrated lexicon's posteriors are
    calibrated.
    """
    return _WordEntropy.apply(logits, lengths, lexicon, diversity)


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
    of every word (all alignments), so the timing of a teacher's tokens does not matter. The loss is multiplied by the
    square of the temperature, like the frame-wise KL.
    """
    shares = weights.float() * (temperature**2 / weights.sum().clamp_min(1e-9))
    return _WordKL.apply(logits, lengths, lexicon, target, shares, temperature)


def _scattered(ctx, upstream: torch.Tensor) -> torch.Tensor:
    """[B, T, V]: the gradient, which a forward pass kept for the tokens in use."""
    (part,) = ctx.saved_tensors
    grad = part.new_zeros(ctx.shape)
    grad[..., ctx.columns] = part * upstream.to(part.dtype)
    return grad


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax of rows, in numpy; zeros if a row is all -inf."""
    largest = scores.max(1, keepdims=True)
    powers = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    return powers / np.maximum(powers.sum(1, keepdims=True), 1e-300)
