"""A whole encoder in one file: energies of frames of 40 ms, and two layers that look at neighbours."""

import torch
from torch import nn

from kdlib.models.encoder import Encoded, Encoder
from kdlib.models.masks import length_mask
from kdlib.settings.encoder import EncoderSizes, InputShape

HOP, BANDS = 640, 32


class Toy(Encoder):
    """A small convolutional encoder."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width, self.layers, self.stride_ms = width, layers, 40.0
        self.inputs = nn.Linear(BANDS, width)
        self.convolutions = nn.ModuleList([nn.Conv1d(width, width, 3, padding=1) for _ in range(layers)])

    @property
    def config(self) -> dict:
        return {"width": self.width, "layers": self.layers}

    @classmethod
    def build(cls, config: dict) -> "Toy":
        return cls(**config)

    @classmethod
    def of_sizes(cls, sizes: EncoderSizes, inputs: InputShape) -> "Toy":
        return cls(sizes.d_model, sizes.layers)

    def extract_features(self, inputs, lengths):
        frames = inputs[:, : inputs.shape[1] // HOP * HOP].reshape(len(inputs), -1, BANDS, HOP // BANDS)
        return frames.pow(2).mean(-1).add(1e-6).log(), (lengths // HOP).clamp_min(1)

    def encode(self, features, lengths, layers=()):
        inside = length_mask(lengths, features.shape[1])[..., None]
        values, hidden = self.inputs(self.masked(features, lengths)) * inside, {}
        for number, layer in enumerate(self.convolutions, start=1):
            values = hidden[number] = torch.relu(layer(values.transpose(1, 2)).transpose(1, 2)) * inside
        return Encoded(values, lengths, {number: hidden[number] for number in layers})
