"""What a comparison has found of two systems, in numbers, in words and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from kdlib.evaluate.statistics import MOST_FOLDS

NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Verdict:
    """System `a` minus system `b`. Shares, not per cent; `*_p` are two-sided."""

    a: str
    b: str
    measure: str
    a_value: float  # mean over speakers
    b_value: float
    difference: float
    these_low: float  # 95 %, of these speakers
    these_high: float
    new_low: float  # 95 %, of new speakers; not a number with one
    new_high: float
    utterances: int
    speakers: int
    seeds: int
    agreeing_seeds: int
    seeds_p: float  # of another training, by Student's t over seeds; not a number with one
    fixed: float  # utterances that a has right and b has not, mean over seeds
    broken: float
    p: float  # of these speakers
    holm_p: float
    mcnemar_p: float  # of one seed; not a number with several
    speakers_p: float  # by flipping the speakers' signs, after Holm's correction
    wilcoxon_p: float
    least_p: float  # that so many speakers can reach
    verdict: str  # "better", "worse", "no difference shown"
    new_speakers: str  # the same of new speakers
    folds_needed: int | None  # to decide it for new speakers; None: more than can be asked for, or not known

    @property
    def text(self) -> str:
        """The verdict as a sentence or three."""
        new = self.new_low, self.new_high
        words = [
            f"{self.a} and {self.b}: {self.verdict}"
            if self.verdict == NO_DIFFERENCE
            else f"{self.a} is {self.verdict} than {self.b}",
            f" ({self.measure.upper()} {100 * self.difference:+.1f} points, for these speakers "
            f"{_range(self.these_low, self.these_high)}, p = {self.holm_p:.2g}",
            f"; {self.agreeing_seeds} of {self.seeds} seeds agree, p = {self.seeds_p:.2g} for another training)."
            if self.seeds > 1
            else "; of these models: another training may differ).",
        ]
        if self.speakers == 1:
            words.append(" One speaker says nothing of new ones.")
        elif self.new_speakers == NO_DIFFERENCE:
            interval = "no interval (nothing tells how they differ)" if np.isnan(self.new_low) else _range(*new)
            open_ = "" if self.verdict == NO_DIFFERENCE else "not shown: "
            words.append(
                f" For new speakers {open_}{interval}, p = {self.speakers_p:.2g} "
                f"(no less than {self.least_p:.2g} with {self.speakers}); "
                + (
                    f"some {self.folds_needed} folds like these would decide it."
                    if self.folds_needed
                    else f"no number of folds up to {MOST_FOLDS} would, if they were like these."
                )
            )
        else:
            words.append(f" For new speakers too: {_range(*new)}, p = {self.speakers_p:.2g}.")
        return "".join(words)


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts for reading, in per cent: one row a pair."""
    rows = []
    for one in verdicts:
        rows.append(
            {
                "a": one.a,
                "b": one.b,
                "measure": one.measure.upper(),
                "a %": _percent(one.a_value),
                "b %": _percent(one.b_value),
                "difference": f"{100 * one.difference:+.1f}",
                "these speakers": _range(one.these_low, one.these_high),
                "new speakers": _range(one.new_low, one.new_high),
                "n": f"{one.utterances} x {one.speakers} sp. x {one.seeds} seed{'s' * (one.seeds > 1)}",
                "Holm p": f"{one.holm_p:.2g}",
                "verdict": one.verdict,
            }
        )
    return pd.DataFrame(rows)


def verdict_frame(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts with all that is known of them, one row a pair."""
    return pd.DataFrame([asdict(one) | {"text": one.text} for one in verdicts])


def _percent(share: float) -> float:
    return round(100 * share, 1)


def _range(low: float, high: float) -> str:
    return "-" if np.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"
