"""The hybrid CTC/attention model of all teachers and students: encoder, CTC head and Transformer decoder.

The encoder is any of `encoders.py`. A saved model is a folder: `model.json` holds the configuration,
`model.safetensors` the weights, `tokenizer.model` the meaning of the ids.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdlib import stage
from kdlib.errors import UserError
from kdlib.io import write_json
from kdlib.models import Emissions, Outputs, nearest_divisor, read_record
from kdlib.models.decoder import Heads
from kdlib.models.encoder import Encoded, Encoder
from kdlib.models.encoders import ENCODERS, name_of
from kdlib.models.fast_layers import use_fast_layers
from kdlib.runtime import set_threads, torch_device
from kdlib.tokens import Tokens


class Hybrid(nn.Module):
    """An encoder with a CTC head and, unless `heads.layers` is 0, an attention decoder."""

    def __init__(self, encoder: Encoder, heads: Heads) -> None:
        super().__init__()
        self.encoder, self.heads, self.frozen = encoder, heads, False
        self.ctc_head = nn.Linear(encoder.width, heads.size)
        self.decoder = encoder.new_decoder(heads) if heads.layers else None
        use_fast_layers(self)

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

    def forward(
        self,
        inputs: torch.Tensor,
        lengths: torch.Tensor,
        targets: torch.Tensor | None = None,
        layers: tuple[int, ...] = (),
    ) -> Outputs:
        """Inputs [B, N], their lengths [B] and, for the decoder, tokens [B, L] that begin with BOS -> `Outputs`.

        `layers`: those of the encoder whose outputs are returned as well; the first is 1.
        """
        return self.apply_heads(self.encoder(inputs, lengths, layers), targets)

    def apply_heads(self, encoded: Encoded, targets: torch.Tensor | None = None) -> Outputs:
        """Apply the CTC head and, given targets, the decoder to an encoder's output."""
        frames, lengths, hidden = encoded
        logits = None if targets is None else self.forward_decoder(frames, targets, lengths)
        return Outputs(Emissions(self.ctc_head(frames), lengths), frames, hidden, logits)

    def forward_with_hidden_states(
        self, x: torch.Tensor, lengths: torch.Tensor, return_layer_indices: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """Log-probabilities [T, B, V], as CTC losses take them, their lengths [B], and layers [B, T, D], from 1 on."""
        outputs = self(x, lengths, layers=tuple(return_layer_indices or ()))
        return outputs.ctc.logits.log_softmax(-1).transpose(0, 1), outputs.lengths, outputs.hidden

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


class DecoderSizes(Protocol):
    """The settings of an attention decoder, of a teacher or of a student."""

    decoder_layers: int
    heads: int
    ffn: int
    dropout: float


def new_model(encoder: Encoder, size: int, decoder: DecoderSizes) -> Hybrid:
    """An encoder with new heads for `size` tokens; the decoder's number of attention heads divides its width."""
    heads = nearest_divisor(encoder.width, decoder.heads)
    return Hybrid(encoder, Heads(size, decoder.decoder_layers, heads, decoder.ffn, decoder.dropout))


class TrainedModel:
    """A saved model for evaluation: samples in, `Outputs` out, with its tokens; it runs on `device`."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self._use(*load(folder), device)

    @classmethod
    def of(cls, model: Hybrid, tokens: Tokens, record: dict, device: str = "auto") -> "TrainedModel":
        """A model that is not saved; its `record` says which heads are trained."""
        system = cls.__new__(cls)
        system._use(model, tokens, record, device)
        return system

    def _use(self, model: Hybrid, tokens: Tokens, record: dict, device: str) -> None:
        set_threads()
        self.device, self.tokens, self.record = torch_device(device), tokens, record
        self.model, self.stride_ms = model.eval().to(self.device), model.encoder.stride_ms

    def __call__(self, inputs: torch.Tensor, lengths: torch.Tensor, layers: tuple[int, ...] = ()) -> Outputs:
        """Samples [B, N] or features [B, N, F] and lengths [B] -> CTC logits, encodings, and the layers asked for."""
        with torch.inference_mode():
            return self.model(inputs.to(self.device), lengths.to(self.device), layers=layers)


def save(model: Hybrid, tokens: Tokens, folder: Path, **fields: object) -> None:
    """Write a model into a folder, with further `fields` of its record."""
    weights = {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.model").write_bytes(tokens.model)
    write_json(folder / "model.json", describe(model) | {"tokens": tokens.fingerprint} | fields)


def describe(model: Hybrid) -> dict:
    """Return the configuration of a model's architecture."""
    encoder = model.encoder
    return {"encoder": name_of(encoder), "encoder_config": encoder.config, "heads": asdict(model.heads)}


def load(folder: Path, file: str = "model.safetensors") -> tuple[Hybrid, Tokens, dict]:
    """Load a saved model with the weights of one of its files, its tokens, and its record."""
    if damage := stage.damaged(folder):
        raise UserError(f"{folder}/{damage}; train it again, or take it from a copy")
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
    if record["encoder"] not in ENCODERS:
        raise UserError(f"{folder} has the encoder {record['encoder']!r}; expected one of {', '.join(ENCODERS)}")
    model = Hybrid(ENCODERS[record["encoder"]].kind.build(record["encoder_config"]), Heads(**record["heads"]))
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model, tokens, record
