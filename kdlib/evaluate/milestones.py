"""Expected values of a training against what was reached."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kdlib.settings.milestone import Milestone

MET, MISSED, PENDING = "met", "missed", "not reached yet"


@dataclass(frozen=True)
class Outcome:
    """A milestone, its step, and the value there in per cent; None before training got there."""

    milestone: Milestone
    step: int | None  # None: of the model that is kept
    value: float | None

    @property
    def status(self) -> str:
        """Met, missed, or not reached yet."""
        if self.value is None:
            return PENDING
        return MISSED if self._short_by > 1e-9 else MET

    @property
    def _short_by(self) -> float:
        """Points by which the value is short of what is expected; better than a range is not short of it."""
        wanted = self.milestone
        return self.value - wanted.high if wanted.measure == "wer" else wanted.low - self.value

    @property
    def text(self) -> str:
        """The outcome in a sentence."""
        wanted = self.milestone
        name = f"{wanted.name} ({wanted.when})" if wanted.name else wanted.when
        where = f"{wanted.speech} speech, {wanted.decoder}"
        if self.value is None:
            return f"{name}: {wanted.expects} is expected on {where}; the training did not get there"
        better = self.value < wanted.low if wanted.measure == "wer" else self.value > wanted.high
        how = "better than expected" if better else self.status
        return f"{name}: {wanted.expects} is expected on {where}, {self.value:.1f} % was reached: {how}"


def on_curve(milestone: Milestone, curves: pd.DataFrame, epoch_steps: int) -> Outcome:
    """A milestone of the dev speech on the curves of a training: the last validation up to its step.

    Without a step it is the value of the best validation, which is kept. Columns: step, name, value.
    """
    step = milestone.after_steps or (milestone.after_epochs and round(milestone.after_epochs * epoch_steps))
    values = curves.pivot_table(index="step", columns="name", values="value") if len(curves) else pd.DataFrame()
    if f"dev_{milestone.measure}" not in values or (step and values.index.max() < step):
        return Outcome(milestone, step or None, None)
    values = values.dropna(subset=[f"dev_{milestone.measure}"])
    row = values.loc[:step].iloc[-1] if step else values.loc[values.dev_score.idxmax()]
    return Outcome(milestone, step or None, 100 * float(row[f"dev_{milestone.measure}"]))


def on_scores(milestone: Milestone, scores: dict) -> Outcome:
    """A milestone of the test speech, from the content of `scores.json`."""
    result = scores["decoders"].get(milestone.decoder)
    return Outcome(milestone, None, 100 * result[milestone.measure] if result else None)


def missed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes that fall short."""
    return [outcome for outcome in outcomes if outcome.status == MISSED]
