"""The hybrid CTC/attention model of all teachers and students: encoder, CTC head and Transformer decoder.

An encoder is SpeechBrain's, or NeMo's with its pretrained weights. It has a `width` and a `stride_ms`, and returns
encodings [B, T, D], frames [B] and {layer: [B, T, D]}. A saved model is a folder: `model.json` holds the configuration,
`model.safetensors` the weights, `tokenizer.model` the meaning of the ids.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdlib.errors import UserError
from kdlib.io import write_json
from kdlib.models import Emissions, Outputs, encoder_conformer, read_record
from kdlib.models.decoder import AttentionDecoder
from kdlib.models.encoder_nemo import NeMoEncoder
from kdlib.runtime import set_threads
from kdlib.tokens import BLANK, Tokens


@dataclass(frozen=True)
class Heads:
    """The sizes of the heads on an encoder. With 0 layers there is no decoder: CTC only."""

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
        """Freeze the encoder, its weights and its batch normalisation statistics; or unfreeze it."""
        self.frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Hybrid":
        """Set training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor, targets: torch.Tensor | None = None) -> Outputs:
        """Samples [B, N], their lengths [B] and, for the decoder, inputs [B, L] that begin with BOS -> `Outputs`."""
        return self.apply_heads(*self.encoder(wavs, wav_lens), targets)

    def apply_heads(
        self, encoded: torch.Tensor, frames: torch.Tensor, hidden: dict, targets: torch.Tensor | None = None
    ) -> Outputs:
        """Apply the CTC head and, given targets, the decoder to encodings [B, T, D]."""
        logits = None if targets is None else self.forward_decoder(encoded, targets, frames)
        return Outputs(Emissions(self.ctc_head(encoded), frames), encoded, hidden, logits)

    def forward_decoder(self, encoded: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V] of the token after each of the targets, for encodings [B, T, D] with `lengths` frames."""
        return self.decoder(encoded, lengths, targets)

    def decode_greedy(
        self, encoded: torch.Tensor, max_len: int, lengths: torch.Tensor | None = None
    ) -> list[list[int]]:
        """Decode with the free-running decoder, at most `max_len` tokens; without `lengths` no frame is padding."""
        if lengths is None:
            lengths = torch.full((len(encoded),), encoded.shape[1], device=encoded.device)
        return self.decoder.greedy(encoded, lengths, max_len)


class NeMoHybridStudent(Hybrid):
    """NeMo's preprocessor and encoder, with a CTC head and a decoder for the teachers' tokens (seed 001)."""

    @classmethod
    def of(cls, source: nn.Module, heads: Heads, *, freeze_preprocessor: bool = True) -> "NeMoHybridStudent":
        """Build a student from a restored NeMo model's encoder, with its weights; the heads are new."""
        student = cls(NeMoEncoder.of(source), heads)
        student.encoder.preprocessor_frozen = freeze_preprocessor
        return student


def remap_head(weight: torch.Tensor, bias: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Map a pretrained CTC head (blank last) to `tokens`: the blank at its id, unused tokens with the lowest bias."""
    pieces = len(tokens.pieces)
    wide = weight.new_zeros(tokens.size, weight.shape[1])
    low = bias.new_full((tokens.size,), float(bias.min()) - 10)
    wide[:pieces], low[:pieces] = weight[:pieces], bias[:pieces]
    wide[BLANK], low[BLANK] = weight[pieces], bias[pieces]
    return wide, low


def copy_head(model: Hybrid, source: nn.Module, tokens: Tokens) -> bool:
    """Copy the CTC head of the NeMo model that a model starts from; returns False if their pieces differ."""
    if source.tokenizer.tokenizer.serialized_model_proto() != tokens.model:
        return False
    head = source.decoder.decoder_layers[0]
    weight, bias = remap_head(head.weight.detach()[:, :, 0], head.bias.detach(), tokens)
    model.ctc_head.load_state_dict({"weight": weight, "bias": bias})
    return True


class TrainedModel:
    """A saved model for evaluation: samples in, `Outputs` out, with its tokens."""

    def __init__(self, folder: Path) -> None:
        set_threads()
        self.path = folder
        self.model, self.tokens, self.record = load(folder)
        self.stride_ms = self.model.encoder.stride_ms
        self.model.eval()

    def __call__(self, samples: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        """Samples [B, N] and their lengths [B] -> CTC logits and encodings."""
        with torch.inference_mode():
            return self.model(samples, lengths)


def save(model: Hybrid, tokens: Tokens, folder: Path, **fields: object) -> None:
    """Write a model into a folder, with further `fields` of its record."""
    weights = {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.model").write_bytes(tokens.model)
    write_json(folder / "model.json", describe(model) | {"tokens": tokens.fingerprint} | fields)


def describe(model: Hybrid) -> dict:
    """Return the configuration of a model's architecture."""
    backbone = "sb" if isinstance(model.encoder, encoder_conformer.Conformer) else "nemo"
    encoder = asdict(model.encoder.shape) if backbone == "sb" else model.encoder.config
    return {"backbone": backbone, "encoder": encoder, "heads": asdict(model.heads)}


def load(folder: Path, file: str = "model.safetensors") -> tuple[Hybrid, Tokens, dict]:
    """Load a saved model with the weights of one of its files, its tokens, and its record."""
    record = read_record(folder)
    try:
        weights = load_file(folder / file)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no complete model ({error}); train it again") from None
    except Exception as error:  # safetensors has its own exception
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
    """Build an encoder with random weights."""
    if backbone == "sb":
        return encoder_conformer.Conformer(encoder_conformer.ConformerShape(**settings))
    return NeMoEncoder.built(settings)
