"""Students: architecture, training schedule, faults set on purpose, ensembles."""

from typing import Annotated, Literal

from pydantic import Field

from kdlib.settings import AsTuple, Names, Section, Seeds
from kdlib.settings.augment import Masks, StudentAugmentation
from kdlib.settings.encoder import EncoderSizes


class Phase(Section):
    """A phase of a student's training, with its own learning rate, warm-up and optimiser."""

    epochs: int | None = Field(None, ge=1)  # either epochs
    steps: int | None = Field(None, ge=1)  # or steps
    lr: float = Field(1e-3, gt=0)  # peak; with noam the factor before d_model ** -0.5
    warmup_steps: int = Field(100, ge=0)
    freeze_encoder: bool = False


class Curriculum(Section):
    """Easy utterances first: the pool grows from a share of the easiest to all of them."""

    # speaker: whose teachers' loss is high; composite: the mean of the ranks by all four
    by: Literal["length", "teacher_loss", "entropy", "speaker", "composite"] = "length"
    start: float = Field(0.3, gt=0, le=1)  # share of the utterances at first
    until: float = Field(0.5, gt=0, le=1)  # share of the training after which all are used


class Student(Section):
    """Architecture and training schedule of the student."""

    encoder: str = "nemo"  # a name of kdlib/models/encoders.py
    start: Literal["pretrained", "scratch"] = "pretrained"  # nemo: the pretrained model; others: the teachers' base
    sizes: EncoderSizes | None = None  # of an encoder from scratch; by default the teachers'
    resume: str | None = None  # a saved student to resume from, with its latest weights: for phases in several runs
    decoder_layers: int = Field(0, ge=0)  # 0: only a CTC head
    heads: int = Field(8, ge=1)  # of the decoder's attention; adjusted to divide the encoder's width
    ffn: int = Field(1024, ge=8)  # of the decoder
    dropout: float = Field(0.1, ge=0, lt=1)  # of the decoder
    freeze_preprocessor: bool = True  # else NeMo dithers the waveform in training
    augment: StudentAugmentation = "mask"  # tempo moves frames: only without frame-level targets
    masks: Masks = Masks()
    mixup: float = Field(0.0, ge=0)  # of inputs and losses of two utterances; the parameter of a Beta distribution
    curriculum: Curriculum | None = None
    phases: Annotated[tuple[Phase, ...], AsTuple] = Field((Phase(steps=300),), min_length=1)
    schedule: Literal["cosine", "noam"] = "cosine"
    batch_size: int = Field(16, ge=1)
    accumulate: int = Field(1, ge=1)  # batches per step
    clip: float = Field(1.0, gt=0)  # gradient norm
    validations_per_epoch: int = Field(1, ge=1)  # on the dev speaker
    validate_every: int = Field(1, ge=1)  # epochs, or parts of one where there are several validations in each
    patience: int = Field(1000, ge=1)  # validations without improvement before a phase ends
    on_collapse: Literal["warn", "stop"] = "warn"  # when hypotheses for the dev speaker begin to collapse
    choose_by: Literal["greedy", "words"] = "greedy"  # of checkpoints on dev speech; words: WRA in the balanced lexicon
    keep_checkpoints: int = Field(1, ge=1)  # number of best checkpoints that are saved, for checkpoint averaging
    precision: Literal["fp32", "bf16"] = "fp32"
    devices: int = Field(1, ge=1)  # several: DDP


class Faults(Section):
    """Causes of student collapse, set on purpose in `params/ablations/collapse.yaml`, and nowhere else."""

    own_recordings: bool = False  # each teacher's outputs are for its own speaker's recording, cut to the shortest
    mispaired: bool = False  # the outputs are those of another utterance
    token_shift: int = 0  # of the teachers' token ids
    frame_jitter: int = Field(0, ge=0)  # maximum shift of the teachers against each other, in frames
    choose_by: Literal["wra", "kl"] = "wra"  # criterion of the best checkpoint on the dev speaker
    max_words: int = Field(0, ge=0)  # maximum number of different words in the training speech
    untrained_head: bool = False  # decode with an untrained CTC head
    decode_offset: int = 0  # added to token ids in decoding
    decode_tokenizer: str = ""  # another sentencepiece model for decoding; "lexicon": the lexicon's own pieces

    @property
    def changes_decoding(self) -> bool:
        """True if evaluation decodes token ids with the wrong offset or tokenizer."""
        return bool(self.decode_offset or self.decode_tokenizer)

    @property
    def named(self) -> str:
        """The faults that are set."""
        return ", ".join(f"{name} {value}" for name, value in self.model_dump(exclude_defaults=True).items())


class EnsembleMembers(Section):
    """Several students of a fold as one system."""

    variants: Names = Field(("hard",), min_length=1)
    seeds: Seeds = (1, 2, 3)  # of each variant
    checkpoints: int = Field(1, ge=1)  # best ones of each student on the dev speaker (student.keep_checkpoints)
    average: Literal["outputs", "probabilities", "weights"] = "outputs"  # outputs: log-probabilities
