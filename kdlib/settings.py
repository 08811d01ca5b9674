"""What a recipe may say, part by part: names, types, limits and defaults. `params.py` puts the parts together."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML has no tuples
Microphones = Annotated[tuple[Literal["M2", "M3", "M4", "M5", "M6", "M7", "M8"], ...], AsTuple]
Names = Annotated[tuple[str, ...], AsTuple]


class Section(BaseModel):
    """No unknown names, no silent conversion of types, no change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Fold(Section):
    """Who is held out from what. Written in `params/folds/<corpus>/<SPEAKER>.yaml`."""

    dev: str | None = None  # speaker for every choice; never trained on, its teacher is not averaged
    exclude: Names = ()  # removed from training; no effect on the held-out one
    train: Literal["all"] | Names = "all"
    teachers: Literal["all", "same_level"] | Names = "all"
    levels: Literal["seed", "published"] = "seed"  # whose level labels `same_level` reads


class Blocks(Section):
    """Which recording blocks are trained and tested on (the literature's; the original study used B3 for both).

    A corpus without blocks is trained and tested on as a whole: on its own speakers each.
    """

    source: Literal["column", "repetition"] = "column"  # repetition: R1, R2, ... each time a speaker says a word
    train: Names = Field(("B1", "B3"), min_length=1)
    test: Names = Field(("B2",), min_length=1)


class WordCounts(Section):
    """How many words of each kind of the UA-Speech list the embedded corpus speaks."""

    digits: int = Field(10, ge=0, le=10)
    letters: int = Field(0, ge=0, le=26)
    computer: int = Field(0, ge=0, le=19)
    common: int = Field(0, ge=0, le=100)
    uncommon_per_block: int = Field(0, ge=0, le=100)


class Synthetic(Section):
    """The embedded corpus: synthetic voices with the UA-Speech speakers' ids, sexes and intelligibilities."""

    speakers: Literal["all"] | Names = "all"
    words: WordCounts = WordCounts()
    sentences: int = Field(0, ge=0, le=400)  # short ones in each block, other ones by each speaker
    repetitions: int = Field(2, ge=1, le=7)  # of each word in each block
    controls: Annotated[int, Field(ge=2, le=13)] | Names = 13  # how many, or who
    control_words: Annotated[int, Field(ge=0)] | Literal["all"] = "all"  # of the whole list, beside the words above
    seed: int = Field(1, ge=0)  # of the voices; the seed of training is another
    severity_gain: float = Field(0.9, ge=0, le=3)  # calibrated on the baseline's error, on nothing else
    sample_rate: int = Field(16_000, ge=8_000, le=48_000)


class SpeakerInfo(Section):
    """What a recipe says of a speaker."""

    level: Literal["VERY_LOW", "LOW", "MID", "HIGH", "CONTROL"] | None = None  # of intelligibility
    intelligibility_pct: float | None = Field(None, ge=0, le=100)
    sex: Literal["F", "M"] | None = None


class UASpeech(Section):
    """Which of UA-Speech's recordings are read (`data_folder`: the folder that holds audio/)."""

    version: Literal["original", "noisereduce", "normalized"] = "original"  # the old release has one version only
    labels: Literal["auto", "mlf", "xls", "list"] = "auto"  # auto: the MLF files, else the xls, else kdlib's own list
    microphone: str = Field("M5", pattern=r"^M[2-8]$")  # the seven microphones are one utterance: this one is it
    augment: Literal["all"] | Microphones = ()  # further microphones, for training only


class Torgo(Section):
    """Which of TORGO's recordings are read (`data_folder`: the folder that holds the speakers' folders)."""

    microphones: Names = Field(("wav_headMic", "wav_arrayMic"), min_length=1)  # the first that recorded a prompt is it
    augment: bool = False  # the other microphone too, for training only


class AudioChecks(Section):
    """Which recordings are left out, and what is cut off the others."""

    min_duration_s: float = Field(0.1, gt=0)  # below it no model has a frame to write a word in
    max_letters_per_s: float = Field(30.0, gt=0)  # more than this cannot be said: the transcript is another file's
    trim_silence: bool = False  # cut off what is 40 dB below the loudest 20 ms, but for a margin of 0.1 s


class Pretraining(Section):
    """How the small pretrained model is made from control voices (`make pretrained`) or from a fold's own speakers."""

    speakers: Names = ()  # from_corpus: who is heard; empty: the fold's training speakers
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
    """The tokens that teachers and students share: 0 BOS, 1 EOS, 2 blank, every other id sentencepiece's own."""

    source: str = "pretrained"  # the pretrained model's pieces; "corpus": of the closed lexicon; or a model's path
    pieces: int = Field(256, ge=16)  # at most, where they are made of the corpus
    size: int | None = Field(None, ge=4)  # outputs; those beyond the pieces are never used (original study: 5000)


class Training(Section):
    """How long and how fast a model is trained."""

    steps: int = Field(300, ge=1)  # at most, where there is a dev block to stop on
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    validate_every: int = Field(5, ge=1)  # epochs between two looks at the dev block
    patience: int = Field(6, ge=1)  # looks without a better one, after which training ends


class ConformerSizes(Section):
    """The sizes of a SpeechBrain ConformerSizes."""

    d_model: int = Field(96, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    ffn: int = Field(384, ge=8)
    kernel: int = Field(15, ge=3)
    mels: int = Field(40, ge=8)
    dropout: float = Field(0.1, ge=0, lt=1)


class Teacher(ConformerSizes):
    """A teacher a speaker: its shape, what it starts from, and how it is adapted to the speaker."""

    backbone: Literal["sb", "nemo", "students"] = "sb"  # SpeechBrain's, the student's own encoder, or whole students
    students: Names = ("hard",)  # born again: the fold's students by these variants teach the next,
    student_seeds: Annotated[tuple[int, ...], AsTuple] = Field((1, 2, 3), min_length=1)  # of these seeds
    parent: Literal["shipped", "controls", "from_corpus", "none"] = "controls"  # whom the shared start has heard
    max_teachers: int | None = Field(
        None, ge=1
    )  # teachers a fold: as many, evenly from the least to the most intelligible
    decoder_layers: int = Field(2, ge=1)
    ctc_weight: float = Field(0.8, gt=0, le=1)  # the rest is the attention decoder's: .3 would starve the CTC head
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the attention decoder
    augment: bool = True  # SpecAugment and other tempi, while teachers are trained
    dev_share: float = Field(0.15, ge=0, lt=0.5)  # of the training blocks, kept from training to stop on
    base_training: Training = Training(steps=2000, lr=2e-3, warmup_steps=300, validate_every=3)  # of the parent
    adapt: Training = Training(steps=300, batch_size=16, lr=1e-3, warmup_steps=30)

    @property
    def family(self) -> str:
        """The folder's name of teachers that can be averaged with each other."""
        if self.backbone != "sb":
            return self.backbone
        return "speechbrain-scratch" if self.parent == "none" else "speechbrain"

    @property
    def teacher_set(self) -> str:
        """The folder's name of what depends on all of them together: students are of one family, in many circles."""
        if self.backbone != "students":
            return self.family
        return "-".join(["students", *self.students, *map(str, self.student_seeds)])


class Aggregation(Section):
    """How the teachers' outputs become one target."""

    method: Literal[
        "logprob_mean",
        "prob_mean",
        "weighted_accuracy",  # by accuracy on the dev speaker
        "weighted_loss",  # by the loss of each utterance's reference
        "weighted_similarity",  # by how much the teacher's speaker sounds like the utterance's
        "best",
        "own",
        "same_level",
        "attention",  # learnt on the dev speaker: weights by frame
        "transformer",  # learnt there too: weights by frame, and a correction
        "auto",  # which of these does best on the dev speaker
    ] = "logprob_mean"
    missing: Literal["strict", "partial", "all"] = "strict"  # utterances that not every teacher has
    min_teachers: int = Field(10, ge=1)  # teachers, for "partial"
    encoding: Literal["fp16", "int8"] = "fp16"  # of the stores
    fusion_steps: int = Field(100, ge=1)  # that attention and transformer learn


class LogitStudentSettings(Section):
    """Seed 003's student, which hears nothing: teachers' logits in, its own out."""

    temperature: float = Field(3.0, gt=0)
    alpha: float = Field(0.5, ge=0, le=1)  # of the teachers; the rest is the references'
    steps: int = Field(200, ge=1)
    dim: int = Field(96, ge=8, multiple_of=4)
    layers: int = Field(1, ge=1)


class Phase(Section):
    """A stretch of a student's training, with a learning rate, a warm-up and an optimiser of its own."""

    epochs: int | None = Field(None, ge=1)  # either these
    steps: int | None = Field(None, ge=1)  # or these
    lr: float = Field(1e-3, gt=0)  # the highest; under noam the factor before d_model ** -0.5
    warmup_steps: int = Field(100, ge=0)
    freeze_encoder: bool = False


class Student(Section):
    """The student: what it is made of, and how long and how fast it is trained."""

    backbone: Literal["nemo", "sb"] = "nemo"  # the pretrained NeMo model's encoder, or SpeechBrain's Conformer
    start: Literal["pretrained", "scratch"] = "pretrained"  # sb: the teachers' parent, or random weights
    conformer: ConformerSizes | None = None  # sizes for sb from scratch; by default the teachers'
    resume: str | None = None  # a saved student to go on from, with its latest weights: for phases in several runs
    decoder_layers: int = Field(0, ge=0)  # 0: a CTC head alone
    heads: int = Field(8, ge=1)  # of the decoder's attention; adjusted to divide the encoder's width
    ffn: int = Field(1024, ge=8)  # of the decoder
    dropout: float = Field(0.1, ge=0, lt=1)  # of the decoder
    freeze_preprocessor: bool = True  # else NeMo adds a little noise to the waveform in training
    augment: Literal["none", "mask", "mask_and_tempo"] = "mask"  # tempo moves frames: only without targets by frame
    phases: Annotated[tuple[Phase, ...], AsTuple] = Field((Phase(steps=300),), min_length=1)
    schedule: Literal["cosine", "noam"] = "cosine"
    batch_size: int = Field(16, ge=1)
    accumulate: int = Field(1, ge=1)  # batches a step
    clip: float = Field(1.0, gt=0)  # of the gradients' norm
    validations_per_epoch: int = Field(1, ge=1)  # at the dev speaker, an epoch
    patience: int = Field(1000, ge=1)  # looks without a better one, after which a phase ends
    on_collapse: Literal["warn", "stop"] = "warn"  # when dev answers begin to collapse
    keep_checkpoints: int = Field(
        1, ge=1
    )  # looks whose weights are kept, those that scored best: for averaged checkpoints
    precision: Literal["fp32", "bf16"] = "fp32"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = Field(1, ge=1)  # several: DDP


class PseudoLabelTerm(Section):
    """Cross-entropy with the teachers' best token, where they are sure of it (seed 001's `PL CE`)."""

    weight: float = Field(0.0, ge=0)
    confidence: float = Field(0.5, ge=0, le=1)  # least probability of the best token
    min_nonblank: float = Field(0.0, ge=0, le=1)  # least probability that a frame is no blank
    smoothing: float = Field(0.0, ge=0, lt=1)


class WordTerm(Section):
    """KL between the teachers' and the student's posteriors over the words of the closed lexicon."""

    weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)  # divides log-probabilities of whole words
    shortlist: int = Field(0, ge=0)  # words an utterance, those that the teachers find likeliest; 0: the whole lexicon
    random_words: int = Field(0, ge=0)  # with a shortlist: random words beside, a batch


class SequenceTerm(Section):
    """What the teachers take an utterance for, as CTC's and the decoder's reference."""

    weight: float = Field(0.0, ge=0)
    nbest: int = Field(1, ge=1)  # hypotheses an utterance, weighted by their shares
    hypotheses_from: Literal["lexicon", "greedy", "beam"] = "lexicon"  # words, or any text
    confidence: float = Field(0.0, ge=0, le=1)  # least share of the best one: below it nothing is taught
    weight_by_confidence: bool = True  # an utterance counts as much as its hypotheses' shares


class OccupancyTerm(Section):
    """KL by frame against where teachers put the reference's tokens; without one, those of a word they are sure of."""

    weight: float = Field(0.0, ge=0)
    confidence: float = Field(0.5, ge=0, le=1)  # least share of a word that stands for a missing reference


class IntermediateTerm(Section):
    """A CTC head on a layer within the encoder, which learns from references and from the student's own last head."""

    weight: float = Field(0.0, ge=0)
    layer: int = Field(2, ge=1)


class Distill(Section):
    """What the student's loss is made of: alpha x teachers + beta x references + gamma x the teachers' encodings.

    Beside KL by frame (alpha) stand other kinds of targets, each with a weight of its own.
    """

    alpha: float = Field(0.5, ge=0)
    alpha_end: float | None = Field(None, ge=0)  # at the end of training, straight from alpha
    beta: float = Field(0.5, ge=0)
    gamma: float = Field(0.0, ge=0)
    heads: Literal["ctc", "decoder", "both"] = "ctc"  # which learn, from teachers and references alike
    ctc_weight: float = Field(0.8, ge=0, le=1)  # of the CTC head, where both learn
    allow_decoder_kd: bool = False  # a decoder on NeMo's encoder learns from SpeechBrain teachers only on purpose
    temperature: float = Field(2.0, gt=0)
    temperature_end: float | None = Field(None, gt=0)
    temperature_on: Literal["both", "student", "teacher"] = "both"  # what the temperature divides; T ** 2 only for both
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the decoder's references
    blanks: Literal["all", "drop_blank", "symmetric"] = "all"  # which frames are taught
    context_frames: int = Field(2, ge=0)  # frames on each side of what is no blank, for symmetric
    max_shift: int = Field(0, ge=0)  # frames by which targets may be moved to fit the student's spikes
    first_token: Literal["keep", "suppress_specials", "skip"] = "keep"  # of the decoder's targets
    pseudo_labels: PseudoLabelTerm = PseudoLabelTerm()
    words: WordTerm = WordTerm()
    sequence: SequenceTerm = SequenceTerm()
    occupancy: OccupancyTerm = OccupancyTerm()
    ctc_smoothing: float = Field(0.0, ge=0, lt=1)  # of the references of CTC: towards equal tokens in every frame
    intermediate: IntermediateTerm = IntermediateTerm()
    control: str = "hard"  # the variant of the same student and steps without teachers
    allow: Names = ()  # preflight checks that may refuse without stopping the run

    @property
    def uses_teachers(self) -> bool:
        """Whether teachers have a say, or the references alone."""
        return any([self.uses_frame_targets, self.words.weight, self.sequence.weight])

    @property
    def uses_frame_targets(self) -> bool:
        """Whether something is taught frame by frame, or step by step."""
        return any([self.alpha, self.alpha_end, self.gamma, self.pseudo_labels.weight, self.occupancy.weight])

    @property
    def references_only(self) -> bool:
        """Whether the references alone are learnt, and nothing else is done."""
        return not (self.uses_teachers or self.ctc_smoothing or self.intermediate.weight)


class Faults(Section):
    """What has made students collapse, each on purpose: `params/ablations/collapse.yaml`. Nothing is set elsewhere."""

    own_recordings: bool = False  # each teacher speaks of its own speaker's recording of the word, cut to the shortest
    mispaired: bool = False  # of another utterance
    token_shift: int = 0  # of the teachers' token ids
    frame_jitter: int = Field(0, ge=0)  # frames, at most, by which teachers are moved apart
    choose_by: Literal["wra", "kl"] = "wra"  # the best look at the dev speaker
    max_words: int = Field(0, ge=0)  # of the training speech: no more different ones than these
    untrained_head: bool = False  # what is decoded is a CTC head that has learnt nothing
    decode_offset: int = 0  # added to token ids where they become text
    decode_tokenizer: str = ""  # another sentencepiece model, with which they do; "lexicon": the lexicon's own pieces

    @property
    def named(self) -> str:
        """Those that are set."""
        return ", ".join(f"{name} {value}" for name, value in self.model_dump(exclude_defaults=True).items())


class EnsembleMembers(Section):
    """Several of a fold's students as one more system."""

    variants: Names = Field(("hard",), min_length=1)  # variants
    seeds: Annotated[tuple[int, ...], AsTuple] = Field((1, 2, 3), min_length=1)  # of each
    checkpoints: int = Field(
        1, ge=1
    )  # of each: those looks that scored best on the dev speaker (student.keep_checkpoints)
    average: Literal["outputs", "probabilities", "weights"] = "outputs"  # outputs: log-probabilities


class BeamSearchSettings(Section):
    """Beam search with an n-gram language model of the training speech's texts; tried out on the dev speaker."""

    units: Literal["words", "pieces"] = "words"  # words of the closed lexicon, or any text that the pieces can write
    order: int = Field(3, ge=2, le=6)  # of the n-grams; KenLM reads no unigrams alone
    lm_weight: float = 0.9  # where there is no dev speaker; the original study's
    word_bonus: float = 0.0  # nats a word
    beam_size: int = Field(20, ge=1)  # hypotheses kept
    lm_weights: Annotated[tuple[float, ...], AsTuple] = Field((0.0, 0.5, 0.9, 1.2, 1.5), min_length=1)  # tried, with
    word_bonuses: Annotated[tuple[float, ...], AsTuple] = Field((0.0, 1.0), min_length=1)
    beam_sizes: Annotated[tuple[int, ...], AsTuple] = Field((10, 20, 50), min_length=1)
    max_utterances: int = Field(300, ge=1)  # dev utterances that settings are tried on
    ctc_weight: float = Field(0.3, ge=0, le=1)  # of CTC beside the attention decoder, where a model has both
    attention_beam_size: int = Field(8, ge=1)  # hypotheses kept by the attention decoder's search


class Scoring(Section):
    """How hypotheses are scored."""

    measure: Literal["wra", "wer"] = "wra"  # of tables and verdicts: words recognised, or, of sentences, word errors
    fold_homophones: bool = False  # count TO for TWO, RIGHT for WRITE, ... as correct
    bootstrap: int = Field(1000, ge=100)
    batch_size: int = Field(32, ge=1)
