"""Caches of what stays the same for an utterance over a training, so that it is computed once.

A frozen encoder has neither dropout nor masks, and its encodings do not change; nor do the features of recordings,
which are augmented later. A cached tensor equals a new one.
"""

from collections.abc import Callable

import torch
from torch import nn

from kdlib.corpus.inputs import Batch
from kdlib.models.encoder import Encoded, Encoder

MAX_BYTES = 512 * 2**20  # of a cache; further utterances are computed again
Compute = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class UtteranceCache:
    """Frames [T, D] by utterance, computed from inputs and their lengths."""

    def __init__(self, compute: Compute, max_bytes: int) -> None:
        self.compute, self.left = compute, max_bytes
        self.cached: dict[str, torch.Tensor] = {}

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The frames of a batch [B, T, D], and their lengths; inputs are read only for new utterances.

        Each is computed alone: with others its last bits would depend on them, and so on where a killed run resumed.
        """
        computed: dict[str, torch.Tensor] = {}
        for row, utt_id in enumerate(batch.utt_ids):
            if utt_id not in self.cached:
                new = batch.select([row])
                with torch.no_grad():
                    frames, lengths = self.compute(new.inputs, new.lengths)
                computed[utt_id] = frames[0, : int(lengths)].clone()
        rows = [computed[utt_id] if utt_id in computed else self.cached[utt_id] for utt_id in batch.utt_ids]
        for utt_id, row in computed.items():
            size = row.numel() * row.element_size()
            if size <= self.left:
                self.cached[utt_id], self.left = row, self.left - size
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


class EncoderCache(UtteranceCache):
    """The encodings of a frozen encoder."""

    def __init__(self, encoder: Encoder, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(lambda inputs, lengths: encoder(inputs, lengths)[:2], max_bytes)

    def __call__(self, batch: Batch, layers: tuple[int, ...] = ()) -> Encoded:
        """The encoder's output on a batch; there are no inner layers."""
        return Encoded(*super().__call__(batch), {})


class FeatureCache(UtteranceCache):
    """The features of utterances; the encoder runs on them in every step, with the augmentation of the batch."""

    def __init__(self, encoder: Encoder, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(encoder.extract_features, max_bytes)
        self.encoder = encoder

    def __call__(self, batch: Batch, layers: tuple[int, ...] = ()) -> Encoded:
        """The encoder's output on a batch."""
        return self.encoder.augmented(*self.features(batch), batch, layers)

    def features(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The features of a batch, which another model with the same analysis may use, and their lengths."""
        return super().__call__(batch)
