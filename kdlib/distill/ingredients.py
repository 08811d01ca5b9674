"""What a recipe's student is made of: its start, its speech, its targets, its loss, and all that these depend on.

Every variant of a recipe - hard labels alone among them - is made by this code, with the same utterances in the same
order for the same seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import audio, labels, prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import split
from kdlib.decode.beam import Beam, Setting
from kdlib.decode.lexicon import Lexicon
from kdlib.distill import faults
from kdlib.errors import UserError
from kdlib.evaluate import panels
from kdlib.models import nemo, vocabulary
from kdlib.models.pretrain import fits, heard, pretrained
from kdlib.params import Params, located
from kdlib.stage import read_json, say_once
from kdlib.teachers import adapt, aggregates, extract, hypotheses, scores, targets, voices
from kdlib.teachers.ensemble import Ensemble
from kdlib.teachers.hypotheses import Hypotheses
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    from kdlib.distill.objective import Batch, Objective
    from kdlib.models.hybrid import Hybrid

BUILT = (
    "models/hybrid.py",
    "models/frozen.py",
    "models/vocabulary.py",
    "models/conformer.py",
    "models/decoder.py",
    "models/nemo.py",
)
CODE = (
    "distill/ingredients.py",
    "distill/objective.py",
    "distill/losses.py",
    "models/supervised.py",
    "train.py",
    *BUILT,
)
CODE += (
    "models/augment.py",
    "decode/greedy.py",
    "tokens.py",
    "corpus/audio.py",
    *targets.CODE,
    *hypotheses.CODE,
    *labels.CODE,
    *faults.CODE,
)
CODE += ("teachers/adapt.py", "models/pretrain.py")  # what is set aside, and what fits into its frames
LATEST = "latest.safetensors"


def look_file(rank: int) -> str:
    """The file of a student's weights at one of its best looks, 1 being the best."""
    return f"look{rank}.safetensors"


def write(model: "Hybrid", path: Path) -> None:
    """Write a model's weights."""
    from safetensors.torch import save_file

    save_file({name: one.detach().contiguous() for name, one in model.state_dict().items()}, path)


@dataclass(frozen=True)
class Material:
    """What a student learns from, and what it is chosen on."""

    train: list[Utterance]
    dev: list[Utterance]
    too_short: int  # training utterances left out: fewer frames than tokens
    unheard: int = 0  # those without a transcript, where nobody teaches them


def place(params: Params, seed: int) -> Path:
    """The folder of a student."""
    return params.fold_folder / "students" / (params.variant or "unnamed") / f"seed{seed}"


def depends(params: Params) -> dict:
    """What of the recipe a student depends on; the teachers' part only where they have a say."""
    taught = params.distill.taught
    hard = {"beta", "heads", "ctc_weight", "label_smoothing", "ctc_smoothing", "intermediate"}
    found = {
        "student": params.student.model_dump(
            mode="json", exclude={"accelerator"} if params.student.keep > 1 else {"accelerator", "keep"}
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
    if beams(params):
        found["search"] = params.search.model_dump(mode="json")
    if params.student.backbone == "sb":
        found["shape"] = _shape(params)
    if params.fold.dev is None:
        found |= {"dev_share": params.teacher.dev_share, "split": params.seed}
    return found


def inputs(params: Params, seed: int = 1) -> list[Path]:
    """What a student is made of."""
    found = [prepare.made(params), vocabulary.made(params)]
    if start := resumed(params, seed):
        found += [start / LATEST]
    elif params.student.backbone == "nemo":
        found += [pretrained(params)]
    elif params.student.start == "pretrained":
        found += [_sb_parent(params) / "model.safetensors"]
    if params.distill.taught:
        names = targets.teachers(params, params.aggregation.method)
        found += [extract.extract(params, name, "training") for name in names]
        if params.faults.choose_by == "kl":
            found += [extract.extract(params, name, "analysis") for name in names]
        if params.aggregation.method == "weighted_similarity":
            found += [voices.made(params)]
        if beams(params):
            found += [panels.language_model(params, vocabulary.vocabulary(params))]
        if params.aggregation.method in aggregates.LEARNT and params.fold.dev:
            found += [scores.scores(params, name) for name in names]
    return found


def crosses(params: Params) -> bool:
    """Whether a decoder on NeMo's encoder is asked to learn from SpeechBrain teachers."""
    backbones = params.student.backbone, params.teacher.backbone
    return params.distill.heads != "ctc" and params.distill.taught and backbones == ("nemo", "sb")


def effective(params: Params) -> Params:
    """The recipe as it is carried out: with the method that `auto` comes to, and the heads that learn.

    Seed 000's rule turns decoder distillation across encoders into that of CTC.
    """
    if params.distill.taught and params.aggregation.method == "auto":
        method, why = aggregates.decided(params)
        say_once(why)
        params = params.model_copy(update={"aggregation": params.aggregation.model_copy(update={"method": method})})
    if not crosses(params) or params.distill.allow_decoder_kd:
        return params
    return params.model_copy(update={"distill": params.distill.model_copy(update={"heads": "ctc"})})


def material(params: Params, tokens: Tokens) -> Material:
    """The fold's training speech, and the dev speaker's; without one, a share of the training speech."""
    splits = split(prepare.load(params), params)
    train, dev = splits.train, splits.dev
    if not dev:
        apart = adapt.material(splits.train, params.teacher.dev_share, params.seed)
        train, dev = apart.train, apart.dev
    train = faults.fewer(params, train)
    learnt = [utt for utt in train if fits(tokens.encode(utt.text), utt.duration_s)]
    too_short = len(train) - len(learnt)
    untold = [utt for utt in splits.unlabelled if fits([0], utt.duration_s)]
    if params.distill.taught:  # else nothing can be learnt from speech without a transcript
        learnt, untold = learnt + untold, []
    if not learnt or not dev:
        raise UserError(
            f"student: {len(learnt)} utterances to learn from and {len(dev)} to choose by; look at fold.dev, "
            "fold.train and blocks"
        )
    return Material(learnt, dev, too_short, len(untold))


def first(params: Params, tokens: Tokens, seed: int) -> "Hybrid":
    """The student before training."""
    from kdlib import train
    from kdlib.models import conformer, hybrid

    settings = params.student
    train.seed_everything(seed)
    if folder := resumed(params, seed):
        model, known, record = hybrid.load(folder, LATEST)
        _check_resumed(params, folder, model, known.fingerprint == tokens.fingerprint, record)
        if settings.backbone == "nemo":
            model.encoder.preprocessor_frozen = settings.freeze_preprocessor
    elif settings.backbone == "nemo":
        source = nemo.restore(pretrained(params))
        heads = _heads(params, tokens, source.cfg.encoder.d_model)
        model = hybrid.NeMoHybridStudent.of(source, heads, freeze_preprocessor=settings.freeze_preprocessor)
        if not params.faults.untrained_head:
            vocabulary.take_head(model, source, tokens)
    elif settings.start == "pretrained":
        start, _, _ = hybrid.load(_sb_parent(params))
        model = hybrid.Hybrid(start.encoder, _heads(params, tokens, start.encoder.width))
        if not params.faults.untrained_head:
            model.ctc_head.load_state_dict(start.ctc_head.state_dict())
    else:
        shape = conformer.Shape(**_shape(params))
        model = hybrid.Hybrid(conformer.Conformer(shape), _heads(params, tokens, shape.d_model))
    model.encoder.spec_augment = settings.augment != "none"
    return model


def ensembles(params: Params) -> dict[str, Ensemble]:
    """The fold's targets by output, where teachers have a say."""
    if not params.distill.taught:
        return {}
    return {output: faults.applied(params, targets.target(params, output=output)) for output in outputs(params)}


def judge(params: Params) -> Ensemble | None:
    """The teachers on the dev speaker's speech, where the best look is the one most like them."""
    if params.faults.choose_by == "words" or not params.distill.taught:
        return None
    if params.distill.heads == "decoder":
        raise UserError(
            "faults.choose_by: kl compares CTC outputs: teachers' decoder outputs on dev speech are not kept; write "
            "distill: {heads: ctc}"
        )
    found = targets.target(params, purpose="analysis")
    return faults.applied(params, found, training=False)


def outputs(params: Params) -> tuple[str, ...]:
    """Which of the teachers' outputs are asked for: those of the heads that learn, and those by frame where needed."""
    settings = params.distill
    if not any([settings.alpha, settings.alpha_end, settings.pseudo.weight]):
        return ("ctc",)
    found = ("ctc", "decoder") if settings.heads == "both" else (settings.heads,)
    return found if "ctc" in found or not (settings.gamma or _by_text(params)) else ("ctc", *found)


def _by_text(params: Params) -> bool:
    """Whether something is taught by words or texts."""
    settings = params.distill
    return any([settings.words.weight, settings.sequence.weight, settings.occupancy.weight])


def asked(params: Params) -> tuple[str, float]:
    """What texts are taken from (`sequence.over`), and the least share with which they are taught."""
    settings = params.distill
    if settings.sequence.weight:
        return settings.sequence.over, settings.sequence.confidence
    return "lexicon", 0.0 if settings.words.weight else settings.occupancy.confidence


def beams(params: Params) -> bool:
    """Whether teachers' texts are found by beam search."""
    return params.distill.sequence.weight > 0 and params.distill.sequence.over == "beam"


def guesses(params: Params, found: Mapping[str, Ensemble]) -> Hypotheses | None:
    """What teachers take utterances for, where that is taught."""
    if not _by_text(params):
        return None
    tokens, words = vocabulary.vocabulary(params), prepare.spellings(params)
    search, settings = params.search, params.distill
    listed = settings.words.weight or (settings.sequence.weight and settings.sequence.over == "lexicon")
    if sum(" " in word for word in words) > len(words) / 2 and (
        listed or (settings.occupancy.weight and params.labels)
    ):
        raise UserError(
            "distill: words, sequence over the lexicon, and occupancy of speech without transcripts choose among the "
            f"lexicon's entries, but most of these {len(words):,} are whole sentences, the denied and the test "
            "speech's among them; write distill: {sequence: {weight: 0.5, over: beam}} (or over: greedy), or name a "
            "lexicon of words"
        )
    beam = None
    if beams(params):
        chosen = Setting(search.lm_weight, search.word_bonus, search.size)
        listed = None if search.units == "pieces" else words
        beam = Beam(tokens, listed, panels.language_model(params, tokens), chosen)
    return Hypotheses(found["ctc"], Lexicon(words, tokens), tokens, beam)


def objective(params: Params, model: "Hybrid", found: Mapping[str, Ensemble]) -> "Objective":
    """What the student's training minimises."""
    from kdlib.distill.objective import Learner, Objective

    width = 0
    if params.distill.gamma:
        width = next(iter(found["ctc"].stores.values())).header.width
    tap = params.distill.intermediate.layer if params.distill.intermediate.weight else 0
    return Objective(Learner(model, width, tap), params.distill, found, guesses(params, found))


def read(utterances: Sequence[Utterance], tokens: Tokens) -> "Batch":
    """A batch of utterances as the objective takes it."""
    from kdlib.distill.objective import Batch

    ids = [tokens.encode(utt.text) for utt in utterances]
    return Batch(
        *audio.collate(utterances), ids, [utt.utt_id for utt in utterances], [utt.speaker for utt in utterances]
    )


def _heads(params: Params, tokens: Tokens, width: int):
    from kdlib.models.hybrid import Heads, fitting

    settings = params.student
    return Heads(tokens.size, settings.decoder_layers, fitting(width, settings.heads), settings.ffn, settings.dropout)


def _shape(params: Params) -> dict:
    """The sizes of a SpeechBrain student: its own, or the teachers'."""
    from kdlib.models.conformer import Shape

    wanted = (params.student.conformer or params.teacher).model_dump()
    return {name: wanted[name] for name in Shape.__dataclass_fields__ if name in wanted}


def heard_before(params: Params, seed: int) -> list[str]:
    """Whom the student's start had heard."""
    if folder := resumed(params, seed):
        return read_json(folder / "model.json")["heard"]
    if params.student.backbone == "nemo":
        known = heard(params)
        return known["speakers"] if known else []
    return read_json(_sb_parent(params) / "model.json")["heard"] if params.student.start == "pretrained" else []


def _sb_parent(params: Params) -> Path:
    """The SpeechBrain teachers' parent, from which a SpeechBrain student starts."""
    found = adapt.parent(params.model_copy(update={"teacher": params.teacher.model_copy(update={"backbone": "sb"})}))
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
    if leaked := sorted(set(record["heard"]) & {params.held_out, params.fold.dev}):
        raise UserError(f"student.resume: {folder} has heard {', '.join(leaked)}, who may not be heard in this fold")
    settings = params.student
    if record["backbone"] != settings.backbone or model.heads.layers != settings.decoder_layers:
        raise UserError(
            f"student.resume: {folder} has the backbone {record['backbone']} and {model.heads.layers} decoder layers, "
            f"the recipe {settings.backbone} and {settings.decoder_layers}"
        )


def resumed(params: Params, seed: int) -> Path | None:
    """The folder of the student that this one goes on from."""
    name = params.student.resume
    if not name:
        return None
    ours = all(part in params.variants for part in name.split("+"))
    folder = params.fold_folder / "students" / name / f"seed{seed}" if ours else located(name)
    if not (folder / LATEST).is_file():
        raise UserError(
            f"student.resume: there is no student in {folder} (no {LATEST}); train it first, or name a variant of this "
            f"recipe ({', '.join(params.variants)}) or the folder of a student"
        )
    return folder
