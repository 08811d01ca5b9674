"""The sections of a recipe: names, types, limits and defaults. `params.py` combines them."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML has no tuples
Microphones = Annotated[tuple[Literal["M2", "M3", "M4", "M5", "M6", "M7", "M8"], ...], AsTuple]
Names = Annotated[tuple[str, ...], AsTuple]


class Section(BaseModel):
    """No unknown names, no silent conversion of types, no change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Fold(Section):
    """The speakers of a fold. Written in `params/folds/<corpus>/<SPEAKER>.yaml`."""

    dev: str | None = None  # speaker for all model selection; never trained on, its teacher is not averaged
    exclude: Names = ()  # removed from training; no effect on the held-out speaker
    train: Literal["all"] | Names = "all"
    teachers: Literal["all", "same_level"] | Names = "all"
    levels: Literal["seed", "published"] = "seed"  # source of the level labels for `same_level`


class Blocks(Section):
    """Recording blocks for training and test (as in the literature; the original study used B3 for both).

    Without blocks, all utterances of the training and the test speakers are used.
    """

    source: Literal["column", "repetition"] = "column"  # repetition: R1, R2, ... for each repetition of a word
    train: Names = Field(("B1", "B3"), min_length=1)
    test: Names = Field(("B2",), min_length=1)


class WordCounts(Section):
    """Number of words of each kind of the UA-Speech list in the embedded corpus."""

    digits: int = Field(10, ge=0, le=10)
    letters: int = Field(0, ge=0, le=26)
    computer: int = Field(0, ge=0, le=19)
    common: int = Field(0, ge=0, le=100)
    uncommon_per_block: int = Field(0, ge=0, le=100)


class Synthetic(Section):
    """The embedded corpus: synthetic voices with the UA-Speech speakers' ids, sexes and intelligibilities."""

    speakers: Literal["all"] | Names = "all"
    words: WordCounts = WordCounts()
    sentences: int = Field(0, ge=0, le=400)  # short ones per block, different for each speaker
    repetitions: int = Field(2, ge=1, le=7)  # of each word in each block
    controls: Annotated[int, Field(ge=2, le=13)] | Names = 13  # number or names
    control_words: Annotated[int, Field(ge=0)] | Literal["all"] = "all"  # of the whole list, in addition to `words`
    seed: int = Field(1, ge=0)  # of the voices; training has a separate seed
    severity_gain: float = Field(0.9, ge=0, le=3)  # calibrated on the baseline's error only
    sample_rate: int = Field(16_000, ge=8_000, le=48_000)


class SpeakerInfo(Section):
    """Metadata of a speaker in a recipe."""

    level: Literal["VERY_LOW", "LOW", "MID", "HIGH", "CONTROL"] | None = None  # of intelligibility
    intelligibility_pct: float | None = Field(None, ge=0, le=100)
    sex: Literal["F", "M"] | None = None


class UASpeech(Section):
    """Selection of UA-Speech's recordings (`data_folder`: the folder that contains audio/)."""

    version: Literal["original", "noisereduce", "normalized"] = "original"  # the old release has one version only
    labels: Literal["auto", "mlf", "xls", "list"] = "auto"  # auto: the MLF files, else the xls, else kdlib's own list
    microphone: str = Field("M5", pattern=r"^M[2-8]$")  # of seven: its recording is the utterance
    augment: Literal["all"] | Microphones = ()  # further microphones, for training only


class Torgo(Section):
    """Selection of TORGO's recordings (`data_folder`: the folder that contains the speakers' folders)."""

    microphones: Names = Field(("wav_headMic", "wav_arrayMic"), min_length=1)  # the first with a recording is used
    augment: bool = False  # the other microphone too, for training only


class AudioChecks(Section):
    """Exclusion of recordings, and silence trimming."""

    min_duration_s: float = Field(0.1, gt=0)  # below it no model has a frame to output a word in
    max_letters_per_s: float = Field(30.0, gt=0)  # a faster transcript is that of another file
    trim_silence: bool = False  # trim below 40 dB of the loudest 20 ms, with a margin of 0.1 s


class Pretraining(Section):
    """Training of the small pretrained model, on control voices (`make pretrained`) or on a fold's own speakers."""

    speakers: Names = ()  # from_corpus: its training speakers; empty: the fold's
    test_controls: int = Field(3, ge=1, le=6)  # voices that are not trained on
    unseen_words: float = Field(0.1, ge=0, lt=1)  # share of the words beyond the corpus's own that are not trained on
    pieces: int = Field(64, ge=32, le=1024)
    d_model: int = Field(96, ge=16)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    conv_channels: int = Field(32, ge=1)
    steps: int = Field(2000, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(300, ge=0)


class TokenSettings(Section):
    """Tokens shared by teachers and students: 0 BOS, 1 EOS, 2 blank, every other id sentencepiece's own."""

    source: str = "pretrained"  # the pretrained model's pieces; "corpus": of the closed lexicon; or a model's path
    pieces: int = Field(256, ge=16)  # maximum, if they are made from the corpus
    size: int | None = Field(None, ge=4)  # outputs; those beyond the pieces are never used (original study: 5000)


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


class Aggregation(Section):
    """Aggregation of the teachers' outputs into one target."""

    method: Literal[
        "logprob_mean",
        "prob_mean",
        "weighted_accuracy",  # by accuracy on the dev speaker
        "weighted_loss",  # by the loss of each utterance's reference
        "weighted_similarity",  # by the similarity of the teacher's speaker to the utterance's
        "best",
        "own",
        "same_level",
        "attention",  # trained on the dev speaker: weights per frame
        "transformer",  # trained on the dev speaker: weights per frame, and a correction
        "auto",  # the best of these on the dev speaker
    ] = "logprob_mean"
    missing: Literal["strict", "partial", "all"] = "strict"  # utterances without the outputs of some teachers
    min_teachers: int = Field(10, ge=1)  # for "partial"
    encoding: Literal["fp16", "int8"] = "fp16"  # of the stores
    fusion_steps: int = Field(100, ge=1)  # training steps of attention and transformer


class LogitStudentSettings(Section):
    """Seed 003's student without audio input: teachers' logits in, its own out."""

    temperature: float = Field(3.0, gt=0)
    alpha: float = Field(0.5, ge=0, le=1)  # weight of the teachers; the rest is the references'
    steps: int = Field(200, ge=1)
    dim: int = Field(96, ge=8, multiple_of=4)
    layers: int = Field(1, ge=1)


class Phase(Section):
    """A phase of a student's training, with its own learning rate, warm-up and optimiser."""

    epochs: int | None = Field(None, ge=1)  # either epochs
    steps: int | None = Field(None, ge=1)  # or steps
    lr: float = Field(1e-3, gt=0)  # peak; with noam the factor before d_model ** -0.5
    warmup_steps: int = Field(100, ge=0)
    freeze_encoder: bool = False


class Student(Section):
    """Architecture and training schedule of the student."""

    backbone: Literal["nemo", "sb"] = "nemo"  # the pretrained NeMo model's encoder, or SpeechBrain's Conformer
    start: Literal["pretrained", "scratch"] = "pretrained"  # sb: the teachers' base model, or random weights
    conformer: ConformerSizes | None = None  # sizes for sb from scratch; by default the teachers'
    resume: str | None = None  # a saved student to resume from, with its latest weights: for phases in several runs
    decoder_layers: int = Field(0, ge=0)  # 0: only a CTC head
    heads: int = Field(8, ge=1)  # of the decoder's attention; adjusted to divide the encoder's width
    ffn: int = Field(1024, ge=8)  # of the decoder
    dropout: float = Field(0.1, ge=0, lt=1)  # of the decoder
    freeze_preprocessor: bool = True  # else NeMo dithers the waveform in training
    augment: Literal["none", "mask", "mask_and_tempo"] = "mask"  # tempo moves frames: only without frame-level targets
    phases: Annotated[tuple[Phase, ...], AsTuple] = Field((Phase(steps=300),), min_length=1)
    schedule: Literal["cosine", "noam"] = "cosine"
    batch_size: int = Field(16, ge=1)
    accumulate: int = Field(1, ge=1)  # batches per step
    clip: float = Field(1.0, gt=0)  # gradient norm
    validations_per_epoch: int = Field(1, ge=1)  # on the dev speaker
    patience: int = Field(1000, ge=1)  # validations without improvement before a phase ends
    on_collapse: Literal["warn", "stop"] = "warn"  # when hypotheses for the dev speaker begin to collapse
    keep_checkpoints: int = Field(1, ge=1)  # number of best checkpoints that are saved, for checkpoint averaging
    precision: Literal["fp32", "bf16"] = "fp32"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = Field(1, ge=1)  # several: DDP


class PseudoLabelTerm(Section):
    """Cross-entropy with the teachers' best token, in frames of high confidence (seed 001's `PL CE`)."""

    weight: float = Field(0.0, ge=0)
    confidence: float = Field(0.5, ge=0, le=1)  # minimum probability of the best token
    min_nonblank: float = Field(0.0, ge=0, le=1)  # minimum probability that a frame is not blank
    smoothing: float = Field(0.0, ge=0, lt=1)


class WordTerm(Section):
    """KL between the teachers' and the student's posteriors over the words of the closed lexicon."""

    weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)  # divides log-probabilities of whole words
    shortlist: int = Field(0, ge=0)  # most likely words per utterance by the teachers; 0: the whole lexicon
    random_words: int = Field(0, ge=0)  # with a shortlist: additional random words per batch


class SequenceTerm(Section):
    """The teachers' hypotheses of an utterance as references of CTC and the decoder."""

    weight: float = Field(0.0, ge=0)
    nbest: int = Field(1, ge=1)  # hypotheses per utterance, weighted by their shares
    hypotheses_from: Literal["lexicon", "greedy", "beam"] = "lexicon"  # words, or any text
    confidence: float = Field(0.0, ge=0, le=1)  # minimum share of the best one: below it the utterance has no target
    weight_by_confidence: bool = True  # weight an utterance by its hypotheses' shares


class OccupancyTerm(Section):
    """KL per frame with the teachers' occupancies of the reference's tokens; without one, those of a confident word."""

    weight: float = Field(0.0, ge=0)
    confidence: float = Field(0.5, ge=0, le=1)  # minimum share of a word that replaces a missing reference


class IntermediateTerm(Section):
    """A CTC head on an inner encoder layer, trained on references and on the outputs of the student's own last head."""

    weight: float = Field(0.0, ge=0)
    layer: int = Field(2, ge=1)


class Distill(Section):
    """The terms of the student's loss: alpha x teachers + beta x references + gamma x the teachers' encodings.

    Besides KL per frame (alpha) there are other kinds of targets, each with its own weight.
    """

    alpha: float = Field(0.5, ge=0)
    alpha_end: float | None = Field(None, ge=0)  # at the end of training, linear from alpha
    beta: float = Field(0.5, ge=0)
    gamma: float = Field(0.0, ge=0)
    heads: Literal["ctc", "decoder", "both"] = "ctc"  # heads trained on teachers and references alike
    ctc_weight: float = Field(0.8, ge=0, le=1)  # of the CTC head, if both are trained
    allow_decoder_kd: bool = False  # train a decoder on NeMo's encoder on SpeechBrain teachers all the same
    temperature: float = Field(2.0, gt=0)
    temperature_end: float | None = Field(None, gt=0)
    temperature_on: Literal["both", "student", "teacher"] = "both"  # what the temperature divides; T ** 2 only for both
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the decoder's references
    blanks: Literal["all", "drop_blank", "symmetric"] = "all"  # frames that are trained on
    context_frames: int = Field(2, ge=0)  # frames on each side of a non-blank frame, for symmetric
    max_shift: int = Field(0, ge=0)  # frames by which targets may be moved to fit the student's spikes
    first_token: Literal["keep", "suppress_specials", "skip"] = "keep"  # of the decoder's targets
    pseudo_labels: PseudoLabelTerm = PseudoLabelTerm()
    words: WordTerm = WordTerm()
    sequence: SequenceTerm = SequenceTerm()
    occupancy: OccupancyTerm = OccupancyTerm()
    ctc_smoothing: float = Field(0.0, ge=0, lt=1)  # of the CTC references: towards a uniform distribution per frame
    intermediate: IntermediateTerm = IntermediateTerm()
    control: str = "hard"  # the variant of the same student and steps without teachers
    allow: Names = ()  # preflight checks that may refuse without stopping the run

    @property
    def uses_teachers(self) -> bool:
        """True if the loss has a term of the teachers."""
        return any([self.uses_frame_targets, self.words.weight, self.sequence.weight])

    @property
    def uses_frame_targets(self) -> bool:
        """True if a target is per frame or per decoder step."""
        return any([self.alpha, self.alpha_end, self.gamma, self.pseudo_labels.weight, self.occupancy.weight])

    @property
    def references_only(self) -> bool:
        """True if the references are the only term of the loss."""
        return not (self.uses_teachers or self.ctc_smoothing or self.intermediate.weight)


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
    def named(self) -> str:
        """The faults that are set."""
        return ", ".join(f"{name} {value}" for name, value in self.model_dump(exclude_defaults=True).items())


class EnsembleMembers(Section):
    """Several students of a fold as one system."""

    variants: Names = Field(("hard",), min_length=1)
    seeds: Annotated[tuple[int, ...], AsTuple] = Field((1, 2, 3), min_length=1)  # of each variant
    checkpoints: int = Field(1, ge=1)  # best ones of each student on the dev speaker (student.keep_checkpoints)
    average: Literal["outputs", "probabilities", "weights"] = "outputs"  # outputs: log-probabilities


class BeamSearchSettings(Section):
    """Beam search with an n-gram language model of the training transcripts; tuned on the dev speaker."""

    units: Literal["words", "pieces"] = "words"  # words of the closed lexicon, or any text of the pieces
    order: int = Field(3, ge=2, le=6)  # of the n-grams; KenLM cannot read a unigram model
    lm_weight: float = 0.9  # without a dev speaker; the original study's
    word_bonus: float = 0.0  # nats per word
    beam_size: int = Field(20, ge=1)  # hypotheses kept
    lm_weights: Annotated[tuple[float, ...], AsTuple] = Field((0.0, 0.5, 0.9, 1.2, 1.5), min_length=1)  # tuning grid
    word_bonuses: Annotated[tuple[float, ...], AsTuple] = Field((0.0, 1.0), min_length=1)
    beam_sizes: Annotated[tuple[int, ...], AsTuple] = Field((10, 20, 50), min_length=1)
    max_utterances: int = Field(300, ge=1)  # dev utterances for tuning
    ctc_weight: float = Field(0.3, ge=0, le=1)  # of CTC against the attention decoder, if a model has both
    attention_beam_size: int = Field(8, ge=1)  # hypotheses kept by the attention decoder's search


class Scoring(Section):
    """Scoring of hypotheses."""

    measure: Literal["wra", "wer"] = "wra"  # of tables and verdicts: word recognition accuracy, or WER for sentences
    fold_homophones: bool = False  # count TO for TWO, RIGHT for WRITE, ... as correct
    bootstrap: int = Field(1000, ge=100)
    batch_size: int = Field(32, ge=1)
