"""How a teacher, or the parent of all, is trained: CTC and attention together, stopped on speech set aside."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import audio, labels
from kdlib.corpus.manifest import Utterance
from kdlib.errors import UserError
from kdlib.params import Params
from kdlib.pretrained.model import fits_frames
from kdlib.settings import Training
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    import torch

    from kdlib.models import Outputs
    from kdlib.models.hybrid import Hybrid
    from kdlib.training.sampling import TrainingData


def train_teacher(
    partial: Path,
    params: Params,
    pace: Training,
    model: "Hybrid",
    tokens: Tokens,
    chosen: "TrainingData",
    what: str,
    before: list[str],
) -> None:
    """Train a model on what was chosen, stop on what was set aside, and save it into a folder."""
    from kdlib.models import augment, hybrid
    from kdlib.training.checkpoints import remove_checkpoints
    from kdlib.training.loop import EpochData, Task, fit
    from kdlib.training.schedules import cosine

    model.encoder.spec_augment = params.teacher.augment
    learnt = [utt for utt in chosen.train if fits_frames(tokens.encode(utt.text), utt.duration_s)]
    if not learnt:
        raise UserError(f"{what}: every utterance has fewer frames of 40 ms than tokens; is its audio cut off?")

    def read(utterances: Sequence[Utterance]) -> tuple:
        return *audio.collate(utterances), [tokens.encode(utt.text) for utt in utterances]

    def step(batch: tuple) -> "dict[str, torch.Tensor]":
        if params.teacher.augment:
            batch = *augment.change_tempo(*batch[:2]), batch[2]
        return teacher_losses(model, batch, params.teacher.ctc_weight, params.teacher.label_smoothing)

    dev = [read(batch) for batch in audio.batches(chosen.dev, 32)]
    record = fit(
        Task(model, step, lr=pace.lr, scale=cosine(pace.warmup_steps, pace.steps)),
        EpochData(lambda epoch: audio.batches(learnt, pace.batch_size, seed=params.seed * 1009 + epoch), read),
        folder=partial,
        what=what,
        steps=pace.steps,
        seed=params.seed,
        checkpoint_every=pace.validate_every,
        check=(lambda: validate_teacher(model, dev, params.teacher.ctc_weight)) if dev else None,
        validate_every=pace.validate_every,
        patience=pace.patience,
    )
    known = sorted({*before, *(utt.speaker for utt in learnt)})
    record.pop("best_checkpoints", None)  # of a teacher only the best look stays
    sizes = {"train_utterances": len(learnt), "dev_utterances": len(chosen.dev)}
    hybrid.save(model, tokens, partial, train_speakers=known, labels=labels.record(params), **sizes, **record)
    remove_checkpoints(partial)


def teacher_losses(
    model: "Hybrid", batch: tuple, ctc_weight: float, smoothing: float = 0.0
) -> "dict[str, torch.Tensor]":
    """The joint loss: CTC a token, and cross-entropy of the teacher-forced decoder a token."""
    return _answered(model, batch, ctc_weight, smoothing)[1]


def _answered(
    model: "Hybrid", batch: tuple, ctc_weight: float, smoothing: float = 0.0
) -> "tuple[Outputs, dict[str, torch.Tensor]]":
    """What a model says of a batch, and its losses."""
    from kdlib.models.decoder import teacher_forced
    from kdlib.objectives.reference_losses import cross_entropy, ctc_loss

    samples, lengths, ids = batch
    outputs = model(samples, lengths, teacher_forced(ids)[0].to(samples.device))
    ctc = ctc_loss(outputs, ids)
    attention = cross_entropy(outputs.decoder_logits, ids, smoothing)
    return outputs, {"loss": ctc_weight * ctc + (1 - ctc_weight) * attention, "ctc": ctc, "attention": attention}


def validate_teacher(model: "Hybrid", dev: Sequence[tuple], ctc_weight: float) -> dict[str, float]:
    """A look at the dev block: greedy CTC accuracy, and the loss, which decides between equal ones."""
    from kdlib.decode.greedy import greedy
    from kdlib.tokens import BLANK

    right = total = loss = 0
    device = next(model.parameters()).device
    for samples, lengths, ids in dev:
        outputs, found = _answered(model, (samples.to(device), lengths.to(device), ids), ctc_weight)
        right += sum(one == other for one, other in zip(greedy(outputs, BLANK), ids, strict=True))
        loss += float(found["loss"]) * len(ids)
        total += len(ids)
    wra, loss = right / total, loss / total
    return {"dev_wra": wra, "dev_loss": loss, "dev_score": wra - 1e-3 * min(loss, 100.0)}


TEACHER_CODE = (
    "teachers/adapt.py",
    "teachers/base_model.py",
    "teachers/teacher_sets.py",
    "teachers/training.py",
    "models/hybrid.py",
    "pretrained/pieces.py",
    "models/encoder_conformer.py",
    "models/augment.py",
    "models/decoder.py",
    "models/encoder_nemo.py",
    "models/nemo_files.py",
    "objectives/reference_losses.py",
    "pretrained/model.py",
    *labels.CODE,
    "decode/greedy.py",
    "training/loop.py",
    "training/callbacks.py",
    "training/checkpoints.py",
    "training/schedules.py",
    "training/sampling.py",
    "runtime.py",
    "tokens.py",
    "corpus/audio.py",
)
