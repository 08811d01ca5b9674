"""What a recipe's student is made of: its start, its speech, its targets, its loss, and all that these depend on.

Every variant of a recipe - hard labels alone among them - is made by this code, with the same utterances in the same
order for the same seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from kdlib.models import read_record
from kdlib.models.nemo_files import restore_model
from kdlib.params import Params
from kdlib.pretrained.model import fits_frames, pretrained_model, training_record
from kdlib.pretrained.pieces import copy_head, load_tokens, tokens_folder
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.choice import CHOICE_CODE, load_target, target_teachers
from kdlib.targets.pseudo_labels import PSEUDO_LABEL_CODE, TeacherHypotheses
from kdlib.targets.similarity import features_folder
from kdlib.targets.target_report import DEV_FITTED, best_method
from kdlib.teachers.base_model import base_model
from kdlib.tokens import Tokens
from kdlib.training.sampling import set_aside

if TYPE_CHECKING:
    from kdlib.models.hybrid import Hybrid
    from kdlib.objectives.objective import Batch, Objective

BUILT = (
    "models/hybrid.py",
    "models/encoder_cache.py",
    "pretrained/pieces.py",
    "models/encoder_conformer.py",
    "models/decoder.py",
    "models/encoder_nemo.py",
    "models/nemo_files.py",
)
SETUP_CODE = (
    "distill/setup.py",
    "objectives/objective.py",
    "objectives/losses.py",
    "objectives/reference_losses.py",
    "training/loop.py",
    "training/callbacks.py",
    "training/checkpoints.py",
    "training/schedules.py",
    "training/sampling.py",
    "runtime.py",
    *BUILT,
)
SETUP_CODE += (
    "models/augment.py",
    "decode/greedy.py",
    "tokens.py",
    "corpus/audio.py",
    *CHOICE_CODE,
    *PSEUDO_LABEL_CODE,
    *labels.CODE,
    *faults.CODE,
)
SETUP_CODE += (
    "teachers/adapt.py",
    "teachers/base_model.py",
    "teachers/teacher_sets.py",
    "teachers/training.py",
    "pretrained/model.py",
)  # what is set aside, and what fits into its frames
LATEST = "latest.safetensors"


def checkpoint_file(rank: int) -> str:
    """The file of a student's weights at one of its best looks, 1 being the best."""
    return f"best{rank}.safetensors"


def write_weights(model: "Hybrid", path: Path) -> None:
    """Write a model's weights."""
    from safetensors.torch import save_file

    save_file({name: one.detach().contiguous() for name, one in model.state_dict().items()}, path)


@dataclass(frozen=True)
class StudentData:
    """What a student learns from, and what it is chosen on."""

    train: list[Utterance]
    dev: list[Utterance]
    too_short: int  # training utterances left out: fewer frames than tokens
    unheard: int = 0  # those without a transcript, where nobody teaches them


def student_folder(params: Params, seed: int) -> Path:
    """The folder of a student."""
    return params.fold_folder / "students" / (params.variant or "unnamed") / f"seed{seed}"


def student_settings(params: Params) -> dict:
    """What of the recipe a student depends on; the teachers' part only where they have a say."""
    taught = params.distill.uses_teachers
    hard = {"beta", "heads", "ctc_weight", "label_smoothing", "ctc_smoothing", "intermediate"}
    found = {
        "student": params.student.model_dump(
            mode="json",
            exclude={"accelerator"} if params.student.keep_checkpoints > 1 else {"accelerator", "keep_checkpoints"},
        ),
        "distill": params.distill.model_dump(
            mode="json", include=None if taught else hard, exclude={"allow", "control", "allow_decoder_kd"}
        ),
        "fold": params.fold.model_dump(mode="json"),
        "held_out": params.held_out,
        "blocks": params.blocks.model_dump(mode="json"),
    }
    if params.labels:
        found["labels"] = labels.record(params)
    if taught:
        found["aggregation"] = params.aggregation.model_dump(mode="json")
    if params.faults.named:
        found["faults"] = params.faults.model_dump(exclude_defaults=True)
    if needs_beam(params):
        found["search"] = params.search.model_dump(mode="json")
    if params.student.backbone == "sb":
        found["shape"] = _shape(params)
    if params.fold.dev is None:
        found |= {"dev_share": params.teacher.dev_share, "split": params.seed}
    return found


def student_inputs(params: Params, seed: int = 1) -> list[Path]:
    """What a student is made of."""
    found = [prepare.corpus_folder(params), tokens_folder(params)]
    if start := resumed_from(params, seed):
        found += [start / LATEST]
    elif params.student.backbone == "nemo":
        found += [pretrained_model(params)]
    elif params.student.start == "pretrained":
        found += [_sb_parent(params) / "model.safetensors"]
    if params.distill.uses_teachers:
        names = target_teachers(params, params.aggregation.method)
        found += [extract.extract(params, name, "training") for name in names]
        if params.faults.choose_by == "kl":
            found += [extract.extract(params, name, "analysis") for name in names]
        if params.aggregation.method == "weighted_similarity":
            found += [features_folder(params)]
        if needs_beam(params):
            found += [language_model(params, load_tokens(params))]
        if params.aggregation.method in DEV_FITTED and params.fold.dev:
            found += [teacher_scores.teacher_scores(params, name) for name in names]
    return found


def crosses_encoders(params: Params) -> bool:
    """Whether a decoder on NeMo's encoder is asked to learn from SpeechBrain teachers."""
    backbones = params.student.backbone, params.teacher.backbone
    return params.distill.heads != "ctc" and params.distill.uses_teachers and backbones == ("nemo", "sb")


def resolved(params: Params) -> Params:
    """The recipe as it is carried out: with the method that `auto` comes to, and the heads that learn.

    Seed 000's rule turns decoder distillation across encoders into that of CTC.
    """
    if params.distill.uses_teachers and params.aggregation.method == "auto":
        method, why = best_method(params)
        print_once(why)
        params = params.model_copy(update={"aggregation": params.aggregation.model_copy(update={"method": method})})
    if not crosses_encoders(params) or params.distill.allow_decoder_kd:
        return params
    return params.model_copy(update={"distill": params.distill.model_copy(update={"heads": "ctc"})})


def student_data(params: Params, tokens: Tokens) -> StudentData:
    """The fold's training speech, and the dev speaker's; without one, a share of the training speech."""
    splits = split(prepare.load(params), params)
    train, dev = splits.train, splits.dev
    if not dev:
        apart = set_aside(splits.train, params.teacher.dev_share, params.seed)
        train, dev = apart.train, apart.dev
    train = faults.limit_words(params, train)
    learnt = [utt for utt in train if fits_frames(tokens.encode(utt.text), utt.duration_s)]
    too_short = len(train) - len(learnt)
    untold = [utt for utt in splits.unlabelled if fits_frames([0], utt.duration_s)]
    if params.distill.uses_teachers:  # else nothing can be learnt from speech without a transcript
        learnt, untold = learnt + untold, []
    if not learnt or not dev:
        raise UserError(
            f"student: {len(learnt)} utterances to learn from and {len(dev)} to choose by; look at fold.dev, "
            "fold.train and blocks"
        )
    return StudentData(learnt, dev, too_short, len(untold))


def initial_student(params: Params, tokens: Tokens, seed: int) -> "Hybrid":
    """The student before training."""
    from kdlib.models import encoder_conformer, hybrid
    from kdlib.runtime import seed_everything

    settings = params.student
    seed_everything(seed)
    if folder := resumed_from(params, seed):
        model, known, record = hybrid.load(folder, LATEST)
        _check_resumed(params, folder, model, known.fingerprint == tokens.fingerprint, record)
        if settings.backbone == "nemo":
            model.encoder.preprocessor_frozen = settings.freeze_preprocessor
    elif settings.backbone == "nemo":
        source = restore_model(pretrained_model(params))
        heads = _heads(params, tokens, source.cfg.encoder.d_model)
        model = hybrid.NeMoHybridStudent.of(source, heads, freeze_preprocessor=settings.freeze_preprocessor)
        if not params.faults.untrained_head:
            copy_head(model, source, tokens)
    elif settings.start == "pretrained":
        start, _, _ = hybrid.load(_sb_parent(params))
        model = hybrid.Hybrid(start.encoder, _heads(params, tokens, start.encoder.width))
        if not params.faults.untrained_head:
            model.ctc_head.load_state_dict(start.ctc_head.state_dict())
    else:
        shape = encoder_conformer.ConformerShape(**_shape(params))
        model = hybrid.Hybrid(encoder_conformer.Conformer(shape), _heads(params, tokens, shape.d_model))
    model.encoder.spec_augment = settings.augment != "none"
    return model


def student_targets(params: Params) -> dict[str, TeacherEnsemble]:
    """The fold's targets by output, where teachers have a say."""
    if not params.distill.uses_teachers:
        return {}
    return {
        output: faults.apply_faults(params, load_target(params, output=output)) for output in needed_outputs(params)
    }


def kl_judge(params: Params) -> TeacherEnsemble | None:
    """The teachers on the dev speaker's speech, where the best look is the one most like them."""
    if params.faults.choose_by == "wra" or not params.distill.uses_teachers:
        return None
    if params.distill.heads == "decoder":
        raise UserError(
            "faults.choose_by: kl compares CTC outputs: teachers' decoder outputs on dev speech are not kept; write "
            "distill: {heads: ctc}"
        )
    found = load_target(params, purpose="analysis")
    return faults.apply_faults(params, found, training=False)


def needed_outputs(params: Params) -> tuple[str, ...]:
    """Which of the teachers' outputs are asked for: those of the heads that learn, and those by frame where needed."""
    settings = params.distill
    if not any([settings.alpha, settings.alpha_end, settings.pseudo_labels.weight]):
        return ("ctc",)
    found = ("ctc", "decoder") if settings.heads == "both" else (settings.heads,)
    return found if "ctc" in found or not (settings.gamma or _by_text(params)) else ("ctc", *found)


def _by_text(params: Params) -> bool:
    """Whether something is taught by words or texts."""
    settings = params.distill
    return any([settings.words.weight, settings.sequence.weight, settings.occupancy.weight])


def text_source(params: Params) -> tuple[str, float]:
    """What texts are taken from (`sequence.hypotheses_from`), and the least share with which they are taught."""
    settings = params.distill
    if settings.sequence.weight:
        return settings.sequence.hypotheses_from, settings.sequence.confidence
    return "lexicon", 0.0 if settings.words.weight else settings.occupancy.confidence


def needs_beam(params: Params) -> bool:
    """Whether teachers' texts are found by beam search."""
    return params.distill.sequence.weight > 0 and params.distill.sequence.hypotheses_from == "beam"


def teacher_hypotheses(params: Params, found: Mapping[str, TeacherEnsemble]) -> TeacherHypotheses | None:
    """What teachers take utterances for, where that is taught."""
    if not _by_text(params):
        return None
    tokens, words = load_tokens(params), prepare.spellings(params)
    search, settings = params.search, params.distill
    listed = settings.words.weight or (settings.sequence.weight and settings.sequence.hypotheses_from == "lexicon")
    if sum(" " in word for word in words) > len(words) / 2 and (
        listed or (settings.occupancy.weight and params.labels)
    ):
        raise UserError(
            "distill: words, sequence over the lexicon, and occupancy of speech without transcripts choose among the "
            f"lexicon's entries, but most of these {len(words):,} are whole sentences, the denied and the test "
            "speech's among them; write distill: {sequence: {weight: 0.5, hypotheses_from: beam}} (or hypotheses_from: greedy), or name a "
            "lexicon of words"
        )
    beam = None
    if needs_beam(params):
        chosen = BeamSettings(search.lm_weight, search.word_bonus, search.beam_size)
        listed = None if search.units == "pieces" else words
        beam = BeamSearch(tokens, listed, language_model(params, tokens), chosen)
    return TeacherHypotheses(found["ctc"], Lexicon(words, tokens), tokens, beam)


def build_objective(params: Params, model: "Hybrid", found: Mapping[str, TeacherEnsemble]) -> "Objective":
    """What the student's training minimises."""
    from kdlib.objectives.objective import Objective, TrainableStudent

    width = 0
    if params.distill.gamma:
        width = next(iter(found["ctc"].stores.values())).header.width
    tap = params.distill.intermediate.layer if params.distill.intermediate.weight else 0
    return Objective(TrainableStudent(model, width, tap), params.distill, found, teacher_hypotheses(params, found))


def make_batch(utterances: Sequence[Utterance], tokens: Tokens) -> "Batch":
    """A batch of utterances as the objective takes it."""
    from kdlib.objectives.objective import Batch

    ids = [tokens.encode(utt.text) for utt in utterances]
    return Batch(
        *audio.collate(utterances), ids, [utt.utt_id for utt in utterances], [utt.speaker for utt in utterances]
    )


def _heads(params: Params, tokens: Tokens, width: int):
    from kdlib.models.hybrid import Heads, nearest_divisor

    settings = params.student
    return Heads(
        tokens.size, settings.decoder_layers, nearest_divisor(width, settings.heads), settings.ffn, settings.dropout
    )


def _shape(params: Params) -> dict:
    """The sizes of a SpeechBrain student: its own, or the teachers'."""
    from kdlib.models.encoder_conformer import ConformerShape

    wanted = (params.student.conformer or params.teacher).model_dump()
    return {name: wanted[name] for name in ConformerShape.__dataclass_fields__ if name in wanted}


def initial_speakers(params: Params, seed: int) -> list[str]:
    """Whom the student's start had heard."""
    if folder := resumed_from(params, seed):
        return read_record(folder)["train_speakers"]
    if params.student.backbone == "nemo":
        known = training_record(params)
        return known["speakers"] if known else []
    return read_record(_sb_parent(params))["train_speakers"] if params.student.start == "pretrained" else []


def _sb_parent(params: Params) -> Path:
    """The SpeechBrain teachers' parent, from which a SpeechBrain student starts."""
    found = base_model(params.model_copy(update={"teacher": params.teacher.model_copy(update={"backbone": "sb"})}))
    if found is None:
        raise UserError(
            "student: a SpeechBrain student starts from the teachers' parent, but teacher.parent is 'none'; write "
            "student: {start: scratch}, or teacher: {parent: controls}"
        )
    return found


def _check_resumed(params: Params, folder: Path, model: "Hybrid", same_tokens: bool, record: dict) -> None:
    """A student to go on from must fit the recipe, and may not have heard whom this fold keeps away."""
    if not same_tokens:
        raise UserError(f"student.resume: {folder} was trained with other tokens than this recipe has")
    if why := labels.leaks(record.get("labels"), params):
        raise UserError(f"student.resume: {folder} {why}")
    if leaked := sorted(set(record["train_speakers"]) & {params.held_out, params.fold.dev}):
        raise UserError(f"student.resume: {folder} has heard {', '.join(leaked)}, who may not be heard in this fold")
    settings = params.student
    if record["backbone"] != settings.backbone or model.heads.layers != settings.decoder_layers:
        raise UserError(
            f"student.resume: {folder} has the backbone {record['backbone']} and {model.heads.layers} decoder layers, "
            f"the recipe {settings.backbone} and {settings.decoder_layers}"
        )


def resumed_from(params: Params, seed: int) -> Path | None:
    """The folder of the student that this one goes on from."""
    name = params.student.resume
    if not name:
        return None
    ours = all(part in params.variants for part in name.split("+"))
    folder = params.fold_folder / "students" / name / f"seed{seed}" if ours else resolve_path(name)
    if not (folder / LATEST).is_file():
        raise UserError(
            f"student.resume: there is no student in {folder} (no {LATEST}); train it first, or name a variant of this "
            f"recipe ({', '.join(params.variants)}) or the folder of a student"
        )
    return folder
