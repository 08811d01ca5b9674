"""The files of a training: checkpoints to resume from, the best and the last weights."""

from pathlib import Path

import torch

CHECKPOINT, BEST, LAST, ENDED = "latest.ckpt", "best-{}.ckpt", "last.pt", "ended.json"


def checkpoint_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of one of the best checkpoints of a `fit` in a folder."""
    return _weights(folder / BEST.format(step))


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a `fit` in a folder."""
    return _weights(folder / LAST)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints; call it once the trained model is saved in the folder."""
    for path in (folder / CHECKPOINT, folder / LAST, folder / ENDED, *folder.glob(BEST.format("*"))):
        path.unlink(missing_ok=True)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True, map_location="cpu")
