"""Seed 003's student: teachers' logits in, its own logits out, no audio.

It is trained on the teachers' mean at a temperature (3 in the seed) and on references, on the fold's training speech,
and scored like any other system - but inference needs the outputs of every teacher. The checkpoint that is best on the
dev speaker is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from kdlib.console import progress
from kdlib.corpus.inputs import Batch
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import Splits
from kdlib.decode.greedy import greedy
from kdlib.evaluate.fold_scores import FoldScoring, score_fold
from kdlib.evaluate.score import About
from kdlib.io import write_json
from kdlib.models import Emissions, Outputs
from kdlib.models.masks import length_mask
from kdlib.objectives import losses
from kdlib.objectives.reference_losses import ctc_loss
from kdlib.runtime import seed_everything, set_threads
from kdlib.settings.targets import LogitStudentSettings
from kdlib.targets import fusion
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.tokens import BLANK, Tokens


@dataclass(frozen=True)
class TeacherOutputs:
    """The teachers' mean on training speech, and on the test blocks."""

    training: TeacherEnsemble
    analysis: TeacherEnsemble


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
        return Outputs(Emissions(self.head(encoded), lengths), encoded)


def train_and_score(partial: Path, outputs: TeacherOutputs, settings: LogitStudentSettings, how: FoldScoring) -> None:
    """Train a student; write its weights, and its scores on the held-out and, in `dev/`, on the dev speaker."""
    set_threads()
    student, validations = _train(outputs, how.splits, settings, how.setup.tokens)
    weights = {name: weight.contiguous() for name, weight in student.state_dict().items()}
    save_file(weights, partial / "model.safetensors")
    write_json(partial / "validations.json", validations)
    covered = set(outputs.training.coverage([utt.utt_id for utt in how.splits.train]).usable)

    def forward(batch: list[Utterance]) -> Outputs:
        return run(student, outputs.training if batch[0].utt_id in covered else outputs.analysis, batch)

    about = About("student of logits", checkpoint="logit_student")
    score_fold(partial, forward, how.setup.decoders(), how, about, usable=covered)


def _train(
    outputs: TeacherOutputs, splits: Splits, settings: LogitStudentSettings, tokens: Tokens
) -> tuple[LogitStudent, list[dict]]:
    """Train the student; return its best checkpoint on dev speech, and all validations."""
    training, dev, seed = outputs.training, splits.dev, splits.settings.seed
    seed_everything(seed)
    student = LogitStudent(len(training.stores), tokens.size, settings.dim, settings.layers)
    covered = set(training.coverage([utt.utt_id for utt in splits.train]).usable)
    usable = [utt for utt in splits.train if utt.utt_id in covered]

    def loss(batch: Sequence[Utterance]) -> torch.Tensor:
        own, target = _forward(student, training, batch)
        mask = length_mask(own.lengths, target.shape[1]).float()
        soft = losses.soft_kl(own.ctc.logits, target / settings.temperature, mask, settings.temperature)
        hard = ctc_loss(own.ctc, [tokens.encode(utt.text) for utt in batch])
        return settings.alpha * soft + (1 - settings.alpha) * hard

    best, validations, weights = -1.0, [], student.state_dict()
    with progress(settings.steps, "logit student", "step") as bar:

        def validate(step: int) -> None:
            nonlocal best, weights
            bar.update(step - bar.n)
            if not dev or (step % (settings.steps // 8 or 1) and step < settings.steps):
                return
            hypotheses = [
                ids for batch in _batches(dev) for ids in greedy(run(student, outputs.analysis, batch).ctc, BLANK)
            ]
            references = [tokens.encode(utt.text) for utt in dev]
            wra = sum(a == b for a, b in zip(hypotheses, references, strict=True)) / len(dev)
            validations.append({"step": step, "dev_wra": round(wra, 4)})
            if wra > best:
                best, weights = wra, {name: weight.clone() for name, weight in student.state_dict().items()}

        fusion.minimise(student, loss, usable, fusion.Training(seed, settings.steps), validate)
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
    frames = ensemble.frames(Batch(batch))
    logits = [part for _, part, _ in ensemble.each(Batch(batch), frames)]
    return student(logits, frames), sum(logits) / len(logits)


def _batches(utterances: Sequence[Utterance], size: int = 32) -> list[Sequence[Utterance]]:
    return [utterances[start : start + size] for start in range(0, len(utterances), size)]
