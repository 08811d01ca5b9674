"""SpeechBrain's Conformer encoder, for teachers and students: samples in, encodings out, one frame per 40 ms.

Log-mel features, normalised per utterance -> two convolutions of stride 2 -> Conformer encoder. Padding is masked at
every step, so that an utterance's outputs do not depend on its neighbours in the batch: stored outputs come from other
batches than those of training. SpeechBrain takes 1-4 s to import, and is therefore imported inside functions.
"""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from kdlib.corpus.audio import RATE_HZ
from kdlib.models.encoder import Encoded, Encoder
from kdlib.models.masks import length_mask
from kdlib.settings.encoder import EncoderSizes, InputShape

HOP = RATE_HZ // 100
STRIDE_MS = 40.0


@dataclass(frozen=True)
class ConformerShape:
    """The sizes of an encoder; the defaults are the original study's."""

    d_model: int = 144
    layers: int = 12
    heads: int = 4
    ffn: int = 1024
    kernel: int = 31
    mels: int = 80
    channels: int = 32  # of the two convolutions
    dropout: float = 0.1


class Conformer(Encoder):
    """SpeechBrain's Conformer encoder with log-mel features and convolutional subsampling."""

    def __init__(self, shape: ConformerShape) -> None:
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder
        from speechbrain.nnet.attention import RelPosEncXL

        super().__init__()
        self.shape, self.width, self.stride_ms, self.layers = shape, shape.d_model, STRIDE_MS, shape.layers
        self.features = Fbank(sample_rate=RATE_HZ, n_mels=shape.mels, n_fft=512, win_length=25, hop_length=10)
        self.subsampling = nn.ModuleList(
            [nn.Conv2d(channels, shape.channels, 3, stride=2, padding=1) for channels in (1, shape.channels)]
        )
        self.project = nn.Linear(shape.channels * ((shape.mels + 3) // 4), shape.d_model)
        self.positions = RelPosEncXL(shape.d_model)
        self.encoder = ConformerEncoder(
            num_layers=shape.layers,
            d_model=shape.d_model,
            d_ffn=shape.ffn,
            nhead=shape.heads,
            kernel_size=shape.kernel,
            dropout=shape.dropout,
            output_hidden_states=True,
        )
        for layer in self.encoder.layers:  # SpeechBrain masks after this convolution: padding has leaked in by then
            layer.convolution_module.conv.register_forward_pre_hook(self._mask_padding)
        self.dropout = nn.Dropout(shape.dropout)

    @property
    def config(self) -> dict:
        """The sizes."""
        return asdict(self.shape)

    @classmethod
    def build(cls, config: dict) -> "Conformer":
        """Build an encoder with random weights."""
        return cls(ConformerShape(**config))

    @classmethod
    def of_sizes(cls, sizes: EncoderSizes, inputs: InputShape) -> "Conformer":
        """Build an encoder with random weights and the sizes of a recipe."""
        known = {name: getattr(sizes, name) for name in ConformerShape.__dataclass_fields__ if name != "channels"}
        return cls(ConformerShape(**known))

    def encode(self, features: torch.Tensor, lengths: torch.Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """Features [B, T, F], their lengths [B], and the layers to return."""
        image, frames = self.masked(features, lengths)[:, None], lengths
        for layer in self.subsampling:
            image, frames = nn.functional.gelu(layer(image)), (frames + 1) // 2
            image = image * length_mask(frames, image.shape[2])[:, None, :, None]
        batch, channels, steps, bands = image.shape
        flat = self.dropout(self.project(image.transpose(1, 2).reshape(batch, steps, channels * bands)))
        self._mask = length_mask(frames, steps)
        encoded, _, hidden = self.encoder(flat, src_key_padding_mask=~self._mask, pos_embs=self.positions(flat))
        return Encoded(encoded, frames, {layer: hidden[layer] for layer in layers})

    def _mask_padding(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0] * self._mask[:, None, :],)

    def extract_features(self, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mel features [B, T, F] with mean 0 and deviation 1 per band, over the utterance's own frames."""
        frames = lengths // HOP + 1
        with torch.no_grad():
            mels = self.features(inputs)
            mask = length_mask(frames, mels.shape[1])[..., None]
            count = frames[:, None, None]
            mean = (mels * mask).sum(1, keepdim=True) / count
            deviation = (((mels - mean) * mask) ** 2).sum(1, keepdim=True).div(count).sqrt()
            return (mels - mean) / (deviation + 1e-5) * mask, frames
