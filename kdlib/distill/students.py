"""A fold's students: one a variant and seed, trained in phases, chosen by the dev speaker's words, and scored.

Kept are the weights of the best look at the dev speaker (`model.safetensors`, "best"), with `student.keep` those of the
next best (`look2.safetensors`, ...), and those of the last step (`latest.safetensors`), from which `student.resume`
goes on. While a student is made its folder holds a folder a phase, with checkpoints: a killed run goes on in the phase
that had not ended.
"""

import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import audio, labels, prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import split
from kdlib.distill import faults, ingredients, preflight
from kdlib.distill.alarm import Alarm
from kdlib.distill.ingredients import LATEST, Material
from kdlib.errors import UserError
from kdlib.evaluate import panels, score, system
from kdlib.models import vocabulary
from kdlib.params import Params, root
from kdlib.settings import Phase
from kdlib.stage import produce

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from kdlib.distill.objective import Batch, Objective
    from kdlib.models.hybrid import Hybrid, Trained
    from kdlib.teachers.ensemble import Ensemble

SCORED = ("distill/students.py", *panels.CODE, *system.CODE)
STOPPED = "collapsed.json"  # left in the folder of a student whose training the alarm has ended
Watch = Callable[["pd.DataFrame"], None]  # is shown the curves at every look


def student(params: Params, seed: int = 1, watch: Watch | None = None) -> Path:
    """The folder of the recipe's student of a seed, trained now or found."""
    used = ingredients.effective(params)
    return produce(
        ingredients.place(params, seed),
        lambda partial: _made(partial, params, seed, watch),
        what=f"student {params.variant or 'unnamed'}, seed {seed}",
        parameters=ingredients.depends(used),
        inputs=ingredients.inputs(used, seed),
        seed=seed,
        code=("distill/students.py", *ingredients.CODE),
    )


def scored(params: Params, seed: int = 1) -> Path:
    """The folder of a student's hypotheses and scores: of the held-out speaker, and of the dev speaker in `dev/`."""
    folder = student(params, seed)

    def build(partial: Path) -> None:
        from kdlib.models.hybrid import Trained

        one = Trained(folder)
        hear_all(
            partial, params, one, f"{params.variant or 'student'}, seed {seed}", f"students/{params.variant}/seed{seed}"
        )

    return produce(
        folder / "scores",
        build,
        what=f"scores of {params.variant}, seed {seed}",
        parameters=score_settings(params),
        inputs=[prepare.made(params), folder, *faults.files(params)],
        code=SCORED,
    )


def score_settings(params: Params) -> dict:
    """What of a recipe the scores of a system depend on."""
    found = {"scoring": params.scoring.model_dump(), "search": params.search.model_dump(mode="json")}
    return found | ({"faults": params.faults.model_dump(exclude_defaults=True)} if params.faults.named else {})


def hear_all(partial: Path, params: Params, one: "Trained", name: str, checkpoint: str) -> None:
    """Let a trained system hear the held-out and the dev speaker, decode with all that applies, and score."""
    corpus = prepare.load(params)
    splits = split(corpus, params)
    heads = one.record["heads_trained"]  # what another head says is no result of this training
    heads = ["ctc", *heads] if params.faults.untrained_head and "ctc" not in heads else heads
    decoders = panels.panel(params, one.tokens, model=one.model, heads=heads)
    decoders = panels.tuned(decoders, lambda batch: one(*audio.collate(batch)), splits.dev, params, partial)
    without = one.record.get("labels", {}).get("heard_without", [])
    remark = f"has heard {', '.join(without)} without transcripts: no leave-one-speaker-out result" if without else ""
    if params.faults.named:
        remark = "; ".join([*([remark] if remark else []), f"with faults on purpose: {params.faults.named}"])
    read = faults.reading(params, one.tokens)
    for part, utterances in (("", splits.test), ("dev", splits.dev)):
        if not utterances:
            continue
        (partial / part).mkdir(exist_ok=True)
        rows = system.hear(
            one,
            utterances,
            decoders,
            batch_size=params.scoring.batch_size,
            level=corpus.level,
            seen=splits.seen,
            what=f"{name}, {part or 'held-out'} speech",
            keep=None if part else partial / "posteriors",
        )
        if faults.misreads(params):
            rows = [score.read_anew(row, read) for row in rows]
        score.write(
            rows,
            decoders.columns,
            partial / part,
            system=name,
            held_out="" if part else params.held_out,
            tokenizer=one.tokens.fingerprint,
            checkpoint=checkpoint,
            settings=panels.settings(decoders, params, params.fold.dev or ""),
            remark=remark,
            fold_homophones=params.scoring.fold_homophones,
            bootstrap=params.scoring.bootstrap,
        )


def _made(partial: Path, params: Params, seed: int, watch: Watch | None) -> None:
    if params.student.devices > 1:
        _build_apart(partial, params, seed)
    else:
        _build(partial, params, seed, watch)


def _build(partial: Path, params: Params, seed: int, watch: Watch | None) -> None:
    """Train a student into a folder: phase by phase, then the best look's weights and the last step's."""
    from kdlib import train
    from kdlib.models import hybrid

    preflight.demand(params, seed)
    params = ingredients.effective(params)
    tokens = vocabulary.vocabulary(params)
    chosen, model = ingredients.material(params, tokens), ingredients.first(params, tokens, seed)
    minimised = ingredients.objective(params, model, ingredients.ensembles(params))
    plan = plan_of(params, chosen)
    alarm = Alarm(
        f"{params.variant or 'student'}, seed {seed}",
        sum(plan.steps),
        utterances=len(chosen.dev),
        words=len({utt.text for utt in chosen.dev}),
        parts=plan.parts,
        stop=partial / STOPPED if params.student.on_collapse == "stop" else None,
    )
    records, before, kept = [], 0, []
    for number in range(len(plan.steps)):
        (partial / f"phase{number + 1}").mkdir(exist_ok=True)
        record = _phase(partial, params, seed, number, before, plan, minimised, chosen, alarm, watch)
        records.append(record | {"made_before": before})
        kept += [(score, before + step, partial / f"phase{number + 1}", step) for score, step in record["kept"]]
        minimised.learner.load_state_dict(train.last(partial / f"phase{number + 1}"))
        alarm.remember(record["best_dev_score"], before + record["best_step"])
        before += record["steps"]
        if alarm.stopped:
            break
    if not train.is_first():
        sys.exit(0)
    ingredients.write(model, partial / LATEST)
    kept = sorted(kept, key=lambda one: (-one[0], one[1]))[: params.student.keep]
    for rank, (_, _, phase, step) in reversed(list(enumerate(kept, start=1))):  # the best last: the model's own
        minimised.learner.load_state_dict(train.kept(phase, step))
        if len(kept) > 1:
            ingredients.write(model, partial / ingredients.look_file(rank))
    hybrid.save(
        model,
        tokens,
        partial,
        heard=sorted({*ingredients.heard_before(params, seed), *(utt.speaker for utt in chosen.train if utt.text)}),
        labels=labels.record(params, heard=any(utt.speaker == params.held_out for utt in chosen.train)),
        variant=params.variant,
        seed=seed,
        taught=params.distill.taught,
        plain=params.distill.plain,
        heads_trained=list(minimised.heads),
        steps=before,
        best_step=kept[0][1],
        best_dev_score=round(kept[0][0], 6),
        looks=[{"step": step, "dev_score": round(score, 6)} for score, step, *_ in kept],
        phases=records,
        train_utterances=len(chosen.train),
        without_transcripts=sum(not utt.text for utt in chosen.train),
        too_short=chosen.too_short,
    )
    for number in range(len(records)):  # with what a killed run has left in it
        shutil.rmtree(partial / f"phase{number + 1}")


def _build_apart(partial: Path, params: Params, seed: int) -> None:
    """Train on several devices: in a process of its own, whose command Lightning runs again for each of them."""
    (partial / "params.json").write_text(params.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "kdlib.distill.students", str(partial), str(seed)]
    ended = subprocess.run(command, cwd=root(), check=False).returncode
    if ended:
        raise UserError(f"student {params.variant}, seed {seed}: training on several devices ended with {ended}")
    (partial / "params.json").unlink()


def _phase(
    partial: Path,
    params: Params,
    seed: int,
    number: int,
    before: int,
    plan: "Plan",
    minimised: "Objective",
    chosen: Material,
    alarm: Alarm,
    watch: Watch | None,
) -> dict[str, float]:
    """Train one phase, behind `before` steps of those before it; the student ends with the phase's best weights."""
    from kdlib import train
    from kdlib.models import augment
    from kdlib.models.frozen import Remembered

    settings, tokens, steps = params.student, vocabulary.vocabulary(params), plan.steps[number]
    phase, model = settings.phases[number], minimised.learner.student
    dev = [ingredients.read(batch, tokens) for batch in audio.batches(chosen.dev, 32)]
    judge = ingredients.judge(params)
    model.freeze(phase.freeze_encoder)
    same = phase.freeze_encoder and settings.augment != "mask_and_tempo" and minimised.learner.within is None
    minimised.remembered = Remembered(model.encoder) if same else None

    def step(batch: "Batch") -> "dict[str, torch.Tensor]":
        if settings.augment == "mask_and_tempo":
            wavs, lengths = augment.stretched(batch.wavs, batch.wav_lens)
            batch = batch._replace(wavs=wavs, wav_lens=lengths)
        return minimised(batch, (before + task.global_step) / sum(plan.steps))

    def check() -> dict[str, float]:
        if watch:
            task.logger.experiment.flush()
            watch(train.curves(partial / train.CURVES))
        return look(minimised, dev, judge)

    task = train.Task(
        minimised.learner, step, lr=phase.lr, scale=_scale(params, phase, steps, model), made_before=before
    )
    return train.fit(
        task,
        train.Epochs(lambda epoch: plan.part(chosen.train, epoch, seed), lambda some: ingredients.read(some, tokens)),
        folder=partial / f"phase{number + 1}",
        what=f"{params.variant or 'student'}, seed {seed}" + f", phase {number + 1}" * (len(plan.steps) > 1),
        steps=steps,
        seed=seed,
        clip=settings.clip,
        accumulate=settings.accumulate,
        check=check,
        patience=settings.patience,
        keep=settings.keep,
        board=partial / train.CURVES,
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[settings.precision],
        accelerator=settings.accelerator,
        devices=settings.devices,
        parts=plan.parts,
        callbacks=[alarm],
    )


def look(minimised: "Objective", dev: Sequence["Batch"], judge: "Ensemble | None" = None) -> dict[str, float]:
    """A look at the dev speaker: words right by the head that learns; between equal ones the loss decides.

    Also how many different answers there are, how often the commonest and none, for the alarm. With a `judge` it is the
    look most like the teachers that is best (a fault).
    """
    import torch

    from kdlib.decode.greedy import greedy
    from kdlib.models import supervised
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
                said, found = greedy(outputs, BLANK), supervised.ctc(outputs, batch.ids)
            else:
                said = model.decode_greedy(outputs.encoded, max(map(len, batch.ids)) + 4, outputs.lengths)
                found = supervised.cross_entropy(outputs.decoder_logits, batch.ids)
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
        "dev_commonest": max(answers.values()) / total,
        "dev_empty": answers[()] / total,
    }


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut into parts with a look at the dev speaker behind each, and how many steps phases have.

    An epoch is as many batches as all training speech has. Who learns from the labelled part alone hears that several
    times over: few labels or many, the same steps have the same looks.
    """

    batch_size: int
    groups: int  # batches an epoch
    parts: int
    steps: list[int]

    def part(self, utterances: Sequence[Utterance], number: int, seed: int) -> list[list[Utterance]]:
        """The batches of a part; parts are counted through all epochs."""
        epoch, part = divmod(number, self.parts)
        groups: list[list[Utterance]] = []
        while len(groups) < self.groups:
            drawn = seed * 1009 + epoch + 1_000_003 * len(groups)
            groups += audio.batches(utterances, self.batch_size, seed=drawn)
        size = math.ceil(self.groups / self.parts)
        return groups[: self.groups][part * size : (part + 1) * size]


def plan_of(params: Params, chosen: Material) -> Plan:
    """The parts of an epoch and the steps of the phases."""
    settings = params.student
    groups = math.ceil((len(chosen.train) + chosen.unheard) / settings.batch_size)
    size = math.ceil(groups / settings.looks)
    sizes = [min(size, groups - begin) for begin in range(0, groups, size)]
    epoch = sum(math.ceil(one / (settings.accumulate * settings.devices)) for one in sizes)
    return Plan(
        settings.batch_size, groups, len(sizes), [phase.steps or phase.epochs * epoch for phase in settings.phases]
    )


def _scale(params: Params, phase: Phase, steps: int, model: "Hybrid") -> Callable[[int], float]:
    from kdlib import train

    if params.student.schedule == "noam":
        return train.noam(phase.warmup_steps, model.encoder.width)
    return train.cosine(phase.warmup_steps, steps)


if __name__ == "__main__":
    try:
        folder = Path(sys.argv[1])
        settings = Params.model_validate_json((folder / "params.json").read_text(encoding="utf-8"))
        _build(folder, settings, int(sys.argv[2]), None)
    except UserError as error:
        sys.exit(f"\n{error}\n")
