"""A cache of a frozen encoder's encodings, so that every utterance is encoded only once.

In training a frozen encoder has neither dropout nor augmentation: a cached encoding equals a new one.
"""

import torch
from torch import nn

from kdlib.corpus.inputs import Batch
from kdlib.models.encoder import Encoded, Encoder

MAX_BYTES = 512 * 2**20  # of cached encodings; further utterances are encoded again


class EncoderCache:
    """Encodings by utterance."""

    def __init__(self, encoder: Encoder, max_bytes: int = MAX_BYTES) -> None:
        self.encoder, self.left = encoder, max_bytes
        self.cached: dict[str, torch.Tensor] = {}

    def __call__(self, batch: Batch) -> Encoded:
        """The encoder's output on a batch, without inner layers."""
        new = batch.select([row for row, utt_id in enumerate(batch.utt_ids) if utt_id not in self.cached])
        computed: dict[str, torch.Tensor] = {}
        if len(new):
            with torch.no_grad():
                encoded, frames, _ = self.encoder(new.inputs, new.lengths)
            for utt_id, encoding, length in zip(new.utt_ids, encoded, frames.tolist(), strict=True):
                computed[utt_id] = encoding[:length].clone()
        rows = [computed[utt_id] if utt_id in computed else self.cached[utt_id] for utt_id in batch.utt_ids]
        for utt_id, encoding in computed.items():
            size = encoding.numel() * encoding.element_size()
            if size <= self.left:
                self.cached[utt_id], self.left = encoding, self.left - size
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return Encoded(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, {})
