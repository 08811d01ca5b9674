"""A cache of a frozen encoder's encodings, so that every utterance is encoded only once.

In training a frozen encoder has neither dropout nor augmentation: a cached encoding equals a new one.
"""

from collections.abc import Sequence

import torch
from torch import nn

MAX_BYTES = 512 * 2**20  # of cached encodings; further utterances are encoded again


class EncoderCache:
    """Encodings by utterance."""

    def __init__(self, encoder: nn.Module, max_bytes: int = MAX_BYTES) -> None:
        self.encoder, self.left = encoder, max_bytes
        self.cached: dict[str, torch.Tensor] = {}

    def __call__(
        self, utt_ids: Sequence[str], wavs: torch.Tensor, wav_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodings [B, T, D] and frames [B] of a batch: samples [B, N] and their lengths [B]."""
        new = [row for row, utt_id in enumerate(utt_ids) if utt_id not in self.cached]
        computed: dict[str, torch.Tensor] = {}
        if new:
            with torch.no_grad():
                encoded, frames, _ = self.encoder(wavs[new, : int(wav_lens[new].max())], wav_lens[new])
            for row, encoding, length in zip(new, encoded, frames.tolist(), strict=True):
                computed[utt_ids[row]] = encoding[:length].clone()
        rows = [computed[utt_id] if utt_id in computed else self.cached[utt_id] for utt_id in utt_ids]
        for utt_id, encoding in computed.items():
            size = encoding.numel() * encoding.element_size()
            if size <= self.left:
                self.cached[utt_id], self.left = encoding, self.left - size
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths
