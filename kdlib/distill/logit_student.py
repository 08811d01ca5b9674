"""Seed 003's student: teachers' logits in, its own logits out, no audio.

It is trained on the teachers' mean at a temperature (3 in the seed) and on references, on the fold's training speech,
and scored like any other system - but inference needs the outputs of every teacher. The checkpoint that is best on the
dev speaker is kept. Over decoder outputs it is trained on those of the references, and recognises step by step: every
teacher continues the text that the student has written so far, so that no reference is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from kdlib.console import progress
from kdlib.corpus import audio
from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.corpus.views import View, same
from kdlib.decode.greedy import greedy
from kdlib.evaluate.fold_scores import FoldScoring, score_fold
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Forward
from kdlib.io import write_json
from kdlib.models import Emissions, Outputs
from kdlib.models.averaging import OutputEnsemble
from kdlib.models.hybrid import Hybrid
from kdlib.models.masks import length_mask
from kdlib.objectives import losses
from kdlib.objectives.reference_losses import cross_entropies, ctc_loss
from kdlib.runtime import seed_everything, set_threads
from kdlib.settings.targets import LogitStudentSettings
from kdlib.targets import fusion
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.tokens import BLANK, Tokens


@dataclass(frozen=True)
class TeacherOutputs:
    """The teachers' mean on training speech; on the test blocks; and for decoders, which read no reference there."""

    training: TeacherEnsemble
    analysis: TeacherEnsemble | None = None
    models: Sequence[Hybrid] = ()
    view: View = same  # the recordings that teachers get


class LogitStudent(nn.Module):
    """K teachers' logits [B, T, V] -> logits [B, T, V], by a small transformer over time, or a perceptron by frame."""

    def __init__(
        self,
        teachers: int,
        size: int,
        dim: int = 96,
        layers: int = 2,
        heads: int = 4,
        *,
        kind: str = "transformer",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal  # a decoder's step reads no later one
        self.projections = nn.ModuleList([nn.Linear(size, dim) for _ in range(teachers)])
        self.over_time = fusion.transformer_layers(dim, layers, heads) if kind == "transformer" else None
        wide = [part for _ in range(layers) for part in (nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))]
        self.by_frame = None if self.over_time else nn.Sequential(nn.LayerNorm(dim), *wide)
        self.head = nn.Linear(dim, size)

    def forward(self, logits: Sequence[torch.Tensor], lengths: torch.Tensor) -> Outputs:
        """Teachers' logits and frames [B] -> `Outputs`. Only differences of logits matter: inputs are log-softmaxed."""
        encoded = sum(project(part.log_softmax(-1)) for project, part in zip(self.projections, logits, strict=True))
        encoded = encoded / len(logits)
        if self.over_time is None:
            encoded = encoded + self.by_frame(encoded)
        else:
            encoded = fusion.apply_layers(self.over_time, encoded, lengths, causal=self.causal)
        return Outputs(Emissions(self.head(encoded), lengths), encoded)


class TeacherDecoders(OutputEnsemble):
    """The teachers' models with a logit student over their decoders: one system."""

    def __init__(self, members: Sequence[Hybrid], student: LogitStudent) -> None:
        super().__init__(members)
        self.student = student

    def forward_decoder(self, encoded: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The student's logits [B, L, V], from every teacher's for the same texts."""
        logits = [member.forward_decoder(part, targets, lengths) for member, part in self._split(encoded)]
        return self.student(logits, torch.full((len(targets),), targets.shape[1])).ctc.logits

    def recognise(self, utterances: Sequence[Utterance]) -> Outputs:
        """The encodings of a batch; CTC outputs, which nothing reads here, are those of the first teacher."""
        batch = Batch(utterances)
        with torch.inference_mode():
            outputs = [member(batch.inputs, batch.lengths) for member in self.members]
        return Outputs(outputs[0].ctc, torch.cat([output.encoded for output in outputs], -1))


def train_and_score(partial: Path, outputs: TeacherOutputs, settings: LogitStudentSettings, how: FoldScoring) -> None:
    """Train a student; write its weights, and its scores on the held-out and, in `dev/`, on the dev speaker."""
    set_threads()
    seed, tokens = how.splits.settings.seed, how.setup.tokens
    seed_everything(seed)
    of_decoder = settings.heads == "decoder"
    sizes = {"dim": settings.dim, "layers": settings.layers, "kind": settings.model, "causal": of_decoder}
    student = LogitStudent(len(outputs.training.stores), tokens.size, **sizes)
    system = TeacherDecoders(outputs.models, student).eval() if of_decoder else None

    def recognise(batch: Sequence[Utterance]) -> Outputs:
        return system.recognise(outputs.view(batch))

    def accuracy(speech: Sequence[Utterance]) -> float:
        return (
            _of_decoders(system, recognise, tokens, speech)
            if of_decoder
            else _of_frames(student, outputs, tokens, speech)
        )

    validations = _train(student, outputs.training, how, settings, accuracy)
    weights = {name: weight.contiguous() for name, weight in student.state_dict().items()}
    save_file(weights, partial / "model.safetensors")
    write_json(partial / "validations.json", validations)
    about = About("student of logits", checkpoint="logit_student")
    if of_decoder:
        score_fold(partial, recognise, how.setup.decoders(system, ["decoder"]), how, about)
        return
    covered = {utt.utt_id for utt in outputs.training.covered(how.splits.train)}

    def forward(batch: list[Utterance]) -> Outputs:
        return run(student, outputs.training if batch[0].utt_id in covered else outputs.analysis, batch)

    score_fold(partial, forward, how.setup.decoders(), how, about, usable=covered)


def _train(
    student: LogitStudent,
    training: TeacherEnsemble,
    how: FoldScoring,
    settings: LogitStudentSettings,
    accuracy: Callable[[Sequence[Utterance]], float],
) -> list[dict]:
    """Train the student, with its best checkpoint on dev speech; return all validations."""
    splits, tokens = how.splits, how.setup.tokens
    usable = [utt for utt in training.covered(splits.train) if utt.text]

    def loss(batch: Sequence[Utterance]) -> torch.Tensor:
        own, target = _forward(student, training, batch)
        mask = length_mask(own.lengths, target.shape[1]).float()
        soft = losses.soft_kl(own.ctc.logits, target / settings.temperature, mask, settings.temperature)
        ids = [tokens.encode(utt.text) for utt in batch]
        hard = cross_entropies(own.ctc.logits, ids).mean() if settings.heads == "decoder" else ctc_loss(own.ctc, ids)
        return settings.alpha * soft + (1 - settings.alpha) * hard

    best, validations, weights = -1.0, [], student.state_dict()
    with progress(settings.steps, "logit student", "step") as bar:

        def validate(step: int) -> None:
            nonlocal best, weights
            bar.update(step - bar.n)
            if not splits.dev or (step % (settings.steps // 8 or 1) and step < settings.steps):
                return
            wra = accuracy(splits.dev)
            validations.append({"step": step, "dev_wra": round(wra, 4)})
            if wra > best:
                best, weights = wra, {name: weight.clone() for name, weight in student.state_dict().items()}

        fusion.minimise(student, loss, usable, fusion.Training(splits.settings.seed, settings.steps), validate)
    if splits.dev:
        student.load_state_dict(weights)
    student.eval()
    return validations


def _of_frames(student: LogitStudent, outputs: TeacherOutputs, tokens: Tokens, speech: Sequence[Utterance]) -> float:
    """WRA of greedy CTC on some speech."""
    right = 0
    for batch in audio.batches(speech, 32):
        hypotheses = greedy(run(student, outputs.analysis, batch).ctc, BLANK)
        right += sum(ids == tokens.encode(utt.text) for ids, utt in zip(hypotheses, batch, strict=True))
    return right / len(speech)


def _of_decoders(system: TeacherDecoders, recognise: Forward, tokens: Tokens, speech: Sequence[Utterance]) -> float:
    """WRA of free-running greedy decoding on some speech."""
    right, longest = 0, max(len(tokens.encode(utt.text)) for utt in speech) + 4
    for batch in audio.batches(speech, 32):
        outputs = recognise(batch)
        hypotheses = system.decode_greedy(outputs.encoded, longest, outputs.lengths)
        right += sum(ids == tokens.encode(utt.text) for ids, utt in zip(hypotheses, batch, strict=True))
    return right / len(speech)


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
