"""Learned fusion of teachers (seed 003): a weight a teacher and frame, by attention or by a transformer over time.

A fusion sees what enters the teachers' CTC heads and is trained on the fold's dev speaker, whom no teacher has heard:
on training speech every speaker's own teacher would win by what it remembers. It begins as the plain mean.
"""

import copy
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from kdlib.corpus.manifest import Utterance
from kdlib.errors import UserError
from kdlib.models import Outputs
from kdlib.models.encoder_conformer import length_mask
from kdlib.objectives.reference_losses import ctc_loss

if TYPE_CHECKING:
    from kdlib.targets.aggregation import TeacherEnsemble
    from kdlib.tokens import Tokens

BATCH, LR, LOOK = 32, 2e-3, 10
Loss = Callable[[Sequence[Utterance]], torch.Tensor]


class Attention(nn.Module):
    """A weight a teacher and frame, from what the teacher and the mean of all see there."""

    def __init__(self, widths: Sequence[int], size: int, dim: int = 32) -> None:
        super().__init__()
        self.keys = nn.ModuleList([nn.Linear(width, dim) for width in widths])
        self.query = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(len(widths)))
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)

    def forward(self, hidden: Sequence[torch.Tensor], lengths: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Activations [B, T, d] of K teachers -> scores [B, T, K]."""
        keys = torch.stack([key(one) for key, one in zip(self.keys, hidden, strict=True)], 2)  # [B, T, K, dim]
        query = self.query(torch.tanh(keys.mean(2)))
        return (keys * query[:, :, None]).sum(-1) / keys.shape[-1] ** 0.5 + self.bias, None


class Transformer(nn.Module):
    """Weights by frame, and a correction of the logits, from all teachers' activations over time."""

    def __init__(self, widths: Sequence[int], size: int, dim: int = 64, layers: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(width, dim) for width in widths])
        self.over_time = transformer_layers(dim, layers, heads)
        self.scores, self.correction = nn.Linear(dim, len(widths)), nn.Linear(dim, size)
        for one in (self.scores, self.correction):
            nn.init.zeros_(one.weight)
            nn.init.zeros_(one.bias)

    def forward(self, hidden: Sequence[torch.Tensor], lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations [B, T, d] of K teachers -> scores [B, T, K] and what is added to the logits [B, T, V]."""
        seen = sum(project(one) for project, one in zip(self.projections, hidden, strict=True))
        seen = apply_layers(self.over_time, seen, lengths)
        return self.scores(seen), self.correction(seen)


def transformer_layers(dim: int, layers: int, heads: int) -> nn.Module:
    """Transformer layers for `through_time`."""
    one = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(one, layers, enable_nested_tensor=False)


def apply_layers(layers: nn.Module, seen: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Encodings [B, T, D] with their places in time, through layers that look at no padding."""
    steps, dim = seen.shape[1:]
    angles = torch.arange(steps, device=seen.device)[:, None] / 10_000 ** (
        torch.arange(0, dim, 2, device=seen.device) / dim
    )
    places = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim]
    return layers(seen + places, src_key_padding_mask=~length_mask(lengths.to(seen.device), steps))


def new_fusion(kind: str, ensemble: "TeacherEnsemble") -> nn.Module:
    """A fusion for the teachers of an ensemble, which says at first what their mean says."""
    headers = [store.header for store in ensemble.stores.values()]
    widths, size = [header.width for header in headers], headers[0].size
    return {"attention": Attention, "transformer": Transformer}[kind](widths, size)


def fit_fusion(
    kind: str, ensemble: "TeacherEnsemble", learnt: Sequence[Utterance], tokens: "Tokens", seed: int, steps: int
) -> nn.Module:
    """A fusion trained on some utterances' references by CTC, as it is best on a fifth of them that is kept apart."""
    from kdlib.runtime import seed_everything

    if not learnt:
        raise UserError("learned fusion: there is no dev speech to learn on; name another aggregation.method")
    seed_everything(seed)
    fusion, ensemble = new_fusion(kind, ensemble).eval(), ensemble.cached()
    drawn = random.Random(seed).sample(list(learnt), len(learnt))
    check, rest = drawn[: len(drawn) // 5] or drawn, drawn[len(drawn) // 5 :]

    def loss_of(utterances: Sequence[Utterance]) -> float:
        with torch.no_grad():
            return float(loss(utterances))

    def loss(batch: Sequence[Utterance]) -> torch.Tensor:
        logits, frames = ensemble.fused(fusion, [utt.utt_id for utt in batch], [utt.speaker for utt in batch])
        return ctc_loss(Outputs(logits, frames, logits), [tokens.encode(utt.text) for utt in batch])

    best, kept = loss_of(check), copy.deepcopy(fusion.state_dict())  # the mean, until something is better

    def look(step: int) -> None:
        nonlocal best, kept
        if step % LOOK == 0 and (found := loss_of(check)) < best:
            best, kept = found, copy.deepcopy(fusion.state_dict())

    minimise(fusion, loss, rest, seed, steps, look)
    fusion.load_state_dict(kept)
    return fusion.eval()


def minimise(
    model: nn.Module,
    loss: Loss,
    utterances: Sequence[Utterance],
    seed: int,
    steps: int,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a small model on what stores hold: seconds, so no checkpoints. `look` is called behind every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-2)
    scale = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps + 1)
    rng, waiting = random.Random(seed), []
    model.train()
    for step in range(1, steps + 1):
        if not waiting:
            waiting = list(utterances)
            rng.shuffle(waiting)
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        optimizer.zero_grad()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scale.step()
        model.eval()
        look(step)
        model.train()
    model.eval()
