"""Train a teacher or the base model on references: CTC and attention loss, early stopping on held-back speech."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import audio, labels
from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.corpus.views import View, same
from kdlib.errors import UserError
from kdlib.settings.corpus import SplitSettings
from kdlib.settings.reference_loss import ReferenceLoss
from kdlib.settings.teacher import Teacher, Training
from kdlib.tokens import Tokens
from kdlib.training.sampling import FRAME_S, TrainingData, fits_frames
from kdlib.training.schedules import cosine

if TYPE_CHECKING:
    import torch

    from kdlib.decode.lexicon import Lexicon
    from kdlib.models import Emissions
    from kdlib.models.hybrid import Hybrid
    from kdlib.objectives.objective import Objective


@dataclass(frozen=True)
class InitialModel:
    """The model that a training starts from."""

    model: "Hybrid"
    tokens: Tokens
    train_speakers: Sequence[str]  # that its weights were trained on
    head_is_trained: bool = True  # the CTC head


@dataclass(frozen=True)
class TeacherTraining:
    """How a teacher, or the base model of all, is trained."""

    what: str
    settings: Teacher
    schedule: Training
    fold: SplitSettings
    lexicon: "Lexicon | None" = None  # where the loss uses it
    frame_s: float = FRAME_S  # of the encoder's outputs
    measure: str = "wra"  # that stops the training
    device: str = "auto"
    view: View = same  # the recordings of utterances that teachers get


def train_teacher(partial: Path, start: InitialModel, data: TrainingData, how: TeacherTraining) -> None:
    """Train a model on `data.train`, stop it on `data.dev`, and save it with all speakers that it was trained on.

    Speech is not augmented for a frozen encoder, which encodes every utterance once.
    """
    from kdlib.models import augment, hybrid
    from kdlib.models.encoder_cache import EncoderCache, FeatureCache
    from kdlib.objectives.objective import Learner, Objective
    from kdlib.objectives.reference_terms import REFERENCE_TERMS
    from kdlib.objectives.step import Sources
    from kdlib.training.checkpoints import remove_checkpoints
    from kdlib.training.loop import EpochData, Run, Task, Validations, fit

    settings, schedule, seed = how.settings, how.schedule, how.fold.seed
    model, tokens = start.model, start.tokens
    encoder = model.encoder
    encoder.spec_augment = augment.SpecAugment.of(settings)
    speech = Utterances.of(how.view(data.train))
    train = speech.where(lambda utt: fits_frames(tokens.encode(utt.text), utt.duration_s, how.frame_s))
    if not train:
        raise UserError(
            f"{how.what}: every utterance has fewer frames of {1000 * how.frame_s:.0f} ms than tokens; is it cut off?"
        )
    encoder.learn_statistics(train)

    def load(utterances: Sequence[Utterance]) -> Batch:
        return Batch.of(utterances, tokens)

    learner = Learner(model)
    sources = Sources({}, lexicon=how.lexicon)
    objective = Objective(learner, loss_of(settings), REFERENCE_TERMS, sources)
    objective.cache = (EncoderCache if model.frozen else FeatureCache)(encoder)

    def step(batch: Batch) -> "dict[str, torch.Tensor]":
        if encoder.spec_augment:
            encoder.spec_augment.done = task.global_step / schedule.steps
        if settings.augment == "mask_and_tempo" and not model.frozen:
            batch = batch.stretched(augment.draw_tempo())
        return objective(batch)

    dev = [Batch.of(batch, tokens) for batch in audio.batches(how.view(data.dev), 32)]
    judged = Objective(learner, loss_of(settings, label_smoothing=0.0), REFERENCE_TERMS, sources)
    judged.cache = objective.cache
    validations = Validations(
        lambda: validate_teacher(judged, dev, tokens, how.measure), schedule.validate_every, schedule.patience
    )
    task = Task(learner, step, lr=schedule.lr, scale=cosine(schedule.warmup_steps, schedule.steps))
    record = fit(
        task,
        EpochData(lambda epoch: audio.batches(train, schedule.batch_size, seed=seed * 1009 + epoch), load),
        Run(
            partial,
            how.what,
            schedule.steps,
            seed,
            checkpoint_every=schedule.validate_every,
            device=how.device,
            batch_size=schedule.batch_size,
        ),
        validations if dev else None,
    )
    speakers = sorted({*start.train_speakers, *(utt.speaker for utt in train)})
    record.pop("best_checkpoints", None)  # of a teacher only the best checkpoint is kept
    sizes = {"train_utterances": len(train), "dev_utterances": len(data.dev)}
    hybrid.save(model, tokens, partial, train_speakers=speakers, labels=labels.record(how.fold), **sizes, **record)
    remove_checkpoints(partial)


def loss_of(settings: Teacher, **changed: float) -> ReferenceLoss:
    """A teacher's loss: the references alone, for all its heads."""
    fields = {"ctc_weight": settings.ctc_weight, "label_smoothing": settings.label_smoothing} | changed
    heads = "both" if settings.decoder_layers else "ctc"
    return ReferenceLoss(beta=1.0, heads=heads, use_teachers=False, hard_words=settings.hard_words, **fields)


def validate_teacher(objective: "Objective", dev: Sequence[Batch], tokens: Tokens, measure: str) -> dict[str, float]:
    """Validate on dev speech: accuracy of greedy CTC, and the loss, which breaks ties."""
    import torch

    from kdlib.training.validation import validate_greedy

    device = next(objective.learner.parameters()).device

    def outputs(batch: Batch) -> "tuple[Emissions, float]":
        step = objective.step(batch.to(device))
        return step.outputs.ctc, float(objective.total(step)["loss"])

    with torch.no_grad():
        return validate_greedy(dev, tokens, outputs, measure)
