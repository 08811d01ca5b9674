"""Seed 003's student: teachers' logits in, its own logits out, no audio.

It is taught by the teachers' mean at a temperature (3 in the seed) and by references, on the fold's training speech,
and scored like any other system - but it needs every teacher at work to say a word. The look at the dev speaker that
scores best is kept.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from kdlib.console import progress
from kdlib.corpus import labels, prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import split
from kdlib.decode.greedy import greedy
from kdlib.evaluate import score
from kdlib.evaluate.decoder_setup import DECODER_SETUP_CODE, decoder_set, decoder_settings
from kdlib.evaluate.transcribe import TRANSCRIBE_CODE, decode_outputs
from kdlib.io import write_json
from kdlib.logits import extract
from kdlib.models import Outputs
from kdlib.models.encoder_conformer import length_mask
from kdlib.objectives import losses
from kdlib.objectives.reference_losses import ctc_loss
from kdlib.params import Params
from kdlib.pretrained.pieces import load_tokens
from kdlib.runtime import set_threads
from kdlib.stage import produce
from kdlib.targets import fusion
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.choice import CHOICE_CODE, load_target, target_teachers
from kdlib.tokens import BLANK, Tokens

CODE = (
    "distill/logit_student.py",
    "objectives/losses.py",
    *CHOICE_CODE,
    *labels.CODE,
    *DECODER_SETUP_CODE,
    *TRANSCRIBE_CODE,
)


class LogitStudent(nn.Module):
    """K teachers' logits [B, T, V] -> logits [B, T, V], by a small transformer over time."""

    def __init__(self, teachers: int, size: int, dim: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(size, dim) for _ in range(teachers)])
        self.over_time = fusion.transformer_layers(dim, layers, heads)
        self.head = nn.Linear(dim, size)

    def forward(self, logits: Sequence[torch.Tensor], lengths: torch.Tensor) -> Outputs:
        """What it says; of logits only differences mean something, so it is given their log-softmax."""
        seen = sum(project(one.log_softmax(-1)) for project, one in zip(self.projections, logits, strict=True))
        seen = fusion.apply_layers(self.over_time, seen / len(logits), lengths)
        return Outputs(self.head(seen), lengths, seen)


def logit_student_scores(params: Params) -> Path:
    """The stage's folder: hypotheses and scores of the held-out speaker, in `dev/` of the dev speaker; the weights."""
    names = target_teachers(params)
    purposes = ("training", "analysis")
    return produce(
        params.label_folder / "logit_student" / params.teacher.teacher_set,
        lambda partial: _build(partial, params),
        what="student of logits",
        parameters=params.logit_student.model_dump()
        | {"scoring": params.scoring.model_dump(), "search": params.search.model_dump(mode="json")}
        | {"fold": params.fold.model_dump(mode="json"), "held_out": params.held_out, "labels": labels.record(params)},
        inputs=[
            prepare.corpus_folder(params),
            *(extract.extract(params, name, purpose) for name in names for purpose in purposes),
        ],
        seed=params.seed,
        code=CODE,
    )


def _build(partial: Path, params: Params) -> None:
    from safetensors.torch import save_file

    set_threads()
    tokens, corpus = load_tokens(params), prepare.load(params)
    splits = split(corpus, params)
    whole = params.aggregation.model_copy(update={"missing": "strict"})  # it needs every teacher
    params = params.model_copy(update={"aggregation": whole})
    taught = load_target(params, "logprob_mean")
    asked = load_target(params, "logprob_mean", purpose="analysis")
    student, looks = _trained(params, taught, asked, splits.train, splits.dev, tokens)
    save_file({name: one.contiguous() for name, one in student.state_dict().items()}, partial / "model.safetensors")
    write_json(partial / "validations.json", looks)
    decoders = decoder_set(params, tokens)
    for part, utterances in (("", splits.test), ("dev", splits.dev)):
        if not utterances:
            continue
        (partial / part).mkdir(exist_ok=True)
        rows = decode_outputs(
            lambda batch: run(student, asked, batch),
            utterances,
            decoders,
            level=corpus.level,
            seen=splits.seen,
            what=f"student of logits, {part or 'held-out'} speech",
        )
        score.write(
            rows,
            decoders.columns,
            partial / part,
            system="student of logits",
            held_out="" if part else params.held_out,
            tokenizer=tokens.fingerprint,
            checkpoint="logit_student",
            settings=decoder_settings(decoders, params, ""),
            fold_homophones=params.scoring.fold_homophones,
            bootstrap=params.scoring.bootstrap,
        )


def _trained(
    params: Params,
    taught: TeacherEnsemble,
    asked: TeacherEnsemble,
    train: Sequence[Utterance],
    dev: Sequence[Utterance],
    tokens: Tokens,
) -> tuple[LogitStudent, list[dict]]:
    """The student at its best look at dev speech, and all looks."""
    from kdlib.runtime import seed_everything

    settings = params.logit_student
    seed_everything(params.seed)
    student = LogitStudent(len(taught.stores), tokens.size, settings.dim, settings.layers)
    usable = set(taught.coverage([utt.utt_id for utt in train]).usable)

    def loss(batch: Sequence[Utterance]) -> torch.Tensor:
        outputs, target = _said(student, taught, batch)
        inside = length_mask(outputs.lengths, target.shape[1]).float()
        soft = losses.soft_kl(outputs.ctc_logits, target, inside, settings.temperature)
        hard = ctc_loss(outputs, [tokens.encode(utt.text) for utt in batch])
        return settings.alpha * soft + (1 - settings.alpha) * hard

    best, looks, kept = -1.0, [], student.state_dict()
    with progress(settings.steps, "student of logits", "step") as bar:

        def look(step: int) -> None:
            nonlocal best, kept
            bar.update(step - bar.n)
            if not dev or (step % (settings.steps // 8 or 1) and step < settings.steps):
                return
            said = [ids for batch in _batches(dev) for ids in greedy(run(student, asked, batch), BLANK)]
            told = [tokens.encode(utt.text) for batch in _batches(dev) for utt in batch]
            right = sum(a == b for a, b in zip(said, told, strict=True)) / len(told)
            looks.append({"step": step, "dev_wra": round(right, 4)})
            if right > best:
                best, kept = right, {name: one.clone() for name, one in student.state_dict().items()}

        learnt = [utt for utt in train if utt.utt_id in usable]
        fusion.minimise(student, loss, learnt, params.seed, settings.steps, look)
    if dev:
        student.load_state_dict(kept)
    return student.eval(), looks


def run(student: LogitStudent, ensemble: TeacherEnsemble, batch: Sequence[Utterance]) -> Outputs:
    """What a logit student says of a batch."""
    with torch.inference_mode():
        return _said(student, ensemble, batch)[0]


def _said(student: LogitStudent, ensemble: TeacherEnsemble, batch: Sequence[Utterance]) -> tuple[Outputs, torch.Tensor]:
    """What it says of a batch, and the teachers' mean."""
    asked = [utt.utt_id for utt in batch], [utt.speaker for utt in batch]
    frames = ensemble.frames(asked[0])
    every = [logits for logits, _ in ensemble.each(*asked, frames)]
    return student(every, torch.tensor(frames)), sum(every) / len(every)


def _batches(utterances: Sequence[Utterance], size: int = 32) -> list[Sequence[Utterance]]:
    return [utterances[start : start + size] for start in range(0, len(utterances), size)]
