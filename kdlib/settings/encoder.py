"""The sizes of encoders."""

from pydantic import Field

from kdlib.settings import Section


class EncoderSizes(Section):
    """Sizes of an encoder with random weights; each encoder uses those that it has."""

    d_model: int = Field(96, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    ffn: int = Field(384, ge=8)
    kernel: int = Field(15, ge=3)
    mels: int = Field(40, ge=8)
    dropout: float = Field(0.1, ge=0, lt=1)
