"""The result of comparing two systems: numbers, a sentence, a table row."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from kdlib.evaluate.rounding import percent, span
from kdlib.evaluate.statistics import LEVEL, MOST_FOLDS

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
    these_low: float  # 95 %, these speakers
    these_high: float
    new_low: float  # 95 %, new speakers; not a number with one speaker
    new_high: float
    utterances: int
    speakers: int
    seeds: int
    agreeing_seeds: int
    seeds_p: float  # another training, by Student's t over seeds; not a number with one
    fixed: float  # utterances with fewer errors by a than by b, mean over seeds
    broken: float
    p: float  # these speakers
    holm_p: float
    mcnemar_p: float  # one seed each; not a number with more
    speakers_p: float  # new speakers: sign-flip test over speakers, after Holm's correction
    wilcoxon_p: float
    least_p: float  # smallest p that this number of speakers can reach
    verdict: str  # "better", "worse", "no difference shown"
    new_speakers: str  # the same for new speakers
    folds_needed: int | None  # to decide it for new speakers; None: more than `MOST_FOLDS`, or unknown

    @property
    def caveat(self) -> str:
        """Why the verdict is another than the interval for these speakers suggests; empty where they agree."""
        if self._excludes_zero == (self.verdict != NO_DIFFERENCE):
            return ""
        if not self._excludes_zero:
            return "the test excludes chance, but barely"
        if self.holm_p < LEVEL:
            return "another training alone could give such a difference"
        if self.p < LEVEL:
            return "in so many comparisons chance could give such a difference"
        return "the test does not exclude chance, but barely"

    @property
    def _excludes_zero(self) -> bool:
        return self.these_low * self.these_high > 0

    @property
    def text(self) -> str:
        """The verdict as one to four sentences."""
        new = self.new_low, self.new_high
        words = [
            f"{self.a} and {self.b}: {self.verdict}"
            if self.verdict == NO_DIFFERENCE
            else f"{self.a} is {self.verdict} than {self.b}",
            f" ({self.measure.upper()} {percent(self.difference):+.1f} points, for these speakers "
            f"{span(self.these_low, self.these_high)}, p = {self.holm_p:.2g}",
            f"; {self.agreeing_seeds} of {self.seeds} seeds agree, p = {self.seeds_p:.2g} for another training)."
            if self.seeds > 1
            else "; for these models: another training may differ).",
        ]
        if self.caveat:
            words.append(
                f" Although the interval {'leaves out' if self._excludes_zero else 'includes'} 0, {self.caveat}."
            )
        if self.speakers == 1:
            words.append(" One speaker allows no inference to new speakers.")
        elif self.new_speakers == NO_DIFFERENCE:
            interval = "no interval (their spread is unknown)" if np.isnan(self.new_low) else span(*new)
            prefix = "" if self.verdict == NO_DIFFERENCE else "not shown: "
            words.append(
                f" For new speakers {prefix}{interval}, p = {self.speakers_p:.2g} "
                f"(no less than {self.least_p:.2g} with {self.speakers}); "
                + (
                    f"about {self.folds_needed} folds like these would decide it."
                    if self.folds_needed
                    else f"up to {MOST_FOLDS} folds like these would not decide it."
                )
            )
        else:
            words.append(f" For new speakers too: {span(*new)}, p = {self.speakers_p:.2g}.")
        return "".join(words)


def verdict_frame(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts with all of their fields and their text: one row per pair."""
    return pd.DataFrame([asdict(verdict) | {"text": verdict.text} for verdict in verdicts])
