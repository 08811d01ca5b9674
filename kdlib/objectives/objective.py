"""The training objective of teachers and students: the weighted sum of the active terms (`terms.py`).

A head's terms share its weight: with both heads, the CTC head's share is `ctc_weight`. Utterances without a target
(their teachers are missing) are trained on the reference alone, those without a transcript on the teachers alone.
Without terms of teachers no target is computed: the hard-label run of the same steps and seed is this same code.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from kdlib.corpus.inputs import Batch
from kdlib.errors import UserError
from kdlib.models import Emissions, Outputs
from kdlib.models.decoder import teacher_forced
from kdlib.models.encoder_cache import EncoderCache, FeatureCache
from kdlib.models.hybrid import Hybrid
from kdlib.objectives.step import Sources, Step
from kdlib.objectives.term import Term, active_among, heads
from kdlib.settings.reference_loss import ReferenceLoss
from kdlib.settings.schedule import Progress

START = Progress()


class Learner(nn.Module):
    """A model with the layers that only training needs: a projection of its encodings, an intermediate CTC head."""

    def __init__(
        self,
        student: Hybrid,
        features: Mapping[int, int] | None = None,
        tap: int = 0,
        *,
        shares_head: bool = False,
        averages: bool = False,
    ) -> None:
        """`features`: widths that layers (0: the encodings) are projected to; `tap`: the intermediate head's layer."""
        super().__init__()
        self.student, width = student, student.encoder.width
        self.project = nn.ModuleDict({str(layer): nn.Linear(width, to) for layer, to in (features or {}).items()})
        self.intermediate_head = None
        self.layers = tuple(sorted({layer for layer in (*(features or ()), tap) if layer}))
        if self.layers and self.layers[-1] > student.encoder.layers:
            raise UserError(
                f"distill.layers: there is no layer {self.layers[-1]}: the student's encoder has "
                f"{student.encoder.layers}, counted from 1"
            )
        if tap:
            if tap >= student.encoder.layers:
                raise UserError(
                    f"distill.intermediate.layer is {tap}: the encoder has {student.encoder.layers} layers, and the "
                    "head must be below the last; set a smaller one"
                )
            self.intermediate_head = None if shares_head else nn.Linear(student.encoder.width, student.heads.size)
        self.register_buffer("passes", torch.zeros(2, dtype=torch.long))  # forward, backward: utterances by the encoder
        self.average = copy.deepcopy(student).requires_grad_(False).eval() if averages else None
        if averages:
            self.register_buffer("averaged", torch.zeros(()))  # steps

    def train(self, mode: bool = True) -> "Learner":
        """Set training mode; the average stays in evaluation mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average towards the weights as they are; at first it follows them fast."""
        if self.average is None:
            return
        self.averaged += 1
        share = 1 - min(decay, float(self.averaged / (self.averaged + 9)))
        new = self.student.state_dict()
        for name, value in self.average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name].to(value), share)
            else:
                value.copy_(new[name])


class Objective:
    """The loss of a batch, at a point of the training: the sum of those of `terms` that the settings have."""

    def __init__(
        self, learner: Learner, settings: ReferenceLoss, terms: Mapping[str, Term], sources: Sources | None = None
    ) -> None:
        self.learner, self.settings = learner, settings
        self.sources = sources or Sources({})
        self.terms = active_among(terms, settings)
        self.heads = heads(settings)
        both = len(self.heads) == 2
        self.shares = {"ctc": settings.ctc_weight, "decoder": 1 - settings.ctc_weight} if both else {}
        self.cache: EncoderCache | FeatureCache | None = None

    def __call__(self, batch: Batch, now: Progress = START) -> dict[str, torch.Tensor]:
        """Named losses; "loss" is their weighted sum."""
        return self.of_both(batch, now) if batch.mix else self.total(self.step(batch, now))

    def of_both(self, batch: Batch, now: Progress) -> dict[str, torch.Tensor]:
        """The losses of a mixed batch: of every row's two utterances, each over its own frames, by their shares."""
        outputs, (rows, share) = self.outputs(batch), batch.mix
        plain, seconds = batch.select(range(len(batch))), [utt.duration_s for utt in batch.utterances]
        longest = [max(mine, seconds[row]) for mine, row in zip(seconds, rows, strict=True)]
        total: dict[str, torch.Tensor] = {}
        for part, its_share in ((plain, 1 - share), (plain.select(rows), share)):
            shares = [utt.duration_s / most for utt, most in zip(part.utterances, longest, strict=True)]
            frames = torch.ceil(outputs.lengths * torch.tensor(shares, device=outputs.lengths.device) - 1e-4).long()
            own = outputs.cut(frames.clamp_min(1))
            step = Step(self.learner, self.settings, self.sources, part, now, own, lambda: self.of_average(batch))
            for name, value in self.total(step).items():
                total[name] = total.get(name, 0.0) + its_share * value
        return total

    def total(self, step: Step) -> dict[str, torch.Tensor]:
        """Named losses of a step; "loss" is their weighted sum."""
        parts = self.weighted(step)
        total = sum(weight * value for weight, value in parts.values())
        return {"loss": total} | {name: value for name, (_, value) in parts.items()}

    def parts(self, batch: Batch, now: Progress = START) -> dict[str, tuple[float, torch.Tensor]]:
        """Every loss of a batch with its weight."""
        return self.weighted(self.step(batch, now))

    def weighted(self, step: Step) -> dict[str, tuple[float, torch.Tensor]]:
        """Every loss of a step with its weight."""
        found = {}
        for name, term in self.terms.items():
            weight = self.weight(name, step.now)
            if weight and (loss := term.loss(step, term.head)) is not None:
                found[name] = weight, loss
        return found or {"nothing": (0.0, step.outputs.ctc.logits.sum() * 0)}  # neither targets nor references

    def weight(self, name: str, now: Progress = START) -> float:
        """The weight of a term, with its head's share."""
        term = self.terms[name]
        return term.weight(self.settings).at(now) * self.shares.get(term.head, 1.0)

    def step(self, batch: Batch, now: Progress = START) -> Step:
        """The model's outputs on a batch, and what its terms share."""
        about = self.learner, self.settings, self.sources, batch, now, self.outputs(batch)
        return Step(*about, lambda: self.of_average(batch))

    def outputs(self, batch: Batch) -> Outputs:
        """The model's outputs on a batch."""
        student, layers = self.learner.student, self.learner.layers
        tokens = teacher_forced(batch.ids)[0].to(batch.device) if "decoder" in self.heads else None
        if torch.is_grad_enabled() and not isinstance(self.cache, EncoderCache):
            self.learner.passes += len(batch)
        encoded = (self.cache or student.encoder.of_batch)(batch, layers)
        return student.apply_heads(encoded, tokens)

    @property
    def passes(self) -> dict[str, int]:
        """How many utterances have passed forward and backward through the encoder and, forward, its average."""
        return dict(zip(("forward", "backward"), self.learner.passes.tolist(), strict=True))

    def of_average(self, batch: Batch) -> Emissions:
        """The CTC outputs of the average of the model's weights, without masks and dropout."""
        model, cache = self.learner.average, self.cache
        self.learner.passes[0] += len(batch)
        with torch.no_grad():
            if isinstance(cache, FeatureCache):
                features = cache.features(batch)
            else:
                features = model.encoder.extract_features(batch.inputs, batch.lengths)
            return model.apply_heads(model.encoder.augmented(*features, batch)).ctc
