"""Parameters: recipe YAML + fold YAML + overrides -> one frozen, validated `Params`.

Precedence is base < recipe < fold < overrides. Unknown names, wrong types, impossible values and unknown speakers are
refused before any work, with the file, the name, what was expected, what was found, and the nearest valid name.
Paths are relative to the repository's root, which is found from any folder below it.
"""

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kdlib.errors import UserError, nearest

Microphones = Annotated[
    tuple[Literal["M2", "M3", "M4", "M5", "M6", "M7", "M8"], ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


class Strict(BaseModel):
    """No unknown names, no silent conversion of types, no change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Fold(Strict):
    """Who is held out from what. Written in `params/folds/<corpus>/<SPEAKER>.yaml`."""

    dev: str | None = None  # speaker for every choice; never trained on, its teacher is not averaged
    exclude: Names = ()  # removed from training; no effect on the held-out one
    train: Literal["all"] | Names = "all"
    teachers: Literal["all", "same_level"] | Names = "all"
    levels: Literal["seed", "published"] = "seed"  # whose level labels `same_level` reads


class Blocks(Strict):
    """Which recording blocks are trained and tested on (the literature's; the original study used B3 for both).

    A corpus without blocks is trained and tested on as a whole: on its own speakers each.
    """

    made_from: Literal["column", "repetition"] = "column"  # repetition: R1, R2, ... each time a speaker says a word
    train: Names = Field(("B1", "B3"), min_length=1)
    test: Names = Field(("B2",), min_length=1)


class Words(Strict):
    """How many words of each kind of the UA-Speech list the embedded corpus speaks."""

    digits: int = Field(10, ge=0, le=10)
    letters: int = Field(0, ge=0, le=26)
    computer: int = Field(0, ge=0, le=19)
    common: int = Field(0, ge=0, le=100)
    uncommon_per_block: int = Field(0, ge=0, le=100)


class Synthetic(Strict):
    """The embedded corpus: synthetic voices with the UA-Speech speakers' ids, sexes and intelligibilities."""

    speakers: Literal["all"] | Names = "all"
    words: Words = Words()
    repetitions: int = Field(2, ge=1, le=7)  # of each word in each block
    controls: int = Field(13, ge=2, le=13)
    control_words: Annotated[int, Field(ge=0)] | Literal["all"] = "all"  # of the whole list, beside the words above
    seed: int = Field(1, ge=0)  # of the voices; the seed of training is another
    severity_gain: float = Field(0.9, ge=0, le=3)  # calibrated on the baseline's error, on nothing else
    sample_rate: int = Field(16_000, ge=8_000, le=48_000)


class Person(Strict):
    """What a recipe says of a speaker."""

    level: Literal["VERY_LOW", "LOW", "MID", "HIGH", "CONTROL"] | None = None  # of intelligibility
    intelligibility_pct: float | None = Field(None, ge=0, le=100)
    sex: Literal["F", "M"] | None = None


class UASpeech(Strict):
    """Which of UA-Speech's recordings are read (`data_folder`: the folder that holds audio/)."""

    version: Literal["original", "noisereduce", "normalized"] = "original"  # the old release has one version only
    labels: Literal["auto", "mlf", "xls", "list"] = "auto"  # auto: the MLF files, else the xls, else kdlib's own list
    microphone: str = Field("M5", pattern=r"^M[2-8]$")  # the seven microphones are one utterance: this one is it
    augment: Literal["all"] | Microphones = ()  # further microphones, for training only


class Torgo(Strict):
    """Which of TORGO's recordings are read (`data_folder`: the folder that holds the speakers' folders)."""

    microphones: Names = Field(("wav_headMic", "wav_arrayMic"), min_length=1)  # the first that recorded a prompt is it
    augment: bool = False  # the other microphone too, for training only


class Hygiene(Strict):
    """Which recordings are left out, and what is cut off the others."""

    shortest_s: float = Field(0.1, gt=0)  # below it no model has a frame to write a word in
    letters_per_s: float = Field(30.0, gt=0)  # more than this cannot be said: the transcript is another file's
    trim_silence: bool = False  # cut off what is 40 dB below the loudest 20 ms, but for a margin of 0.1 s


class Pretraining(Strict):
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


class Vocabulary(Strict):
    """The tokens that teachers and students share: 0 BOS, 1 EOS, 2 blank, every other id sentencepiece's own."""

    source: str = "pretrained"  # the pretrained model's pieces; "corpus": of the closed lexicon; or a model's path
    pieces: int = Field(256, ge=16)  # at most, where they are made of the corpus
    size: int | None = Field(None, ge=4)  # outputs; those beyond the pieces are never used (original study: 5000)


class Training(Strict):
    """How long and how fast a model is trained."""

    steps: int = Field(300, ge=1)  # at most, where there is a dev block to stop on
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    check_every: int = Field(5, ge=1)  # epochs between two looks at the dev block
    patience: int = Field(6, ge=1)  # looks without a better one, after which training ends


class Teacher(Strict):
    """A teacher a speaker: its shape, what it starts from, and how it is adapted to the speaker."""

    backbone: Literal["sb", "nemo"] = "sb"  # SpeechBrain's Conformer, or the student's own pretrained encoder
    parent: Literal["shipped", "controls", "from_corpus", "none"] = "controls"  # whom the shared start has heard
    d_model: int = Field(96, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    ffn: int = Field(384, ge=8)
    kernel: int = Field(15, ge=3)
    mels: int = Field(40, ge=8)
    dropout: float = Field(0.1, ge=0, lt=1)
    decoder_layers: int = Field(2, ge=1)
    ctc_weight: float = Field(0.8, gt=0, le=1)  # the rest is the attention decoder's: .3 would starve the CTC head
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the attention decoder
    augment: bool = True  # SpecAugment and other tempi, while teachers are trained
    dev_share: float = Field(0.15, ge=0, lt=0.5)  # of the training blocks, kept from training to stop on
    start: Training = Training(steps=2000, lr=2e-3, warmup_steps=300, check_every=3)  # of the parent
    adapt: Training = Training(steps=300, batch_size=16, lr=1e-3, warmup_steps=30)

    @property
    def family(self) -> str:
        """The folder's name of teachers that can be averaged with each other."""
        if self.backbone == "nemo":
            return "nemo"
        return "speechbrain-scratch" if self.parent == "none" else "speechbrain"


class Aggregation(Strict):
    """How the teachers' outputs become one target."""

    method: Literal["logprob_mean", "prob_mean", "weighted_accuracy", "weighted_loss", "best", "own", "same_level"] = (
        "logprob_mean"
    )
    missing: Literal["strict", "partial", "all"] = "strict"  # utterances that not every teacher has
    at_least: int = Field(10, ge=1)  # teachers, for "partial"
    encoding: Literal["fp16", "int8"] = "fp16"  # of the stores


class Scoring(Strict):
    """How hypotheses are scored."""

    fold_homophones: bool = False  # count TO for TWO, RIGHT for WRITE, ... as correct
    bootstrap: int = Field(1000, ge=100)
    batch_size: int = Field(32, ge=1)


class Params(Strict):
    """Everything that a notebook needs to know."""

    name: str = Field(pattern=r"^[\w-][\w.-]*$")  # outputs/<name>/; the recipe's file name
    held_out: str
    seed: int = Field(1, ge=0)
    fold: Fold = Fold()
    folds: str | None = None  # params/folds/<folds>/; by default the corpus's: uaspeech, torgo, or the recipe's name
    corpus: Literal["synthetic", "manifest", "uaspeech", "torgo"] = "synthetic"
    manifest: str | None = None  # SpeechBrain CSV or NeMo JSON lines, where corpus: manifest
    data_folder: str | None = None  # what $data_folder stands for; where UA-Speech or TORGO lies
    speakers: Literal["uaspeech"] | dict[str, Person] = {}  # who they are, where the corpus does not say it
    lexicon: str | None = None  # closed vocabulary, a word a line; by default all transcripts of who is no control
    replace: dict[
        Annotated[str, Field(min_length=1)], str
    ] = {}  # in transcripts, before all else: {"&": "and", "7": "seven"}
    hyphens: Literal["keep", "space"] = "keep"  # of transcripts; NVIDIA's tokenizers have no hyphen
    punctuation: Literal["keep", "drop"] = "keep"
    audio: Hygiene = Hygiene()
    uaspeech: UASpeech = UASpeech()
    torgo: Torgo = Torgo()
    blocks: Blocks = Blocks()
    synthetic: Synthetic = Synthetic()
    pretrained: Literal["shipped", "controls", "from_corpus", "nemo"] = "shipped"
    nemo_model: str = "nvidia/stt_en_conformer_ctc_small"  # a model's name, or the path of a .nemo file
    pretraining: Pretraining = Pretraining()
    tokens: Vocabulary = Vocabulary()
    teacher: Teacher = Teacher()
    aggregation: Aggregation = Aggregation()
    scoring: Scoring = Scoring()
    outputs: str = "outputs"

    @property
    def fold_set(self) -> str:
        """The folder of fold files that belongs to the corpus."""
        own = self.corpus == "manifest" and self.speakers != "uaspeech"
        return self.folds or (self.name if own else "torgo" if self.corpus == "torgo" else "uaspeech")

    @property
    def folder(self) -> Path:
        """Where this recipe's artefacts live."""
        return root() / self.outputs / self.name

    @property
    def fold_folder(self) -> Path:
        """Where the artefacts live that depend on the held-out speaker."""
        return self.folder / self.held_out


def located(name: str) -> Path:
    """A path of a recipe: relative to the repository's root, or from ~, or whole."""
    return root() / Path(name).expanduser()


def root(start: Path | None = None) -> Path:
    """The repository's root: the nearest folder upwards that holds `params/base.yaml`."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "params" / "base.yaml").is_file():
            return folder
    raise UserError(f"no params/base.yaml in {here} or above it: start inside the repository")


def load(recipe: str | Path, held_out: str, fold: dict | None = None, overrides: dict | None = None) -> Params:
    """Read, merge and check a recipe, a fold and overrides.

    An empty `fold` reads the fold file of the recipe's corpus: `params/folds/<folds>/<held_out>.yaml`.
    """
    path = _inside(recipe)
    layers = [(_shown(file), _read_yaml(file)) for file in recipe_files(path)]
    for _, settings in layers:
        settings.pop("extends", None)
    if not isinstance(overrides or {}, dict):
        raise UserError(f"parameter 'overrides': expected names and values, found {overrides!r}")
    for source, settings in [*layers, ("parameter 'overrides'", overrides or {})]:
        _validate(settings, held_out, source)
    chosen = _validate({"name": path.stem} | _merged([*layers, ("", overrides or {})]), held_out, _shown(path))
    _check_recipe(chosen, _shown(path))
    if not fold:
        fold, source = _fold_file(chosen.fold_set, held_out, _shown(path))
        layers.append((source, {"fold": fold}))
    else:
        layers.append(("parameter 'fold'", {"fold": fold}))
    layers.append(("parameter 'overrides'", overrides or {}))
    _validate(layers[-2][1], held_out, layers[-2][0])
    params = _validate({"name": path.stem} | _merged(layers), held_out, _shown(path))
    _check_whole(params, layers[-2][0], _shown(path))
    return params


def recipe_files(recipe: str | Path) -> list[Path]:
    """The files that a recipe is made of, base first: the base, what it extends, itself."""
    base, path = (root() / "params" / "base.yaml").resolve(), _inside(recipe)
    chain: list[Path] = []
    while path != base:
        if path in chain:
            raise UserError(f"{_shown(chain[0])}: its 'extends' leads back to {_shown(path)}")
        chain.insert(0, path)
        above = _read_yaml(path).get("extends", str(base))
        if not isinstance(above, str):
            raise UserError(f"{_shown(path)}: extends: expected the name of a recipe, found {above!r}")
        path = (path.parent / above).resolve()
    return [base, *chain]


def _merged(layers: list[tuple[str, dict]]) -> dict:
    return functools.reduce(_merge, (settings for _, settings in layers), {})


def _check_recipe(params: Params, recipe: str) -> None:
    """Checks that need more than one value of the recipe, and no fold."""
    if params.pretraining.d_model % params.pretraining.heads:
        raise UserError(
            f"{recipe}: pretraining.d_model {params.pretraining.d_model} cannot be divided among "
            f"{params.pretraining.heads} heads; choose heads that divide it"
        )
    if params.teacher.kernel % 2 == 0 or params.teacher.d_model % 2:
        raise UserError(
            f"{recipe}: teacher.kernel must be odd and teacher.d_model even, found {params.teacher.kernel} and "
            f"{params.teacher.d_model}"
        )
    if params.teacher.d_model % params.teacher.heads:
        raise UserError(
            f"{recipe}: teacher.d_model {params.teacher.d_model} cannot be divided among {params.teacher.heads} heads; "
            "choose heads that divide it"
        )
    if params.corpus == "manifest" and not params.manifest:
        raise UserError(f"{recipe}: corpus is 'manifest', but no manifest is named; write manifest: path/to/corpus.csv")
    if params.corpus in ("uaspeech", "torgo") and not params.data_folder:
        raise UserError(
            f"{recipe}: corpus is {params.corpus!r}, but it is not said where it lies; write data_folder: path/to/it"
        )


def _check_whole(params: Params, fold_source: str, recipe: str) -> None:
    """Checks that need more than one value."""
    fold, held_out = params.fold, params.held_out
    if isinstance(fold.train, tuple) and (both := sorted(set(fold.train) & set(fold.exclude))):
        raise UserError(
            f"{fold_source}: {both[0]} is named in fold.train and in fold.exclude; remove it from one of them"
        )
    known = fold_names(params.fold_set)
    for role in ("dev", "exclude", "train", "teachers"):
        named = getattr(fold, role)
        for speaker in named if isinstance(named, tuple) else [named] if role == "dev" and named else []:
            if known and speaker not in known:
                raise UserError(f"{fold_source}: fold.{role}: unknown speaker {speaker!r}{nearest(speaker, known)}")
    if fold.dev == held_out:
        raise UserError(f"{fold_source}: fold.dev is {held_out}, the held-out speaker itself; name another speaker")
    for role in ("train", "teachers"):
        for speaker, what in ((held_out, "held-out"), (fold.dev, "dev")):
            if isinstance(getattr(fold, role), tuple) and speaker in getattr(fold, role):
                raise UserError(
                    f"{fold_source}: the {what} speaker {speaker} is also named in fold.{role}; remove it there"
                )
    heard = set(params.pretraining.speakers) & {held_out, fold.dev}
    if params.pretrained == "from_corpus" and heard:
        raise UserError(
            f"{recipe}: pretraining.speakers names {min(heard)}, who is the held-out or the dev speaker of this fold; "
            "a model that has heard them says nothing about new speakers: remove the name"
        )


def _fold_file(folds: str, held_out: str, recipe: str) -> tuple[dict, str]:
    path = root() / "params" / "folds" / folds / f"{held_out}.yaml"
    if not path.is_file():
        known = fold_names(folds)
        hint = nearest(held_out, known) if known else f"; write its fold files with: make folds-for RECIPE={recipe}"
        raise UserError(f"held_out: unknown speaker {held_out!r}: there is no {_shown(path)}{hint}")
    content = _read_yaml(path)
    for name in set(content) - {"held_out", "fold"}:
        raise UserError(f"{_shown(path)}: unknown name {name!r}{nearest(name, ['held_out', 'fold'])}")
    if content.get("held_out", held_out) != held_out:
        raise UserError(f"{_shown(path)}: held_out is {content['held_out']!r}, but speaker {held_out!r} was asked for")
    return content.get("fold") or {}, _shown(path)


def fold_names(folds: str) -> list[str]:
    """The speakers that have a fold file."""
    return sorted(file.stem for file in (root() / "params" / "folds" / folds).glob("*.yaml"))


def _inside(recipe: str | Path) -> Path:
    path = Path(recipe)
    return (path if path.is_absolute() else root() / path).resolve()


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob("*.yaml"))
        hint = f"; recipes there: {', '.join(there)}" if there else ""
        raise UserError(f"{_shown(path)}: no such file{hint}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{_shown(path)}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"{_shown(path)}: expected names and values, found {type(content).__name__}")
    return content or {}


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _validate(settings: dict, held_out: str, source: str) -> Params:
    """Check one source alone (all else at its default), so that an error names the file that it stands in."""
    if "held_out" in settings:
        raise UserError(
            f"{source}: held_out does not belong here; it is a parameter of its own (make demo HELD_OUT=...)"
        )
    try:
        return Params.model_validate({"name": "unnamed", **settings, "held_out": held_out})
    except ValidationError as error:
        problems = [_explain(problem, source) for problem in error.errors()]
    raise UserError("\n".join(dict.fromkeys(problems)))


def _explain(problem: dict, source: str) -> str:
    loc = [str(piece) for piece in problem["loc"] if not _is_branch(piece)]
    name, found = ".".join(loc), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{source}: unknown parameter {name!r}{nearest(loc[-1], _names(loc[:-1]))}"
    message = problem["msg"].replace("a valid tuple", "a list, such as [M04, F03]")
    hint = "; put it in quotes" if problem["type"] == "string_type" and isinstance(found, int) else ""
    if isinstance(found, str) and problem["type"] in ("float_type", "int_type"):
        hint = "; YAML reads 1e-4 as text: write 1.0e-4 or 0.0001" if "e" in found.lower() else "; remove the quotes"
    return f"{source}: {name or 'recipe'}: {message[0].lower()}{message[1:]}, found {found!r}{hint}"


def _is_branch(piece: Any) -> bool:
    """Pydantic names the branch of a union in a location: not something that the user wrote."""
    return isinstance(piece, str) and ("[" in piece or piece in ("int", "str", "float"))


def _names(loc: list[str]) -> list[str]:
    """The names that are valid at a place; keys that the user chooses, such as speakers, are passed over."""
    model: type[BaseModel] = Params
    for piece in loc:
        if piece in model.model_fields:
            model = _model_in(model.model_fields[piece].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(root()))
    except ValueError:
        return str(path)
