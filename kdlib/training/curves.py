"""The curves of a training, as TensorBoard keeps them."""

from pathlib import Path

import pandas as pd

TENSORBOARD = "tensorboard"  # the folder of a training's curves


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
