"""The curves of a training, with what the recipe expects of it; in a notebook they are redrawn during training."""

import math
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.evaluate.milestones import MET, MISSED, Outcome
from kdlib.evaluate.rounding import percent
from kdlib.objectives.terms import TERMS
from kdlib.show.figures import WIDTH_IN, style

STATUS_COLOURS = {MET: "C2", MISSED: "C3"}


class LiveCurves:
    """Training curves, redrawn at every validation; a headless run keeps the last figure.

    `expected` gives the milestones' outcomes on the curves so far.
    """

    def __init__(
        self, measure: str = "wra", expected: Callable[[pd.DataFrame], Sequence[Outcome]] = lambda curves: ()
    ) -> None:
        self.figure, self._handle, self._measure, self._expected = None, None, measure, expected

    def __call__(self, curves: pd.DataFrame) -> None:
        """Replace the displayed curves."""
        if curves.empty:
            return
        self.figure = training(curves, self._expected(curves), self._measure)
        plt.close(self.figure)  # else the notebook shows it again at the end of the cell
        if self._handle is None:
            self._handle = display(self.figure, display_id=True)
        else:
            self._handle.update(self.figure)


def training(curves: pd.DataFrame, expected: Sequence[Outcome] = (), measure: str = "wra") -> Figure:
    """Losses by term, and WRA or WER on dev speech, over the training steps. Columns: step, name, value.

    Terms of references are drawn as full lines, those of teachers dashed, those of the model itself dotted. Milestones
    are drawn on the dev curve; if one is a WER, the curve is the WER.
    """
    with plt.rc_context(style()):
        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_IN, 2.6))
        _draw_losses(left, curves)
        measure = "wer" if any(outcome.milestone.measure == "wer" for outcome in expected) else measure
        _draw_dev(right, curves, measure)
        alarms = curves[(curves.name == "dev_collapse") & (curves.value > 0)]
        if len(alarms):
            for axes in (left, right):
                axes.axvline(alarms.step.iloc[0], color="C3", linestyle=":", linewidth=1.2)
            low = measure == "wer"  # where a collapsed curve is not
            near, how = (alarms.step.iloc[0], 2 if low else 104), {"color": "C3", "fontsize": 8}
            right.annotate("collapse", near, (3, 0), textcoords="offset points", va="bottom" if low else "top", **how)
        _draw_milestones(right, [outcome for outcome in expected if outcome.milestone.measure == measure])
        return figure


def _draw_losses(axes: Axes, curves: pd.DataFrame) -> None:
    names = [name for name in dict.fromkeys(curves.name) if not name.startswith("dev_")]
    places = {name: place for place, name in enumerate(["loss", *TERMS])}
    for index, name in enumerate(sorted(names, key=lambda name: (places.get(name, len(places)), name))):
        part, side = curves[curves.name == name], TERMS[name].side if name in TERMS else ""
        line = {"teachers": "--", "self": ":"}.get(side, "-")
        width = 1.8 if name == "loss" else 1.0
        axes.plot(part.step, part.value, line, marker=".", linewidth=width, color=f"C{index}", label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    if names:
        axes.legend(frameon=False)


def _draw_dev(axes: Axes, curves: pd.DataFrame, measure: str) -> None:
    dev = curves[curves.name == f"dev_{measure}"]
    axes.plot(dev.step, 100 * dev.value, "k.-")
    if len(dev):
        best = dev.loc[dev.value.idxmin() if measure == "wer" else dev.value.idxmax()]
        axes.plot(best.step, 100 * best.value, "o", markersize=9, fillstyle="none", color="C3")
        place, above = (best.step, 100 * best.value), 8 if measure == "wer" else -14
        side = "left" if best.step < 0.08 * dev.step.max() else "center"
        axes.annotate(str(percent(best.value)), place, (0, above), textcoords="offset points", ha=side)
    axes.set_ylim(0, max(105, 105 * dev.value.max()) if measure == "wer" and len(dev) else 105)
    axes.set_xlabel("step")
    axes.set_ylabel(f"dev {measure.upper()} (%)")


def _draw_milestones(axes: Axes, expected: Sequence[Outcome]) -> None:
    """Ranges as bars, single values as triangles that point to where the curve should be; by status in colour."""
    if not expected:
        return
    end = max([*axes.lines[0].get_xdata(), *(outcome.step or 0 for outcome in expected), 1])
    for outcome in expected:
        wanted, colour = outcome.milestone, STATUS_COLOURS.get(outcome.status, "0.45")
        step = outcome.step or end
        if math.isfinite(wanted.high) and wanted.low > 0:
            axes.plot([step, step], [wanted.low, wanted.high], color=colour, linewidth=4, alpha=0.6, zorder=3)
            edge = wanted.high
        else:
            edge = wanted.high if wanted.measure == "wer" else wanted.low
            axes.plot(step, edge, "v" if wanted.measure == "wer" else "^", color=colour, markersize=6, zorder=3)
        place, how = (step, edge), {"fontsize": 7, "color": colour, "ha": "right" if step > end / 2 else "left"}
        axes.annotate(
            wanted.name or f"{edge:g}", place, (-5 if step > end / 2 else 5, 3), textcoords="offset points", **how
        )
    axes.set_xlim(right=1.04 * end)
