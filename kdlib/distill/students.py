"""Train the students of a fold, one per variant and seed, in phases; checkpoints are chosen by WRA on the dev speaker.

A student's folder holds the weights of the best checkpoint (`model.safetensors`, "best"), with
`student.keep_checkpoints` those of the next best (`best2.safetensors`, ...), and those of the last step
(`latest.safetensors`), from which `student.resume` continues. During training the folder holds one folder per phase,
with checkpoints: a killed run continues in the phase that had not ended.
"""

import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdlib.corpus import audio, labels
from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.decode.calibration import towards_prior, word_prior
from kdlib.decode.greedy import greedy
from kdlib.decode.lexicon import Lexicon
from kdlib.distill.collapse_alarm import CollapseAlarm
from kdlib.distill.setup import LATEST, StudentData, StudentSetup, write_weights
from kdlib.models import Outputs, augment, hybrid
from kdlib.models.averaging import checkpoint_file
from kdlib.models.encoder_cache import EncoderCache, FeatureCache
from kdlib.models.masks import length_mask
from kdlib.objectives import losses, terms
from kdlib.objectives.objective import Objective
from kdlib.objectives.reference_losses import cross_entropy, ctc_loss
from kdlib.objectives.step import head_lengths
from kdlib.objectives.targets import TargetSource
from kdlib.runtime import is_main_process
from kdlib.settings.schedule import Progress
from kdlib.settings.student import Phase, Student
from kdlib.tokens import BLANK, Tokens, normalise
from kdlib.training.checkpoints import checkpoint_weights, last_weights
from kdlib.training.curves import TENSORBOARD, read_curves
from kdlib.training.loop import EpochData, Run, Task, Validations, fit
from kdlib.training.sampling import BatchPlan, easiest
from kdlib.training.schedules import Scale, cosine, noam
from kdlib.training.validation import Recognised

COLLAPSED = "collapsed.json"  # in the folder of a student whose training was stopped by the collapse alarm
Watch = Callable[[pd.DataFrame], None]  # called with the training curves at every validation


def train_student(partial: Path, setup: StudentSetup, watch: Watch | None = None) -> dict:
    """Train a student phase by phase, and write the weights of the best checkpoints and of the last step.

    Returned are the encoder's passes.
    """
    data, objective = setup.data, setup.objective()
    setup.model.encoder.learn_statistics(data.train)
    plan = batch_plan(setup.settings, data, setup.views)
    alarm = CollapseAlarm(
        setup.title,
        sum(plan.steps),
        utterances=len(data.dev),
        words=len({utt.text for utt in data.dev}),
        parts=plan.parts,
        stop=partial / COLLAPSED if setup.settings.on_collapse == "stop" else None,
    )
    training = _Training(partial, setup, objective, plan, alarm, watch)
    records, earlier_steps, checkpoints = [], 0, []
    for number in range(len(plan.steps)):
        folder = partial / f"phase{number + 1}"
        folder.mkdir(exist_ok=True)
        record = training.phase(number, earlier_steps)
        records.append(record | {"earlier_steps": earlier_steps})
        checkpoints += [(score, earlier_steps + step, folder, step) for score, step in record["best_checkpoints"]]
        objective.learner.load_state_dict(last_weights(folder))
        alarm.remember(record["best_dev_score"], earlier_steps + record["best_step"])
        earlier_steps += record["steps"]
        if alarm.stopped:
            break
    if not is_main_process():
        sys.exit(0)
    write_weights(setup.model, partial / LATEST)
    passes = {name: count * setup.settings.devices for name, count in objective.passes.items()}
    best = sorted(checkpoints, key=lambda row: (-row[0], row[1]))[: setup.settings.keep_checkpoints]
    for rank, (_, _, folder, step) in reversed(list(enumerate(best, start=1))):  # the best one last: model.safetensors
        objective.learner.load_state_dict(checkpoint_weights(folder, step))
        if len(best) > 1:
            write_weights(setup.model, partial / checkpoint_file(rank))
    held_out = setup.fold.held_out
    hybrid.save(
        setup.model,
        setup.tokens,
        partial,
        train_speakers=setup.train_speakers,
        labels=labels.record(setup.fold, unlabelled_held_out=any(utt.speaker == held_out for utt in data.train)),
        variant=setup.name,
        seed=setup.seed,
        uses_teachers=terms.uses_teachers(setup.distill),
        references_only=terms.references_only(setup.distill),
        heads_trained=list(objective.heads),
        steps=earlier_steps,
        passes=passes,
        best_step=best[0][1],
        best_dev_score=round(best[0][0], 6),
        **{name: value for name, value in records[0].items() if name.startswith("start_")},
        checkpoints=[{"step": step, "dev_score": round(score, 6)} for score, step, *_ in best],
        phases=records,
        train_utterances=len(data.train),
        unlabelled_utterances=sum(not utt.text for utt in data.train),
        too_short=data.too_short,
    )
    for number in range(len(records)):  # with the files that a killed run left there
        shutil.rmtree(partial / f"phase{number + 1}")
    return {"passes": passes}


@dataclass(frozen=True)
class _Training:
    """What all phases of a student's training share."""

    partial: Path
    setup: StudentSetup
    objective: Objective
    plan: BatchPlan
    alarm: CollapseAlarm
    watch: Watch | None

    def phase(self, number: int, earlier_steps: int) -> dict[str, float]:
        """Train one phase, after `earlier_steps` of previous ones; the student ends with the phase's best weights."""
        setup, settings, objective, plan = self.setup, self.setup.settings, self.objective, self.plan
        tokens, data, seed, steps = setup.tokens, setup.data, setup.seed, plan.steps[number]
        phase, learner = settings.phases[number], objective.learner
        dev = [Batch.of(batch, tokens) for batch in audio.batches(data.dev, 32)]
        setup.model.freeze(phase.freeze_encoder)
        encoder = setup.model.encoder
        if settings.freeze_preprocessor:
            changes = "tempo" in settings.augment or settings.mixup or learner.layers
            frozen = phase.freeze_encoder and not changes
            objective.cache = (EncoderCache if frozen else FeatureCache)(encoder)
        curves = self.partial / TENSORBOARD

        def step(batch: Batch) -> dict[str, torch.Tensor]:
            learner.update_average(setup.distill.average.decay)
            batch = batch.select(list(range(len(batch))) * setup.views)
            if settings.augment == "mask_and_tempo":
                batch = batch.stretched(augment.draw_tempo())
            elif settings.augment == "mask_and_matched_tempo":
                batch = batch.stretched(augment.draw_matched(batch.speakers, setup.tempo))
            if settings.mixup:
                batch = batch.mixed(*augment.draw_mix(len(batch), settings.mixup))
            steps_done = earlier_steps + task.global_step
            now = Progress(steps_done / sum(plan.steps), steps_done / plan.epoch_steps)
            if encoder.spec_augment:
                encoder.spec_augment.done = task.global_step / steps  # of the phase, as the learning rate's warm-up
            return objective(batch, now)

        def batches(part: int) -> Sequence[list[Utterance]]:
            pool, each = data.train, plan.epoch_steps / plan.parts
            if settings.curriculum:
                done = (earlier_steps + part * each) / sum(plan.steps)
                pool = easiest(pool, setup.difficulty, settings.curriculum, done)
            return plan.part(pool, part, seed)

        def validation() -> dict[str, float]:
            if self.watch:
                task.logger.experiment.flush()
                self.watch(read_curves(curves))
            words = setup.lexicon if settings.choose_by == "words" else None
            return validate(objective, dev, tokens, setup.judge, setup.measure, words)

        scale = scale_of(settings, phase, steps, setup.model)
        task = Task(learner, step, lr=phase.lr, scale=scale, earlier_steps=earlier_steps)
        return fit(
            task,
            EpochData(batches, lambda utts: Batch.of(utts, tokens)),
            Run(
                folder=self.partial / f"phase{number + 1}",
                what=setup.title + f", phase {number + 1}" * (len(plan.steps) > 1),
                steps=steps,
                seed=seed,
                parts=plan.parts,
                clip=settings.clip,
                accumulate=settings.accumulate,
                tensorboard=curves,
                precision={"fp32": "32-true", "bf16": "bf16-mixed"}[settings.precision],
                device=setup.device.type,
                batch_size=settings.batch_size,
                devices=settings.devices,
            ),
            Validations(
                validation,
                settings.validate_every,
                patience=settings.patience,
                keep=settings.keep_checkpoints,
                initial=number == 0 and setup.start.head_is_trained,
            ),
            [self.alarm],
        )


def validate(
    objective: Objective,
    dev: Sequence[Batch],
    tokens: Tokens,
    judge: TargetSource | None = None,
    measure: str = "wra",
    words: Lexicon | None = None,
) -> dict[str, float]:
    """Validate on the dev speaker: WRA, or WER, of the trained head; between equal ones the loss decides.

    With `words` the score is the WRA among these, balanced: the mean posterior on dev speech is that of its words.

    For the alarm also the number of distinct hypotheses, and the shares of the most frequent one and of empty ones.
    With a `judge` the score is the similarity to the teachers instead (a fault).
    """
    recognised, distance, posteriors = Recognised(tokens, measure), 0.0, []
    model, head = objective.learner.student, objective.heads[0]
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in dev:
            moved = batch.to(device)
            outputs = objective.outputs(moved)
            if head == "ctc":
                hypotheses, batch_loss = greedy(outputs.ctc, BLANK), ctc_loss(outputs.ctc, batch.ids)
            else:
                longest = max(map(len, batch.ids)) + 4
                hypotheses = model.decode_greedy(outputs.encoded, longest, outputs.lengths)
                batch_loss = cross_entropy(outputs.decoder_logits, batch.ids)
            recognised.add(batch, hypotheses, float(batch_loss))
            if words:
                posteriors.append(words.posterior(outputs.ctc))
            if judge:
                distance += _distance(head, outputs, moved, judge) * len(batch.ids)
    metrics, total = recognised.metrics(), len(recognised.hypotheses)
    counts = Counter(map(tuple, recognised.hypotheses))
    if judge:
        metrics["dev_score"] = -distance / total
    if words:
        metrics["dev_words"] = balanced_wra(
            torch.cat(posteriors), words, [utt.text for one in dev for utt in one.utterances]
        )
        metrics["dev_score"] = metrics["dev_words"] - 1e-3 * min(metrics["dev_loss"], 100.0)
    metrics["dev_distinct"] = float(len(counts))
    metrics["dev_most_frequent"] = max(counts.values()) / total
    metrics["dev_empty"] = counts[()] / total
    return metrics


def balanced_wra(posteriors: torch.Tensor, words: Lexicon, texts: Sequence[str]) -> float:
    """WRA of the best word, where the mean posterior [N, W] is moved to the frequencies of the texts."""
    prior = word_prior(words.words, Counter(map(normalise, texts)))
    moved = towards_prior(posteriors.double().numpy(), prior, 1.0)
    best = [words.words[place] for place in moved.argmax(1)]
    return float(np.mean([word == normalise(text) for word, text in zip(best, texts, strict=True)]))


def _distance(head: str, outputs: Outputs, batch: Batch, target: TargetSource) -> float:
    """Mean KL per frame, or decoder step, from a target to the model's outputs on a batch."""
    logits = outputs.ctc.logits if head == "ctc" else outputs.decoder_logits
    teachers, lengths = target.logits(batch, head_lengths(head, outputs, batch))
    return float(losses.soft_kl(logits, teachers, length_mask(lengths, logits.shape[1]).float()))


def batch_plan(settings: Student, data: StudentData, views: int = 1) -> BatchPlan:
    """The parts of an epoch and the number of steps of each phase; a batch has every utterance `views` times."""
    batch_size = max(1, settings.batch_size // views)
    groups = math.ceil((len(data.train) + data.unused) / batch_size)
    size = math.ceil(groups / settings.validations_per_epoch)
    sizes = [min(size, groups - begin) for begin in range(0, groups, size)]
    epoch = sum(math.ceil(batches / (settings.accumulate * settings.devices)) for batches in sizes)
    steps = [phase.steps or phase.epochs * epoch for phase in settings.phases]
    return BatchPlan(batch_size, groups, len(sizes), epoch, steps)


def scale_of(settings: Student, phase: Phase, steps: int, model: hybrid.Hybrid) -> Scale:
    """The learning-rate schedule of a phase."""
    if settings.schedule == "noam":
        return noam(phase.warmup_steps, model.encoder.width)
    return cosine(phase.warmup_steps, steps)
