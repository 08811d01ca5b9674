"""Set up a recipe's student: its initial weights, speech, targets and loss, and the files that these depend on.

Every variant of a recipe, hard labels only included, is set up by this code, with the same utterances in the same order
for the same seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from kdlib.console import print_once
from kdlib.corpus import audio, labels, prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import split
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.lexicon import Lexicon
from kdlib.distill import faults
from kdlib.errors import UserError
from kdlib.evaluate.decoder_setup import language_model
from kdlib.io import resolve_path
from kdlib.logits import extract, teacher_scores
from kdlib.models import encoder_conformer, hybrid, read_record
from kdlib.models.encoder_conformer import ConformerShape
from kdlib.models.nemo_files import restore_model
from kdlib.objectives.objective import Batch, Objective, TrainableStudent
from kdlib.params import Params
from kdlib.pretrained.model import fits_frames, pretrained_model, training_record
from kdlib.pretrained.pieces import copy_head, load_tokens, tokens_folder
from kdlib.runtime import seed_everything
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.choice import CHOICE_CODE, load_target, target_teachers
from kdlib.targets.pseudo_labels import PSEUDO_LABEL_CODE, TeacherHypotheses
from kdlib.targets.similarity import features_folder
from kdlib.targets.target_report import DEV_FITTED, best_method
from kdlib.teachers.base_model import base_model
from kdlib.tokens import Tokens
from kdlib.training.sampling import TrainingData, set_aside

SETUP_CODE = (
    "distill/setup.py",
    *("objectives/objective.py", "objectives/losses.py", "objectives/reference_losses.py"),
    *("training/loop.py", "training/callbacks.py", "training/checkpoints.py", "training/schedules.py"),
    *("training/sampling.py", "runtime.py", "models/hybrid.py", "models/encoder_cache.py", "pretrained/pieces.py"),
    *("models/encoder_conformer.py", "models/decoder.py", "models/encoder_nemo.py", "models/nemo_files.py"),
    *("models/augment.py", "decode/greedy.py", "tokens.py", "corpus/audio.py"),
    *(*CHOICE_CODE, *PSEUDO_LABEL_CODE, *labels.CODE, *faults.CODE),
    *("teachers/adapt.py", "teachers/base_model.py", "teachers/teacher_sets.py", "teachers/training.py"),
    "pretrained/model.py",  # which utterances fit into their frames
)
LATEST = "latest.safetensors"


def checkpoint_file(rank: int) -> str:
    """The file of a student's weights at one of its best checkpoints, 1 being the best."""
    return f"best{rank}.safetensors"


def write_weights(model: hybrid.Hybrid, path: Path) -> None:
    """Write a model's weights."""
    save_file({name: weight.detach().contiguous() for name, weight in model.state_dict().items()}, path)


@dataclass(frozen=True)
class StudentData(TrainingData):
    """A student's training speech, and the dev speech that chooses its checkpoint."""

    too_short: int  # training utterances left out: fewer frames than tokens
    unused: int = 0  # unlabelled utterances left out, where there are no teachers


def student_folder(params: Params, seed: int) -> Path:
    """Return the folder of a student."""
    return params.fold_folder / "students" / (params.variant or "unnamed") / f"seed{seed}"


def student_settings(params: Params) -> dict:
    """The settings of the recipe that a student depends on; those of teachers only where the loss uses them."""
    uses_teachers = params.distill.uses_teachers
    excluded = {"accelerator"} if params.student.keep_checkpoints > 1 else {"accelerator", "keep_checkpoints"}
    hard = {"beta", "heads", "ctc_weight", "label_smoothing", "ctc_smoothing", "intermediate"}
    settings = {
        "student": params.student.model_dump(mode="json", exclude=excluded),
        "distill": params.distill.model_dump(
            mode="json", include=None if uses_teachers else hard, exclude={"allow", "control", "allow_decoder_kd"}
        ),
        "fold": params.fold.model_dump(mode="json"),
        "held_out": params.held_out,
        "blocks": params.blocks.model_dump(mode="json"),
    }
    if params.labels:
        settings["labels"] = labels.record(params)
    if uses_teachers:
        settings["aggregation"] = params.aggregation.model_dump(mode="json")
    if params.faults.named:
        settings["faults"] = params.faults.model_dump(exclude_defaults=True)
    if needs_beam(params):
        settings["search"] = params.search.model_dump(mode="json")
    if params.student.backbone == "sb":
        settings["shape"] = _shape(params)
    if params.fold.dev is None:
        settings |= {"dev_share": params.teacher.dev_share, "split": params.seed}
    return settings


def student_inputs(params: Params, seed: int = 1) -> list[Path]:
    """The files and folders that a student depends on."""
    inputs = [prepare.corpus_folder(params), tokens_folder(params)]
    if folder := resumed_from(params, seed):
        inputs += [folder / LATEST]
    elif params.student.backbone == "nemo":
        inputs += [pretrained_model(params)]
    elif params.student.start == "pretrained":
        inputs += [_sb_base_model(params) / "model.safetensors"]
    if params.distill.uses_teachers:
        names = target_teachers(params, params.aggregation.method)
        inputs += [extract.extract(params, name, "training") for name in names]
        if params.faults.choose_by == "kl":
            inputs += [extract.extract(params, name, "analysis") for name in names]
        if params.aggregation.method == "weighted_similarity":
            inputs += [features_folder(params)]
        if needs_beam(params):
            inputs += [language_model(params, load_tokens(params))]
        if params.aggregation.method in DEV_FITTED and params.fold.dev:
            inputs += [teacher_scores.teacher_scores(params, name) for name in names]
    return inputs


def crosses_encoders(params: Params) -> bool:
    """True if a decoder on NeMo's encoder would be trained on targets of SpeechBrain teachers."""
    backbones = params.student.backbone, params.teacher.backbone
    return params.distill.heads != "ctc" and params.distill.uses_teachers and backbones == ("nemo", "sb")


def resolved(params: Params) -> Params:
    """The recipe as carried out: with the method that `auto` selects, and the heads that are trained.

    Seed 000's rule replaces decoder distillation across encoders by CTC distillation.
    """
    if params.distill.uses_teachers and params.aggregation.method == "auto":
        method, why = best_method(params)
        print_once(why)
        params = params.model_copy(update={"aggregation": params.aggregation.model_copy(update={"method": method})})
    if not crosses_encoders(params) or params.distill.allow_decoder_kd:
        return params
    return params.model_copy(update={"distill": params.distill.model_copy(update={"heads": "ctc"})})


def student_data(params: Params, tokens: Tokens) -> StudentData:
    """The fold's training speech and the dev speaker's speech; without one, a share of the training speech."""
    splits = split(prepare.load(params), params)
    train, dev = splits.train, splits.dev
    if not dev:
        parts = set_aside(splits.train, params.teacher.dev_share, params.seed)
        train, dev = parts.train, parts.dev
    train = faults.limit_words(params, train)
    labelled = [utt for utt in train if fits_frames(tokens.encode(utt.text), utt.duration_s)]
    too_short = len(train) - len(labelled)
    unlabelled = [utt for utt in splits.unlabelled if fits_frames([0], utt.duration_s)]
    train = labelled
    if params.distill.uses_teachers:  # otherwise unlabelled speech has no target
        train, unlabelled = labelled + unlabelled, []
    if not train or not dev:
        raise UserError(
            f"student: {len(train)} training utterances and {len(dev)} dev utterances; check fold.dev, fold.train and "
            "blocks"
        )
    return StudentData(train, dev, too_short, len(unlabelled))


def initial_student(params: Params, tokens: Tokens, seed: int) -> hybrid.Hybrid:
    """Build the student before training."""
    settings = params.student
    seed_everything(seed)
    if folder := resumed_from(params, seed):
        model, earlier, record = hybrid.load(folder, LATEST)
        _check_resumed(params, folder, model, earlier.fingerprint == tokens.fingerprint, record)
        if settings.backbone == "nemo":
            model.encoder.preprocessor_frozen = settings.freeze_preprocessor
    elif settings.backbone == "nemo":
        source = restore_model(pretrained_model(params))
        heads = _heads(params, tokens, source.cfg.encoder.d_model)
        model = hybrid.NeMoHybridStudent.of(source, heads, freeze_preprocessor=settings.freeze_preprocessor)
        if not params.faults.untrained_head:
            copy_head(model, source, tokens)
    elif settings.start == "pretrained":
        base, _, _ = hybrid.load(_sb_base_model(params))
        model = hybrid.Hybrid(base.encoder, _heads(params, tokens, base.encoder.width))
        if not params.faults.untrained_head:
            model.ctc_head.load_state_dict(base.ctc_head.state_dict())
    else:
        shape = ConformerShape(**_shape(params))
        model = hybrid.Hybrid(encoder_conformer.Conformer(shape), _heads(params, tokens, shape.d_model))
    model.encoder.spec_augment = settings.augment != "none"
    return model


def student_targets(params: Params) -> dict[str, TeacherEnsemble]:
    """The fold's targets by output; none where the loss uses no teachers."""
    outputs = needed_outputs(params) if params.distill.uses_teachers else ()
    return {output: faults.apply_faults(params, load_target(params, output=output)) for output in outputs}


def kl_judge(params: Params) -> TeacherEnsemble | None:
    """The teachers' outputs on dev speech, where the best checkpoint is the one closest to them."""
    if params.faults.choose_by == "wra" or not params.distill.uses_teachers:
        return None
    if params.distill.heads == "decoder":
        raise UserError(
            "faults.choose_by: kl compares CTC outputs: teachers' decoder outputs on dev speech are not stored; write "
            "distill: {heads: ctc}"
        )
    return faults.apply_faults(params, load_target(params, purpose="analysis"), training=False)


def needed_outputs(params: Params) -> tuple[str, ...]:
    """The teachers' outputs that the loss needs: those of the trained heads, and CTC where another term uses it."""
    settings = params.distill
    if not any([settings.alpha, settings.alpha_end, settings.pseudo_labels.weight]):
        return ("ctc",)
    outputs = ("ctc", "decoder") if settings.heads == "both" else (settings.heads,)
    return outputs if "ctc" in outputs or not (settings.gamma or _uses_hypotheses(params)) else ("ctc", *outputs)


def _uses_hypotheses(params: Params) -> bool:
    """True if a term of the loss uses the teachers' words or texts."""
    settings = params.distill
    return any([settings.words.weight, settings.sequence.weight, settings.occupancy.weight])


def text_source(params: Params) -> tuple[str, float]:
    """The source of the teachers' texts (`sequence.hypotheses_from`), and the least confidence of a used text."""
    settings = params.distill
    if settings.sequence.weight:
        return settings.sequence.hypotheses_from, settings.sequence.confidence
    return "lexicon", 0.0 if settings.words.weight else settings.occupancy.confidence


def needs_beam(params: Params) -> bool:
    """True if the teachers' texts come from beam search."""
    return params.distill.sequence.weight > 0 and params.distill.sequence.hypotheses_from == "beam"


def teacher_hypotheses(params: Params, targets: Mapping[str, TeacherEnsemble]) -> TeacherHypotheses | None:
    """The teachers' hypotheses of utterances, where the loss uses them."""
    if not _uses_hypotheses(params):
        return None
    tokens, words = load_tokens(params), prepare.spellings(params)
    search, settings = params.search, params.distill
    listed = settings.words.weight or (settings.sequence.weight and settings.sequence.hypotheses_from == "lexicon")
    if sum(" " in word for word in words) > len(words) / 2 and (
        listed or (settings.occupancy.weight and params.labels)
    ):
        raise UserError(
            "distill: words, sequence over the lexicon, and occupancy of unlabelled speech choose among the entries of "
            f"the lexicon, but most of these {len(words):,} are whole sentences, including those of unlabelled and "
            "test speech; write distill: {sequence: {weight: 0.5, hypotheses_from: beam}} (or hypotheses_from: "
            "greedy), or name a lexicon of words"
        )
    beam = None
    if needs_beam(params):
        beam_settings = BeamSettings(search.lm_weight, search.word_bonus, search.beam_size)
        words_or_pieces = None if search.units == "pieces" else words
        beam = BeamSearch(tokens, words_or_pieces, language_model(params, tokens), beam_settings)
    return TeacherHypotheses(targets["ctc"], Lexicon(words, tokens), tokens, beam)


def build_objective(params: Params, model: hybrid.Hybrid, targets: Mapping[str, TeacherEnsemble]) -> Objective:
    """Build the training objective of a student."""
    width = next(iter(targets["ctc"].stores.values())).header.width if params.distill.gamma else 0
    tap = params.distill.intermediate.layer if params.distill.intermediate.weight else 0
    return Objective(TrainableStudent(model, width, tap), params.distill, targets, teacher_hypotheses(params, targets))


def make_batch(utterances: Sequence[Utterance], tokens: Tokens) -> Batch:
    """Collate utterances into a batch for the objective."""
    ids = [tokens.encode(utt.text) for utt in utterances]
    speakers = [utt.speaker for utt in utterances]
    return Batch(*audio.collate(utterances), ids, [utt.utt_id for utt in utterances], speakers)


def _heads(params: Params, tokens: Tokens, width: int) -> hybrid.Heads:
    settings = params.student
    heads = hybrid.nearest_divisor(width, settings.heads)
    return hybrid.Heads(tokens.size, settings.decoder_layers, heads, settings.ffn, settings.dropout)


def _shape(params: Params) -> dict:
    """The dimensions of a SpeechBrain student: its own, or the teachers'."""
    settings = (params.student.conformer or params.teacher).model_dump()
    return {name: settings[name] for name in ConformerShape.__dataclass_fields__ if name in settings}


def initial_speakers(params: Params, seed: int) -> list[str]:
    """The speakers that the student's initial weights were trained on."""
    if folder := resumed_from(params, seed):
        return read_record(folder)["train_speakers"]
    if params.student.backbone == "nemo":
        record = training_record(params)
        return record["speakers"] if record else []
    return read_record(_sb_base_model(params))["train_speakers"] if params.student.start == "pretrained" else []


def _sb_base_model(params: Params) -> Path:
    """The base model of the SpeechBrain teachers, from which a SpeechBrain student starts."""
    folder = base_model(params.model_copy(update={"teacher": params.teacher.model_copy(update={"backbone": "sb"})}))
    if folder is None:
        raise UserError(
            "student: a SpeechBrain student starts from the teachers' base model, but teacher.parent is 'none'; write "
            "student: {start: scratch}, or teacher: {parent: controls}"
        )
    return folder


def _check_resumed(params: Params, folder: Path, model: hybrid.Hybrid, same_tokens: bool, record: dict) -> None:
    """Refuse to resume from a student that does not fit the recipe, or was trained on the held-out or dev speaker."""
    if not same_tokens:
        raise UserError(f"student.resume: {folder} was trained with a different tokenizer than this recipe's")
    if why := labels.leaks(record.get("labels"), params):
        raise UserError(f"student.resume: {folder} {why}")
    if leaked := sorted(set(record["train_speakers"]) & {params.held_out, params.fold.dev}):
        names = ", ".join(leaked)
        raise UserError(f"student.resume: {folder} was trained on {names}, which this fold excludes from training")
    settings = params.student
    if record["backbone"] != settings.backbone or model.heads.layers != settings.decoder_layers:
        raise UserError(
            f"student.resume: {folder} has the backbone {record['backbone']} and {model.heads.layers} decoder layers, "
            f"the recipe has {settings.backbone} and {settings.decoder_layers}"
        )


def resumed_from(params: Params, seed: int) -> Path | None:
    """The folder of the student whose training this one continues; None without `student.resume`."""
    name = params.student.resume
    if not name:
        return None
    is_variant = all(part in params.variants for part in name.split("+"))
    folder = params.fold_folder / "students" / name / f"seed{seed}" if is_variant else resolve_path(name)
    if not (folder / LATEST).is_file():
        raise UserError(
            f"student.resume: there is no student in {folder} (no {LATEST}); train it first, or name a variant of this "
            f"recipe ({', '.join(params.variants)}) or the folder of a student"
        )
    return folder
