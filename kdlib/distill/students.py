"""A fold's students: one a variant and seed, trained in phases, chosen by the dev speaker's words, and scored.

Kept are the weights of the best look at the dev speaker (`model.safetensors`, "best"), with `student.keep_checkpoints` those of the
next best (`best2.safetensors`, ...), and those of the last step (`latest.safetensors`), from which `student.resume`
goes on. While a student is made its folder holds a folder a phase, with checkpoints: a killed run goes on in the phase
that had not ended.
"""

import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import audio, labels
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
from kdlib.params import Params
from kdlib.pretrained.pieces import load_tokens
from kdlib.settings import Phase
from kdlib.stage import produce
from kdlib.training.sampling import BatchPlan

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from kdlib.models.hybrid import Hybrid
    from kdlib.objectives.objective import Batch, Objective
    from kdlib.targets.aggregation import TeacherEnsemble

COLLAPSED = "collapsed.json"  # left in the folder of a student whose training the alarm has ended
Watch = Callable[["pd.DataFrame"], None]  # is shown the curves at every look


def student(params: Params, seed: int = 1, watch: Watch | None = None) -> Path:
    """The folder of the recipe's student of a seed, trained now or found."""
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
        _build_apart(partial, params, seed)
    else:
        _build(partial, params, seed, watch)


def _build(partial: Path, params: Params, seed: int, watch: Watch | None) -> None:
    """Train a student into a folder: phase by phase, then the best look's weights and the last step's."""
    from kdlib.models import hybrid
    from kdlib.runtime import is_main_process
    from kdlib.training.checkpoints import checkpoint_weights, last_weights

    preflight.require(params, seed)
    params = resolved(params)
    tokens = load_tokens(params)
    chosen, model = student_data(params, tokens), initial_student(params, tokens, seed)
    minimised = build_objective(params, model, student_targets(params))
    plan = batch_plan(params, chosen)
    alarm = CollapseAlarm(
        f"{params.variant or 'student'}, seed {seed}",
        sum(plan.steps),
        utterances=len(chosen.dev),
        words=len({utt.text for utt in chosen.dev}),
        parts=plan.parts,
        stop=partial / COLLAPSED if params.student.on_collapse == "stop" else None,
    )
    records, before, kept = [], 0, []
    for number in range(len(plan.steps)):
        (partial / f"phase{number + 1}").mkdir(exist_ok=True)
        record = _phase(partial, params, seed, number, before, plan, minimised, chosen, alarm, watch)
        records.append(record | {"earlier_steps": before})
        kept += [
            (score, before + step, partial / f"phase{number + 1}", step) for score, step in record["best_checkpoints"]
        ]
        minimised.learner.load_state_dict(last_weights(partial / f"phase{number + 1}"))
        alarm.remember(record["best_dev_score"], before + record["best_step"])
        before += record["steps"]
        if alarm.stopped:
            break
    if not is_main_process():
        sys.exit(0)
    write_weights(model, partial / LATEST)
    kept = sorted(kept, key=lambda one: (-one[0], one[1]))[: params.student.keep_checkpoints]
    for rank, (_, _, phase, step) in reversed(list(enumerate(kept, start=1))):  # the best last: the model's own
        minimised.learner.load_state_dict(checkpoint_weights(phase, step))
        if len(kept) > 1:
            write_weights(model, partial / checkpoint_file(rank))
    hybrid.save(
        model,
        tokens,
        partial,
        train_speakers=sorted({*initial_speakers(params, seed), *(utt.speaker for utt in chosen.train if utt.text)}),
        labels=labels.record(params, heard=any(utt.speaker == params.held_out for utt in chosen.train)),
        variant=params.variant,
        seed=seed,
        uses_teachers=params.distill.uses_teachers,
        references_only=params.distill.references_only,
        heads_trained=list(minimised.heads),
        steps=before,
        best_step=kept[0][1],
        best_dev_score=round(kept[0][0], 6),
        checkpoints=[{"step": step, "dev_score": round(score, 6)} for score, step, *_ in kept],
        phases=records,
        train_utterances=len(chosen.train),
        unlabelled_utterances=sum(not utt.text for utt in chosen.train),
        too_short=chosen.too_short,
    )
    for number in range(len(records)):  # with what a killed run has left in it
        shutil.rmtree(partial / f"phase{number + 1}")


def _build_apart(partial: Path, params: Params, seed: int) -> None:
    """Train on several devices: in a process of its own, whose command Lightning runs again for each of them."""
    (partial / "params.json").write_text(params.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "kdlib.distill.students", str(partial), str(seed)]
    ended = subprocess.run(command, cwd=repository_root(), check=False).returncode
    if ended:
        raise UserError(f"student {params.variant}, seed {seed}: training on several devices ended with {ended}")
    (partial / "params.json").unlink()


def _phase(
    partial: Path,
    params: Params,
    seed: int,
    number: int,
    before: int,
    plan: "BatchPlan",
    minimised: "Objective",
    chosen: StudentData,
    alarm: CollapseAlarm,
    watch: Watch | None,
) -> dict[str, float]:
    """Train one phase, behind `before` steps of those before it; the student ends with the phase's best weights."""
    from kdlib.models import augment
    from kdlib.models.encoder_cache import EncoderCache
    from kdlib.training.checkpoints import TENSORBOARD, read_curves
    from kdlib.training.loop import EpochData, Task, fit

    settings, tokens, steps = params.student, load_tokens(params), plan.steps[number]
    phase, model = settings.phases[number], minimised.learner.student
    dev = [make_batch(batch, tokens) for batch in audio.batches(chosen.dev, 32)]
    judge = kl_judge(params)
    model.freeze(phase.freeze_encoder)
    same = phase.freeze_encoder and settings.augment != "mask_and_tempo" and minimised.learner.within is None
    minimised.encoder_cache = EncoderCache(model.encoder) if same else None

    def step(batch: "Batch") -> "dict[str, torch.Tensor]":
        if settings.augment == "mask_and_tempo":
            wavs, lengths = augment.change_tempo(batch.wavs, batch.wav_lens)
            batch = batch._replace(wavs=wavs, wav_lens=lengths)
        return minimised(batch, (before + task.global_step) / sum(plan.steps))

    def check() -> dict[str, float]:
        if watch:
            task.logger.experiment.flush()
            watch(read_curves(partial / TENSORBOARD))
        return validate(minimised, dev, judge)

    task = Task(minimised.learner, step, lr=phase.lr, scale=_scale(params, phase, steps, model), earlier_steps=before)
    return fit(
        task,
        EpochData(lambda epoch: plan.part(chosen.train, epoch, seed), lambda some: make_batch(some, tokens)),
        folder=partial / f"phase{number + 1}",
        what=f"{params.variant or 'student'}, seed {seed}" + f", phase {number + 1}" * (len(plan.steps) > 1),
        steps=steps,
        seed=seed,
        clip=settings.clip,
        accumulate=settings.accumulate,
        check=check,
        patience=settings.patience,
        keep=settings.keep_checkpoints,
        board=partial / TENSORBOARD,
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[settings.precision],
        accelerator=settings.accelerator,
        devices=settings.devices,
        parts=plan.parts,
        callbacks=[alarm],
    )


def validate(
    minimised: "Objective", dev: Sequence["Batch"], judge: "TeacherEnsemble | None" = None
) -> dict[str, float]:
    """A look at the dev speaker: words right by the head that learns; between equal ones the loss decides.

    Also how many different answers there are, how often the commonest and none, for the alarm. With a `judge` it is the
    look most like the teachers that is best (a fault).
    """
    import torch

    from kdlib.decode.greedy import greedy
    from kdlib.objectives.reference_losses import cross_entropy, ctc_loss
    from kdlib.tokens import BLANK

    right = total = loss = distance = 0
    answers: Counter[tuple[int, ...]] = Counter()
    model, head = minimised.learner.student, minimised.heads[0]
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in dev:
            moved = batch._replace(wavs=batch.wavs.to(device), wav_lens=batch.wav_lens.to(device))
            outputs = minimised.answer(moved)
            if head == "ctc":
                said, found = greedy(outputs, BLANK), ctc_loss(outputs, batch.ids)
            else:
                said = model.decode_greedy(outputs.encoded, max(map(len, batch.ids)) + 4, outputs.lengths)
                found = cross_entropy(outputs.decoder_logits, batch.ids)
            right += sum(one == other for one, other in zip(said, batch.ids, strict=True))
            loss += float(found) * len(batch.ids)
            total += len(batch.ids)
            answers.update(map(tuple, said))
            if judge:
                distance += minimised.distance(head, outputs, moved, judge) * len(batch.ids)
    wra, loss = right / total, loss / total
    return {
        "dev_wra": wra,
        "dev_loss": loss,
        "dev_score": -distance / total if judge else wra - 1e-3 * min(loss, 100.0),
        "dev_distinct": float(len(answers)),
        "dev_most_frequent": max(answers.values()) / total,
        "dev_empty": answers[()] / total,
    }


def batch_plan(params: Params, chosen: StudentData) -> BatchPlan:
    """The parts of an epoch and the steps of the phases."""
    settings = params.student
    groups = math.ceil((len(chosen.train) + chosen.unheard) / settings.batch_size)
    size = math.ceil(groups / settings.validations_per_epoch)
    sizes = [min(size, groups - begin) for begin in range(0, groups, size)]
    epoch = sum(math.ceil(one / (settings.accumulate * settings.devices)) for one in sizes)
    return BatchPlan(
        settings.batch_size, groups, len(sizes), [phase.steps or phase.epochs * epoch for phase in settings.phases]
    )


def _scale(params: Params, phase: Phase, steps: int, model: "Hybrid") -> Callable[[int], float]:
    from kdlib.training.schedules import cosine, noam

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
