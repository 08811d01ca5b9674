"""Encoder + CTC head + Transformer decoder over the teachers' tokens: what every teacher and every student is made of.

An encoder knows its `width` and `stride_ms` and gives encodings [B, T, D], frames [B] and {layer: [B, T, D]}: that of
SpeechBrain, or NeMo's with its pretrained weights. A saved model is a folder: `model.json` says what to build,
`model.safetensors` holds the weights, `tokenizer.model` what the ids mean.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from kdlib.errors import UserError
from kdlib.models import Outputs, augment, conformer, decoder, nemo
from kdlib.models.decoder import AttentionDecoder
from kdlib.stage import set_threads, write_json
from kdlib.tokens import Tokens

CODE = ("models/hybrid.py", "models/__init__.py", "tokens.py", "models/nemo.py", *conformer.CODE, *decoder.CODE)


@dataclass(frozen=True)
class Heads:
    """The sizes of what stands on an encoder. Without layers there is no decoder: CTC only."""

    size: int  # tokens
    layers: int = 4
    heads: int = 4
    ffn: int = 1024
    dropout: float = 0.1


class Hybrid(nn.Module):
    """An encoder with a CTC head and, unless `heads.layers` is 0, an attention decoder."""

    def __init__(self, encoder: nn.Module, heads: Heads) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, heads
        self.ctc_head = nn.Linear(encoder.width, heads.size)
        self.decoder = None
        if heads.layers:
            self.decoder = AttentionDecoder(
                size=heads.size,
                d_model=encoder.width,
                heads=heads.heads,
                layers=heads.layers,
                ffn=heads.ffn,
                dropout=heads.dropout,
            )

    def forward(self, samples: torch.Tensor, lengths: torch.Tensor, inputs: torch.Tensor | None = None) -> Outputs:
        """Samples [B, N], their numbers [B] and, for the decoder, inputs [B, L] that begin with BOS -> `Outputs`."""
        encoded, frames, hidden = self.encoder(samples, lengths)
        said = None if inputs is None else self.forward_decoder(encoded, frames, inputs)
        return Outputs(self.ctc_head(encoded), frames, encoded, hidden, said)

    def forward_decoder(self, encoded: torch.Tensor, frames: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V] over the token after each of the inputs."""
        return self.decoder(encoded, frames, inputs)

    def decode_greedy(self, encoded: torch.Tensor, frames: torch.Tensor, longest: int) -> list[list[int]]:
        """What the decoder says by itself, at most `longest` tokens."""
        return self.decoder.greedy(encoded, frames, longest)


class NeMoEncoder(nn.Module):
    """The feature extraction and encoder of a NeMo model, for training further."""

    def __init__(self, preprocessor: nn.Module, encoder: nn.Module, config: dict) -> None:
        super().__init__()
        self.preprocessor, self.encoder, self.config = preprocessor, encoder, config
        self.width, self.frozen = int(config["encoder"]["d_model"]), False
        self.stride_ms = 1000 * config["preprocessor"]["window_stride"] * config["encoder"]["subsampling_factor"]
        self.spec_augment = False  # in training
        self.train()

    @classmethod
    def of(cls, model: nn.Module) -> "NeMoEncoder":
        """A restored model's, with its weights."""
        from omegaconf import OmegaConf

        parts = {name: OmegaConf.to_container(model.cfg[name], resolve=True) for name in ("preprocessor", "encoder")}
        return cls(model.preprocessor, model.encoder, parts)

    @classmethod
    def built(cls, config: dict) -> "NeMoEncoder":
        """With random weights."""
        with nemo.quiet():
            from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor, ConformerEncoder
            from omegaconf import OmegaConf

            parts = (AudioToMelSpectrogramPreprocessor, "preprocessor"), (ConformerEncoder, "encoder")
            built = [kind.from_config_dict(OmegaConf.create(config[name])) for kind, name in parts]
        return cls(*built, config)

    def train(self, mode: bool = True) -> "NeMoEncoder":
        """Train the encoder; features stay as they are (in training NeMo adds noise to them)."""
        super().train(mode and not self.frozen)
        self.preprocessor.eval()
        return self

    def freeze(self) -> None:
        """Learn nothing any more: neither weights nor the statistics of batch normalisation."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def forward(
        self, samples: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """Samples [B, N], their numbers [B] -> encodings [B, T, D], frames [B], and no layers."""
        features, sizes = self.preprocessor(input_signal=samples, length=lengths)
        if self.encoder.training and self.spec_augment:
            features = augment.masked(features)
        encoded, frames = self.encoder(audio_signal=features, length=sizes)
        return encoded.transpose(1, 2)[:, : int(frames.max())], frames, {}


class Trained:
    """A saved model that can be evaluated: samples in, `Outputs` out, with the tokens that they mean."""

    def __init__(self, folder: Path) -> None:
        set_threads()
        self.path = folder
        self.model, self.tokens, self.record = load(folder)
        self.model.eval()

    def __call__(self, samples: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        """Samples [B, N] and their numbers [B] -> CTC logits and encodings."""
        with torch.inference_mode():
            return self.model(samples, lengths)


def save(model: Hybrid, tokens: Tokens, folder: Path, **known: object) -> None:
    """Write a model into a folder, with what else is `known` of it."""
    from safetensors.torch import save_file

    weights = {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.model").write_bytes(tokens.model)
    write_json(folder / "model.json", described(model) | {"tokens": tokens.fingerprint} | known)


def described(model: Hybrid) -> dict:
    """What to build to get a model like this one."""
    backbone = "sb" if isinstance(model.encoder, conformer.Conformer) else "nemo"
    encoder = asdict(model.encoder.shape) if backbone == "sb" else model.encoder.config
    return {"backbone": backbone, "encoder": encoder, "heads": asdict(model.heads)}


def load(folder: Path) -> tuple[Hybrid, Tokens, dict]:
    """A saved model, its tokens, and what else is known of it."""
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no complete model ({error}); train it again") from None
    except Exception as error:  # safetensors has an exception of its own
        raise UserError(f"{folder}/model.safetensors is damaged ({error}); train it again") from None
    tokens = Tokens.for_teachers(folder / "tokenizer.model", record["heads"]["size"])
    if tokens.fingerprint != record["tokens"]:
        raise UserError(
            f"{folder}: its tokenizer is {tokens.fingerprint}, the model was trained with {record['tokens']}; the ids "
            "would mean other words: restore the file, or train the model again"
        )
    model = Hybrid(build_encoder(record["backbone"], record["encoder"]), Heads(**record["heads"]))
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model, tokens, record


def build_encoder(backbone: str, settings: dict) -> nn.Module:
    """An encoder with random weights."""
    if backbone == "sb":
        return conformer.Conformer(conformer.Shape(**settings))
    return NeMoEncoder.built(settings)
