"""The sizes of encoders, and of what they take."""

from dataclasses import dataclass

from pydantic import Field

from kdlib.settings import Section


@dataclass(frozen=True)
class InputShape:
    """The input of an utterance: a recording, or feature vectors."""

    width: int = 0  # of a feature vector; 0: samples
    step_ms: float = 10.0  # from a feature vector to the next; of recordings, as encoders analyse them

    @property
    def kind(self) -> str:
        """The kind of input, as an encoder's entry says it."""
        return "features" if self.width else "audio"


AUDIO = InputShape()


class EncoderSizes(Section):
    """Sizes of an encoder with random weights; each encoder uses those that it has."""

    d_model: int = Field(96, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    ffn: int = Field(384, ge=8)
    kernel: int = Field(15, ge=3)
    mels: int = Field(40, ge=8)
    dropout: float = Field(0.1, ge=0, lt=1)
    checkpoint: str | None = None  # wav2vec2: pretrained weights, torchaudio's file or Hugging Face's folder
    mix_layers: bool = False  # wav2vec2: a learned mean of all layers
    attention: bool = False  # bilstm: gated self-attention over its outputs
    recompute: bool = False  # bilstm: layers anew in the backward pass, which needs less memory
