"""Dense logits that other code has written -> a `LogitStore`, as small as their rank allows.

Read are `.pt` (a dictionary), `.npz`, HDF5, or a folder of one `.pt` or `.npy` file an utterance: `[frames, V]` by
utterance id. Behind a linear head of width d the logits lie in d dimensions around the head's bias, and
log-probabilities in one more, for each frame is shifted by its own constant. A singular value decomposition of some
frames finds them; kept are the coordinates and the basis. Where there is no such rank, the logits stay dense (float16).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdlib.console import progress
from kdlib.errors import UserError
from kdlib.logits.store import Header, LogitStore, Writer

if TYPE_CHECKING:
    import torch

CODE = ("logits/importing.py", "logits/store.py")
SAMPLE = 1200  # frames that are looked at for the rank; enough for widths up to 600
EXACT = 1e-4  # residual, relative to the spread of the logits, that counts as none


def import_logits(source: Path, folder: Path, header: Header, *, dense: bool = False) -> LogitStore:
    """Store the logits in `source`; of `header`, encoding, size and width are found, not believed.

    `dense` keeps them as they are, in float16, without looking for their rank.
    """
    items = _items(source)
    sample = _sample(source, items)
    factors = None if dense else factorise(sample)
    size = sample.shape[1]
    if factors is None:
        head, known = None, replace(header, encoding="dense16", size=size, width=size)
    else:
        mean, basis = factors
        head = _tensor(basis), _tensor(mean)
        known = replace(header, encoding="fp16", size=size, width=basis.shape[1])
    with Writer(folder, known, head) as writer, progress(len(items), f"logits of {header.teacher}", "utt") as bar:
        for utt_id, load in items.items():
            if utt_id not in writer:
                logits = _checked(load(), utt_id, size, source)
                writer.add(
                    utt_id, _tensor(logits if factors is None else _coordinates(logits, mean, basis, utt_id, source))
                )
            bar.update(1)
    return LogitStore(folder)


def factorise(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean [V] and orthonormal basis [V, r] of logits [N, V], or nothing where r is not well below V and N.

    >>> rng = np.random.default_rng(0)
    >>> mean, basis = factorise(rng.normal(size=(300, 8)) @ rng.normal(size=(8, 50)) + rng.normal(size=50))
    >>> basis.shape
    (50, 8)
    """
    mean = logits.mean(0)
    centred = (logits - mean).astype(np.float64)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    rest = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1])  # what is left from this direction on
    kept = int((rest > EXACT * rest[0]).sum()) if rest[0] > 0 else 1
    if kept > 0.5 * min(logits.shape):  # too many, or too few frames to tell
        return None
    return mean.astype(np.float32), directions[:kept].T.astype(np.float32)


def _coordinates(logits: np.ndarray, mean: np.ndarray, basis: np.ndarray, utt_id: str, source: Path) -> np.ndarray:
    """Where logits lie in the basis; refused where they lie outside of it."""
    centred = logits - mean
    found = centred @ basis
    if np.linalg.norm(centred - found @ basis.T) > 10 * EXACT * np.linalg.norm(centred):
        raise UserError(
            f"{source}: {utt_id} does not lie in the {basis.shape[1]} dimensions that the first frames have; was it "
            "written by another model? Store it apart, or pass dense=True"
        )
    return found


def _items(source: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Utterance -> what loads its logits."""
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.suffix in (".pt", ".npy"))
        found = {path.stem: (lambda path=path: _read(path)) for path in paths}
    elif source.suffix == ".npz":
        archive = np.load(source)
        found = {name: (lambda name=name: archive[name]) for name in archive.files}
    elif source.suffix in (".h5", ".hdf5"):
        found = _hdf5(source)
    elif source.suffix == ".pt":
        content = _read(source)
        if not isinstance(content, dict):
            raise UserError(
                f"{source}: expected a dictionary of utterance id -> logits, found {type(content).__name__}"
            )
        found = {str(name): (lambda value=value: np.asarray(value)) for name, value in content.items()}
    else:
        raise UserError(f"{source}: expected .pt, .npz, .h5, .hdf5, or a folder of .pt or .npy files")
    if not found:
        raise UserError(f"{source}: no utterances in it")
    return found


def _read(path: Path):
    if path.suffix == ".npy":
        return np.load(path)
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: cannot be read as tensors alone ({reason}); save a dictionary of tensors") from None


def _hdf5(source: Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{source}: HDF5 needs h5py: pip install 'kdlib[hdf5]'") from None
    file = h5py.File(source, "r")
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return {name.replace("/", "_"): (lambda name=name: file[name][()]) for name in names}


def _checked(logits: np.ndarray, utt_id: str, size: int, source: Path) -> np.ndarray:
    """[T, V] in float32; a batch of one is taken out of its batch."""
    values = np.asarray(logits)
    values = (values[0] if values.ndim == 3 and len(values) == 1 else values).astype(np.float32)
    if values.ndim != 2 or values.shape[1] != size:
        raise UserError(f"{source}: {utt_id} has the shape {list(values.shape)}, expected [frames, {size}]")
    return values


def _sample(source: Path, items: dict[str, Callable[[], np.ndarray]]) -> np.ndarray:
    """Frames from all over the utterances, some SAMPLE of them."""
    names = list(items)
    rows: list[np.ndarray] = []
    size = None
    for utt_id in _spread(names):
        values = np.asarray(items[utt_id]())
        size = size or values.shape[-1]
        rows.append(_checked(values, utt_id, size, source))
        if sum(map(len, rows)) >= SAMPLE:
            break
    sample = np.concatenate(rows)
    if len(sample) and sample.min() >= 0 and np.allclose(sample.sum(1), 1, atol=1e-2):
        raise UserError(
            f"{source}: these are probabilities (each row sums to 1), not logits; give their logarithm, or what went "
            "into the softmax"
        )
    return sample


def _spread(names: list[str]) -> Iterator[str]:
    """Every seventh, then those after them: neighbours say the same word."""
    for start in range(7):
        yield from names[start::7]


def _tensor(values: np.ndarray) -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))
