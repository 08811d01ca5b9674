"""The corpus: its speakers, words and recordings, and the speech that a fold trains on and tests on."""

from typing import Annotated, Literal

from pydantic import Field

from kdlib.settings import AsTuple, Names, Section
from kdlib.settings.encoder import AUDIO, InputShape

Microphones = Annotated[tuple[Literal["M2", "M3", "M4", "M5", "M6", "M7", "M8"], ...], AsTuple]


class Fold(Section):
    """The speakers of a fold. Written in `params/folds/<corpus>/<SPEAKER>.yaml`."""

    given: bool = False  # the corpus's own split: its blocks train, dev and test, each of all speakers
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
    dev: Names = ()  # of a given split alone, and not trained on there
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
    repetitions_in: dict[Literal["B1", "B2", "B3"], Annotated[int, Field(ge=1, le=40)]] = Field({})  # in some, instead
    controls: Annotated[int, Field(ge=2, le=13)] | Names = 13  # number or names
    control_words: Annotated[int, Field(ge=0)] | Literal["all"] = "all"  # of the whole list, in addition to `words`
    seed: int = Field(1, ge=0)  # of the voices; training has a separate seed
    clean: bool = False  # also every recording before noise and the effects of the voice: `teacher: {input: clean}`
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
    # of seven: its recording is the utterance; all: each recording is one, as in the original study
    microphone: str = Field("M5", pattern=r"^(M[2-8]|all)$")
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


class Skeleton(Section):
    """An embedded corpus without sound: seeded signers who sign sentences of known glosses, as moving joints."""

    signers: int = Field(8, ge=3, le=20)
    glosses: int = Field(24, ge=4, le=40)
    sentences: int = Field(24, ge=1, le=400)  # of each signer in each of the blocks B1 to B3
    seed: int = Field(1, ge=0)


class Phoenix(Section):
    """RWTH-PHOENIX-Weather 2014 (`data_folder`: with its annotations, and features of its videos)."""

    part: Literal["multisigner", "SI5"] = "multisigner"  # SI5: signer 5 is in dev and test alone
    features: str = "features/{split}/{id}.npz"  # where the features of a video lie


class FeatureSequences(Section):
    """Inputs that are arrays [frames, width]: of files, or of recordings."""

    width: int = Field(512, ge=1)
    stride_ms: float = Field(40.0, gt=0)  # from a frame to the next
    of_audio: bool = False  # of recordings: log-mel bands of 10 ms, stacked; width and stride follow
    mels: int = Field(64, ge=8)
    stack: int = Field(8, ge=1)
    hop: int = Field(4, ge=1)  # frames of 10 ms from one vector to the next


class CorpusSettings(Section):
    """The corpus that a recipe names, and how its transcripts and recordings are prepared."""

    corpus: Literal["synthetic", "manifest", "uaspeech", "torgo", "features", "skeleton", "phoenix"] = "synthetic"
    manifest: str | None = None  # SpeechBrain CSV or NeMo JSON lines, where corpus: manifest
    data_folder: str | None = None  # the value of $data_folder; the folder of UA-Speech or TORGO
    speakers: Literal["uaspeech"] | dict[str, SpeakerInfo] = Field({})  # metadata that the corpus does not have
    lexicon: str | None = None  # closed vocabulary, one word per line; by default all transcripts except the controls'
    # replaced in transcripts, before all else: {"&": "and", "7": "seven"}
    replace: dict[Annotated[str, Field(min_length=1)], str] = Field({})
    hyphens: Literal["keep", "space"] = "keep"  # of transcripts; NVIDIA's tokenizers have no hyphen
    punctuation: Literal["keep", "drop"] = "keep"
    audio: AudioChecks = AudioChecks()
    features: FeatureSequences = FeatureSequences()
    uaspeech: UASpeech = UASpeech()
    torgo: Torgo = Torgo()
    synthetic: Synthetic = Synthetic()
    skeleton: Skeleton = Skeleton()
    phoenix: Phoenix = Phoenix()
    blocks: Blocks = Blocks()

    @property
    def has_audio(self) -> bool:
        """True if its utterances are recordings."""
        return self.corpus not in ("features", "skeleton", "phoenix")

    @property
    def inputs(self) -> InputShape:
        """What encoders get of an utterance."""
        if not self.has_audio:
            return InputShape(self.features.width, self.features.stride_ms)
        if self.features.of_audio:
            return InputShape(self.features.mels * self.features.stack, 10.0 * self.features.hop)
        return AUDIO

    @property
    def identity(self) -> dict:
        """The settings that the prepared corpus depends on."""
        unused = {"synthetic", "uaspeech", "torgo", "skeleton", "phoenix"} - {self.corpus}
        source = {"blocks": self.blocks.source}
        return self.model_dump(mode="json", exclude=unused | {"manifest", "blocks"}) | source


class SplitSettings(Section):
    """The speech of a fold: whom it is trained on and tested on, and which transcripts are known."""

    held_out: str
    seed: int = Field(1, ge=0)
    fold: Fold = Fold()
    blocks: Blocks = Blocks()
    label_fraction: float = Field(1.0, gt=0, le=1)  # share of each speaker's training utterances with transcripts
    label_by: Literal["utterance", "word"] = "utterance"  # a share of the utterances, or all utterances of some words
    use_unlabelled_held_out: bool = False  # train on it without transcripts: no strict leave-one-speaker-out

    @property
    def labels(self) -> str:
        """Name of the label condition; empty if all transcripts of the training speakers are used.

        >>> SplitSettings(held_out="M08", label_fraction=0.2, label_by="word").labels
        'labels-20-by-word'
        """
        named = []
        if self.label_fraction < 1:
            named += [f"labels-{100 * self.label_fraction:g}", *(["by-word"] if self.label_by == "word" else [])]
        return "-".join(named + ["with-held-out"] * self.use_unlabelled_held_out)

    @property
    def excluded_speakers(self) -> dict[str, str]:
        """The speakers that nothing in this fold may be trained on, and why; none in a split by blocks alone."""
        if self.fold.given:
            return {}
        return {self.held_out: "is held out"} | ({self.fold.dev: "is the dev speaker"} if self.fold.dev else {})

    @property
    def identity(self) -> dict:
        """The fold and its held-out speaker, as stages record them."""
        return {"fold": self.fold.model_dump(mode="json"), "held_out": self.held_out}
