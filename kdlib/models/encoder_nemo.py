"""NeMo's Conformer encoder with its feature extraction, for further training: samples in, encodings out."""

import torch
from torch import nn

from kdlib.models import augment, encoder_conformer
from kdlib.models.nemo_files import quiet_nemo


class NeMoEncoder(nn.Module):
    """The feature extraction and encoder of a NeMo model, for further training."""

    def __init__(self, preprocessor: nn.Module, encoder: nn.Module, config: dict) -> None:
        super().__init__()
        self.preprocessor, self.encoder, self.config = preprocessor, encoder, config
        self.width = int(config["encoder"]["d_model"])
        self.stride_ms = 1000 * config["preprocessor"]["window_stride"] * config["encoder"]["subsampling_factor"]
        self.spec_augment = False  # applied in training only
        self.preprocessor_frozen = True
        self._hidden: dict[int, torch.Tensor] = {}
        self.train()

    @classmethod
    def of(cls, model: nn.Module) -> "NeMoEncoder":
        """Take the preprocessor and encoder of a restored model, with their weights."""
        from omegaconf import OmegaConf

        parts = {name: OmegaConf.to_container(model.cfg[name], resolve=True) for name in ("preprocessor", "encoder")}
        return cls(model.preprocessor, model.encoder, parts)

    @classmethod
    def built(cls, config: dict) -> "NeMoEncoder":
        """Build the preprocessor and encoder with random weights."""
        with quiet_nemo():
            from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor, ConformerEncoder
            from omegaconf import OmegaConf

            parts = (AudioToMelSpectrogramPreprocessor, "preprocessor"), (ConformerEncoder, "encoder")
            built = [kind.from_config_dict(OmegaConf.create(config[name])) for kind, name in parts]
        return cls(*built, config)

    def train(self, mode: bool = True) -> "NeMoEncoder":
        """Set training mode; a frozen preprocessor stays as it is (in training NeMo adds noise to the samples)."""
        super().train(mode)
        self.preprocessor.train(mode and not self.preprocessor_frozen)
        return self

    def forward(
        self, samples: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """Samples [B, N], their lengths [B] -> encodings [B, T, D], frames [B], outputs of the layers requested."""
        features, sizes = self.preprocessor(input_signal=samples, length=lengths)
        if self.encoder.training and self.spec_augment:
            features = augment.spec_augment(features)
        encoded, frames = self.encoder(audio_signal=features, length=sizes)
        longest = int(frames.max())
        hidden = {layer: output[:, :longest] for layer, output in self._hidden.items()}
        self._hidden.clear()  # they belong to this batch's graph
        return encoded.transpose(1, 2)[:, :longest], frames, hidden

    def return_layer(self, layer: int) -> None:
        """Return a layer's output [B, T, D] as well, from now on; the first is 1."""
        layers = self.encoder.layers
        encoder_conformer.check_layer(layer, len(layers))
        layers[layer - 1].register_forward_hook(lambda module, inputs, output: self._hidden.update({layer: output}))
