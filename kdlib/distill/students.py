"""Train the students of a fold, one per variant and seed, in phases; checkpoints are chosen by WRA on the dev speaker.

A student's folder holds the weights of the best checkpoint (`model.safetensors`, "best"), with
`student.keep_checkpoints` those of the next best (`best2.safetensors`, ...), and those of the last step
(`latest.safetensors`), from which `student.resume` continues. During training the folder holds one folder per phase,
with checkpoints: a killed run continues in the phase that had not ended.
"""

import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

from kdlib.corpus import audio, labels
from kdlib.decode.greedy import greedy
from kdlib.distill import preflight
from kdlib.distill.collapse_alarm import CollapseAlarm
from kdlib.distill.setup import (
    LATEST,
    SETUP_CODE,
    StudentData,
    build_objective,
    checkpoint_file,
    initial_speakers,
    initial_student,
    kl_judge,
    make_batch,
    resolved,
    student_data,
    student_folder,
    student_inputs,
    student_settings,
    student_targets,
    write_weights,
)
from kdlib.errors import UserError
from kdlib.io import repository_root
from kdlib.models import augment, hybrid
from kdlib.models.encoder_cache import EncoderCache
from kdlib.objectives.objective import Batch, Objective
from kdlib.objectives.reference_losses import cross_entropy, ctc_loss
from kdlib.params import Params
from kdlib.pretrained.pieces import load_tokens
from kdlib.runtime import is_main_process
from kdlib.settings import Phase
from kdlib.stage import produce
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.tokens import BLANK
from kdlib.training.checkpoints import TENSORBOARD, checkpoint_weights, last_weights, read_curves
from kdlib.training.loop import EpochData, Task, fit
from kdlib.training.sampling import BatchPlan
from kdlib.training.schedules import Scale, cosine, noam

COLLAPSED = "collapsed.json"  # in the folder of a student whose training was stopped by the collapse alarm
Watch = Callable[[pd.DataFrame], None]  # called with the training curves at every validation


def student(params: Params, seed: int = 1, watch: Watch | None = None) -> Path:
    """Return the folder of the recipe's student for a seed; train it if it does not exist yet."""
    used = resolved(params)
    return produce(
        student_folder(params, seed),
        lambda partial: _train(partial, params, seed, watch),
        what=f"student {params.variant or 'unnamed'}, seed {seed}",
        parameters=student_settings(used),
        inputs=student_inputs(used, seed),
        seed=seed,
        code=("distill/students.py", "training/sampling.py", *SETUP_CODE),
    )


def _train(partial: Path, params: Params, seed: int, watch: Watch | None) -> None:
    if params.student.devices > 1:
        _build_in_subprocess(partial, params, seed)
    else:
        _build(partial, params, seed, watch)


def _build(partial: Path, params: Params, seed: int, watch: Watch | None) -> None:
    """Train a student phase by phase, and write the weights of the best checkpoints and of the last step."""
    preflight.require(params, seed)
    params = resolved(params)
    tokens = load_tokens(params)
    data, model = student_data(params, tokens), initial_student(params, tokens, seed)
    objective = build_objective(params, model, student_targets(params))
    plan = batch_plan(params, data)
    alarm = CollapseAlarm(
        f"{params.variant or 'student'}, seed {seed}",
        sum(plan.steps),
        utterances=len(data.dev),
        words=len({utt.text for utt in data.dev}),
        parts=plan.parts,
        stop=partial / COLLAPSED if params.student.on_collapse == "stop" else None,
    )
    records, earlier_steps, checkpoints = [], 0, []
    for number in range(len(plan.steps)):
        folder = partial / f"phase{number + 1}"
        folder.mkdir(exist_ok=True)
        record = _phase(partial, params, seed, number, earlier_steps, plan, objective, data, alarm, watch)
        records.append(record | {"earlier_steps": earlier_steps})
        checkpoints += [(score, earlier_steps + step, folder, step) for score, step in record["best_checkpoints"]]
        objective.learner.load_state_dict(last_weights(folder))
        alarm.remember(record["best_dev_score"], earlier_steps + record["best_step"])
        earlier_steps += record["steps"]
        if alarm.stopped:
            break
    if not is_main_process():
        sys.exit(0)
    write_weights(model, partial / LATEST)
    best = sorted(checkpoints, key=lambda row: (-row[0], row[1]))[: params.student.keep_checkpoints]
    for rank, (_, _, folder, step) in reversed(list(enumerate(best, start=1))):  # the best one last: model.safetensors
        objective.learner.load_state_dict(checkpoint_weights(folder, step))
        if len(best) > 1:
            write_weights(model, partial / checkpoint_file(rank))
    hybrid.save(
        model,
        tokens,
        partial,
        train_speakers=sorted({*initial_speakers(params, seed), *(utt.speaker for utt in data.train if utt.text)}),
        labels=labels.record(params, unlabelled_held_out=any(utt.speaker == params.held_out for utt in data.train)),
        variant=params.variant,
        seed=seed,
        uses_teachers=params.distill.uses_teachers,
        references_only=params.distill.references_only,
        heads_trained=list(objective.heads),
        steps=earlier_steps,
        best_step=best[0][1],
        best_dev_score=round(best[0][0], 6),
        checkpoints=[{"step": step, "dev_score": round(score, 6)} for score, step, *_ in best],
        phases=records,
        train_utterances=len(data.train),
        unlabelled_utterances=sum(not utt.text for utt in data.train),
        too_short=data.too_short,
    )
    for number in range(len(records)):  # with the files that a killed run left there
        shutil.rmtree(partial / f"phase{number + 1}")


def _build_in_subprocess(partial: Path, params: Params, seed: int) -> None:
    """Train on several devices: in a separate process, whose command Lightning starts again for each device."""
    (partial / "params.json").write_text(params.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "kdlib.distill.students", str(partial), str(seed)]
    status = subprocess.run(command, cwd=repository_root(), check=False).returncode
    if status:
        raise UserError(f"student {params.variant}, seed {seed}: training on several devices ended with {status}")
    (partial / "params.json").unlink()


def _phase(
    partial: Path,
    params: Params,
    seed: int,
    number: int,
    earlier_steps: int,
    plan: BatchPlan,
    objective: Objective,
    data: StudentData,
    alarm: CollapseAlarm,
    watch: Watch | None,
) -> dict[str, float]:
    """Train one phase, after the `earlier_steps` of previous phases; the student ends with the phase's best weights."""
    settings, tokens, steps = params.student, load_tokens(params), plan.steps[number]
    phase, learner = settings.phases[number], objective.learner
    model = learner.student
    dev = [make_batch(batch, tokens) for batch in audio.batches(data.dev, 32)]
    judge = kl_judge(params)
    model.freeze(phase.freeze_encoder)
    cached = phase.freeze_encoder and settings.augment != "mask_and_tempo" and learner.intermediate_head is None
    objective.encoder_cache = EncoderCache(model.encoder) if cached else None

    def step(batch: Batch) -> dict[str, torch.Tensor]:
        if settings.augment == "mask_and_tempo":
            wavs, lengths = augment.change_tempo(batch.wavs, batch.wav_lens)
            batch = batch._replace(wavs=wavs, wav_lens=lengths)
        return objective(batch, (earlier_steps + task.global_step) / sum(plan.steps))

    def validation() -> dict[str, float]:
        if watch:
            task.logger.experiment.flush()
            watch(read_curves(partial / TENSORBOARD))
        return validate(objective, dev, judge)

    scale = _scale(params, phase, steps, model)
    task = Task(learner, step, lr=phase.lr, scale=scale, earlier_steps=earlier_steps)
    return fit(
        task,
        EpochData(lambda epoch: plan.part(data.train, epoch, seed), lambda utts: make_batch(utts, tokens)),
        folder=partial / f"phase{number + 1}",
        what=f"{params.variant or 'student'}, seed {seed}" + f", phase {number + 1}" * (len(plan.steps) > 1),
        steps=steps,
        seed=seed,
        clip=settings.clip,
        accumulate=settings.accumulate,
        validate=validation,
        patience=settings.patience,
        keep_checkpoints=settings.keep_checkpoints,
        tensorboard=partial / TENSORBOARD,
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[settings.precision],
        accelerator=settings.accelerator,
        devices=settings.devices,
        parts=plan.parts,
        callbacks=[alarm],
    )


def validate(objective: Objective, dev: Sequence[Batch], judge: TeacherEnsemble | None = None) -> dict[str, float]:
    """Validate on the dev speaker: WRA of the trained head; between equal WRA the loss decides.

    For the alarm also the number of distinct hypotheses, and the shares of the most frequent one and of empty ones.
    With a `judge` the score is the similarity to the teachers instead (a fault).
    """
    correct = total = loss = distance = 0
    counts: Counter[tuple[int, ...]] = Counter()
    model, head = objective.learner.student, objective.heads[0]
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in dev:
            moved = batch._replace(wavs=batch.wavs.to(device), wav_lens=batch.wav_lens.to(device))
            outputs = objective.student_outputs(moved)
            if head == "ctc":
                hypotheses, batch_loss = greedy(outputs, BLANK), ctc_loss(outputs, batch.ids)
            else:
                longest = max(map(len, batch.ids)) + 4
                hypotheses = model.decode_greedy(outputs.encoded, longest, outputs.lengths)
                batch_loss = cross_entropy(outputs.decoder_logits, batch.ids)
            correct += sum(hyp == ref for hyp, ref in zip(hypotheses, batch.ids, strict=True))
            loss += float(batch_loss) * len(batch.ids)
            total += len(batch.ids)
            counts.update(map(tuple, hypotheses))
            if judge:
                distance += objective.distance(head, outputs, moved, judge) * len(batch.ids)
    wra, loss = correct / total, loss / total
    return {
        "dev_wra": wra,
        "dev_loss": loss,
        "dev_score": -distance / total if judge else wra - 1e-3 * min(loss, 100.0),
        "dev_distinct": float(len(counts)),
        "dev_most_frequent": max(counts.values()) / total,
        "dev_empty": counts[()] / total,
    }


def batch_plan(params: Params, data: StudentData) -> BatchPlan:
    """The parts of an epoch and the number of steps of each phase."""
    settings = params.student
    groups = math.ceil((len(data.train) + data.unused) / settings.batch_size)
    size = math.ceil(groups / settings.validations_per_epoch)
    sizes = [min(size, groups - begin) for begin in range(0, groups, size)]
    epoch = sum(math.ceil(batches / (settings.accumulate * settings.devices)) for batches in sizes)
    steps = [phase.steps or phase.epochs * epoch for phase in settings.phases]
    return BatchPlan(settings.batch_size, groups, len(sizes), steps)


def _scale(params: Params, phase: Phase, steps: int, model: hybrid.Hybrid) -> Scale:
    """The learning-rate schedule of a phase."""
    if params.student.schedule == "noam":
        return noam(phase.warmup_steps, model.encoder.width)
    return cosine(phase.warmup_steps, steps)


if __name__ == "__main__":
    try:
        folder = Path(sys.argv[1])
        settings = Params.model_validate_json((folder / "params.json").read_text(encoding="utf-8"))
        _build(folder, settings, int(sys.argv[2]), None)
    except UserError as error:
        sys.exit(f"\n{error}\n")
