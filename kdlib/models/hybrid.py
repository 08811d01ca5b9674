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
        self.encoder, self.heads, self.frozen = encoder, heads, False
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

    def freeze(self, frozen: bool = True) -> None:
        """Let the encoder learn nothing, neither weights nor statistics of batch normalisation; or let it learn."""
        self.frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Hybrid":
        """Training, in which a frozen encoder takes no part."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor, targets: torch.Tensor | None = None) -> Outputs:
        """Samples [B, N], their numbers [B] and, for the decoder, targets [B, L] that begin with BOS -> `Outputs`."""
        return self.heard(*self.encoder(wavs, wav_lens), targets)

    def heard(
        self, encoded: torch.Tensor, frames: torch.Tensor, hidden: dict, targets: torch.Tensor | None = None
    ) -> Outputs:
        """What the heads say of encodings [B, T, D]."""
        said = None if targets is None else self.forward_decoder(encoded, targets, frames)
        return Outputs(self.ctc_head(encoded), frames, encoded, hidden, said)

    def forward_decoder(self, encoded: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V] over the token after each of the targets, of encodings [B, T, D] with `lengths` frames."""
        return self.decoder(encoded, lengths, targets)

    def decode_greedy(
        self, encoded: torch.Tensor, max_len: int, lengths: torch.Tensor | None = None
    ) -> list[list[int]]:
        """What the decoder says by itself, at most `max_len` tokens; without `lengths` no frame is padding."""
        if lengths is None:
            lengths = torch.full((len(encoded),), encoded.shape[1], device=encoded.device)
        return self.decoder.greedy(encoded, lengths, max_len)


class NeMoHybridStudent(Hybrid):
    """NeMo's preprocessor and encoder under a CTC head and a decoder for the teachers' tokens (seed 001)."""

    @classmethod
    def of(cls, source: nn.Module, heads: Heads, *, freeze_preprocessor: bool = True) -> "NeMoHybridStudent":
        """On the encoder of a restored NeMo model, with its weights; the heads are new."""
        student = cls(NeMoEncoder.of(source), heads)
        student.encoder.preprocessor_frozen = freeze_preprocessor
        return student


def fitting(width: int, heads: int) -> int:
    """The number of attention heads nearest to what was asked for that divides the width; of two the smaller.

    >>> [fitting(176, heads) for heads in (4, 8, 9, 10, 12)]
    [4, 8, 8, 11, 11]
    """
    return min((count for count in range(1, width + 1) if width % count == 0), key=lambda count: abs(count - heads))


class NeMoEncoder(nn.Module):
    """The feature extraction and encoder of a NeMo model, for training further."""

    def __init__(self, preprocessor: nn.Module, encoder: nn.Module, config: dict) -> None:
        super().__init__()
        self.preprocessor, self.encoder, self.config = preprocessor, encoder, config
        self.width = int(config["encoder"]["d_model"])
        self.stride_ms = 1000 * config["preprocessor"]["window_stride"] * config["encoder"]["subsampling_factor"]
        self.spec_augment = False  # in training
        self.preprocessor_frozen = True
        self._within: dict[int, torch.Tensor] = {}
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
        """Train the encoder; features stay as they are (in training NeMo adds noise to the samples)."""
        super().train(mode)
        self.preprocessor.train(mode and not self.preprocessor_frozen)
        return self

    def forward(
        self, samples: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """Samples [B, N], their numbers [B] -> encodings [B, T, D], frames [B], and what `tap` asks for."""
        features, sizes = self.preprocessor(input_signal=samples, length=lengths)
        if self.encoder.training and self.spec_augment:
            features = augment.masked(features)
        encoded, frames = self.encoder(audio_signal=features, length=sizes)
        longest = int(frames.max())
        hidden = {layer: one[:, :longest] for layer, one in self._within.items()}
        self._within.clear()  # it belongs to this batch's graph
        return encoded.transpose(1, 2)[:, :longest], frames, hidden

    def tap(self, layer: int) -> None:
        """Give a layer's output [B, T, D] too, from now on; the first is 1."""
        layers = self.encoder.layers
        conformer.check_layer(layer, len(layers))
        layers[layer - 1].register_forward_hook(lambda module, given, made: self._within.update({layer: made}))


class Trained:
    """A saved model that can be evaluated: samples in, `Outputs` out, with the tokens that they mean."""

    def __init__(self, folder: Path) -> None:
        set_threads()
        self.path = folder
        self.model, self.tokens, self.record = load(folder)
        self.stride_ms = self.model.encoder.stride_ms
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


def load(folder: Path, file: str = "model.safetensors") -> tuple[Hybrid, Tokens, dict]:
    """A saved model, with the weights of one of its files, its tokens, and what else is known of it."""
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        weights = load_file(folder / file)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no complete model ({error}); train it again") from None
    except Exception as error:  # safetensors has an exception of its own
        raise UserError(f"{folder}/{file} is damaged ({error}); train it again") from None
    tokens = Tokens.for_teachers(folder / "tokenizer.model", record["heads"]["size"])
    if tokens.fingerprint != record["tokens"]:
        raise UserError(
            f"{folder}: its tokenizer is {tokens.fingerprint}, the model was trained with {record['tokens']}; the ids "
            "would mean other words: restore the file, or train the model again"
        )
    kind = NeMoHybridStudent if record["backbone"] == "nemo" else Hybrid
    model = kind(build_encoder(record["backbone"], record["encoder"]), Heads(**record["heads"]))
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model, tokens, record


def build_encoder(backbone: str, settings: dict) -> nn.Module:
    """An encoder with random weights."""
    if backbone == "sb":
        return conformer.Conformer(conformer.Shape(**settings))
    return NeMoEncoder.built(settings)
