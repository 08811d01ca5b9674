"""A frozen encoder says the same of an utterance every time: it is asked once, and remembered.

In training a frozen encoder has neither dropout nor augmentation, so what is remembered is what it would say.
"""

from collections.abc import Sequence

import torch
from torch import nn

MAX_BYTES = 512 * 2**20  # of encodings that are remembered; of what is more the encoder is asked again


class EncoderCache:
    """Encodings by utterance."""

    def __init__(self, encoder: nn.Module, most_bytes: int = MAX_BYTES) -> None:
        self.encoder, self.left = encoder, most_bytes
        self.known: dict[str, torch.Tensor] = {}

    def __call__(
        self, utt_ids: Sequence[str], wavs: torch.Tensor, wav_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodings [B, T, D] and frames [B] of a batch: samples [B, N] and their numbers [B]."""
        new = [row for row, utt_id in enumerate(utt_ids) if utt_id not in self.known]
        found: dict[str, torch.Tensor] = {}
        if new:
            with torch.no_grad():
                encoded, frames, _ = self.encoder(wavs[new, : int(wav_lens[new].max())], wav_lens[new])
            for row, one, length in zip(new, encoded, frames.tolist(), strict=True):
                found[utt_ids[row]] = one[:length].clone()
        rows = [found[one] if one in found else self.known[one] for one in utt_ids]
        for utt_id, one in found.items():
            size = one.numel() * one.element_size()
            if size <= self.left:
                self.known[utt_id], self.left = one, self.left - size
        lengths = torch.tensor([len(one) for one in rows], device=rows[0].device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths
