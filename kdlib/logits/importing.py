"""Import dense logits of other code, which `found.py` reads, into a `LogitStore`, as small as their rank allows.

Logits of a linear head of width d lie in d dimensions around the head's bias, and log-probabilities in one more,
because each frame is shifted by its own constant. A singular value decomposition of some frames finds these dimensions;
stored are coordinates and basis. Logits without such a low rank stay dense (float16).
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kdlib.console import progress
from kdlib.errors import UserError
from kdlib.io import sha256
from kdlib.logits import found
from kdlib.logits.found import FoundLogits, Load
from kdlib.logits.store import Header, LogitStore, Writer

SAMPLE = 1200  # frames that the rank is estimated from; enough for widths up to 600
EXACT = 1e-4  # residual, relative to the spread of the logits, that counts as zero


def import_logits(
    source: Path | FoundLogits, folder: Path, header: Header, *, dense: bool = False, key: str = ""
) -> LogitStore:
    """Store the logits of a file, or of a folder with a file per utterance.

    Encoding, size and width of `header` are replaced by those of the logits. `dense` stores them as they are, in
    float16, without estimating their rank. A killed import is resumed where the contents are the same, or `key`.
    """
    logits = source if isinstance(source, FoundLogits) else found.one(source)
    source, items = logits.path, logits.items
    sample = _sample(source, items)
    factors = None if dense else factorise(sample)
    size = sample.shape[1]
    if factors is None:
        head, header = None, replace(header, encoding="dense16", size=size, width=size)
    else:
        mean, basis = factors
        head = _tensor(basis), _tensor(mean)
        header = replace(header, encoding="fp16", size=size, width=basis.shape[1])
    with (
        Writer(folder, header, head, key or _fingerprint(source)) as writer,
        progress(len(items), f"logits of {header.teacher}", "utt") as bar,
    ):
        for utt_id, load in items.items():
            if utt_id not in writer:
                values = _float32(load(), utt_id, size, source)
                values = values if factors is None else _coordinates(values, mean, basis, utt_id, source)
                writer.add(utt_id, _tensor(values))
            bar.update(1)
    return LogitStore(folder)


def factorise(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean [V] and orthonormal basis [V, r] of logits [N, V], or None if r is not well below V and N.

    >>> rng = np.random.default_rng(0)
    >>> mean, basis = factorise(rng.normal(size=(300, 8)) @ rng.normal(size=(8, 50)) + rng.normal(size=50))
    >>> basis.shape
    (50, 8)
    """
    mean = logits.mean(0)
    centred = (logits - mean).astype(np.float64)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    rest = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1])  # residual without this and all later directions
    rank = int((rest > EXACT * rest[0]).sum()) if rest[0] > 0 else 1
    if rank > 0.5 * min(logits.shape):  # no low rank, or too few frames to estimate it
        return None
    return mean.astype(np.float32), directions[:rank].T.astype(np.float32)


def _coordinates(logits: np.ndarray, mean: np.ndarray, basis: np.ndarray, utt_id: str, source: Path) -> np.ndarray:
    """Coordinates of logits in the basis; an error if they lie outside of it."""
    centred = logits - mean
    coordinates = centred @ basis
    if np.linalg.norm(centred - coordinates @ basis.T) > 10 * EXACT * np.linalg.norm(centred):
        raise UserError(
            f"{source}: {utt_id} does not lie in the {basis.shape[1]} dimensions of the sampled frames; is it of "
            "another model? Import it separately, or pass dense=True"
        )
    return coordinates


def _fingerprint(source: Path) -> str:
    """The contents of a file, or of the files of a folder with their names."""
    if source.is_file():
        return sha256(source)
    files = sorted(path for path in source.iterdir() if path.is_file())
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()


def _float32(logits: np.ndarray, utt_id: str, size: int, source: Path) -> np.ndarray:
    """Logits [T, V] in float32, checked; a batch of one is unpacked."""
    values = found.as_array(logits, utt_id, source).astype(np.float32)
    if values.ndim != 2 or values.shape[1] != size:
        raise UserError(f"{source}: {utt_id} has the shape {list(values.shape)}, expected [frames, {size}]")
    return values


def _sample(source: Path, items: Mapping[str, Load]) -> np.ndarray:
    """At least SAMPLE frames (or all) of utterances from all over the source."""
    names = list(items)
    rows: list[np.ndarray] = []
    size = None
    for utt_id in _spread(names):
        values = found.as_array(items[utt_id](), utt_id, source)
        shape = values.shape
        if size is None and (len(shape) != 2 or not shape[-1]):
            raise UserError(f"{source}: {utt_id} has the shape {list(shape)}, expected [frames, tokens]")
        size = size or shape[-1]
        rows.append(_float32(values, utt_id, size, source))
        if sum(map(len, rows)) >= SAMPLE:
            break
    sample = np.concatenate(rows)
    if not len(sample):
        raise UserError(f"{source}: none of its utterances has a frame")
    if not np.isfinite(sample).all():
        raise UserError(f"{source}: it has NaN or infinite logits; write them again")
    if len(sample) and sample.min() >= 0 and np.allclose(sample.sum(1), 1, atol=1e-2):
        raise UserError(
            f"{source}: these are probabilities (each row sums to 1), not logits; pass their logarithm, or the input "
            "of the softmax"
        )
    return sample


def _spread(names: list[str]) -> Iterator[str]:
    """Every seventh utterance, then the ones after these: neighbours are of the same word."""
    for start in range(7):
        yield from names[start::7]


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
