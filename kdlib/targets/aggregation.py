"""Combine several teachers' outputs into one target (the aggregate) for a batch, exact at any temperature.

`logprob_mean` (the original study's) needs only the mean of the logits, because the normalisers cancel when the mean of
the log-probabilities is normalised; with linear heads that is one product of the stacked activations with the stacked
heads. `prob_mean` adds probabilities, one teacher at a time. A `Weighting` sets which teachers contribute and by how
much: per utterance, or per frame with a learned fusion (`fusion.py`). Memory never holds more than one batch's
activations of every teacher.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.errors import UserError
from kdlib.logits.store import Header
from kdlib.models import Emissions

MEANS = ("logprob_mean", "prob_mean")
FUSED = "fusion"
MISSING = ("strict", "partial", "all")
REMEMBERED = 100_000  # utterances of which it is known whether they have a target
MAX_DRIFT = 1  # frames by which two models of one stride may differ on one recording


@dataclass(frozen=True)
class Weighting:
    """Which teachers contribute to an utterance's target, and by how much. Weights need not sum to one; 0 excludes."""

    mean: str = "logprob_mean"  # one of MEANS
    weights: Mapping[str, float] = field(default_factory=dict)  # by teacher; empty: all equal
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # teacher -> utterance; weight exp(-loss)
    by_speaker: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # speaker -> teacher -> weight
    fusion: torch.nn.Module | None = None  # scores teachers frame by frame
    own: bool = False  # only the speaker's own teacher, if there is one
    missing: str = "strict"  # utterances with a missing teacher: leave out, or average `min_teachers` or more
    min_teachers: int = 10  # for "partial"
    cut: bool = False  # to the shortest, if teachers' outputs are of different recordings (`distill/faults.py`)


@dataclass(frozen=True)
class Coverage:
    """The utterances that an ensemble has a target for."""

    usable: list[str]
    incomplete: int  # usable utterances with a missing teacher
    left_out: dict[str, int]  # utterance -> number of teachers that have it, too few

    def __str__(self) -> str:
        return (
            f"{len(self.usable):,} utterances have a target, {self.incomplete:,} of them not from every teacher; "
            f"{len(self.left_out):,} have too few teachers"
        )


class Teacher(Protocol):
    """One output of a teacher: stored (`LogitStore`), or made in every step (`targets/live.py`)."""

    header: Header
    head: tuple[torch.Tensor, torch.Tensor] | None  # weight and bias that turn activations into logits

    def __contains__(self, utt_id: str) -> bool: ...

    def activations(self, batch: Batch) -> list[torch.Tensor | None]:
        """[T, width] of each utterance; None without an output."""
        ...


class TeacherEnsemble:
    """Teachers' outputs combined under one weighting: a `TargetSource`."""

    def __init__(
        self, stores: Mapping[str, Teacher], weighting: Weighting, excluded: Mapping[str, str] | None = None
    ) -> None:
        """`excluded`: speaker -> why there is no target on their speech."""
        if not stores:
            raise UserError("an ensemble needs a teacher: no store was given")
        if weighting.mean not in MEANS or weighting.missing not in MISSING:
            found = f"{weighting.mean!r}, {weighting.missing!r}"
            raise ValueError(f"expected one of {MEANS} and one of {MISSING}, found {found}")
        self.weighting, self.excluded = weighting, excluded or {}
        self.stores = {name: store for name, store in stores.items() if weighting.weights.get(name, 1.0) > 0}
        if unknown := sorted(set(weighting.weights) - set(stores)):
            raise UserError(f"weights name teachers without a store: {', '.join(unknown)}")
        if not self.stores:
            raise UserError("an ensemble needs a teacher: every weight is 0")
        _check_compatible(self.stores)
        self.stride_ms = next(iter(self.stores.values())).header.stride_ms
        self._stacked, self.device = None, torch.device("cpu")
        self._heads = {name: store.head for name, store in self.stores.items() if store.head is not None}
        self._usable: dict[str, bool] = {}
        if weighting.mean == "logprob_mean" and len(self._heads) == len(self.stores):
            heads = list(self._heads.values())
            weights, biases = torch.cat([head[0] for head in heads], 1), torch.stack([head[1] for head in heads], 1)
            self._stacked = torch.cat([weights, biases], 1)  # [V, d1 + d2 + ... + K]

    def coverage(self, utt_ids: Sequence[str]) -> Coverage:
        """Count the utterances that have a target."""
        counts, enough = {utt_id: self._count(utt_id) for utt_id in utt_ids}, self._needed
        usable = [utt_id for utt_id, count in counts.items() if count >= enough]
        incomplete = sum(counts[utt_id] < len(self.stores) for utt_id in usable)
        return Coverage(usable, incomplete, {utt_id: count for utt_id, count in counts.items() if count < enough})

    def covered(self, utterances: Sequence[Utterance]) -> Utterances:
        """The utterances that have a target."""
        needed = self._needed
        return Utterances.of(utterances).where(lambda utt: self._count(utt.utt_id) >= needed)

    @property
    def _needed(self) -> int:
        """How many teachers an utterance needs."""
        few = min(self.weighting.min_teachers, len(self.stores))
        return {"strict": len(self.stores), "partial": few, "all": 1}[self.weighting.missing]

    def _count(self, utt_id: str) -> int:
        """How many teachers have an utterance."""
        return sum(utt_id in store for store in self.stores.values())

    @property
    def width(self) -> int:
        """Dimensions of the teachers' activations."""
        return next(iter(self.stores.values())).header.width

    def rows(self, batch: Batch) -> list[int]:
        """The rows of a batch that have a target."""
        if len(self._usable) > REMEMBERED:
            self._usable.clear()
        for utt_id in batch.utt_ids:
            if utt_id not in self._usable:
                self._usable[utt_id] = self._count(utt_id) >= self._needed
        return [row for row, utt_id in enumerate(batch.utt_ids) if self._usable[utt_id]]

    def frames(self, batch: Batch) -> torch.Tensor:
        """[B]: frames of each utterance, of the teacher with the most; of stored outputs."""
        stores = self.stores.values()
        return torch.tensor([max(one.frames(name) for one in stores if name in one) for name in batch.utt_ids])

    def log_probs(self, batch: Batch, lengths: torch.Tensor | None = None, temperature: float = 1.0) -> Emissions:
        """The target of a batch as log-probabilities; see `logits`."""
        logits, frames = self.logits(batch, lengths, temperature)
        return Emissions(logits.log_softmax(-1), frames)

    def logits(self, batch: Batch, lengths: torch.Tensor | None = None, temperature: float = 1.0) -> Emissions:
        """The target of a batch at a temperature, before normalising.

        `lengths` [B] are the student's frames, which the target is aligned to, on the student's device; by default
        those of the longest teacher.
        """
        if self.weighting.fusion is not None:
            with torch.no_grad():
                logits, frames = self.fused(self.weighting.fusion, batch, lengths)
            return Emissions(logits if temperature == 1 else logits / temperature, frames)
        with self._precisely(lengths):
            padded, weights, frames = self._padded(batch, lengths)
            if self.weighting.mean == "prob_mean":
                return Emissions(self._mean_of_probs(padded, weights, temperature), frames)
            return Emissions(self._mean_of_logits(padded, weights[:, None] / temperature), frames)

    def fused(self, fusion: torch.nn.Module, batch: Batch, lengths: torch.Tensor | None = None) -> Emissions:
        """Combine the teachers' activations with a fusion, with gradients."""
        with self._precisely(lengths):
            padded, weights, frames = self._padded(batch, lengths)
            scores, correction = fusion(list(padded.values()), frames)
            absent = (weights == 0)[:, None]
            shares = (scores + weights.clamp_min(1e-9).log()[:, None]).masked_fill(absent, -1e9).softmax(-1)  # [B,T,K]
            logits = self._mean_of_logits(padded, shares)
            return Emissions(logits if correction is None else logits + correction, frames)

    def each(
        self, batch: Batch, lengths: torch.Tensor | None = None
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """The teachers that contribute to a batch: name, logits [B, T, V] and weight per utterance [B].

        A fusion counts as one teacher, `FUSED`.
        """
        if self.weighting.fusion is not None:
            logits, _ = self.logits(batch, lengths)
            yield FUSED, logits, torch.ones(len(batch), device=logits.device)
            return
        with self._precisely(lengths):
            padded, weights, _ = self._padded(batch, lengths)
        for (name, hidden), weight in zip(padded.items(), weights.T, strict=True):
            if weight.any():
                with self._precisely(lengths):
                    logits = self._logits(name, hidden)
                yield name, logits, weight

    def hidden(self, batch: Batch, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The teachers' mean activations [B, T, d]; only for teachers of one parent, whose dimensions mean the same."""
        with self._precisely(lengths):
            padded, weights, _ = self._padded(batch, lengths)
            parts = zip(padded.values(), weights.T, strict=True)
            return sum(weight[:, None, None] * hidden for hidden, weight in parts)

    def cached(self) -> "TeacherEnsemble":
        """A copy that keeps in memory what it has read: for little speech that is read many times."""
        ensemble = copy.copy(self)
        ensemble.stores = {name: _Cached(store) for name, store in self.stores.items()}
        return ensemble

    def _precisely(self, lengths: torch.Tensor | None) -> torch.autocast:
        """Compute on the device of the student's lengths, without autocast, as exactly as outputs were stored."""
        device = torch.device("cpu") if lengths is None else lengths.device
        if device != self.device:
            self.device = device
            self._stacked = None if self._stacked is None else self._stacked.to(device)
            if self.weighting.fusion is not None:
                self.weighting.fusion.to(device)
            self._heads = {name: tuple(part.to(device) for part in head) for name, head in self._heads.items()}
        return torch.autocast(device.type, enabled=False)

    def _activations(self, batch: Batch) -> dict[str, list[torch.Tensor | None]]:
        """Every teacher's activations on each utterance; None where it has none."""
        return {name: store.activations(batch) for name, store in self.stores.items()}

    def _padded(
        self, batch: Batch, lengths: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Every teacher's activations [B, T, d], their weights [B, K], and frames [B]."""
        for utt in batch.utterances:
            if utt.speaker in self.excluded:
                why = f"{utt.speaker} {self.excluded[utt.speaker]}"
                raise UserError(f"{utt.utt_id}: {why}: no training target on this speech")
        weights = torch.tensor([self._weights(utt.utt_id, utt.speaker) for utt in batch.utterances])
        stored = self._activations(batch)
        counts = _counts(stored)
        frames = lengths.tolist() if lengths is not None else [max(row) for row in counts]
        longest = max(frames)
        if self.weighting.cut:
            frames = [min(length, *row) for length, row in zip(frames, counts, strict=True)]
        padded = {}
        for name, rows in stored.items():
            values = torch.zeros(len(rows), longest, self.stores[name].header.width, device=_device_of(rows))
            for row, hidden, length in zip(values, rows, frames, strict=True):
                if hidden is not None:
                    hidden = hidden[:length] if self.weighting.cut else hidden
                    row[:length] = align_frames(hidden, length, name)
            padded[name] = values.to(self.device)
        return padded, weights.to(self.device), torch.tensor(frames, device=self.device)

    def _mean_of_logits(self, padded: dict, weights: torch.Tensor) -> torch.Tensor:
        """The mean with weights [B, 1, K], or by frame [B, T, K]."""
        by_teacher = [weight[..., None] for weight in weights.unbind(-1)]
        if self._stacked is None:
            return sum(
                weight * self._logits(name, hidden)
                for (name, hidden), weight in zip(padded.items(), by_teacher, strict=True)
            )
        scaled = [weight * hidden for hidden, weight in zip(padded.values(), by_teacher, strict=True)]
        biases = weights.expand(-1, scaled[0].shape[1], -1)
        return torch.cat([*scaled, biases], -1) @ self._stacked.T

    def _mean_of_probs(self, padded: dict, weights: torch.Tensor, temperature: float) -> torch.Tensor:
        probs = sum(
            weight[:, None, None] * (self._logits(name, hidden) / temperature).softmax(-1)
            for (name, hidden), weight in zip(padded.items(), weights.T, strict=True)
        )
        return probs.clamp_min(1e-30).log()

    def _logits(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        head = self._heads.get(name)
        return hidden if head is None else hidden @ head[0].T + head[1]

    def _weights(self, utt_id: str, speaker: str) -> list[float]:
        """Each teacher's weight on an utterance; they sum to one over those that have it."""
        weights = {name: self.weighting.weights.get(name, 1.0) for name in self.stores if utt_id in self.stores[name]}
        if not weights:
            raise UserError(f"no teacher has an output for {utt_id}; extract it, or leave it out (see `coverage`)")
        if self.weighting.own and speaker in weights:
            weights = {speaker: 1.0}
        similarity = self.weighting.by_speaker.get(speaker, {})
        weights = {name: weight * similarity.get(name, 1.0) for name, weight in weights.items()}
        losses = {name: self.weighting.losses.get(name, {}).get(utt_id, 0.0) for name in weights}
        if math.isfinite(least := min(losses.values())):  # less the smallest, so that not all weights vanish
            weights = {name: weight * math.exp(least - losses[name]) for name, weight in weights.items()}
        total = sum(weights.values())
        return [weights.get(name, 0.0) / total for name in self.stores]


def align_frames(hidden: torch.Tensor, frames: int, teacher: str) -> torch.Tensor:
    """Fit one recording's activations [T, d] to another model's number of frames of the same stride.

    Models of one stride differ by one frame at the end: the last frame is repeated or dropped. A larger difference
    means another stride or another recording, and is refused.
    """
    more = frames - len(hidden)
    if abs(more) > MAX_DRIFT:
        raise UserError(
            f"teacher {teacher} has {len(hidden)} frames where {frames} are expected: another stride or another "
            "recording; extract its outputs again"
        )
    if more <= 0:
        return hidden[:frames]
    if not len(hidden):
        return hidden.new_zeros(frames, hidden.shape[1])
    return torch.cat([hidden, hidden[-1:].expand(more, -1)])


class _Cached:
    """A teacher whose activations are kept in memory."""

    def __init__(self, store: Teacher) -> None:
        self.header, self.head, self._store = store.header, store.head, store
        self._kept: dict[str, torch.Tensor | None] = {}

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self._store

    def activations(self, batch: Batch) -> list[torch.Tensor | None]:
        new = batch.select([row for row, utt_id in enumerate(batch.utt_ids) if utt_id not in self._kept])
        self._kept |= dict(zip(new.utt_ids, self._store.activations(new), strict=True))
        return [self._kept[utt_id] for utt_id in batch.utt_ids]


def _device_of(rows: Sequence[torch.Tensor | None]) -> torch.device:
    """Where activations are: of stores on the CPU, of live teachers where the student is."""
    return next((row.device for row in rows if row is not None), torch.device("cpu"))


def _counts(stored: Mapping[str, Sequence[torch.Tensor | None]]) -> list[list[int]]:
    """The numbers of frames of each utterance, of the teachers that have it."""
    return [[len(hidden) for hidden in row if hidden is not None] for row in zip(*stored.values(), strict=True)]


def _check_compatible(stores: Mapping[str, Teacher]) -> None:
    """Refuse teachers whose outputs cannot be averaged."""
    (first, reference), *rest = stores.items()
    for name, store in rest:
        for key in ("tokens", "size", "blank", "output", "stride_ms"):
            expected, found = getattr(reference.header, key), getattr(store.header, key)
            if expected != found:
                raise UserError(
                    f"the teachers {first} and {name} cannot be averaged: {key} is {expected} and {found}; extract one "
                    "of them again"
                )
