"""Figures that are updated in a notebook during training."""

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display

from kdlib.show import figures


class LiveCurves:
    """Training curves, redrawn at every validation; a headless run keeps the last figure."""

    def __init__(self) -> None:
        self.figure, self._handle = None, None

    def __call__(self, curves: pd.DataFrame) -> None:
        """Replace the displayed curves."""
        if curves.empty:
            return
        self.figure = figures.training(curves)
        plt.close(self.figure)  # else the notebook shows it again at the end of the cell
        if self._handle is None:
            self._handle = display(self.figure, display_id=True)
        else:
            self._handle.update(self.figure)
