"""Teachers: architecture, base model, adaptation."""

from typing import Annotated, Literal

from pydantic import Field

from kdlib.settings import AsTuple, Names, Section
from kdlib.settings.distill import HardWordTerm


class Training(Section):
    """Training schedule of a model."""

    steps: int = Field(300, ge=1)  # maximum, if there is a dev block for early stopping
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    validate_every: int = Field(5, ge=1)  # epochs between validations on the dev block
    patience: int = Field(6, ge=1)  # validations without improvement before training stops


class ConformerSizes(Section):
    """Sizes of a SpeechBrain Conformer."""

    d_model: int = Field(96, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    ffn: int = Field(384, ge=8)
    kernel: int = Field(15, ge=3)
    mels: int = Field(40, ge=8)
    dropout: float = Field(0.1, ge=0, lt=1)


class Teacher(ConformerSizes):
    """The teachers, one per speaker: architecture, initialisation, and adaptation to the speaker."""

    backbone: Literal["sb", "nemo", "students"] = "sb"  # SpeechBrain's, the student's own encoder, or whole students
    students: Names = ("hard",)  # born again: the fold's students of these variants are the next teachers,
    student_seeds: Annotated[tuple[int, ...], AsTuple] = Field((1, 2, 3), min_length=1)  # with these seeds
    parent: Literal["shipped", "controls", "from_corpus", "none"] = "controls"  # training data of the base model
    max_teachers: int | None = Field(None, ge=1)  # per fold, evenly from the least to the most intelligible
    decoder_layers: int = Field(2, ge=1)
    ctc_weight: float = Field(0.8, gt=0, le=1)  # the rest is the attention decoder's: 0.3 is too low for the CTC head
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the attention decoder
    hard_words: HardWordTerm = HardWordTerm()  # beside CTC and the attention decoder
    augment: bool = True  # SpecAugment and tempo perturbation in teacher training
    dev_share: float = Field(0.15, ge=0, lt=0.5)  # of the training blocks, for early stopping only
    base_training: Training = Training(steps=2000, lr=2e-3, warmup_steps=300, validate_every=3)  # of the base model
    adapt: Training = Training(steps=300, batch_size=16, lr=1e-3, warmup_steps=30)

    @property
    def family(self) -> str:
        """Folder name of teachers that can be averaged with each other."""
        if self.backbone != "sb":
            return self.backbone
        return "speechbrain-scratch" if self.parent == "none" else "speechbrain"

    @property
    def teacher_set(self) -> str:
        """Folder name of what depends on the whole set: students are of one family, but form several sets."""
        if self.backbone != "students":
            return self.family
        return "-".join(["students", *self.students, *map(str, self.student_seeds)])
