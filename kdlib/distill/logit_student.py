"""Seed 003's student: teachers' logits in, its own logits out, no audio.

It is trained on the teachers' mean at a temperature (3 in the seed) and on references, on the fold's training speech,
and scored like any other system - but inference needs the outputs of every teacher. The checkpoint that is best on the
dev speaker is kept.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
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
from kdlib.runtime import seed_everything, set_threads
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
        """Teachers' logits and frames [B] -> `Outputs`. Only differences of logits matter: inputs are log-softmaxed."""
        encoded = sum(project(part.log_softmax(-1)) for project, part in zip(self.projections, logits, strict=True))
        encoded = fusion.apply_layers(self.over_time, encoded / len(logits), lengths)
        return Outputs(self.head(encoded), lengths, encoded)


def logit_student_scores(params: Params) -> Path:
    """The stage's folder: weights, hypotheses and scores of the held-out speaker, and in `dev/` of the dev speaker."""
    names = target_teachers(params)
    return produce(
        params.label_folder / "logit_student" / params.teacher.teacher_set,
        lambda partial: _build(partial, params),
        what="logit student",
        parameters=params.logit_student.model_dump()
        | {"scoring": params.scoring.model_dump(), "search": params.search.model_dump(mode="json")}
        | {"fold": params.fold.model_dump(mode="json"), "held_out": params.held_out, "labels": labels.record(params)},
        inputs=[
            prepare.corpus_folder(params),
            *(extract.extract(params, name, purpose) for name in names for purpose in ("training", "analysis")),
        ],
        seed=params.seed,
        code=CODE,
    )


def _build(partial: Path, params: Params) -> None:
    set_threads()
    tokens, corpus = load_tokens(params), prepare.load(params)
    splits = split(corpus, params)
    strict = params.aggregation.model_copy(update={"missing": "strict"})  # the student needs every teacher
    params = params.model_copy(update={"aggregation": strict})
    training = load_target(params, "logprob_mean")
    analysis = load_target(params, "logprob_mean", purpose="analysis")
    student, validations = _train(params, training, analysis, splits.train, splits.dev, tokens)
    weights = {name: weight.contiguous() for name, weight in student.state_dict().items()}
    save_file(weights, partial / "model.safetensors")
    write_json(partial / "validations.json", validations)
    decoders = decoder_set(params, tokens)
    for part, utterances in (("", splits.test), ("dev", splits.dev)):
        if not utterances:
            continue
        (partial / part).mkdir(exist_ok=True)
        rows = decode_outputs(
            lambda batch: run(student, analysis, batch),
            utterances,
            decoders,
            level=corpus.level,
            seen=splits.seen,
            what=f"logit student, {part or 'held-out'} speech",
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


def _train(
    params: Params,
    training: TeacherEnsemble,
    analysis: TeacherEnsemble,
    train: Sequence[Utterance],
    dev: Sequence[Utterance],
    tokens: Tokens,
) -> tuple[LogitStudent, list[dict]]:
    """Train the student; return its best checkpoint on dev speech, and all validations."""
    settings = params.logit_student
    seed_everything(params.seed)
    student = LogitStudent(len(training.stores), tokens.size, settings.dim, settings.layers)
    covered = set(training.coverage([utt.utt_id for utt in train]).usable)
    usable = [utt for utt in train if utt.utt_id in covered]

    def loss(batch: Sequence[Utterance]) -> torch.Tensor:
        outputs, target = _forward(student, training, batch)
        mask = length_mask(outputs.lengths, target.shape[1]).float()
        soft = losses.soft_kl(outputs.ctc_logits, target, mask, settings.temperature)
        hard = ctc_loss(outputs, [tokens.encode(utt.text) for utt in batch])
        return settings.alpha * soft + (1 - settings.alpha) * hard

    best, validations, weights = -1.0, [], student.state_dict()
    with progress(settings.steps, "logit student", "step") as bar:

        def validate(step: int) -> None:
            nonlocal best, weights
            bar.update(step - bar.n)
            if not dev or (step % (settings.steps // 8 or 1) and step < settings.steps):
                return
            hypotheses = [ids for batch in _batches(dev) for ids in greedy(run(student, analysis, batch), BLANK)]
            references = [tokens.encode(utt.text) for utt in dev]
            wra = sum(a == b for a, b in zip(hypotheses, references, strict=True)) / len(dev)
            validations.append({"step": step, "dev_wra": round(wra, 4)})
            if wra > best:
                best, weights = wra, {name: weight.clone() for name, weight in student.state_dict().items()}

        fusion.minimise(student, loss, usable, params.seed, settings.steps, validate)
    if dev:
        student.load_state_dict(weights)
    return student.eval(), validations


def run(student: LogitStudent, ensemble: TeacherEnsemble, batch: Sequence[Utterance]) -> Outputs:
    """Run a logit student on a batch."""
    with torch.inference_mode():
        return _forward(student, ensemble, batch)[0]


def _forward(
    student: LogitStudent, ensemble: TeacherEnsemble, batch: Sequence[Utterance]
) -> tuple[Outputs, torch.Tensor]:
    """The student's outputs on a batch, and the teachers' mean logits."""
    utt_ids, speakers = [utt.utt_id for utt in batch], [utt.speaker for utt in batch]
    frames = ensemble.frames(utt_ids)
    logits = [part for part, _ in ensemble.each(utt_ids, speakers, frames)]
    return student(logits, torch.tensor(frames)), sum(logits) / len(logits)


def _batches(utterances: Sequence[Utterance], size: int = 32) -> list[Sequence[Utterance]]:
    return [utterances[start : start + size] for start in range(0, len(utterances), size)]
