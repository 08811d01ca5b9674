"""Sound results: what the signs of a result without a fault are, given how many words it recognises.

`kdlib/data/sound_results.json` has the signs of the pretrained model and of the demo's teachers on each of the 15
embedded speakers, from 1 to 76 % of the words (`false_names.py` makes it). A result is compared with those that
recognise about as many: letters right, consistency and length of hypotheses all change with that share.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd

WIDTH = 0.04  # standard deviation of the weights of sound results, in WRA
LEAST = 5.0  # sound results that are compared with; where fewer are as near, the width grows
USUAL = 0.95  # share of the sound results that are nearer to the others
# Signs of a training's record, which these do not have: what they are without a fault.
OTHERS = {
    "lost_after_training": lambda wra: 0.0,
    "better_checkpoint": lambda wra: 0.0,
    "teacher_errors_shared": lambda wra: 0.1,
    "seen_minus_unseen": lambda wra: wra,
}
GIVEN = ("wra", "wrong_decoding", "offset_decoding")  # signs that say nothing here


@dataclass(frozen=True)
class Sound:
    """How a result compares with sound ones of about its WRA."""

    name: str
    distance: float  # root mean square of the signs' differences from their mean
    usual: float  # which of these distances is usual for a sound result


@functools.cache
def rows() -> pd.DataFrame:
    """The signs of sound results."""
    content = json.loads(files("kdlib").joinpath("data/sound_results.json").read_text(encoding="utf-8"))
    return pd.DataFrame([one["signs"] for one in content], dtype=float)


def expected(signs: Mapping[str, float]) -> Sound:
    """Compare a result with sound ones."""
    known = rows()
    wra = signs.get("wra", 0.0)
    others = [signs[name] - usual(wra) for name, usual in OTHERS.items() if name in signs]
    distance = _distance(pd.Series(signs, dtype=float), known, others)
    weights = _weights(known.wra, wra)
    return Sound(
        "sound results with about as many words right", distance, float(np.quantile(_of_each()[weights > 0.1], USUAL))
    )


@functools.cache
def _of_each() -> np.ndarray:
    """The distance of every sound result from the others."""
    known = rows()
    return np.array([_distance(known.iloc[place], known.drop(known.index[place])) for place in range(len(known))])


def _weights(values: pd.Series, wra: float) -> np.ndarray:
    width = WIDTH
    while True:
        weights = np.exp(-0.5 * ((values.to_numpy() - wra) / width) ** 2)
        if weights.sum() >= LEAST or width > 1:
            return weights
        width *= 1.5


def _distance(value: pd.Series, known: pd.DataFrame, others: Sequence[float] = ()) -> float:
    """The distance of signs from the weighted mean of sound results."""
    shared = [name for name in known.columns if name in value.index and not np.isnan(value[name])]
    weights = _weights(known.wra, value.get("wra", 0.0))[:, None]
    table = known[shared]
    mean = (table.fillna(0.0) * weights).sum() / (table.notna() * weights).sum()
    differences = (value[shared] - mean).where(~mean.index.isin(GIVEN), 0.0)
    return float(np.sqrt(np.mean(np.square([*differences, *others]))))
