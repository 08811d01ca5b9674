"""A bidirectional LSTM on feature sequences: projection, frames halved, residual layers of 2 H dimensions.

What enters a layer is normalised, and its outputs are added to what entered: plain stacked LSTMs learned the embedded
sentences several times more slowly. The hidden states of a layer are its own outputs. Every direction is an LSTM of its
own, which sees padding last, where it changes nothing: on a CPU that is two to three times faster than packed
sequences. Features are normalised by the mean and deviation of the training speech, which are part of the weights.
With `attention`, every frame may add what other frames are about: one head of queries and keys of 64 dimensions looks
for frames that are alike, whose outputs themselves are averaged, and a gate per frame, nearly closed at first, decides
how much of that is added. So the layer has few weights, begins as the plain BiLSTM, and is inspected by its gate.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdlib.corpus import inputs as corpus_inputs
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.models.encoder import Encoded, Encoder
from kdlib.models.masks import length_mask
from kdlib.settings.encoder import EncoderSizes, InputShape

QUERY = 64  # dimensions of queries and keys
CLOSED = -2.0  # the gate's bias at first: an eighth of the context is added
SAMPLE = 1000  # utterances that mean and deviation are estimated on


@dataclass(frozen=True)
class BiLSTMShape:
    """The sizes of an encoder; the defaults are those of `params/bilstm.yaml`."""

    inputs: int = 512
    d_model: int = 256  # H, of one direction
    layers: int = 4
    dropout: float = 0.3
    attention: bool = False
    recompute: bool = False
    step_ms: float = 40.0  # from a feature vector to the next


class BiLSTM(Encoder):
    """Projection, a convolution of stride 2, and residual bidirectional LSTM layers."""

    def __init__(self, shape: BiLSTMShape) -> None:
        super().__init__()
        self.shape, self.layers = shape, shape.layers
        self.width, self.stride_ms = 2 * shape.d_model, 2 * shape.step_ms
        self.register_buffer("mean", torch.zeros(shape.inputs))
        self.register_buffer("deviation", torch.zeros(shape.inputs))  # 0: not estimated yet
        self.project = nn.Linear(shape.inputs, shape.d_model)
        self.halve = nn.Conv1d(shape.d_model, self.width, 3, stride=2, padding=1)
        self.norm, self.norm_halved = nn.LayerNorm(shape.d_model), nn.LayerNorm(self.width)
        self.lstm = nn.ModuleList(BothDirections(self.width, shape.d_model) for _ in range(shape.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(self.width) for _ in range(shape.layers))
        self.dropout = nn.Dropout(shape.dropout)
        self.attention = SelectiveAttention(self.width) if shape.attention else None

    @property
    def config(self) -> dict:
        """The sizes."""
        return asdict(self.shape)

    @classmethod
    def build(cls, config: dict) -> "BiLSTM":
        """Build an encoder with random weights."""
        return cls(BiLSTMShape(**config))

    @classmethod
    def of_sizes(cls, sizes: EncoderSizes, inputs: InputShape) -> "BiLSTM":
        """Build an encoder with random weights and the sizes of a recipe."""
        names = "d_model", "layers", "dropout", "attention", "recompute"
        known = {name: getattr(sizes, name) for name in names}
        return cls(BiLSTMShape(inputs=inputs.width, step_ms=inputs.step_ms, **known))

    def learn_statistics(self, utterances: Sequence[Utterance]) -> None:
        """Estimate mean and deviation of the features on training speech, unless the weights have them."""
        if self.deviation.any() or not utterances:
            return
        total, squares, frames = 0.0, 0.0, 0
        for utt in utterances[:: -(-len(utterances) // SAMPLE)]:
            values = torch.from_numpy(corpus_inputs.load(utt)).double()
            self._check_width(values.shape[-1])
            total, squares, frames = total + values.sum(0), squares + values.pow(2).sum(0), frames + len(values)
        mean = total / frames
        self.mean.copy_(mean)
        self.deviation.copy_((squares / frames - mean**2).clamp_min(0).sqrt().clamp_min(1e-5))

    def extract_features(self, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, T, F], normalised, and their lengths; 0 in padding."""
        self._check_width(inputs.shape[-1])
        if self.deviation.any():
            inputs = (inputs - self.mean) / self.deviation
        return inputs * length_mask(lengths, inputs.shape[1])[..., None], lengths

    def encode(self, features: torch.Tensor, lengths: torch.Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """Features [B, T, F], their lengths [B], and the layers to return."""
        inside = length_mask(lengths, features.shape[1])[..., None]
        values = torch.relu(self.norm(self.project(self.masked(features, lengths)))) * inside
        values, frames = self.norm_halved(self.halve(values.transpose(1, 2)).transpose(1, 2)), (lengths + 1) // 2
        inside, order = length_mask(frames, int(frames.max()))[..., None], reversed_frames(frames, int(frames.max()))
        values, hidden = values[:, : len(order[0])], {}
        again = self.shape.recompute and self.training and torch.is_grad_enabled()
        for number, (layer, norm) in enumerate(zip(self.lstm, self.norms, strict=True), start=1):
            given = self.dropout(norm(values))
            own = checkpoint(layer, given, order, use_reentrant=False) if again else layer(given, order)
            values = values + own
            if number in layers:
                hidden[number] = own * inside  # between -1 and 1, which half precision stores well
        values = self.dropout(values) * inside
        return Encoded(values if self.attention is None else self.attention(values, frames), frames, hidden)

    def _check_width(self, width: int) -> None:
        if width != self.shape.inputs:
            raise UserError(
                f"the encoder takes {self.shape.inputs} features per frame, found {width}; correct features.width, or "
                "take a model that was trained on such features"
            )


class BothDirections(nn.Module):
    """A layer: an LSTM on the frames, and one on every utterance's frames from its last to its first."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.ahead, self.back = (nn.LSTM(inputs, hidden, batch_first=True) for _ in range(2))

    def forward(self, values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Values [B, T, D] and the places of the frames backwards [B, T] -> outputs of both directions, [B, T, 2 H]."""
        back = _gathered(self.back(_gathered(values, order))[0], order)
        return torch.cat([self.ahead(values)[0], back], -1)


def reversed_frames(lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """Places [B, T] of every utterance's frames backwards; padding stays where it is."""
    places = torch.arange(frames, device=lengths.device)[None]
    return torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)


def _gathered(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return values.gather(1, places[..., None].expand_as(values))


class SelectiveAttention(nn.Module):
    """One head of self-attention whose values are the frames themselves, added through a gate per frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, QUERY), nn.Linear(width, QUERY)
        self.gate = nn.Linear(width, 1)
        nn.init.constant_(self.gate.bias, CLOSED)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Frames [B, T, D] and their lengths [B] -> frames with context, [B, T, D]."""
        mask = length_mask(lengths, frames.shape[1])
        scores = self.query(frames) @ self.key(frames).transpose(1, 2) / QUERY**0.5
        shares = scores.masked_fill(~mask[:, None, :], float("-inf")).softmax(-1)
        return (frames + torch.sigmoid(self.gate(frames)) * (shares @ frames)) * mask[..., None]
