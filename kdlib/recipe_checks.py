"""Values of a recipe that depend on each other, and on its fold: what does not fit is refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kdlib.errors import UserError, nearest
from kdlib.models.encoders import ENCODERS
from kdlib.objectives import terms


class Params(Protocol):
    """The parameters of a run: the sections of `params.Params`, by name."""

    def __getattr__(self, name: str) -> Any:
        """A section, or a value."""
        ...


def check_recipe(params: Params, recipe: str) -> None:
    """Check values of the recipe that depend on each other, but not on the fold."""
    for name, section in (("teacher", params.teacher), ("student", params.student)):
        if section.encoder not in ENCODERS:
            hint = nearest(section.encoder, list(ENCODERS))
            raise UserError(f"{recipe}: {name}.encoder: unknown encoder {section.encoder!r}{hint}")
        takes, kind = ENCODERS[section.encoder].takes, params.inputs.kind
        unused = name == "teacher" and (section.imported or (section.source == "model" and section.model))
        if takes != kind and not unused:
            fitting = [one for one, entry in ENCODERS.items() if entry.takes == kind]
            raise UserError(
                f"{recipe}: {name}.encoder: {section.encoder!r} takes {takes}, but the inputs of this corpus are "
                f"{kind}; write {name}: {{encoder: {fitting[0]}}}"
            )
    if params.teacher.imported and not params.teacher.folder:
        raise UserError(
            f"{recipe}: teacher.source is {params.teacher.source!r}, but no folder is named; write teacher: {{folder: "
            "path/to/it}"
        )
    if params.teacher.average_weights and params.teacher.source in ("stores", "model"):
        raise UserError(
            f"{recipe}: teacher.average_weights needs the models of several teachers, but teacher.source is "
            f"{params.teacher.source!r}"
        )
    for name, section in (("pretraining", params.pretraining), ("teacher", params.teacher)):
        if name == "teacher" and (section.kernel % 2 == 0 or section.d_model % 2):
            raise UserError(
                f"{recipe}: teacher.kernel must be odd and teacher.d_model even, found {section.kernel} and "
                f"{section.d_model}"
            )
        if section.d_model % section.heads:
            raise UserError(
                f"{recipe}: {name}.d_model {section.d_model} cannot be divided among {section.heads} heads; choose "
                "heads that divide it"
            )
    if params.pretrained == "none" and params.tokens.source == "pretrained":
        raise UserError(f"{recipe}: there is no pretrained model (pretrained: none); write tokens: {{source: corpus}}")
    if params.inputs.kind == "features" and params.pretrained != "none":
        raise UserError(f"{recipe}: pretrained models take audio, and the inputs are features; write pretrained: none")
    for number, phase in enumerate(params.student.phases, start=1):
        if (phase.epochs is None) == (phase.steps is None):
            raise UserError(
                f"{recipe}: student.phases: phase {number} needs either epochs or steps, found epochs {phase.epochs} "
                f"and steps {phase.steps}"
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
    if params.corpus in ("manifest", "features") and not params.manifest:
        raise UserError(f"{recipe}: corpus {params.corpus!r}, no manifest is named; write manifest: path/to/corpus.csv")
    if params.corpus in ("uaspeech", "torgo", "phoenix") and not params.data_folder:
        raise UserError(f"{recipe}: corpus is {params.corpus!r}, but has no folder; write data_folder: path/to/it")


def _check_losses(params: Params, recipe: str) -> None:
    """Check that the loss has a term, and that its terms fit the heads and the augmentation."""
    settings = params.distill
    if not terms.active(settings):
        raise UserError(f"{recipe}: distill: alpha, beta, gamma and all other weights are 0: the loss would be empty")
    of_decoder = {term.setting for term in terms.TERMS.values() if term.head == "decoder"}
    for term in terms.TERMS.values():
        of_ctc = term.head == "ctc" or "layer" in term.needs
        if settings.heads == "decoder" and of_ctc and term.weight(settings) and term.setting not in of_decoder:
            raise UserError(
                f"{recipe}: distill.{term.setting.split('.')[0]} is a loss of a CTC head, but distill.heads is "
                "'decoder'; write heads: both, or ctc"
            )
    if params.student.mixup and settings.heads != "ctc":
        raise UserError(
            f"{recipe}: student.mixup mixes the losses of two utterances, of CTC outputs; a decoder reads one text: "
            "write mixup: 0, or distill: {heads: ctc}"
        )
    used = settings
    if params.crosses_encoders and not settings.allow_decoder_kd:
        used = settings.model_copy(update={"heads": "ctc"})
    if "tempo" in params.student.augment and terms.needs(used, "frames") and not settings.live_teachers:
        raise UserError(
            f"{recipe}: student.augment is {params.student.augment!r}, but the teachers' stored outputs are those of "
            "the unchanged recording; write augment: mask, which moves no frames, or distill: {live_teachers: true}"
        )


def check_fold(params: Params, fold_source: str, recipe: str, known: Sequence[str]) -> None:
    """Check the speakers of the fold and of the pretraining; `known` are those that have a fold file."""
    fold, held_out = params.fold, params.held_out
    if isinstance(fold.train, tuple) and (both := sorted(set(fold.train) & set(fold.exclude))):
        raise UserError(
            f"{fold_source}: {both[0]} is named in fold.train and in fold.exclude; remove it from one of them"
        )
    if fold.given and not params.blocks.dev:
        raise UserError(
            f"{recipe}: a given split needs the blocks of its dev speech; write blocks: {{dev: [dev], ...}}"
        )
    if fold.given and (both := sorted({*params.blocks.test} & {*params.blocks.train, *params.blocks.dev})):
        raise UserError(
            f"{recipe}: the block {both[0]} of a given split is test speech, and named in blocks.train or blocks.dev "
            "too: what is chosen there would be chosen on the speech that is scored; remove it from one"
        )
    speakers = [] if fold.given else known
    for role in ("dev", "exclude", "train", "teachers"):
        named = getattr(fold, role)
        for name in named if isinstance(named, tuple) else [named] if role == "dev" and named else []:
            if speakers and name not in speakers:
                raise UserError(f"{fold_source}: fold.{role}: unknown speaker {name!r}{nearest(name, speakers)}")
    if fold.dev == held_out:
        raise UserError(f"{fold_source}: fold.dev is {held_out}, the held-out speaker itself; name another speaker")
    for role in ("train", "teachers"):
        for name, what in ((held_out, "held-out"), (fold.dev, "dev")):
            if isinstance(getattr(fold, role), tuple) and name in getattr(fold, role):
                raise UserError(f"{fold_source}: the {what} speaker {name} is also in fold.{role}; remove it there")
    leaked = set(params.pretraining.speakers) & set(params.excluded_speakers)
    if params.pretrained == "from_corpus" and leaked:
        raise UserError(
            f"{recipe}: pretraining.speakers names {min(leaked)}, the held-out or the dev speaker of this fold; "
            "remove the name: a model that was trained on them cannot be tested on new speakers"
        )
