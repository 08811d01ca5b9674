"""Learned fusion of teachers: a weight per teacher and frame, by attention or by a transformer over time.

A fusion reads the inputs of the teachers' CTC heads and is trained on the fold's dev speaker, whom no teacher was
trained on: on training speech every speaker's own teacher would win by overfitting. It starts as the plain mean.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.models.masks import length_mask
from kdlib.objectives.reference_losses import ctc_loss
from kdlib.runtime import seed_everything
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.choice import halves
from kdlib.tokens import Tokens

BATCH, LR, VALIDATE_EVERY, PATIENCE = 32, 2e-3, 10, 3  # steps; validations without improvement
PARTS = {None: "whole", 0: "half0", 1: "half1"}  # of the dev speech
Loss = Callable[[Sequence[Utterance]], torch.Tensor]


@dataclass(frozen=True)
class Training:
    """The training of a small model on stored outputs."""

    seed: int
    steps: int


class Attention(nn.Module):
    """A weight per teacher and frame, from the teacher's activations and the mean of all teachers'."""

    def __init__(self, widths: Sequence[int], size: int, dim: int = 32) -> None:
        super().__init__()
        self.keys = nn.ModuleList([nn.Linear(width, dim) for width in widths])
        self.query = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(len(widths)))
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)

    def forward(self, hidden: Sequence[torch.Tensor], lengths: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Activations [B, T, d] of K teachers -> scores [B, T, K]."""
        keys = torch.stack([key(states) for key, states in zip(self.keys, hidden, strict=True)], 2)  # [B, T, K, dim]
        query = self.query(torch.tanh(keys.mean(2)))
        return (keys * query[:, :, None]).sum(-1) / keys.shape[-1] ** 0.5 + self.bias, None


class Transformer(nn.Module):
    """Weights by frame, and a correction of the logits, from all teachers' activations over time."""

    def __init__(self, widths: Sequence[int], size: int, dim: int = 64, layers: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(width, dim) for width in widths])
        self.over_time = transformer_layers(dim, layers, heads)
        self.scores, self.correction = nn.Linear(dim, len(widths)), nn.Linear(dim, size)
        for layer in (self.scores, self.correction):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Sequence[torch.Tensor], lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations [B, T, d] of K teachers -> scores [B, T, K] and a correction of the logits [B, T, V]."""
        encoded = sum(project(states) for project, states in zip(self.projections, hidden, strict=True))
        encoded = apply_layers(self.over_time, encoded, lengths)
        return self.scores(encoded), self.correction(encoded)


def transformer_layers(dim: int, layers: int, heads: int) -> nn.Module:
    """Build transformer layers for `apply_layers`."""
    layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def apply_layers(
    layers: nn.Module, encoded: torch.Tensor, lengths: torch.Tensor, *, causal: bool = False
) -> torch.Tensor:
    """Add sinusoidal positions to encodings [B, T, D] and run the layers with padding masked, and later steps."""
    steps, dim = encoded.shape[1:]
    exponents = torch.arange(0, dim, 2, device=encoded.device) / dim
    angles = torch.arange(steps, device=encoded.device)[:, None] / 10_000**exponents
    positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim]
    later = torch.ones(steps, steps, dtype=torch.bool, device=encoded.device).triu(1) if causal else None
    padding = ~length_mask(lengths.to(encoded.device), steps)
    return layers(encoded + positions, mask=later, src_key_padding_mask=padding)


def new_fusion(kind: str, ensemble: TeacherEnsemble) -> nn.Module:
    """Build an untrained fusion for the teachers of an ensemble; its output is their mean."""
    headers = [store.header for store in ensemble.stores.values()]
    widths, size = [header.width for header in headers], headers[0].size
    return {"attention": Attention, "transformer": Transformer}[kind](widths, size)


def train_fusions(
    partial: Path, kind: str, ensemble: TeacherEnsemble, dev: Sequence[Utterance], tokens: Tokens, training: Training
) -> None:
    """Train a fusion on dev speech, and one on each half of it, for scores on the other half."""
    usable, half_of = [utt for utt in dev if ensemble.coverage([utt.utt_id]).usable], halves(dev)
    for part, name in PARTS.items():
        utterances = [utt for utt in usable if part in (None, half_of[utt.utt_id])]
        trained = fit_fusion(kind, ensemble, utterances, tokens, training)
        weights = {key: weight.contiguous() for key, weight in trained.state_dict().items()}
        save_file(weights, partial / f"{name}.safetensors")


def load_fusion(folder: Path, kind: str, ensemble: TeacherEnsemble, half: int | None = None) -> nn.Module:
    """Load a trained fusion: of all dev speech, or of one half of it."""
    model = new_fusion(kind, ensemble)
    model.load_state_dict(load_file(folder / f"{PARTS[half]}.safetensors"))
    with torch.no_grad():
        return model.eval().requires_grad_(False)


def fit_fusion(
    kind: str, ensemble: TeacherEnsemble, utterances: Sequence[Utterance], tokens: Tokens, training: Training
) -> nn.Module:
    """Train a fusion on references by CTC; the checkpoint that is best on a validation fifth is kept."""
    if not utterances:
        raise UserError("learned fusion: there is no dev speech to train on; name another aggregation.method")
    seed = training.seed
    seed_everything(seed)
    fusion, ensemble = new_fusion(kind, ensemble).eval(), ensemble.cached()
    drawn = random.Random(seed).sample(list(utterances), len(utterances))
    validation, train = drawn[: len(drawn) // 5] or drawn, drawn[len(drawn) // 5 :]

    def loss(batch: Sequence[Utterance]) -> torch.Tensor:
        return ctc_loss(ensemble.fused(fusion, Batch(batch)), [tokens.encode(utt.text) for utt in batch])

    def validation_loss() -> float:
        with torch.no_grad():
            return float(loss(validation))

    best, weights = validation_loss(), copy.deepcopy(fusion.state_dict())  # the mean, until training improves on it

    waited = 0

    def validate(step: int) -> bool:
        nonlocal best, weights, waited
        if step % VALIDATE_EVERY:
            return False
        waited += 1
        if (current := validation_loss()) < best:
            best, weights, waited = current, copy.deepcopy(fusion.state_dict()), 0
        return waited == PATIENCE

    minimise(fusion, loss, train, training, validate)
    fusion.load_state_dict(weights)
    return fusion.eval()


def minimise(
    model: nn.Module,
    loss: Loss,
    utterances: Sequence[Utterance],
    training: Training,
    validate: Callable[[int], bool | None] = lambda step: None,
) -> None:
    """Train a small model on stored outputs: seconds, so no checkpoints.

    `validate` is called after every step, and ends the training where it returns true.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-2)
    scale = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, training.steps + 1)
    rng, remaining = random.Random(training.seed), []
    model.train()
    for step in range(1, training.steps + 1):
        if not remaining:
            remaining = list(utterances)
            rng.shuffle(remaining)
        batch, remaining = remaining[:BATCH], remaining[BATCH:]
        optimizer.zero_grad()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scale.step()
        model.eval()
        if validate(step):
            break
        model.train()
    model.eval()
