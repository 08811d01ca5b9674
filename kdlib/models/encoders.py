"""The encoders of teachers and students: a new one is a file with an `Encoder` (`encoder.py`), and an entry here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kdlib.source_code import lazy

if TYPE_CHECKING:
    from kdlib.models.encoder import Encoder


@dataclass(frozen=True)
class Entry:
    """An encoder, and what is known of it before torch is imported."""

    module: lazy
    name: str  # of the class
    takes: Literal["audio", "features"] = "audio"
    checkpoint: bool = False  # its pretrained weights are the recipe's `pretrained`; else the teachers' base model
    subsampling: int = 4  # steps of its input (of audio 10 ms) per frame of its output

    @property
    def kind(self) -> "type[Encoder]":
        """Its class."""
        return getattr(self.module, self.name)


ENCODERS: dict[str, Entry] = {
    "nemo": Entry(lazy("kdlib.models.encoder_nemo"), "NeMoEncoder", checkpoint=True),
    "sb": Entry(lazy("kdlib.models.encoder_conformer"), "Conformer"),
    "sb_recipe": Entry(lazy("kdlib.models.encoder_speechbrain"), "SpeechBrainASR"),
    "wav2vec2": Entry(lazy("kdlib.models.encoder_wav2vec2"), "Wav2Vec2", subsampling=2),
    "bilstm": Entry(lazy("kdlib.models.encoder_bilstm"), "BiLSTM", takes="features", subsampling=2),
}


def name_of(encoder: "Encoder") -> str:
    """The name of an encoder in recipes."""
    return next(name for name, entry in ENCODERS.items() if isinstance(encoder, entry.kind))
