"""Synchrony of the teachers' CTC spikes: where they are in different frames, the mean of the outputs is blank.

A CTC model gives each token a frame or two and the blank all others. In the mean of log-probabilities a token exceeds
the blank only if most teachers have it in the same frame. Times are those of the best alignment of the reference, which
exists for every teacher, whatever it recognises. Where they are the same for every recording, as of clips of one length
or of words of one token, teachers agree without listening: `Timing` measures it.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torchaudio

from kdlib.corpus.utterances import Utterance
from kdlib.logits.store import LogitStore
from kdlib.tokens import BLANK, Tokens


def times_ms(logits: torch.Tensor, ids: Sequence[int], stride_ms: float) -> np.ndarray:
    """Start time of each token in the best alignment with [T, V]; empty if the tokens do not fit into the frames.

    >>> logits = torch.full((5, 4), -9.0)
    >>> logits[[0, 1, 2, 3, 4], [2, 3, 2, 2, 3]] = 0.0
    >>> times_ms(logits, [3, 3], 40.0).tolist()
    [40.0, 160.0]
    """
    if len(ids) + sum(a == b for a, b in itertools.pairwise(ids)) > len(logits):
        return np.empty(0)
    path, _ = torchaudio.functional.forced_align(
        logits.log_softmax(-1)[None], torch.tensor([list(ids)], dtype=torch.int32), blank=BLANK
    )
    path = path[0].numpy()
    starts = (path != BLANK) & (path != np.concatenate([[BLANK], path[:-1]]))
    return np.flatnonzero(starts) * stride_ms


def token_times(
    stores: Mapping[str, LogitStore], utterances: Sequence[Utterance], tokens: Tokens
) -> dict[str, list[np.ndarray]]:
    """The times of each utterance's tokens, by teacher."""
    ids = {utt.utt_id: tokens.encode(utt.text) for utt in utterances}
    return {
        name: [times_ms(store.logits(utt_id), row, store.header.stride_ms) for utt_id, row in ids.items()]
        for name, store in stores.items()
    }


def compare_times(times: Mapping[str, Sequence[np.ndarray]], stride_ms: float) -> pd.DataFrame:
    """One row per pair of teachers: mean absolute difference of token times, and the share within one frame.

    `other_ms` is the difference that would be found without listening: between the tokens of one recording by one
    teacher and those of another recording, with as many tokens, by the other.
    """
    rows = []
    for first, second in itertools.combinations(times, 2):
        shifts = _shifts(times[first], times[second])
        elsewhere = _shifts(times[first], _of_other_recordings(times[second]))
        rows.append((first, second, _mean(shifts), _mean(shifts <= stride_ms), len(shifts), _mean(elsewhere)))
    return pd.DataFrame(rows, columns=["one", "other", "mean_ms", "within_a_frame", "tokens", "other_ms"])


@dataclass(frozen=True)
class Timing:
    """Whether the times of tokens say anything about the speech."""

    stride_ms: float
    same_ms: float  # tokens of one recording by two teachers are so far apart; 0 with one teacher
    other_ms: float  # and those of two recordings with as many tokens
    first_frame: float  # share of the tokens that stand in the first frame of their recording
    clip_s: float  # median duration
    clip_range_s: float  # from the 5th to the 95th percentile

    @property
    def means_nothing(self) -> bool:
        """True if it makes no difference to the times, by half a frame, which recording was transcribed."""
        return self.other_ms - self.same_ms < self.stride_ms / 2

    @property
    def remark(self) -> str:
        """What to know before reading times: a sentence, or nothing."""
        one_length = f"the clips are all of one length ({self.clip_s:.2f} s)"
        one_length = one_length if 1000 * self.clip_range_s <= self.stride_ms else ""
        if not self.means_nothing:
            return f"note: {one_length}" if one_length else ""
        causes = f"; {100 * self.first_frame:.0f} % of the tokens stand in the first {self.stride_ms:.0f} ms"
        causes += f", and {one_length}" if one_length else ""
        return (
            f"these times say nothing about the speech: tokens of different recordings are {self.other_ms:.0f} ms "
            f"apart, those of one recording {self.same_ms:.0f} ms{causes}"
        )


def timing(times: Mapping[str, Sequence[np.ndarray]], utterances: Sequence[Utterance], stride_ms: float) -> Timing:
    """Compare the times of one recording's tokens with those of different recordings, over all teachers."""
    rows, pairs = list(times.values()), compare_times(times, stride_ms)
    alone = _mean(_shifts(rows[0], _of_other_recordings(rows[0])))
    same_ms, other_ms = (0.0, alone) if pairs.empty else (_mean(pairs.mean_ms), _mean(pairs.other_ms))
    first = [time < stride_ms for row in rows for found in row for time in found]
    low, middle, high = np.percentile([utt.duration_s for utt in utterances] or [np.nan], [5, 50, 95])
    return Timing(stride_ms, same_ms, other_ms, _mean(first), float(middle), float(high - low))


def _shifts(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> np.ndarray:
    """Absolute differences of token times, of the utterances in which both have as many."""
    return np.abs(np.concatenate([np.empty(0), *(a - b for a, b in zip(one, other, strict=True) if len(a) == len(b))]))


def _of_other_recordings(times: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each utterance the times of another one with as many tokens; none where there is no such utterance."""
    others = [np.empty(0)] * len(times)
    by_length: dict[int, list[int]] = {}
    for place, found in enumerate(times):
        by_length.setdefault(len(found), []).append(place)
    for places in by_length.values():
        random.Random(0).shuffle(places)
        if len(places) > 1:
            for place, other in zip(places, [*places[1:], places[0]], strict=True):
                others[place] = times[other]
    return others


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def describe_times(pairs: pd.DataFrame) -> str:
    """Summarise `compare_times` in one sentence."""
    if pairs.empty:
        return "only one teacher: nothing to compare"
    if pairs.mean_ms.isna().all():
        return "no two teachers have outputs on one recording: nothing to compare"
    return (
        f"{len(pairs)} pairs of teachers: their tokens are {pairs.mean_ms.mean():.0f} ms apart on average, "
        f"{100 * pairs.within_a_frame.mean():.0f} % of them within a frame"
    )


def simultaneous(stores: Mapping[str, LogitStore], utterances: Sequence[Utterance]) -> pd.Series:
    """Shares of frames in which 1, 2, ... teachers spike (a token beats the blank), among those where any does."""
    counts = np.zeros(len(stores) + 1, dtype=int)
    for utt in utterances:
        spikes = [(store.logits(utt.utt_id).argmax(-1) != BLANK).numpy() for store in stores.values()]
        counts += np.bincount(np.sum(spikes, axis=0), minlength=len(counts))
    counts = counts[1:]
    shares = counts / counts.sum() if counts.any() else np.full(len(counts), np.nan)
    return pd.Series(shares, index=range(1, len(counts) + 1), name="share of spiking frames")


def nonblank(logits: torch.Tensor) -> np.ndarray:
    """Probability of each frame of [T, V] that it is not blank: [T]."""
    return 1 - logits.softmax(-1)[:, BLANK].numpy()
