"""Do teachers write the same token in the same frame? Where they do not, the mean of their outputs is blank.

A CTC model gives each token a frame or two and everything else to the blank. Of the means, that of log-probabilities
needs most teachers in one frame before a token beats the blank. The times are those of the best alignment of the
reference, which exists for every teacher, whatever it recognises.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kdlib.corpus.manifest import Utterance
from kdlib.logits.store import LogitStore
from kdlib.tokens import BLANK, Tokens

if TYPE_CHECKING:
    import torch

CODE = ("logits/spikes.py", "logits/store.py", "tokens.py")


def times_ms(logits: "torch.Tensor", ids: Sequence[int], stride_ms: float) -> np.ndarray:
    """When each of the tokens begins in the best alignment of [T, V]; nothing where they do not fit into the frames.

    >>> import torch
    >>> logits = torch.full((5, 4), -9.0)
    >>> logits[[0, 1, 2, 3, 4], [2, 3, 2, 2, 3]] = 0.0
    >>> times_ms(logits, [3, 3], 40.0).tolist()
    [40.0, 160.0]
    """
    import torch
    import torchaudio

    needed = len(ids) + sum(one == other for one, other in itertools.pairwise(ids))
    if needed > len(logits):
        return np.empty(0)
    path, _ = torchaudio.functional.forced_align(
        logits.log_softmax(-1)[None], torch.tensor([list(ids)], dtype=torch.int32), blank=BLANK
    )
    path = path[0].numpy()
    begins = (path != BLANK) & (path != np.concatenate([[BLANK], path[:-1]]))
    return np.flatnonzero(begins) * stride_ms


def compare_times(stores: Mapping[str, LogitStore], utterances: Sequence[Utterance], tokens: Tokens) -> pd.DataFrame:
    """One row a pair of teachers: mean absolute difference of their tokens' times, and the share within one frame."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in stores}
    for utt in utterances:
        ids = tokens.encode(utt.text)
        for name, store in stores.items():
            found[name].append(times_ms(store.logits(utt.utt_id), ids, store.header.stride_ms))
    stride_ms = next(iter(stores.values())).header.stride_ms
    rows = []
    for one, other in itertools.combinations(stores, 2):
        pairs = [(a, b) for a, b in zip(found[one], found[other], strict=True) if len(a) == len(b)]
        apart = np.abs(np.concatenate([a - b for a, b in pairs])) if pairs else np.array([np.nan])
        rows.append(
            {
                "one": one,
                "other": other,
                "mean_ms": float(apart.mean()),
                "within_a_frame": float((apart <= stride_ms).mean()),
                "tokens": len(apart),
            }
        )
    return pd.DataFrame(rows, columns=["one", "other", "mean_ms", "within_a_frame", "tokens"])


def describe_times(pairs: pd.DataFrame) -> str:
    """What `compare` found, in a sentence."""
    if pairs.empty:
        return "one teacher alone: there is nothing to compare"
    return (
        f"{len(pairs)} pairs of teachers: their tokens are {pairs.mean_ms.mean():.0f} ms apart on average, "
        f"{100 * pairs.within_a_frame.mean():.0f} % of them within a frame"
    )


def simultaneous(stores: Mapping[str, LogitStore], utterances: Sequence[Utterance]) -> pd.Series:
    """How many teachers find a token more likely than the blank, in the frames where at least one does: shares."""
    counts = np.zeros(len(stores) + 1, dtype=int)
    for utt in utterances:
        spikes = [(store.logits(utt.utt_id).argmax(-1) != BLANK).numpy() for store in stores.values()]
        at_once = np.sum(spikes, axis=0)
        counts += np.bincount(at_once, minlength=len(counts))
    counts = counts[1:]
    return pd.Series(counts / max(1, counts.sum()), index=range(1, len(counts) + 1), name="share of spiking frames")


def nonblank(logits: "torch.Tensor") -> np.ndarray:
    """[T]: the probability that a frame of [T, V] is no blank."""
    return 1 - logits.softmax(-1)[:, BLANK].numpy()
