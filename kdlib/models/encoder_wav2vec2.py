"""wav2vec 2.0, HuBERT and WavLM, torchaudio's own model classes: samples in, encodings out, one frame per 20 ms.

The convolutions are frozen, and are the features; the Transformer is trained. Weights are random, or those of a local
checkpoint: torchaudio's state dict (`.pt`, `.safetensors`; the sizes are the recipe's), or a folder of Hugging Face's
layout (`config.json` with `model.safetensors` or `pytorch_model.bin`). With `mix_layers` the frames are a learned mean
of all layers.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from kdlib.errors import UserError
from kdlib.io import resolve_path
from kdlib.models.encoder import Encoded, Encoder
from kdlib.models.masks import length_mask
from kdlib.settings.encoder import EncoderSizes, InputShape

STRIDE_MS = 20.0
WIDEST = 512  # channels of the convolutions
CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # kernel, stride
PREFIXES = ("wav2vec2.", "hubert.", "wavlm.", "model.")


@dataclass(frozen=True)
class Wav2Vec2Shape:
    """The sizes of an encoder; the defaults are wav2vec 2.0 base's."""

    d_model: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    dropout: float = 0.1
    channels: int = WIDEST
    layer_norm: bool = False  # of the convolutions and before each layer, as in the large models; else group norm
    bias: bool = False  # of the convolutions
    wavlm: bool = False  # gated relative positions
    mix_layers: bool = False


class Wav2Vec2(Encoder):
    """A convolutional feature extractor, which stays as it is, and a Transformer."""

    def __init__(self, shape: Wav2Vec2Shape) -> None:
        from torchaudio.models import wav2vec2_model, wavlm_model

        super().__init__()
        self.shape, self.width, self.stride_ms, self.layers = shape, shape.d_model, STRIDE_MS, shape.layers
        sizes = {
            "extractor_mode": "layer_norm" if shape.layer_norm else "group_norm",
            "extractor_conv_layer_config": [(shape.channels, *size) for size in CONVOLUTIONS],
            "extractor_conv_bias": shape.bias,
            "encoder_embed_dim": shape.d_model,
            "encoder_projection_dropout": shape.dropout,
            "encoder_pos_conv_kernel": 128,
            "encoder_pos_conv_groups": 16 if shape.d_model % 16 == 0 else 1,
            "encoder_num_layers": shape.layers,
            "encoder_num_heads": shape.heads,
            "encoder_attention_dropout": shape.dropout,
            "encoder_ff_interm_features": shape.ffn,
            "encoder_ff_interm_dropout": shape.dropout,
            "encoder_dropout": shape.dropout,
            "encoder_layer_norm_first": shape.layer_norm,
            "encoder_layer_drop": 0.0,
            "aux_num_out": None,
        }
        relative = {"encoder_num_buckets": 320, "encoder_max_distance": 800}
        self.model = wavlm_model(**sizes, **relative) if shape.wavlm else wav2vec2_model(**sizes)
        self.model.feature_extractor.requires_grad_(False)
        self.mix = nn.Parameter(torch.zeros(shape.layers)) if shape.mix_layers else None

    @property
    def config(self) -> dict:
        """The sizes."""
        return asdict(self.shape)

    @classmethod
    def build(cls, config: dict) -> "Wav2Vec2":
        """Build an encoder with random weights."""
        return cls(Wav2Vec2Shape(**config))

    @classmethod
    def of_sizes(cls, sizes: EncoderSizes, inputs: InputShape) -> "Wav2Vec2":
        """Build an encoder with the sizes of a recipe, or those of the checkpoint that it names, and its weights."""
        known = {name: getattr(sizes, name) for name in ("d_model", "layers", "heads", "ffn", "dropout", "mix_layers")}
        if not sizes.checkpoint:
            return cls(Wav2Vec2Shape(**known, channels=min(WIDEST, sizes.d_model)))
        return from_checkpoint(resolve_path(sizes.checkpoint), known)

    def extract_features(self, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of the convolutions [B, T, F]; each utterance alone: group norm would see the padding."""
        rows = []
        with torch.no_grad():
            for samples, length in zip(inputs, lengths.tolist(), strict=True):
                own = nn.functional.pad(samples[:length], (0, max(0, 400 - length)))  # one frame at least
                if self.shape.layer_norm:
                    own = nn.functional.layer_norm(own, own.shape)
                rows.append(self.model.feature_extractor(own[None], None)[0][0])
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return padded, torch.tensor([len(row) for row in rows], device=padded.device)

    def encode(self, features: torch.Tensor, lengths: torch.Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """Features [B, T, F], their lengths [B], and the layers to return."""
        hidden = self._hidden(self.masked(features, lengths), lengths)
        inside = length_mask(lengths, features.shape[1])[..., None]
        frames = hidden[-1]
        if self.mix is not None:
            frames = (torch.stack(hidden, -1) * self.mix.softmax(0)).sum(-1)
        elif self.shape.layer_norm:
            frames = self.model.encoder.transformer.layer_norm(frames)
        return Encoded(frames * inside, lengths, {layer: hidden[layer - 1] for layer in layers})

    def _hidden(self, features: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of all layers; torchaudio's WavLM has no mask of padding, and gets each utterance alone."""
        encode = self.model.encoder.extract_features
        if not self.shape.wavlm:
            return encode(features, lengths)
        rows = [encode(row[None, :length]) for row, length in zip(features, lengths.tolist(), strict=True)]
        layers = zip(*rows, strict=True)
        return [nn.utils.rnn.pad_sequence([row[0] for row in layer], batch_first=True) for layer in layers]


def from_checkpoint(path: Path, sizes: dict) -> Wav2Vec2:
    """An encoder with the weights of a local checkpoint."""
    if not path.exists():
        raise UserError(f"encoder checkpoint: there is no file or folder {path}; correct `checkpoint` in the recipe")
    if path.is_file():
        weights = _read(path)
        shape = Wav2Vec2Shape(**sizes, channels=_channels(weights, path))
        return _filled(Wav2Vec2(shape), weights, path)
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    if not files or not (path / "config.json").is_file():
        raise UserError(f"encoder checkpoint: {path} needs config.json, and model.safetensors or pytorch_model.bin")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    shape = Wav2Vec2Shape(
        d_model=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"],
        dropout=sizes["dropout"],
        channels=config["conv_dim"][0],
        layer_norm=config.get("do_stable_layer_norm", False),
        bias=config.get("conv_bias", False),
        wavlm=config.get("model_type") == "wavlm",
        mix_layers=sizes["mix_layers"],
    )
    return _filled(Wav2Vec2(shape), _from_hugging_face(_read(files[0])), path)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file, loaded without running code."""
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # both have exceptions of their own
        raise UserError(f"encoder checkpoint: {path} is no file of weights ({error})") from None
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _channels(weights: dict[str, torch.Tensor], path: Path) -> int:
    name = "feature_extractor.conv_layers.0.conv.weight"
    if name not in weights:
        raise UserError(f"encoder checkpoint: {path} has no {name}: it is not a torchaudio wav2vec2 state dict")
    return weights[name].shape[0]


def _from_hugging_face(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of Hugging Face's layout under torchaudio's names."""
    found: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name.startswith("feature_projection."):
            name = f"encoder.{name}"
        elif name.startswith("encoder."):
            name = f"encoder.transformer.{name.removeprefix('encoder.')}"
        name = name.replace("parametrizations.weight.original0", "weight_g")
        found[name.replace("parametrizations.weight.original1", "weight_v")] = value
    for name in [name for name in found if re.search(r"attention\.gru_rel_pos_const$", name)]:  # WavLM
        base = name.removesuffix("gru_rel_pos_const")
        for kind in ("weight", "bias"):
            parts = [found.pop(f"{base}{part}_proj.{kind}") for part in "qkv"]
            found[f"{base}attention.in_proj_{kind}"] = torch.cat(parts)
            found[f"{base}attention.out_proj.{kind}"] = found.pop(f"{base}out_proj.{kind}")
    return found


def _filled(encoder: Wav2Vec2, weights: dict[str, torch.Tensor], path: Path) -> Wav2Vec2:
    """Load weights; those of heads are ignored, missing or unlike ones refused."""
    own = encoder.model.state_dict()
    aliases = {name: name.replace("parametrizations.weight.original0", "weight_g") for name in own}
    aliases = {name: alias.replace("parametrizations.weight.original1", "weight_v") for name, alias in aliases.items()}
    missing = [name for name, alias in aliases.items() if name not in weights and alias not in weights]
    if missing:
        raise UserError(f"encoder checkpoint: {path} lacks {len(missing)} weights of its encoder, first {missing[0]}")
    taken = {name: weights.get(name, weights.get(alias)) for name, alias in aliases.items()}
    for name, value in taken.items():
        if value.shape != own[name].shape:
            expected, shape = list(own[name].shape), list(value.shape)
            raise UserError(f"encoder checkpoint: {path}: {name} has the shape {shape}, the recipe's sizes {expected}")
    encoder.model.load_state_dict(taken)
    return encoder
