"""The Transformer decoder over any encoder's encodings: teacher-forced, or free-running and greedy.

BOS and EOS are explicit: the inputs are BOS and the text, the targets the text and EOS. Padding is masked by lengths,
never by a token's id (SpeechBrain's own masks take id 0 for padding, which is our BOS).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from kdlib.models.masks import length_mask
from kdlib.tokens import BOS, EOS


@dataclass(frozen=True)
class Heads:
    """The sizes of the heads on an encoder. With 0 layers there is no decoder: CTC only."""

    size: int  # tokens
    layers: int = 4
    heads: int = 4
    ffn: int = 1024
    dropout: float = 0.1


class AttentionDecoder(nn.Module):
    """SpeechBrain's Transformer decoder between an embedding and an output layer."""

    def __init__(self, *, size: int, d_model: int, heads: int, layers: int, ffn: int, dropout: float = 0.1) -> None:
        from speechbrain.lobes.models.transformer.Transformer import (
            NormalizedEmbedding,
            PositionalEncoding,
            TransformerDecoder,
        )

        super().__init__()
        self.embed = NormalizedEmbedding(d_model, size)
        self.positions = PositionalEncoding(d_model)
        self.decoder = TransformerDecoder(
            num_layers=layers, nhead=heads, d_ffn=ffn, d_model=d_model, dropout=dropout, normalize_before=True
        )
        self.head = nn.Linear(d_model, size)

    def activations(self, encoded: torch.Tensor, frames: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """The input of the output layer, [B, L, D], for inputs [B, L] that begin with BOS."""
        embedded = self.embed(inputs)
        steps = inputs.shape[1]
        causal = torch.ones(steps, steps, dtype=torch.bool, device=inputs.device).triu(1)
        hidden, *_ = self.decoder(
            embedded + self.positions(embedded),
            encoded,
            tgt_mask=causal,
            memory_key_padding_mask=~length_mask(frames, encoded.shape[1]),
        )
        return hidden

    def forward(self, encoded: torch.Tensor, frames: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V] of the token after each of the inputs."""
        return self.head(self.activations(encoded, frames, inputs))

    def greedy(self, encoded: torch.Tensor, frames: torch.Tensor, longest: int) -> list[list[int]]:
        """Decode free-running: take the best token after BOS, and so on, until EOS or `longest` tokens."""
        return greedy(self, encoded, frames, longest)


@torch.no_grad()
def greedy(
    decoder: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    encoded: torch.Tensor,
    frames: torch.Tensor,
    longest: int,
) -> list[list[int]]:
    """Decode greedily with any function from encodings, frames and inputs to logits, like `AttentionDecoder`."""
    inputs = torch.full((len(encoded), 1), BOS, dtype=torch.long, device=encoded.device)
    active, hypotheses = torch.arange(len(encoded), device=encoded.device), [[] for _ in encoded]
    while len(active) and inputs.shape[1] <= longest:
        best = decoder(encoded, frames, inputs)[:, -1].argmax(-1)
        going = best != EOS  # ended hypotheses leave the batch
        active, encoded, frames = active[going], encoded[going], frames[going]
        inputs = torch.cat([inputs[going], best[going, None]], 1)
        for row, token in zip(active.tolist(), inputs[:, -1].tolist(), strict=True):
            hypotheses[row].append(token)
    return hypotheses


def teacher_forced(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make inputs BOS + ids [B, L], targets ids + EOS [B, L], and lengths [B], from token ids.

    >>> inputs, targets, lengths = teacher_forced([[7, 8], [9]])
    >>> inputs.tolist(), targets.tolist(), lengths.tolist()
    ([[0, 7, 8], [0, 9, 1]], [[7, 8, 1], [9, 1, 1]], [3, 2])
    """
    inputs = [torch.tensor([BOS, *row]) for row in ids]
    targets = [torch.tensor([*row, EOS]) for row in ids]
    pad = {"batch_first": True, "padding_value": EOS}
    lengths = torch.tensor([len(row) + 1 for row in ids])
    return nn.utils.rnn.pad_sequence(inputs, **pad), nn.utils.rnn.pad_sequence(targets, **pad), lengths
