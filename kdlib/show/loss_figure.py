"""One batch under the loss, as a figure: the posteriors of student and teachers on one axis."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kdlib.distill.loss_view import LossView
from kdlib.show.drawing import outside_legend
from kdlib.show.figures import WIDTH_IN, style
from kdlib.tokens import BLANK

SHOWN = 0.1  # least probability, in one frame, of a token that is drawn
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494")


def posteriors(view: LossView) -> Figure:
    """Every utterance's likely tokens over time: areas are the teachers', lines the student's."""
    rows = -(-len(view.utterances) // 2)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(rows, 2, figsize=(WIDTH_IN, 1.9 * rows + 0.4), sharey=True, squeeze=False)
        for place, axis in enumerate(axes.flat):
            if place < len(view.utterances):
                _draw(axis, view, place)
            else:
                axis.set_axis_off()
        for axis in axes[:, 0]:
            axis.set_ylabel("probability")
        for axis in axes[-1]:
            axis.set_xlabel("time (s)")
        handles = [plt.Line2D([], [], color="0.3"), plt.Line2D([], [], color="0.3", ls=":")]
        labels = ["student after training", "before"]
        if view.teachers:
            handles, labels = [plt.Rectangle((0, 0), 1, 1, color="0.3", alpha=0.3), *handles], ["teachers", *labels]
        outside_legend(figure, handles, labels)
    return figure


def _draw(axis, view: LossView, place: int) -> None:
    """One utterance; the blank is left out: it is the rest."""
    after, before = view.after[place], view.before[place]
    teachers = view.teachers[place] if view.teachers else None
    seconds = (np.arange(len(after)) + 0.5) * view.stride_ms / 1000
    sides = [after] if teachers is None else [teachers, after]
    peaks = np.max([side.max(0) for side in sides], axis=0)
    peaks[BLANK] = 0
    likely = [token for token in np.argsort(-peaks) if peaks[token] >= SHOWN][: len(COLOURS)]
    for token, colour in zip(likely, COLOURS, strict=False):
        if teachers is not None:
            axis.fill_between(seconds, teachers[:, token], color=colour, alpha=0.3, lw=0)
        axis.plot(seconds, after[:, token], color=colour, lw=1.2)
        axis.plot(seconds, before[:, token], color=colour, lw=0.9, ls=":")
        highest = max(sides, key=lambda side: side[:, token].max())[:, token]
        axis.annotate(
            view.pieces[token],
            (seconds[highest.argmax()], highest.max()),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontsize=8,
            annotation_clip=False,
        )
    axis.set_ylim(0, 1.12)
    axis.set_xlim(0, seconds[-1] + view.stride_ms / 2000)
    utt = view.utterances[place]
    text = utt.text if len(utt.text) <= 30 else f"{utt.text[:29]}…"
    axis.set_title(f"{text} ({utt.speaker})", loc="left", fontsize=9)
