"""What a training starts from: an encoder with the weights of a file, or random ones, and new heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kdlib.models.encoders import ENCODERS
from kdlib.models.hybrid import DecoderSizes, Hybrid, new_model
from kdlib.runtime import seed_everything
from kdlib.settings.encoder import AUDIO, EncoderSizes, InputShape
from kdlib.tokens import Tokens


class Architecture(DecoderSizes, Protocol):
    """The settings of a model, a teacher's or a student's."""

    encoder: str


@dataclass(frozen=True)
class Start:
    """A model's weights before training: of one of these files, or random of these sizes."""

    resumed: Path | None = None  # the folder of the student whose training is continued
    file: str = "latest.safetensors"  # of its weights
    pretrained: Path | None = None  # of the encoder: see `Encoder.pretrained`
    sizes: EncoderSizes | None = None
    inputs: InputShape = AUDIO
    train_speakers: Sequence[str] = ()  # that these weights were trained on
    head_is_trained: bool = False  # the CTC head


def initial_model(
    settings: Architecture, tokens: Tokens, start: Start, seed: int, *, new_head: bool = False
) -> tuple[Hybrid, bool]:
    """Build a model before training, and tell whether its CTC head is trained; with `new_head` it never is."""
    seed_everything(seed)
    kind, head = ENCODERS[settings.encoder].kind, None
    if start.pretrained:
        encoder, head = kind.pretrained(start.pretrained, tokens)
    else:
        encoder = kind.of_sizes(start.sizes, start.inputs)
    model = new_model(encoder, tokens.size, settings)
    if head and not new_head:
        model.ctc_head.load_state_dict(head)
    return model, head is not None and not new_head
