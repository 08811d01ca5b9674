"""Parameters: recipe YAML + fold YAML + overrides -> one frozen, validated `Params`.

Precedence is base < recipe < fold < overrides. Unknown names, wrong types, impossible values and unknown speakers are
refused before any work, with the file, the name and the nearest name. Paths are relative to the repository's root.
"""

import functools
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from kdlib.errors import UserError, nearest
from kdlib.io import UniqueKeys, repository_root
from kdlib.models.encoders import ENCODERS
from kdlib.objectives import terms
from kdlib.recipe_checks import check_fold, check_recipe
from kdlib.settings import AsTuple, Names, Section, Seeds
from kdlib.settings.ablation import Ablation
from kdlib.settings.adaptation import Adaptation
from kdlib.settings.corpus import CorpusSettings, SplitSettings
from kdlib.settings.distill import Distill
from kdlib.settings.evaluation import BeamSearchSettings, Calibration, Scoring
from kdlib.settings.messages import explain, renamed
from kdlib.settings.milestone import Milestone
from kdlib.settings.pretrained import PretrainedSettings, TokenSettings
from kdlib.settings.student import EnsembleMembers, Faults, Student
from kdlib.settings.targets import Aggregation, LogitStudentSettings
from kdlib.settings.teacher import Teacher
from kdlib.settings.tuning import Tune

GIVEN = "given"  # the fold of a corpus's own split, in place of a held-out speaker
SomeSection = TypeVar("SomeSection", bound=Section)


class Params(CorpusSettings, SplitSettings, PretrainedSettings):
    """All parameters of a run."""

    name: str = Field(pattern=r"^[\w-][\w.-]*$", max_length=100)  # outputs/<name>/; the recipe's file name
    folds: str | None = None  # params/folds/<folds>/; by default the corpus's: uaspeech, torgo, or the recipe's name
    tokens: TokenSettings = TokenSettings()
    teacher: Teacher = Teacher()
    aggregation: Aggregation = Aggregation()
    logit_student: LogitStudentSettings = LogitStudentSettings()
    student: Student = Student()
    distill: Distill = Distill()
    adapt: Adaptation | None = None
    faults: Faults = Faults()
    variant: str = Field("", pattern=r"^[\w.+-]*$")  # name of the chosen variant: set by `load`
    variants: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], dict[str, Any]] = Field({})  # settings that differ
    ablation: Ablation = Ablation()
    tune: Tune = Tune()
    compare: Annotated[Names, Field(min_length=1)] = ("hard", "ctc_kd")  # variants that a whole run trains
    seeds: Seeds = (1,)  # of each variant
    ensembles: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], EnsembleMembers] = Field({})  # of students
    milestones: Annotated[tuple[Milestone, ...], AsTuple] = ()  # expected values, shown on curves and in tables
    scoring: Scoring = Scoring()
    search: BeamSearchSettings = BeamSearchSettings()
    calibration: Calibration = Calibration()
    outputs: str = "outputs"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of all models; auto: a CUDA GPU where there is one

    def part(self, section: type[SomeSection]) -> SomeSection:
        """The parameters of one section alone, such as `SplitSettings`."""
        return section.model_construct(**{name: getattr(self, name) for name in section.model_fields})

    def but(self, **sections: dict[str, Any]) -> "Params":
        """A copy with other values: `params.but(aggregation={"method": "best"})`."""
        changed = {
            name: getattr(self, name).model_copy(update=value) if isinstance(value, dict) else value
            for name, value in sections.items()
        }
        return self.model_copy(update=changed)

    @property
    def fold_set(self) -> str:
        """Name of the corpus's folder of fold files."""
        if self.folds:
            return self.folds
        if self.corpus in ("torgo", "phoenix", "skeleton"):
            return self.corpus
        own = self.corpus in ("manifest", "features") and self.speakers != "uaspeech"
        return self.name if own else "uaspeech"

    @property
    def with_all_labels(self) -> "Params":
        """The same parameters with every transcript: for scoring, never for training."""
        return self.but(label_fraction=1.0, use_unlabelled_held_out=False)

    @property
    def tokens_per_fold(self) -> bool:
        """True if each fold has its own tokens: those of a model of its speakers, or its training texts' words."""
        of_model = self.tokens.source == "pretrained" and self.pretrained == "from_corpus"
        return of_model or self.tokens.source == "words"

    @property
    def base_model_per_fold(self) -> bool:
        """True if teachers, or the model that they start from, were trained on the speakers of one fold."""
        if self.teacher.source == "students":
            return True
        from_checkpoint = ENCODERS[self.teacher.encoder].checkpoint and self.pretrained == "from_corpus"
        return self.teacher.parent == "from_corpus" or from_checkpoint or self.tokens_per_fold

    @property
    def teachers_per_fold(self) -> bool:
        """True if teachers and their outputs depend on the fold's speakers or on its labels."""
        return self.base_model_per_fold or bool(self.labels or self.teacher.average_weights)

    @property
    def crosses_encoders(self) -> bool:
        """True if a decoder would be trained on targets of teachers with another encoder."""
        others = self.teacher.source == "speakers" and self.student.encoder != self.teacher.encoder
        others = others or self.teacher.imported  # of an encoder that is not known
        return self.distill.heads != "ctc" and terms.uses_teachers(self.distill) and others

    @property
    def scoring_identity(self) -> dict:
        """The settings that scores depend on, as stages record them."""
        sections = {"scoring": self.scoring, "search": self.search, "calibration": self.calibration}
        return {name: section.model_dump(mode="json", exclude={"unit"}) for name, section in sections.items()}

    @property
    def resumes_variant(self) -> bool:
        """True if the student continues one of another variant, and not that of a folder."""
        name = self.student.resume
        return bool(name) and all(part in self.variants for part in name.split("+"))

    def learns_from(self, seed: int) -> list[tuple[str, int]]:
        """The students, by variant and seed, that teach one of this seed or that it continues."""
        pairs: list[tuple[str, int]] = []
        if terms.uses_teachers(self.distill) and self.teacher.source == "students":
            pairs += itertools.product(self.teacher.students, self.teacher.student_seeds)
        if self.adapt:
            pairs += [(self.adapt.start, seed), *self.adapt.members(seed)]
        if self.resumes_variant:
            pairs.append((self.student.resume, seed))
        return list(dict.fromkeys(pairs))

    def ensemble(self, name: str) -> EnsembleMembers:
        """The settings of an ensemble that the recipe names."""
        if name not in self.ensembles:
            hint = nearest(name, list(self.ensembles)) if self.ensembles else "; the recipe names none"
            raise UserError(f"ensembles: unknown ensemble {name!r}{hint}")
        return self.ensembles[name]

    @property
    def student_scoring_identity(self) -> dict:
        """The settings that a student's scores depend on: faults on purpose, too, which nothing shared has."""
        faults = {"faults": self.faults.model_dump(exclude_defaults=True)} if self.faults.named else {}
        return self.scoring_identity | faults


def load(
    recipe: str | Path, held_out: str, fold: dict | None = None, overrides: dict | None = None, variant: str = ""
) -> Params:
    """Read, merge and check a recipe, a fold, one of the recipe's variants, and overrides.

    An empty `fold` reads the fold file of the recipe's corpus: `params/folds/<folds>/<held_out>.yaml`. Variants may be
    joined, each over those before it: `decoder_kd+shifted_tokens`.
    """
    path, overrides = _resolve(recipe), overrides or {}
    shown = _shown(path)
    layers = [(_shown(file), _read_yaml(file)) for file in recipe_files(path)]
    for _, settings in layers:
        settings.pop("extends", None)
    if not isinstance(overrides, dict):
        raise UserError(f"parameter 'overrides': expected names and values, found {overrides!r}")
    last = ("parameter 'overrides'", overrides)
    for source, settings in [*layers, last]:
        _validate(settings, held_out, source)
    chosen = _validate({"name": path.stem} | _merge_layers([*layers, last]), held_out, shown)
    if chosen.ablation.factors:
        layers.append((shown, _expanded(chosen, shown)))
        chosen = _validate({"name": path.stem} | _merge_layers([*layers, last]), held_out, shown)
    check_recipe(chosen, shown)
    fold, fold_source = (fold, "parameter 'fold'") if fold else _fold_file(chosen.fold_set, held_out, shown)
    layers.append((fold_source, {"fold": fold}))
    _validate({"fold": fold}, held_out, fold_source)
    for part in variant.split("+") if variant else []:
        source, settings = _variant(chosen, part, held_out, shown)
        layers.append((source, settings | {"variant": variant}))
    params = _validate({"name": path.stem} | _merge_layers([*layers, last]), held_out, shown)
    if (control := params.ablation.control(variant, params.distill.control)) != params.distill.control:
        layers.append((shown, {"distill": {"control": control}}))
        params = _validate({"name": path.stem} | _merge_layers([*layers, last]), held_out, shown)
    check_recipe(params, shown)
    check_fold(params, fold_source, shown, fold_names(params.fold_set))
    return params


def load_recipe(recipe: str | Path, overrides: dict | None = None) -> Params:
    """Load a recipe without a fold, for what all folds share."""
    return load(recipe, "nobody", {"exclude": []}, overrides)


def _expanded(params: Params, recipe: str) -> dict:
    """The levels of a set of ablations as variants, and its cells as what is compared."""
    ablation = params.ablation
    if unknown := [part for part in ablation.base.split("+") if part not in params.variants]:
        hint = nearest(unknown[0], list(params.variants))
        raise UserError(f"{recipe}: ablation.base: unknown variant {unknown[0]!r}{hint}")
    for name in ablation.cross:
        if name not in ablation.factors:
            raise UserError(f"{recipe}: ablation.cross: unknown factor {name!r}{nearest(name, list(ablation.factors))}")
    return {"variants": ablation.variants, "compare": [cell.variant for cell in ablation.cells]}


def _variant(params: Params, variant: str, held_out: str, recipe: str) -> tuple[str, dict]:
    """Return a variant of a recipe as a layer: its source and its settings."""
    if variant not in params.variants and (new := renamed("variants", variant)) in params.variants:
        raise UserError(f"{recipe}: variants: {variant!r} was renamed to {new!r}")
    if variant not in params.variants:
        raise UserError(f"{recipe}: variants: unknown variant {variant!r}{nearest(variant, list(params.variants))}")
    source, settings = f"{recipe}: variants.{variant}", params.variants[variant]
    if fixed := sorted(set(settings) & {"name", "outputs", "variant", "variants", "held_out"}):
        raise UserError(f"{source}: {fixed[0]} cannot differ between variants of a recipe")
    _validate(settings, held_out, source)
    return source, settings


def recipe_files(recipe: str | Path) -> list[Path]:
    """List the files of a recipe in order of precedence: the base, the recipes that it extends, itself."""
    base, path = (repository_root() / "params" / "base.yaml").resolve(), _resolve(recipe)
    chain: list[Path] = []
    while path != base:
        if path in chain:
            raise UserError(f"{_shown(chain[0])}: its 'extends' leads back to {_shown(path)}")
        chain.insert(0, path)
        parent = _read_yaml(path).get("extends", str(base))
        if not isinstance(parent, str):
            raise UserError(f"{_shown(path)}: extends: expected the name of a recipe, found {parent!r}")
        path = (path.parent / parent).resolve()
    return [base, *chain]


def _merge_layers(layers: list[tuple[str, dict]]) -> dict:
    return functools.reduce(_merge, (settings for _, settings in layers), {})


def _fold_file(folds: str, held_out: str, recipe: str) -> tuple[dict, str]:
    folder = repository_root() / "params" / "folds"
    path = folder / f"{GIVEN}.yaml" if held_out == GIVEN else folder / folds / f"{held_out}.yaml"
    if not path.is_file():
        names = fold_names(folds)
        hint = nearest(held_out, names) if names else f"; write its fold files with: make folds-for RECIPE={recipe}"
        raise UserError(f"held_out: unknown speaker {held_out!r}: there is no {_shown(path)}{hint}")
    content = _read_yaml(path)
    for name in set(content) - {"held_out", "fold"}:
        raise UserError(f"{_shown(path)}: unknown name {name!r}{nearest(name, ['held_out', 'fold'])}")
    if content.get("held_out", held_out) != held_out:
        raise UserError(f"{_shown(path)}: expected held_out {held_out!r}, found {content['held_out']!r}")
    return content.get("fold") or {}, _shown(path)


def fold_names(folds: str) -> list[str]:
    """List the speakers that have a fold file."""
    return sorted(file.stem for file in (repository_root() / "params" / "folds" / folds).glob("*.yaml"))


def _resolve(recipe: str | Path) -> Path:
    path = Path(recipe)
    return (path if path.is_absolute() else repository_root() / path).resolve()


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        recipes = sorted(file.name for file in path.parent.glob("*.yaml"))
        hint = f"; recipes there: {', '.join(recipes)}" if recipes else ""
        raise UserError(f"{_shown(path)}: no such file{hint}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
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
    """Validate one source alone (all else at its default), so that an error names its file."""
    if "held_out" in settings:
        raise UserError(f"{source}: held_out does not belong here; it is a separate parameter (make demo HELD_OUT=...)")
    try:
        return Params.model_validate({"name": "unnamed", **settings, "held_out": held_out})
    except ValidationError as error:
        problems = [explain(problem, source, Params) for problem in error.errors()]
    raise UserError("\n".join(dict.fromkeys(problems)))


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(repository_root()))
    except ValueError:
        return str(path)
