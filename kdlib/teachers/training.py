"""Train a teacher or the base model: joint CTC and attention loss, early stopping on held-back speech."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import audio, labels
from kdlib.corpus.manifest import Utterance
from kdlib.errors import UserError
from kdlib.models import Outputs
from kdlib.settings.corpus import SplitSettings
from kdlib.settings.teacher import Teacher, Training
from kdlib.tokens import BLANK, Tokens
from kdlib.training.sampling import TrainingData, fits_frames
from kdlib.training.schedules import cosine

if TYPE_CHECKING:
    import torch

    from kdlib.models.hybrid import Hybrid


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


def train_teacher(partial: Path, start: InitialModel, data: TrainingData, how: TeacherTraining) -> None:
    """Train a model on `data.train`, stop it on `data.dev`, and save it with all speakers that it was trained on."""
    from kdlib.models import augment, hybrid
    from kdlib.training.checkpoints import remove_checkpoints
    from kdlib.training.loop import EpochData, Run, Task, Validations, fit

    settings, schedule, seed = how.settings, how.schedule, how.fold.seed
    model, tokens = start.model, start.tokens
    model.encoder.spec_augment = settings.augment
    train = [utt for utt in data.train if fits_frames(tokens.encode(utt.text), utt.duration_s)]
    if not train:
        raise UserError(f"{how.what}: every utterance has fewer frames of 40 ms than tokens; is its audio cut off?")

    def collate(utterances: Sequence[Utterance]) -> tuple:
        return *audio.collate(utterances), [tokens.encode(utt.text) for utt in utterances]

    def step(batch: tuple) -> "dict[str, torch.Tensor]":
        if settings.augment:
            batch = *augment.change_tempo(*batch[:2]), batch[2]
        return teacher_losses(model, batch, settings.ctc_weight, settings.label_smoothing)

    dev = [collate(batch) for batch in audio.batches(data.dev, 32)]
    validations = Validations(
        lambda: validate_teacher(model, dev, settings.ctc_weight), schedule.validate_every, schedule.patience
    )
    record = fit(
        Task(model, step, lr=schedule.lr, scale=cosine(schedule.warmup_steps, schedule.steps)),
        EpochData(lambda epoch: audio.batches(train, schedule.batch_size, seed=seed * 1009 + epoch), collate),
        Run(partial, how.what, schedule.steps, seed, checkpoint_every=schedule.validate_every),
        validations if dev else None,
    )
    speakers = sorted({*start.train_speakers, *(utt.speaker for utt in train)})
    record.pop("best_checkpoints", None)  # of a teacher only the best checkpoint is kept
    sizes = {"train_utterances": len(train), "dev_utterances": len(data.dev)}
    hybrid.save(model, tokens, partial, train_speakers=speakers, labels=labels.record(how.fold), **sizes, **record)
    remove_checkpoints(partial)


def teacher_losses(
    model: "Hybrid", batch: tuple, ctc_weight: float, smoothing: float = 0.0
) -> "dict[str, torch.Tensor]":
    """The joint loss: CTC per token, and cross-entropy of the teacher-forced decoder per token."""
    return _outputs_and_losses(model, batch, ctc_weight, smoothing)[1]


def _outputs_and_losses(
    model: "Hybrid", batch: tuple, ctc_weight: float, smoothing: float = 0.0
) -> "tuple[Outputs, dict[str, torch.Tensor]]":
    """Outputs and losses of a model on a batch."""
    from kdlib.models.decoder import teacher_forced
    from kdlib.objectives.reference_losses import cross_entropy, ctc_loss

    samples, lengths, ids = batch
    outputs = model(samples, lengths, teacher_forced(ids)[0].to(samples.device))
    ctc = ctc_loss(outputs.ctc, ids)
    attention = cross_entropy(outputs.decoder_logits, ids, smoothing)
    return outputs, {"loss": ctc_weight * ctc + (1 - ctc_weight) * attention, "ctc": ctc, "attention": attention}


def validate_teacher(model: "Hybrid", dev: Sequence[tuple], ctc_weight: float) -> dict[str, float]:
    """Validate on dev speech: accuracy of greedy CTC, and the loss, which breaks ties."""
    from kdlib.decode.greedy import greedy

    correct = total = loss = 0
    device = next(model.parameters()).device
    for samples, lengths, ids in dev:
        outputs, losses = _outputs_and_losses(model, (samples.to(device), lengths.to(device), ids), ctc_weight)
        correct += sum(output == reference for output, reference in zip(greedy(outputs.ctc, BLANK), ids, strict=True))
        loss += float(losses["loss"]) * len(ids)
        total += len(ids)
    wra, loss = correct / total, loss / total
    return {"dev_wra": wra, "dev_loss": loss, "dev_score": wra - 1e-3 * min(loss, 100.0)}
