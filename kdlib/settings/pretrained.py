"""The pretrained model that students start from, and the tokens."""

from typing import Literal

from pydantic import Field

from kdlib.settings import Names, Section
from kdlib.settings.augment import Masks


class Pretraining(Section):
    """Training of the small pretrained model, on control voices (`make pretrained`) or on a fold's own speakers."""

    speakers: Names = ()  # from_corpus: its training speakers; empty: the fold's
    test_controls: int = Field(3, ge=1, le=6)  # voices that are not trained on
    unseen_words: float = Field(0.1, ge=0, lt=1)  # share of the words beyond the corpus's own that are not trained on
    pieces: int = Field(64, ge=8, le=1024)  # maximum: fewer where words would have less than two on average
    d_model: int = Field(96, ge=16)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    conv_channels: int = Field(32, ge=1)
    steps: int = Field(2000, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(300, ge=0)
    validate_every: int = Field(5, ge=1)  # from_corpus: epochs between validations on the dev speaker
    patience: int = Field(6, ge=1)  # validations without improvement before training stops
    augment: Literal["none", "mask"] = "none"
    masks: Masks = Masks()


class TokenSettings(Section):
    """Tokens shared by teachers and students: 0 BOS, 1 EOS, 2 blank, every other id sentencepiece's own."""

    # the pretrained model's pieces; "corpus": of the closed lexicon; "words": whole words of the training texts; a path
    source: str = "pretrained"
    pieces: int = Field(256, ge=8)  # maximum, if they are made from the corpus: see `Pretraining.pieces`
    size: int | None = Field(None, ge=4)  # outputs; those beyond the pieces are never used (original study: 5000)


class PretrainedSettings(Section):
    """Where the pretrained model is from."""

    pretrained: Literal["shipped", "controls", "from_corpus", "nemo", "none"] = "shipped"
    nemo_model: str = "nvidia/stt_en_conformer_ctc_small"  # a model's name, or the path of a .nemo file
    pretraining: Pretraining = Pretraining()
