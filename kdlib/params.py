"""Parameters: recipe YAML + fold YAML + overrides -> one frozen, validated `Params`.

Precedence is base < recipe < fold < overrides. Unknown names, wrong types, impossible values and unknown speakers are
refused before any work, with the file, the name, what was expected, what was found, and the nearest valid name.
Paths are relative to the repository's root, which is found from any folder below it.
"""

import functools
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from kdlib.errors import UserError, nearest
from kdlib.io import repository_root
from kdlib.settings import (
    Aggregation,
    AsTuple,
    AudioChecks,
    BeamSearchSettings,
    Blocks,
    Distill,
    EnsembleMembers,
    Faults,
    Fold,
    LogitStudentSettings,
    Names,
    Pretraining,
    Scoring,
    Section,
    SpeakerInfo,
    Student,
    Synthetic,
    Teacher,
    TokenSettings,
    Torgo,
    UASpeech,
)


class Params(Section):
    """Everything that a notebook needs to know."""

    name: str = Field(pattern=r"^[\w-][\w.-]*$")  # outputs/<name>/; the recipe's file name
    held_out: str
    seed: int = Field(1, ge=0)
    fold: Fold = Fold()
    folds: str | None = None  # params/folds/<folds>/; by default the corpus's: uaspeech, torgo, or the recipe's name
    corpus: Literal["synthetic", "manifest", "uaspeech", "torgo"] = "synthetic"
    manifest: str | None = None  # SpeechBrain CSV or NeMo JSON lines, where corpus: manifest
    data_folder: str | None = None  # what $data_folder stands for; where UA-Speech or TORGO lies
    speakers: Literal["uaspeech"] | dict[str, SpeakerInfo] = Field({})  # who they are, where the corpus does not say it
    lexicon: str | None = None  # closed vocabulary, a word a line; by default all transcripts of who is no control
    # in transcripts, before all else: {"&": "and", "7": "seven"}
    replace: dict[Annotated[str, Field(min_length=1)], str] = Field({})
    hyphens: Literal["keep", "space"] = "keep"  # of transcripts; NVIDIA's tokenizers have no hyphen
    punctuation: Literal["keep", "drop"] = "keep"
    audio: AudioChecks = AudioChecks()
    uaspeech: UASpeech = UASpeech()
    torgo: Torgo = Torgo()
    blocks: Blocks = Blocks()
    label_fraction: float = Field(1.0, gt=0, le=1)  # of each speaker's training utterances, whose transcripts are known
    label_by: Literal["utterance", "word"] = "utterance"  # which: utterances, or all utterances of some words
    use_unlabelled_held_out: bool = (
        False  # its training blocks too, without transcripts: no strict leave-one-speaker-out
    )
    synthetic: Synthetic = Synthetic()
    pretrained: Literal["shipped", "controls", "from_corpus", "nemo"] = "shipped"
    nemo_model: str = "nvidia/stt_en_conformer_ctc_small"  # a model's name, or the path of a .nemo file
    pretraining: Pretraining = Pretraining()
    tokens: TokenSettings = TokenSettings()
    teacher: Teacher = Teacher()
    aggregation: Aggregation = Aggregation()
    logit_student: LogitStudentSettings = LogitStudentSettings()
    student: Student = Student()
    distill: Distill = Distill()
    faults: Faults = Faults()
    variant: str = Field("", pattern=r"^[\w.+-]*$")  # which of the variants this is: set by `load`
    variants: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], dict[str, Any]] = Field({})  # what is other in each
    compare: Names = ("hard", "ctc_kd")  # variants that a whole run trains
    seeds: Annotated[tuple[int, ...], AsTuple] = (1,)  # of each
    ensembles: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], EnsembleMembers] = Field({})  # of students, by name
    scoring: Scoring = Scoring()
    search: BeamSearchSettings = BeamSearchSettings()
    outputs: str = "outputs"

    @property
    def fold_set(self) -> str:
        """The folder of fold files that belongs to the corpus."""
        own = self.corpus == "manifest" and self.speakers != "uaspeech"
        return self.folds or (self.name if own else "torgo" if self.corpus == "torgo" else "uaspeech")

    @property
    def folder(self) -> Path:
        """Where this recipe's artefacts live."""
        return repository_root() / self.outputs / self.name

    @property
    def fold_folder(self) -> Path:
        """Where the artefacts live that depend on the held-out speaker."""
        return self.folder / self.held_out

    @property
    def label_folder(self) -> Path:
        """Where the artefacts live that depend on whose transcripts are known."""
        return self.fold_folder / self.labels if self.labels else self.fold_folder

    @property
    def labels(self) -> str:
        """A name for what may be learnt from; empty where it is every transcript of the training speakers.

        >>> load("params/demo.yaml", "M08", overrides={"label_fraction": 0.2, "label_by": "word"}).labels
        'labels-20-by-word'
        """
        named = []
        if self.label_fraction < 1:
            named += [f"labels-{100 * self.label_fraction:g}", *(["by-word"] if self.label_by == "word" else [])]
        return "-".join(named + ["with-held-out"] * self.use_unlabelled_held_out)

    @property
    def with_all_labels(self) -> "Params":
        """The same, every transcript being known: for what is scored, never for what is trained."""
        return self.model_copy(update={"label_fraction": 1.0, "use_unlabelled_held_out": False})


def load(
    recipe: str | Path, held_out: str, fold: dict | None = None, overrides: dict | None = None, variant: str = ""
) -> Params:
    """Read, merge and check a recipe, a fold, one of the recipe's variants, and overrides.

    An empty `fold` reads the fold file of the recipe's corpus: `params/folds/<folds>/<held_out>.yaml`. Variants may be
    joined, each over those before it: `decoder_kd+shifted_tokens`.
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
    _validate(layers[-1][1], held_out, layers[-1][0])
    fold_source = layers[-1][0]
    for part in variant.split("+") if variant else []:
        source, settings = _variant(chosen, part, held_out, _shown(path))
        layers.append((source, settings | {"variant": variant}))
    layers.append(("parameter 'overrides'", overrides or {}))
    params = _validate({"name": path.stem} | _merged(layers), held_out, _shown(path))
    _check_recipe(params, _shown(path))
    _check_whole(params, fold_source, _shown(path))
    return params


def _variant(params: Params, variant: str, held_out: str, recipe: str) -> tuple[str, dict]:
    """A variant of a recipe, as a layer of its own."""
    if variant not in params.variants and (new := _renamed("variants", variant)) in params.variants:
        raise UserError(f"{recipe}: variants: {variant!r} was renamed to {new!r}")
    if variant not in params.variants:
        raise UserError(f"{recipe}: variants: unknown variant {variant!r}{nearest(variant, list(params.variants))}")
    source, settings = f"{recipe}: variants.{variant}", params.variants[variant]
    if beyond := sorted(set(settings) & {"name", "outputs", "variant", "variants", "held_out"}):
        raise UserError(f"{source}: {beyond[0]} cannot differ between variants of a recipe")
    _validate(settings, held_out, source)
    return source, settings


def recipe_files(recipe: str | Path) -> list[Path]:
    """The files that a recipe is made of, base first: the base, what it extends, itself."""
    base, path = (repository_root() / "params" / "base.yaml").resolve(), _inside(recipe)
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
    for number, phase in enumerate(params.student.phases, start=1):
        if (phase.epochs is None) == (phase.steps is None):
            raise UserError(
                f"{recipe}: student.phases: phase {number} must say either its epochs or its steps, "
                f"found epochs {phase.epochs} and steps {phase.steps}"
            )
    if params.distill.heads != "ctc" and not params.student.decoder_layers:
        raise UserError(
            f"{recipe}: distill.heads is {params.distill.heads!r}, but the student has no decoder; write student: "
            "{decoder_layers: 4}"
        )
    _check_losses(params, recipe)
    for name, group in params.ensembles.items():
        if name in params.variants or name == "baseline":
            raise UserError(f"{recipe}: ensembles.{name}: there is a variant or system of this name; choose another")
        for variant in group.variants:
            unknown = [part for part in variant.split("+") if part not in params.variants]
            if params.variants and unknown:
                hint = nearest(unknown[0], list(params.variants))
                raise UserError(f"{recipe}: ensembles.{name}.variants: unknown variant {variant!r}{hint}")
        if group.checkpoints > params.student.keep_checkpoints:
            raise UserError(
                f"{recipe}: ensembles.{name} averages {group.checkpoints} checkpoints of a student, but of each only "
                f"{params.student.keep_checkpoints} are kept; write student: {{keep_checkpoints: {group.checkpoints}}}"
            )
    if params.corpus == "manifest" and not params.manifest:
        raise UserError(f"{recipe}: corpus is 'manifest', but no manifest is named; write manifest: path/to/corpus.csv")
    if params.corpus in ("uaspeech", "torgo") and not params.data_folder:
        raise UserError(
            f"{recipe}: corpus is {params.corpus!r}, but it is not said where it lies; write data_folder: path/to/it"
        )


def _check_losses(params: Params, recipe: str) -> None:
    """What cannot be learnt, or not so."""
    settings = params.distill
    if not settings.uses_teachers and not settings.beta:
        raise UserError(f"{recipe}: distill: alpha, beta, gamma and all other weights are 0: nothing would be learnt")
    by_ctc = {"words": settings.words, "occupancy": settings.occupancy, "intermediate": settings.intermediate}
    for name, one in by_ctc.items():
        if one.weight and settings.heads == "decoder":
            raise UserError(
                f"{recipe}: distill.{name} is learnt by a CTC head, but distill.heads is 'decoder'; write heads: both, "
                "or ctc"
            )
    switched = params.student.backbone == "nemo" and params.teacher.backbone == "sb" and not settings.allow_decoder_kd
    by_frame = settings.uses_frame_targets and (settings.heads != "decoder" or settings.gamma or switched)
    if params.student.augment == "mask_and_tempo" and by_frame:
        raise UserError(
            f"{recipe}: student.augment is 'mask_and_tempo', but the teachers' outputs by frame are those of the "
            "unchanged recording; write augment: mask, which leaves frames where they are"
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
    path = repository_root() / "params" / "folds" / folds / f"{held_out}.yaml"
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
    return sorted(file.stem for file in (repository_root() / "params" / "folds" / folds).glob("*.yaml"))


def _inside(recipe: str | Path) -> Path:
    path = Path(recipe)
    return (path if path.is_absolute() else repository_root() / path).resolve()


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
    if new := _renamed("settings", _place(problem["loc"])):
        return f"{source}: {name} was renamed to {new}"
    if new := _renamed("settings", f"{_place(problem['loc'])}.{found}"):
        return f"{source}: {name}: {found!r} was renamed to {new!r}"
    if problem["type"] == "extra_forbidden":
        return f"{source}: unknown parameter {name!r}{nearest(loc[-1], _names(loc[:-1]))}"
    message = problem["msg"].replace("a valid tuple", "a list, such as [M04, F03]")
    hint = "; put it in quotes" if problem["type"] == "string_type" and isinstance(found, int) else ""
    if isinstance(found, str) and problem["type"] in ("float_type", "int_type"):
        hint = "; YAML reads 1e-4 as text: write 1.0e-4 or 0.0001" if "e" in found.lower() else "; remove the quotes"
    return f"{source}: {name or 'recipe'}: {message[0].lower()}{message[1:]}, found {found!r}{hint}"


def _place(loc: Sequence[str | int]) -> str:
    """Where a setting stands, without the names that a user chose."""
    pieces = [str(piece) for piece in loc if not _is_branch(piece)]
    return ".".join(pieces[:1] + pieces[2:] if pieces[0] in ("ensembles", "variants") else pieces)


@functools.cache
def _renames() -> dict[str, dict[str, str]]:
    return yaml.safe_load(files("kdlib").joinpath("data/renamed.yaml").read_text(encoding="utf-8"))


def _renamed(part: str, name: str) -> str:
    """What something was renamed to; nothing if it was not."""
    return _renames()[part].get(name, "")


def _is_branch(piece: Any) -> bool:
    """Pydantic names the branch of a union in a location: not something that the user wrote."""
    return isinstance(piece, str) and ("[" in piece or piece.removeprefix("constrained-") in ("int", "str", "float"))


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
        return str(path.relative_to(repository_root()))
    except ValueError:
        return str(path)
