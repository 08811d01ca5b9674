"""The files of a training: checkpoints to resume from, the best and the last weights, and TensorBoard curves."""

from pathlib import Path

import pandas as pd
import torch

CHECKPOINT, BEST, LAST, ENDED, TENSORBOARD = "latest.ckpt", "best-{}.ckpt", "last.pt", "ended.json", "tensorboard"


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


def read_curves(folder: Path) -> pd.DataFrame:
    """The logged values of a TensorBoard folder: step, name, value; steps that a resumed run repeated appear once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows: dict[tuple[int, str], float] = {}
    for path in sorted(folder.glob("events.*"), key=lambda file: file.name):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            rows |= {(event.step, name): event.value for event in events.Scalars(name)}
    table = [(step, name, value) for (step, name), value in sorted(rows.items()) if name != "epoch"]
    return pd.DataFrame(table, columns=["step", "name", "value"])


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True, map_location="cpu")
