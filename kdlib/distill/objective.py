"""What a student's training minimises: alpha x teachers + beta x references + gamma x the teachers' encodings.

Each term is computed for the heads that learn, the CTC head's share being `ctc_weight` where both do. Weights and the
temperature may go from one value to another in a straight line over training. Utterances that have no target (their
teachers are missing) are learnt from the reference alone. Where alpha is 0 no teacher is asked for anything: the
hard-label run of the same steps and seed is this same code.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from kdlib.distill import losses
from kdlib.models import Outputs, supervised
from kdlib.models.conformer import mask
from kdlib.models.decoder import teacher_forced
from kdlib.models.hybrid import Hybrid
from kdlib.settings import Distill
from kdlib.teachers.ensemble import Ensemble
from kdlib.tokens import BLANK, BOS, EOS


class Batch(NamedTuple):
    """What one step learns from."""

    wavs: torch.Tensor  # [B, N]
    wav_lens: torch.Tensor  # [B], samples
    ids: list[list[int]]  # of the references
    utt_ids: list[str]
    speakers: list[str]


class Learner(nn.Module):
    """A student, and the projection of its encodings where they are compared with the teachers'."""

    def __init__(self, student: Hybrid, features: int = 0) -> None:
        super().__init__()
        self.student = student
        self.project = nn.Linear(student.encoder.width, features) if features else None


class Objective:
    """The loss of a batch, at a point of training between 0 and 1."""

    def __init__(self, learner: Learner, settings: Distill, targets: Mapping[str, Ensemble]) -> None:
        self.learner, self.settings, self.targets = learner, settings, targets  # by output: "ctc", "decoder"
        self.heads = {"both": ("ctc", "decoder")}.get(settings.heads, (settings.heads,))
        both = len(self.heads) == 2
        self.shares = {"ctc": settings.ctc_weight if both else 1.0, "decoder": 1 - settings.ctc_weight if both else 1.0}
        self._usable: dict[tuple[str, str], bool] = {}

    def __call__(self, batch: Batch, done: float = 0.0) -> dict[str, torch.Tensor]:
        """Named losses; "loss" is their weighted sum."""
        parts = self.parts(batch, done)
        total = sum(weight * value for weight, value in parts.values())
        return {"loss": total} | {name: value for name, (_, value) in parts.items()}

    def parts(self, batch: Batch, done: float = 0.0) -> dict[str, tuple[float, torch.Tensor]]:
        """Every loss with its weight."""
        settings = self.settings
        alpha, temperature = (
            annealed(settings.alpha, settings.alpha_end, done),
            annealed(settings.temperature, settings.temperature_end, done),
        )
        outputs = self.answer(batch)
        found: dict[str, tuple[float, torch.Tensor]] = {}
        for head in self.heads:
            share = self.shares[head]
            if settings.beta:
                found[head] = settings.beta * share, self._hard(head, outputs, batch)
            rows = self._with_target(head, batch) if alpha or settings.pseudo.weight else []
            if not rows:
                continue
            logits, target, plain, weights = self._soft(head, outputs, batch, rows, temperature)
            if alpha:
                soften = {"soften": settings.soften, "softened": self.targets[head].softened}
                found[f"kd_{head}"] = alpha * share, losses.soft_kl(logits, target, weights, temperature, **soften)
            if settings.pseudo.weight:
                known = settings.pseudo.model_dump(exclude={"weight"}) | {"blank": BLANK if head == "ctc" else None}
                found[f"pl_{head}"] = (
                    settings.pseudo.weight * share,
                    losses.pseudo_label(logits, plain, weights, **known),
                )
        if settings.gamma and (rows := self._with_target("ctc", batch)):
            found["features"] = settings.gamma, self._features(outputs, batch, rows)
        return found or {"nothing": (0.0, outputs.ctc_logits.sum() * 0)}  # a batch that no teacher speaks of

    def answer(self, batch: Batch) -> Outputs:
        """What the student says of a batch."""
        inputs = teacher_forced(batch.ids)[0].to(batch.wavs.device) if "decoder" in self.heads else None
        return self.learner.student(batch.wavs, batch.wav_lens, inputs)

    def _hard(self, head: str, outputs: Outputs, batch: Batch) -> torch.Tensor:
        if head == "ctc":
            return supervised.ctc(outputs, batch.ids)
        return supervised.cross_entropy(outputs.decoder_logits, batch.ids, self.settings.label_smoothing)

    def _soft(
        self, head: str, outputs: Outputs, batch: Batch, rows: Sequence[int], temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the rows that have a target: the student's logits, the target, the same at T = 1, the rows' weights."""
        settings, ensemble = self.settings, self.targets[head]
        logits, lengths = _of(head, outputs, batch)
        whole = len(rows) == len(batch.ids)
        logits, lengths = (logits, lengths) if whole else (logits[rows], lengths[rows])
        asked = [batch.utt_ids[row] for row in rows], [batch.speakers[row] for row in rows], lengths.tolist()
        made_at = temperature if settings.soften != "student" else 1.0
        target = plain = self._asked(head, asked, made_at, logits)
        if ensemble.softened and made_at != 1 and (settings.pseudo.weight or self._chooses(head)):
            plain = self._asked(head, asked, 1.0, logits)
        if head == "decoder":
            weights = mask(lengths, logits.shape[1]).float()
            if settings.first_token == "skip":
                weights[:, 0] = 0
            elif settings.first_token == "no_specials":
                target, plain = (losses.without_specials(one, (BOS, EOS, BLANK)) for one in (target, plain))
            return logits, target, plain, weights
        if settings.best_shift:
            shifts, _ = losses.best_shift(logits, plain, lengths, settings.best_shift, BLANK)
            target, plain = (losses.shifted(one, shifts, lengths) for one in (target, plain))
        return logits, target, plain, losses.taught(plain, lengths, settings.blanks, BLANK, settings.around)

    def _chooses(self, head: str) -> bool:
        """Whether frames are chosen or moved by what the target says."""
        return head == "ctc" and (self.settings.best_shift > 0 or self.settings.blanks != "all")

    def _asked(self, head: str, asked: tuple, temperature: float, like: torch.Tensor) -> torch.Tensor:
        """The teachers' target, on the student's device, in full precision and with as many rows as its logits."""
        with torch.autocast(like.device.type, enabled=False):
            target, _ = self.targets[head].to(like.device).logits(*asked, temperature)
        return _fitted(target, like.shape[1])

    def _features(self, outputs: Outputs, batch: Batch, rows: Sequence[int]) -> torch.Tensor:
        lengths = outputs.lengths[rows]
        asked = [batch.utt_ids[row] for row in rows], [batch.speakers[row] for row in rows]
        wanted = self.targets["ctc"].to(outputs.encoded.device).features(*asked, lengths.tolist())
        longest = outputs.encoded.shape[1]
        weights = mask(lengths, longest).float()
        return losses.features(outputs.encoded[rows], _fitted(wanted, longest), weights, self.learner.project)

    def _with_target(self, head: str, batch: Batch) -> list[int]:
        """Which rows of a batch have a target."""
        new = [utt_id for utt_id in batch.utt_ids if (head, utt_id) not in self._usable]
        if new:
            usable = set(self.targets[head].coverage(new).usable)
            self._usable |= {(head, utt_id): utt_id in usable for utt_id in new}
        return [row for row, utt_id in enumerate(batch.utt_ids) if self._usable[head, utt_id]]


def annealed(start: float, end: float | None, done: float) -> float:
    """A value that goes from start to end in a straight line while training goes from 0 to 1.

    >>> annealed(4.0, 2.0, 0.5), annealed(4.0, None, 0.5)
    (3.0, 4.0)
    """
    return start if end is None else start + (end - start) * min(1.0, max(0.0, done))


def _of(head: str, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A head's logits and how many rows of each utterance are no padding."""
    if head == "ctc":
        return outputs.ctc_logits, outputs.lengths
    return outputs.decoder_logits, torch.tensor([len(one) + 1 for one in batch.ids]).to(outputs.encoded.device)


def _fitted(target: torch.Tensor, longest: int) -> torch.Tensor:
    """A target with as many rows as the student's output: what is more is padding on one side or the other."""
    if target.shape[1] >= longest:
        return target[:, :longest]
    return nn.functional.pad(target, (0, 0, 0, longest - target.shape[1]))
