"""Teachers: architecture, base model, adaptation."""

from typing import Literal

from pydantic import Field

from kdlib.settings import Names, Section, Seeds
from kdlib.settings.augment import Augmentation, Masks
from kdlib.settings.encoder import EncoderSizes
from kdlib.settings.reference_loss import HardWordTerm

NO_TRAINING = {"source", "max_teachers", "model", "students", "student_seeds"}  # settings that no training depends on
NO_TRAINING |= {"average_weights", "folder", "without", "trained_on", "ids", "logits_temperature"}


class Training(Section):
    """Training schedule of a model."""

    steps: int = Field(300, ge=1)  # maximum, if there is a dev block for early stopping
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    validate_every: int = Field(5, ge=1)  # epochs between validations on the dev block
    patience: int = Field(6, ge=1)  # validations without improvement before training stops


class TokenIds(Section):
    """Where other code has the special tokens; by default where kdlib has them."""

    blank: int = Field(2, ge=-1)  # -1: the last
    bos: int | None = Field(0, ge=0)
    eos: int | None = Field(1, ge=0)


class Teacher(EncoderSizes):
    """The teachers: where they come from, architecture, initialisation, and adaptation to the speaker."""

    # one per speaker, the fold's students, or one model; of other code: stored logits, or models
    source: Literal["speakers", "students", "model", "stores", "checkpoints"] = "speakers"
    folder: str | None = None  # of teachers of other code: a file or a folder for each
    without: Names = ()  # of these: teachers that are left out
    trained_on: dict[str, Names] = Field(
        {}
    )  # the speakers of a teacher of other code, if its name is not its speaker's
    ids: TokenIds = TokenIds()  # of logits of other code
    logits_temperature: float = Field(1.0, gt=0)  # that other code has divided its logits by
    model: str | None = None  # for source: model, the folder of a saved model; by default the base model
    input: str = "same"  # recordings for teachers: the students' own, "clean" (embedded corpus), or a microphone's
    encoder: str = "sb"  # of teachers of speakers: a name of kdlib/models/encoders.py
    students: Names = ("hard",)  # born again: the fold's students of these variants are the next teachers,
    student_seeds: Seeds = (1, 2, 3)  # with these seeds
    parent: Literal["shipped", "controls", "from_corpus", "none"] = "controls"  # training data of the base model
    average_weights: Literal["all", "same_level"] | None = (
        None  # one teacher with the mean of the fold's teachers' weights
    )
    max_teachers: int | None = Field(None, ge=1)  # per fold, evenly from the least to the most intelligible
    decoder_layers: int = Field(2, ge=0)  # 0: only a CTC head
    ctc_weight: float = Field(0.8, gt=0, le=1)  # the rest is the attention decoder's: 0.3 is too low for the CTC head
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the attention decoder
    hard_words: HardWordTerm = HardWordTerm()  # beside CTC and the attention decoder
    augment: Augmentation = "mask_and_tempo"  # of the base model and the teachers
    masks: Masks = Masks()
    dev_share: float = Field(0.15, ge=0, lt=0.5)  # of the training blocks, for early stopping only
    base_training: Training = Training(steps=2000, lr=2e-3, warmup_steps=300, validate_every=3)  # of the base model
    adapt: Training = Training(steps=300, batch_size=16, lr=1e-3, warmup_steps=30, patience=3)

    @property
    def imported(self) -> bool:
        """True if the teachers are of other code."""
        return self.source in ("stores", "checkpoints")

    @property
    def of_speakers(self) -> bool:
        """True if teachers are of single speakers, so that an utterance may have a teacher of its own."""
        return (self.source == "speakers" or self.imported) and not self.average_weights
