"""Pictures that change while something runs, in a notebook."""

import matplotlib.pyplot as plt
import pandas as pd

from kdlib.show import figures


class LiveCurves:
    """The curves of a training, drawn anew at every look; in a headless run the last picture stays."""

    def __init__(self) -> None:
        self.figure, self._handle = None, None

    def __call__(self, curves: pd.DataFrame) -> None:
        """Show these curves in the place of the former."""
        from IPython.display import display

        if curves.empty:
            return
        self.figure = figures.training(curves)
        plt.close(self.figure)  # else the notebook shows it once more at the end of the cell
        if self._handle is None:
            self._handle = display(self.figure, display_id=True)
        else:
            self._handle.update(self.figure)
