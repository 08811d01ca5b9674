"""NeMo's Conformer encoder with its feature extraction, for further training: samples in, encodings out."""

from pathlib import Path

import torch
from torch import nn

from kdlib.models.encoder import Encoded, Encoder
from kdlib.models.nemo_files import conformer_config, quiet_nemo, restore_model
from kdlib.settings.encoder import EncoderSizes, InputShape
from kdlib.tokens import BLANK, Tokens


class NeMoEncoder(Encoder):
    """The feature extraction and encoder of a NeMo model, for further training."""

    def __init__(self, preprocessor: nn.Module, encoder: nn.Module, config: dict) -> None:
        super().__init__()
        self.preprocessor, self.encoder, self._config = preprocessor, encoder, config
        self.width = int(config["encoder"]["d_model"])
        self.stride_ms = 1000 * config["preprocessor"]["window_stride"] * config["encoder"]["subsampling_factor"]
        self.layers = len(encoder.layers)
        self.train()

    @property
    def config(self) -> dict:
        """The configuration of the preprocessor and of the encoder."""
        return self._config

    @classmethod
    def of(cls, model: nn.Module) -> "NeMoEncoder":
        """Take the preprocessor and encoder of a restored model, with their weights."""
        from omegaconf import OmegaConf

        parts = {name: OmegaConf.to_container(model.cfg[name], resolve=True) for name in ("preprocessor", "encoder")}
        return cls(model.preprocessor, model.encoder, parts)

    @classmethod
    def build(cls, config: dict) -> "NeMoEncoder":
        """Build the preprocessor and encoder with random weights."""
        with quiet_nemo():
            from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor, ConformerEncoder
            from omegaconf import OmegaConf

            parts = (AudioToMelSpectrogramPreprocessor, "preprocessor"), (ConformerEncoder, "encoder")
            built = [kind.from_config_dict(OmegaConf.create(config[name])) for kind, name in parts]
        return cls(*built, config)

    @classmethod
    def of_sizes(cls, sizes: EncoderSizes, inputs: InputShape) -> "NeMoEncoder":
        """Build the preprocessor and encoder with random weights and the sizes of a recipe."""
        names = "d_model", "layers", "heads", "mels", "kernel"
        return cls.build(conformer_config(**{name: getattr(sizes, name) for name in names}, channels=sizes.d_model))

    @classmethod
    def pretrained(cls, source: Path, tokens: Tokens) -> "tuple[NeMoEncoder, dict[str, torch.Tensor] | None]":
        """The encoder of a `.nemo` file, and its CTC head for these tokens, if its pieces are theirs."""
        model = restore_model(source)
        encoder = cls.of(model)
        if model.tokenizer.tokenizer.serialized_model_proto() != tokens.model:
            return encoder, None
        head = model.decoder.decoder_layers[0]
        return encoder, remap_head(head.weight.detach()[:, :, 0], head.bias.detach(), tokens)

    def train(self, mode: bool = True) -> "NeMoEncoder":
        """Set training mode; a frozen preprocessor stays as it is (in training NeMo adds noise to the samples)."""
        super().train(mode)
        self.preprocessor.train(mode and not self.preprocessor_frozen)
        return self

    def extract_features(self, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mel features [B, T, F] of samples [B, N], and their lengths."""
        features, sizes = self.preprocessor(input_signal=inputs, length=lengths)
        return features.transpose(1, 2), sizes

    def encode(self, features: torch.Tensor, lengths: torch.Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """Features [B, T, F], their lengths [B], and the layers to return."""
        features = self.masked(features, lengths).transpose(1, 2)
        kept: dict[int, torch.Tensor] = {}
        hooks = [
            self.encoder.layers[layer - 1].register_forward_hook(
                lambda module, given, output, layer=layer: kept.update({layer: output})
            )
            for layer in layers
        ]
        try:
            encoded, frames = self.encoder(audio_signal=features, length=lengths)
        finally:
            for hook in hooks:
                hook.remove()
        longest = int(frames.max())
        hidden = {layer: output[:, :longest] for layer, output in kept.items()}
        return Encoded(encoded.transpose(1, 2)[:, :longest], frames, hidden)


def remap_head(weight: torch.Tensor, bias: torch.Tensor, tokens: Tokens) -> dict[str, torch.Tensor]:
    """Map a pretrained CTC head (blank last) to `tokens`: the blank at its id, unused tokens with the lowest bias."""
    pieces = len(tokens.pieces)
    wide = weight.new_zeros(tokens.size, weight.shape[1])
    low = bias.new_full((tokens.size,), float(bias.min()) - 10)
    wide[:pieces], low[:pieces] = weight[:pieces], bias[:pieces]
    wide[BLANK], low[BLANK] = weight[pieces], bias[pieces]
    return {"weight": wide, "bias": low}
