"""Combine several teachers' stores into one target (the aggregate) for a batch of utterances, exact at any temperature.

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

import torch
from torch.nn.utils.rnn import pad_sequence

from kdlib.errors import UserError
from kdlib.logits.store import LogitStore

MEANS = ("logprob_mean", "prob_mean")
MISSING = ("strict", "partial", "all")
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


class TeacherEnsemble:
    """Teachers' stores combined under one weighting."""

    def __init__(
        self, stores: Mapping[str, LogitStore], weighting: Weighting, excluded: Mapping[str, str] | None = None
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
        self._stacked, self.device = None, "cpu"
        if weighting.mean == "logprob_mean" and all(store.head is not None for store in self.stores.values()):
            heads = [store.head for store in self.stores.values()]
            weights, biases = torch.cat([head[0] for head in heads], 1), torch.stack([head[1] for head in heads], 1)
            self._stacked = torch.cat([weights, biases], 1)  # [V, d1 + d2 + ... + K]

    def coverage(self, utt_ids: Sequence[str]) -> Coverage:
        """Count the utterances that have a target."""
        needed = {"strict": len(self.stores), "partial": min(self.weighting.min_teachers, len(self.stores)), "all": 1}
        counts = {utt_id: sum(utt_id in store for store in self.stores.values()) for utt_id in utt_ids}
        enough = needed[self.weighting.missing]
        usable = [utt_id for utt_id, count in counts.items() if count >= enough]
        incomplete = sum(counts[utt_id] < len(self.stores) for utt_id in usable)
        return Coverage(usable, incomplete, {utt_id: count for utt_id, count in counts.items() if count < enough})

    @property
    def fixed_temperature(self) -> bool:
        """True if `logits` hold at one temperature only: means of probabilities do, means of logits serve all."""
        return self.weighting.mean == "prob_mean"

    def frames(self, utt_ids: Sequence[str]) -> list[int]:
        """Number of frames of each utterance, from the teacher with the most."""
        return [max(store.frames(utt_id) for store in self.stores.values() if utt_id in store) for utt_id in utt_ids]

    def log_probs(
        self,
        utt_ids: Sequence[str],
        speakers: Sequence[str],
        lengths: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target of a batch: log-probabilities [B, T, V] at a temperature, and frames [B]; see `logits`."""
        logits, frames = self.logits(utt_ids, speakers, lengths, temperature)
        return (logits / (1.0 if self.fixed_temperature else temperature)).log_softmax(-1), frames

    def logits(
        self,
        utt_ids: Sequence[str],
        speakers: Sequence[str],
        lengths: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target of a batch before normalising, [B, T, V], and frames [B].

        Mean logits are still to be divided by a temperature; mean probabilities are taken at `temperature`
        (`fixed_temperature`). `speakers` are those of the utterances, for `own`. `lengths` are the student's frames,
        which the target is aligned to; default: the frames of the longest teacher.
        """
        if self.weighting.fusion is not None:
            with torch.no_grad():
                return self.fused(self.weighting.fusion, utt_ids, speakers, lengths)
        padded, weights, frames = self._padded(utt_ids, speakers, lengths)
        if self.fixed_temperature:
            return self._mean_of_probs(padded, weights, temperature), torch.tensor(frames)
        return self._mean_of_logits(padded, weights[:, None]), torch.tensor(frames)

    def fused(
        self,
        fusion: torch.nn.Module,
        utt_ids: Sequence[str],
        speakers: Sequence[str],
        lengths: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Combine the teachers' activations with a fusion, with gradients: logits [B, T, V] and frames [B]."""
        padded, weights, frames = self._padded(utt_ids, speakers, lengths)
        lengths = torch.tensor(frames)
        scores, correction = fusion(list(padded.values()), lengths)
        absent = (weights == 0)[:, None]
        shares = (scores + weights.clamp_min(1e-9).log()[:, None]).masked_fill(absent, -1e9).softmax(-1)  # [B, T, K]
        logits = self._mean_of_logits(padded, shares)
        return (logits if correction is None else logits + correction), lengths

    def each(
        self, utt_ids: Sequence[str], speakers: Sequence[str], lengths: Sequence[int] | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over the teachers that contribute to a batch: logits [B, T, V] and weight per utterance [B]."""
        padded, weights, _ = self._padded(utt_ids, speakers, lengths)
        if self.weighting.fusion is not None:  # a fusion counts as one teacher
            yield self.logits(utt_ids, speakers, lengths)[0], torch.ones(len(utt_ids), device=self.device)
            return
        for (name, hidden), weight in zip(padded.items(), weights.T, strict=True):
            if weight.any():
                yield self._logits(name, hidden), weight

    def features(
        self, utt_ids: Sequence[str], speakers: Sequence[str], lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The teachers' mean activations [B, T, d]; only for teachers of one parent, whose dimensions mean the same."""
        padded, weights, _ = self._padded(utt_ids, speakers, lengths)
        return sum(weight[:, None, None] * hidden for hidden, weight in zip(padded.values(), weights.T, strict=True))

    def to(self, device: torch.device | str) -> "TeacherEnsemble":
        """Compute on a device."""
        if str(device) == str(self.device):
            return self
        self.device = device
        self._stacked = None if self._stacked is None else self._stacked.to(device)
        if self.weighting.fusion is not None:
            self.weighting.fusion.to(device)
        for store in self.stores.values():
            store.head = None if store.head is None else tuple(part.to(device) for part in store.head)
        return self

    def cached(self) -> "TeacherEnsemble":
        """A copy that keeps in memory what it has read: for little speech that is read many times."""
        ensemble, cache = copy.copy(self), {}

        def hidden(store: LogitStore, utt_ids: Sequence[str]) -> list[torch.Tensor | None]:
            for utt_id in utt_ids:
                if (store.folder, utt_id) not in cache:
                    cache[store.folder, utt_id] = store.hidden(utt_id) if utt_id in store else None
            return [cache[store.folder, utt_id] for utt_id in utt_ids]

        ensemble._hidden = hidden
        return ensemble

    def _padded(
        self, utt_ids: Sequence[str], speakers: Sequence[str], lengths: Sequence[int] | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[int]]:
        """Every teacher's activations [B, T, d], their weights [B, K], and frames."""
        for utt_id, speaker in zip(utt_ids, speakers, strict=True):
            if speaker in self.excluded:
                raise UserError(f"{utt_id}: {speaker} {self.excluded[speaker]}: no training target on this speech")
        weights = torch.tensor([self._weights(utt_id, who) for utt_id, who in zip(utt_ids, speakers, strict=True)])
        stored = {name: self._hidden(store, utt_ids) for name, store in self.stores.items()}
        counts = [[len(hidden) for hidden in row if hidden is not None] for row in zip(*stored.values(), strict=True)]
        frames = list(lengths) if lengths is not None else [max(row) for row in counts]
        if self.weighting.cut:
            frames = [min(length, *row) for length, row in zip(frames, counts, strict=True)]
        padded = {}
        for name, rows in stored.items():
            aligned = []
            for hidden, length in zip(rows, frames, strict=True):
                if hidden is None:
                    aligned.append(torch.zeros(length, self.stores[name].header.width))
                else:
                    aligned.append(align_frames(hidden[:length] if self.weighting.cut else hidden, length, name))
            padded[name] = pad_sequence(aligned, batch_first=True).to(self.device)
        return padded, weights.to(self.device), frames

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
        head = self.stores[name].head
        return hidden if head is None else hidden @ head[0].T + head[1]

    def _hidden(self, store: LogitStore, utt_ids: Sequence[str]) -> list[torch.Tensor | None]:
        return [store.hidden(utt_id) if utt_id in store else None for utt_id in utt_ids]

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


def _check_compatible(stores: Mapping[str, LogitStore]) -> None:
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
