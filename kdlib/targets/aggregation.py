"""Several teachers' stores -> one target for a batch of utterances, exact at any temperature.

`logprob_mean` (the original study's) needs the mean of the logits alone, for the normalisers cancel when the mean of
the log-probabilities is normalised; with linear heads that is one product of the stacked activations with the stacked
heads. `prob_mean` adds probabilities, a teacher at a time. Which teachers speak, and how loudly, is said by `Choice`:
by utterance, or by frame where a fusion was learnt (`fusion.py`). Never more is held than one batch's activations of
every teacher.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdlib.errors import UserError
from kdlib.logits.store import LogitStore

if TYPE_CHECKING:
    import torch

AGGREGATION_CODE = ("targets/aggregation.py", "logits/store.py")
MEANS = ("logprob_mean", "prob_mean")
FUSIONS = ("attention", "transformer")  # learnt, in `fusion.py`, which needs torch from the start
MISSING = ("strict", "partial", "all")
MAX_DRIFT = 1  # frames by which two models of one stride may differ on one recording


@dataclass(frozen=True)
class Weighting:
    """Which teachers speak for an utterance, and how much each says. Weights need not sum to one; 0 is silence."""

    mean: str = "logprob_mean"  # one of MEANS
    weights: Mapping[str, float] = field(default_factory=dict)  # by teacher; empty: all alike
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # teacher -> utterance -> exp(-it) weighs
    by_speaker: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # speaker -> teacher -> weight
    fusion: "torch.nn.Module | None" = None  # scores teachers frame by frame
    own: bool = False  # the speaker's own teacher alone, where there is one
    missing: str = "strict"  # utterances that not every teacher has: leave out, or take from `min_teachers` teachers
    min_teachers: int = 10  # for "partial"
    cut: bool = False  # to the shortest recording, where teachers speak of several (a fault: `distill/faults.py`)


@dataclass(frozen=True)
class Coverage:
    """Which utterances an ensemble can speak of."""

    usable: list[str]
    incomplete: int  # of the usable ones, how many not every teacher has
    left_out: dict[str, int]  # utterance -> teachers that have it, too few

    def __str__(self) -> str:
        return (
            f"{len(self.usable):,} utterances have a target, {self.incomplete:,} of them not from every teacher; "
            f"{len(self.left_out):,} have too few teachers"
        )


class TeacherEnsemble:
    """Teachers' stores under one choice."""

    def __init__(
        self, stores: Mapping[str, LogitStore], choice: Weighting, excluded: Mapping[str, str] | None = None
    ) -> None:
        import torch

        if not stores:
            raise UserError("an ensemble needs a teacher: no store was given")
        if choice.mean not in MEANS or choice.missing not in MISSING:
            raise ValueError(f"expected one of {MEANS} and one of {MISSING}, found {choice.mean!r}, {choice.missing!r}")
        self.choice, self.excluded = (
            choice,
            excluded or {},
        )  # excluded: speaker -> why there is no target on their speech
        self.stores = {name: store for name, store in stores.items() if choice.weights.get(name, 1.0) > 0}
        if unknown := sorted(set(choice.weights) - set(stores)):
            raise UserError(f"weights name teachers that have no store here: {', '.join(unknown)}")
        if not self.stores:
            raise UserError("an ensemble needs a teacher: every weight is 0")
        _check_alike(self.stores)
        self.stride_ms = next(iter(self.stores.values())).header.stride_ms
        self._stacked, self.device = None, "cpu"
        if choice.mean == "logprob_mean" and all(store.head is not None for store in self.stores.values()):
            heads = [store.head for store in self.stores.values()]
            weights, biases = torch.cat([head[0] for head in heads], 1), torch.stack([head[1] for head in heads], 1)
            self._stacked = torch.cat([weights, biases], 1)  # [V, d1 + d2 + ... + K]

    def coverage(self, utt_ids: Sequence[str]) -> Coverage:
        """Which of these utterances have a target."""
        needed = {"strict": len(self.stores), "partial": min(self.choice.min_teachers, len(self.stores)), "all": 1}
        has = {utt_id: sum(utt_id in store for store in self.stores.values()) for utt_id in utt_ids}
        enough = needed[self.choice.missing]
        usable = [utt_id for utt_id, count in has.items() if count >= enough]
        incomplete = sum(has[utt_id] < len(self.stores) for utt_id in usable)
        return Coverage(usable, incomplete, {utt_id: count for utt_id, count in has.items() if count < enough})

    @property
    def fixed_temperature(self) -> bool:
        """Whether `logits` are those of one temperature: means of probabilities are, means of logits serve all."""
        return self.choice.mean == "prob_mean"

    def frames(self, utt_ids: Sequence[str]) -> list[int]:
        """How many frames the longest teacher has of each utterance."""
        return [max(store.frames(one) for store in self.stores.values() if one in store) for one in utt_ids]

    def log_probs(
        self,
        utt_ids: Sequence[str],
        speakers: Sequence[str],
        lengths: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """The target of a batch: log-probabilities [B, T, V] at a temperature, and frames [B]; see `logits`."""
        logits, frames = self.logits(utt_ids, speakers, lengths, temperature)
        return (logits / (1.0 if self.fixed_temperature else temperature)).log_softmax(-1), frames

    def logits(
        self,
        utt_ids: Sequence[str],
        speakers: Sequence[str],
        lengths: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """The target of a batch before normalising, [B, T, V], and frames [B].

        Mean logits are to be divided by a temperature; of probabilities it is taken at `temperature` (`fixed_temperature`).
        `speakers` say whose speech it is, for `own`. `lengths` are the student's frames, which the target is aligned
        to; without them the longest teacher's count.
        """
        import torch

        if self.choice.fusion is not None:
            with torch.no_grad():
                return self.fused(self.choice.fusion, utt_ids, speakers, lengths)
        padded, weights, frames = self._padded(utt_ids, speakers, lengths)
        if self.fixed_temperature:
            return self._mean_of_probs(padded, weights, temperature), torch.tensor(frames)
        return self._mean_of_logits(padded, weights[:, None]), torch.tensor(frames)

    def fused(
        self,
        fusion: "torch.nn.Module",
        utt_ids: Sequence[str],
        speakers: Sequence[str],
        lengths: Sequence[int] | None = None,
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """What a fusion makes of the teachers' activations: logits [B, T, V] and frames [B], by which it can learn."""
        import torch

        padded, weights, frames = self._padded(utt_ids, speakers, lengths)
        lengths = torch.tensor(frames)
        scores, correction = fusion(list(padded.values()), lengths)
        absent = (weights == 0)[:, None]
        shares = (scores + weights.clamp_min(1e-9).log()[:, None]).masked_fill(absent, -1e9).softmax(-1)  # [B, T, K]
        logits = self._mean_of_logits(padded, shares)
        return (logits if correction is None else logits + correction), lengths

    def each(
        self, utt_ids: Sequence[str], speakers: Sequence[str], lengths: Sequence[int] | None = None
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Every teacher that speaks of a batch: its logits [B, T, V], and its weight on each utterance [B]."""
        import torch

        padded, weights, _ = self._padded(utt_ids, speakers, lengths)
        if self.choice.fusion is not None:  # together they are one
            yield self.logits(utt_ids, speakers, lengths)[0], torch.ones(len(utt_ids), device=self.device)
            return
        for (name, hidden), weight in zip(padded.items(), weights.T, strict=True):
            if weight.any():
                yield self._logits(name, hidden), weight

    def features(
        self, utt_ids: Sequence[str], speakers: Sequence[str], lengths: Sequence[int] | None = None
    ) -> "torch.Tensor":
        """The teachers' mean activations [B, T, d]: of those that share a parent, whose dimensions mean the same."""
        padded, weights, _ = self._padded(utt_ids, speakers, lengths)
        return sum(weight[:, None, None] * one for one, weight in zip(padded.values(), weights.T, strict=True))

    def to(self, device: "torch.device | str") -> "TeacherEnsemble":
        """Do the products on a device."""
        if str(device) == str(self.device):
            return self
        self.device = device
        self._stacked = None if self._stacked is None else self._stacked.to(device)
        if self.choice.fusion is not None:
            self.choice.fusion.to(device)
        for store in self.stores.values():
            store.head = None if store.head is None else tuple(part.to(device) for part in store.head)
        return self

    def cached(self) -> "TeacherEnsemble":
        """The same, keeping in memory what it has read: for little speech that is gone through many times."""
        other, known = copy.copy(self), {}

        def hidden(store: LogitStore, utt_ids: Sequence[str]) -> "list[torch.Tensor | None]":
            for one in utt_ids:
                if (store.folder, one) not in known:
                    known[store.folder, one] = store.hidden(one) if one in store else None
            return [known[store.folder, one] for one in utt_ids]

        other._hidden = hidden
        return other

    def _padded(
        self, utt_ids: Sequence[str], speakers: Sequence[str], lengths: Sequence[int] | None
    ) -> "tuple[dict[str, torch.Tensor], torch.Tensor, list[int]]":
        """Every teacher's activations [B, T, d], their weights [B, K], and frames."""
        import torch

        for utt_id, speaker in zip(utt_ids, speakers, strict=True):
            if speaker in self.excluded:
                raise UserError(f"{utt_id}: {speaker} {self.excluded[speaker]}: no training target on this speech")
        weights = torch.tensor([self._weights(utt_id, who) for utt_id, who in zip(utt_ids, speakers, strict=True)])
        parts = {name: self._hidden(store, utt_ids) for name, store in self.stores.items()}
        heard_by = [[one[index] for one in parts.values() if one[index] is not None] for index in range(len(utt_ids))]
        frames = list(lengths) if lengths is not None else [max(map(len, hidden)) for hidden in heard_by]
        if self.choice.cut:
            frames = [min(count, *map(len, hidden)) for count, hidden in zip(frames, heard_by, strict=True)]
            parts = {
                name: [one if one is None else one[:count] for one, count in zip(hidden, frames, strict=True)]
                for name, hidden in parts.items()
            }
        padded = {
            name: torch.nn.utils.rnn.pad_sequence(
                [
                    torch.zeros(count, self.stores[name].header.width)
                    if one is None
                    else align_frames(one, count, name)
                    for one, count in zip(hidden, frames, strict=True)
                ],
                batch_first=True,
            ).to(self.device)
            for name, hidden in parts.items()
        }
        return padded, weights.to(self.device), frames

    def _mean_of_logits(self, padded: dict, weights: "torch.Tensor") -> "torch.Tensor":
        """The mean with weights [B, 1, K], or by frame [B, T, K]."""
        import torch

        by_teacher = [weight[..., None] for weight in weights.unbind(-1)]
        if self._stacked is None:
            return sum(
                weight * self._logits(name, hidden)
                for (name, hidden), weight in zip(padded.items(), by_teacher, strict=True)
            )
        scaled = [weight * hidden for hidden, weight in zip(padded.values(), by_teacher, strict=True)]
        biases = weights.expand(-1, scaled[0].shape[1], -1)
        return torch.cat([*scaled, biases], -1) @ self._stacked.T

    def _mean_of_probs(self, padded: dict, weights: "torch.Tensor", temperature: float) -> "torch.Tensor":
        probs = sum(
            weight[:, None, None] * (self._logits(name, hidden) / temperature).softmax(-1)
            for (name, hidden), weight in zip(padded.items(), weights.T, strict=True)
        )
        return probs.clamp_min(1e-30).log()

    def _logits(self, name: str, hidden: "torch.Tensor") -> "torch.Tensor":
        head = self.stores[name].head
        return hidden if head is None else hidden @ head[0].T + head[1]

    def _hidden(self, store: LogitStore, utt_ids: Sequence[str]) -> "list[torch.Tensor | None]":
        return [store.hidden(utt_id) if utt_id in store else None for utt_id in utt_ids]

    def _weights(self, utt_id: str, speaker: str) -> list[float]:
        """Each teacher's weight on an utterance; they sum to one over those that have it."""
        there = {name: self.choice.weights.get(name, 1.0) for name, store in self.stores.items() if utt_id in store}
        if not there:
            raise UserError(f"no teacher has an output on {utt_id}; extract it, or leave it out as `coverage` says")
        if self.choice.own and speaker in there:
            there = {speaker: 1.0}
        nearness = self.choice.by_speaker.get(speaker, {})
        there = {name: one * nearness.get(name, 1.0) for name, one in there.items()}
        losses = [self.choice.losses.get(name, {}).get(utt_id, 0.0) for name in there]
        if math.isfinite(least := min(losses)):  # the smallest apart, so that not all weights vanish
            there = {
                name: one * math.exp(least - loss) for (name, one), loss in zip(there.items(), losses, strict=True)
            }
        total = sum(there.values())
        return [there.get(name, 0.0) / total for name in self.stores]


def align_frames(hidden: "torch.Tensor", frames: int, teacher: str) -> "torch.Tensor":
    """One recording's frames in another model's number of frames of the same stride.

    Models of one stride differ by a frame at the end: the last one is repeated or dropped. More is another stride, or
    another recording, and is refused.
    """
    import torch

    more = frames - len(hidden)
    if abs(more) > MAX_DRIFT:
        raise UserError(
            f"teacher {teacher} has {len(hidden)} frames where {frames} are expected: another stride or another "
            "recording; extract its outputs again"
        )
    if more <= 0:
        return hidden[:frames]
    return (
        torch.cat([hidden, hidden[-1:].expand(more, -1)]) if len(hidden) else hidden.new_zeros(frames, hidden.shape[1])
    )


def _check_alike(stores: Mapping[str, LogitStore]) -> None:
    """Averaged can only be what means the same."""
    (first, one), *others = stores.items()
    for name, store in others:
        for what in ("tokens", "size", "blank", "output", "stride_ms"):
            here, there = getattr(one.header, what), getattr(store.header, what)
            if here != there:
                raise UserError(
                    f"the teachers {first} and {name} cannot be averaged: {what} is {here} and {there}; extract one of "
                    "them again"
                )
