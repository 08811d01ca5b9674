"""Encoder + CTC head + Transformer decoder over the teachers' tokens: what every teacher and every student is made of.

An encoder knows its `width` and `stride_ms` and gives encodings [B, T, D], frames [B] and {layer: [B, T, D]}: that of
SpeechBrain, or NeMo's with its pretrained weights. A saved model is a folder: `model.json` says what to build,
`model.safetensors` holds the weights, `tokenizer.model` what the ids mean.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from kdlib.errors import UserError
from kdlib.io import write_json
from kdlib.models import Outputs, decoder, encoder_conformer, read_record
from kdlib.models.decoder import AttentionDecoder
from kdlib.models.encoder_nemo import NeMoEncoder
from kdlib.runtime import set_threads
from kdlib.tokens import Tokens

CODE = (
    "models/hybrid.py",
    "models/__init__.py",
    "tokens.py",
    "models/encoder_nemo.py",
    "models/nemo_files.py",
    *encoder_conformer.CODE,
    *decoder.CODE,
)


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
        return self.apply_heads(*self.encoder(wavs, wav_lens), targets)

    def apply_heads(
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


def nearest_divisor(width: int, heads: int) -> int:
    """The number of attention heads nearest to what was asked for that divides the width; of two the smaller.

    >>> [fitting(176, heads) for heads in (4, 8, 9, 10, 12)]
    [4, 8, 8, 11, 11]
    """
    return min((count for count in range(1, width + 1) if width % count == 0), key=lambda count: abs(count - heads))


class TrainedModel:
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
    write_json(folder / "model.json", describe(model) | {"tokens": tokens.fingerprint} | known)


def describe(model: Hybrid) -> dict:
    """What to build to get a model like this one."""
    backbone = "sb" if isinstance(model.encoder, encoder_conformer.Conformer) else "nemo"
    encoder = asdict(model.encoder.shape) if backbone == "sb" else model.encoder.config
    return {"backbone": backbone, "encoder": encoder, "heads": asdict(model.heads)}


def load(folder: Path, file: str = "model.safetensors") -> tuple[Hybrid, Tokens, dict]:
    """A saved model, with the weights of one of its files, its tokens, and what else is known of it."""
    from safetensors.torch import load_file

    record = read_record(folder)
    try:
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
        return encoder_conformer.Conformer(encoder_conformer.ConformerShape(**settings))
    return NeMoEncoder.built(settings)
