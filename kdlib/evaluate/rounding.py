"""The one rounding of shares to per cent: every table, figure and sentence shows the same number.

Half a unit is rounded away from zero: 51 of 80 are 63.8 %. In binary, 100 x .6375 is a little less than 63.75, so that
`round` and `format` give 63.7 or 63.8, by the order of the operations.
"""

from typing import TypeVar

import numpy as np
import pandas as pd

Shares = TypeVar("Shares", float, pd.Series, pd.DataFrame)
NOISE = 1e-6  # of the last place: what binary fractions may lack of half a unit


def percent(share: Shares, places: int = 1) -> Shares:
    """A share in per cent, or all of a table.

    >>> percent(51 / 80), percent(-51 / 80), percent(2 / 3, 0)
    (63.8, -63.8, 67.0)
    """
    unit = 10**places
    rounded = np.sign(share) * np.floor(np.abs(share) * 100 * unit + 0.5 + NOISE) / unit + 0.0  # + 0.0: no minus zero
    return float(rounded) if np.ndim(share) == 0 else rounded


def span(low: float, high: float) -> str:
    """An interval of differences in points; "-" if it is not known."""
    return "-" if np.isnan(low) else f"{percent(low):+.1f} to {percent(high):+.1f}"
