"""Synchrony of the teachers' CTC spikes: where they are in different frames, the mean of the outputs is blank.

A CTC model gives each token a frame or two and the blank all others. In the mean of log-probabilities a token exceeds
the blank only if most teachers have it in the same frame. Times are those of the best alignment of the reference, which
exists for every teacher, whatever it recognises.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torchaudio

from kdlib.corpus.manifest import Utterance
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


def compare_times(stores: Mapping[str, LogitStore], utterances: Sequence[Utterance], tokens: Tokens) -> pd.DataFrame:
    """One row per pair of teachers: mean absolute difference of token times, and the share within one frame."""
    times: dict[str, list[np.ndarray]] = {name: [] for name in stores}
    for utt in utterances:
        ids = tokens.encode(utt.text)
        for name, store in stores.items():
            times[name].append(times_ms(store.logits(utt.utt_id), ids, store.header.stride_ms))
    stride_ms = next(iter(stores.values())).header.stride_ms
    rows = []
    for first, second in itertools.combinations(stores, 2):
        pairs = [(a, b) for a, b in zip(times[first], times[second], strict=True) if len(a) == len(b)]
        shifts = np.abs(np.concatenate([a - b for a, b in pairs])) if pairs else np.array([np.nan])
        rows.append((first, second, float(shifts.mean()), float((shifts <= stride_ms).mean()), len(shifts)))
    return pd.DataFrame(rows, columns=["one", "other", "mean_ms", "within_a_frame", "tokens"])


def describe_times(pairs: pd.DataFrame) -> str:
    """Summarise `compare_times` in one sentence."""
    if pairs.empty:
        return "only one teacher: nothing to compare"
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
    return pd.Series(counts / max(1, counts.sum()), index=range(1, len(counts) + 1), name="share of spiking frames")


def nonblank(logits: torch.Tensor) -> np.ndarray:
    """Probability of each frame of [T, V] that it is not blank: [T]."""
    return 1 - logits.softmax(-1)[:, BLANK].numpy()
