"""What every encoder is: inputs in, frames out. `encoders.py` lists them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.models.augment import SpecAugment, mixed, stretch
from kdlib.models.decoder import AttentionDecoder, Heads
from kdlib.settings.encoder import EncoderSizes, InputShape
from kdlib.tokens import Tokens


class Encoded(NamedTuple):
    """An encoder's output on a batch of B utterances: T frames, D dimensions."""

    frames: torch.Tensor  # [B, T, D]
    lengths: torch.Tensor  # [B], frames without padding
    hidden: dict[int, torch.Tensor]  # layer, the first is 1 -> [B, T, D]


class Encoder(nn.Module):
    """An encoder. Padding must not change an utterance's frames: stored outputs are those of other batches."""

    width: int  # dimensions of a frame
    stride_ms: float  # from a frame to the next
    layers: int  # whose outputs can be asked for
    spec_augment: SpecAugment | None = None  # masks, in training only
    preprocessor_frozen = True  # else feature extraction is in training mode too

    @property
    def config(self) -> dict:
        """What `build` needs to build the same encoder."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: dict) -> "Encoder":
        """Build an encoder with random weights."""
        raise NotImplementedError

    @classmethod
    def of_sizes(cls, sizes: EncoderSizes, inputs: InputShape) -> "Encoder":
        """Build an encoder with random weights, the sizes of a recipe, and the inputs of its corpus."""
        raise NotImplementedError

    @classmethod
    def pretrained(cls, source: Path, tokens: Tokens) -> "tuple[Encoder, dict[str, torch.Tensor] | None]":
        """A trained encoder, and the weights of its CTC head for these tokens, if it was trained with them.

        `source` is a saved model, such as the teachers' base model; for an encoder with `checkpoint` in `encoders.py`,
        the recipe's pretrained model.
        """
        from kdlib.models import hybrid

        model, its_tokens, _ = hybrid.load(source)
        if not isinstance(model.encoder, cls):
            raise UserError(f"{source} has a {type(model.encoder).__name__}; expected a {cls.__name__}")
        same = its_tokens.fingerprint == tokens.fingerprint
        return model.encoder, model.ctc_head.state_dict() if same else None

    def learn_statistics(self, utterances: Sequence[Utterance]) -> None:
        """Before a training: what the encoder takes from its speech, such as means, unless its weights have it."""

    def new_decoder(self, heads: Heads) -> AttentionDecoder:
        """The attention decoder over this encoder."""
        sizes = {"heads": heads.heads, "layers": heads.layers, "ffn": heads.ffn, "dropout": heads.dropout}
        return AttentionDecoder(size=heads.size, d_model=self.width, **sizes)

    def extract_features(self, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [B, N] (samples) or [B, N, F] (features), their lengths [B] -> features [B, T, F] and theirs.

        Without weights that are trained: a training may keep them.
        """
        raise NotImplementedError

    def encode(self, features: torch.Tensor, lengths: torch.Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """Features [B, T, F], their lengths [B], and the layers to return."""
        raise NotImplementedError

    def forward(self, inputs: torch.Tensor, lengths: torch.Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """Inputs [B, N] (samples) or [B, N, F] (features), their lengths [B], and the layers to return."""
        return self.encode(*self.extract_features(inputs, lengths), layers)

    def of_batch(self, batch: Batch, layers: tuple[int, ...] = ()) -> Encoded:
        """The output on a batch, with its augmentation, and the layers to return."""
        return self.augmented(*self.extract_features(batch.inputs, batch.lengths), batch, layers)

    def augmented(
        self, features: torch.Tensor, lengths: torch.Tensor, batch: Batch, layers: tuple[int, ...] = ()
    ) -> Encoded:
        """The output on features [B, T, F] of a batch, mixed and stretched as it says."""
        return self.encode(*stretch(*mixed(features, lengths, batch.mix), batch.tempo), layers)

    def masked(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Features [B, T, F], in training with the masks of augmentation."""
        if not self.training or not self.spec_augment:
            return features
        return self.spec_augment(features.transpose(1, 2), lengths).transpose(1, 2)
