"""Collapse alarm during training: print a line in the progress log as soon as hypotheses on dev speech collapse.

A collapse is the loss of half of the words that were recognised before; or, once half of the training is over and
nothing is recognised, hypotheses that are mostly empty, mostly the same, or far fewer than there are words.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from kdlib.io import write_json

MIN_WRA = 0.1  # dev WRA from which a model counts as recognising words
MIN_LOST = 5  # utterances that must be lost at least


class CollapseAlarm(pl.Callback):
    """Watch the validations on dev speech over all phases of a training; its state is part of the checkpoints."""

    def __init__(
        self, what: str, steps: int, *, utterances: int, words: int, parts: int = 1, stop: Path | None = None
    ) -> None:
        """`utterances` and different `words` of dev speech; an epoch has `parts`; `stop`: a file that ends training."""
        self.what, self.steps, self.utterances, self.words = what, steps, utterances, words
        self.parts, self.stop = parts, stop
        self.best, self.best_step, self.raised = 0.0, 0, False

    @property
    def stopped(self) -> bool:
        """True if the alarm has ended the training."""
        return self.stop is not None and self.stop.is_file()

    def state_dict(self) -> dict[str, Any]:
        """The best validation so far, and whether the alarm is raised."""
        return {"best": self.best, "best_step": self.best_step, "raised": self.raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        vars(self).update(state)

    def remember(self, score: float, step: int) -> None:
        """Record a validation; also the best of a phase that ended before this process began."""
        if score > self.best:
            self.best, self.best_step = score, step

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do not resume a training that the alarm has ended, even if the process was killed just then."""
        trainer.should_stop = trainer.should_stop or self.stopped

    def on_validation(self, trainer: pl.Trainer, module: Any, metrics: dict[str, float]) -> None:
        """Check a validation for a collapse, and mark it in the curves."""
        step = trainer.global_step + module.earlier_steps
        why = self.judge(metrics, step)
        metrics["dev_collapse"] = float(bool(why))
        if why and not self.raised and trainer.is_global_zero:
            epoch = f"epoch {trainer.current_epoch // self.parts + 1}, step {step} of {self.steps}"
            end = "; training is stopped (student.on_collapse)" if self.stop else ""
            print(f"ALARM: {self.what} collapses at {epoch}: {why}{end}", flush=True)
            if self.stop:
                write_json(self.stop, {"step": step, "why": why})
        self.raised = bool(why)
        if why and self.stop:
            trainer.should_stop = True

    def judge(self, metrics: dict[str, float], step: int) -> str:
        """Why this validation is a collapse; empty if it is none."""
        wra = metrics["dev_wra"]
        self.remember(wra, step)
        signs = self._signs(metrics)
        lost = (self.best - wra) * self.utterances
        if self.best >= MIN_WRA and wra < self.best / 2 and lost > MIN_LOST - 0.5:
            drop = f"dev WRA falls from {100 * self.best:.0f} % (step {self.best_step}) to {100 * wra:.0f} %"
            return "; ".join([drop, *signs])
        if self.best < MIN_WRA and step >= self.steps / 2 and signs:
            return "; ".join(["half of the training is over and nothing is recognised", *signs])
        return ""

    def _signs(self, metrics: dict[str, float]) -> list[str]:
        """Signs of a collapse among a validation's hypotheses."""
        signs = []
        if metrics["dev_empty"] >= 0.5:
            signs.append(f"{100 * metrics['dev_empty']:.0f} % of the hypotheses are empty")
        elif metrics["dev_most_frequent"] >= 0.5 and self.words > 3:
            signs.append(f"{100 * metrics['dev_most_frequent']:.0f} % of the hypotheses are the same")
        if metrics["dev_distinct"] < self.words / 4:
            signs.append(f"{metrics['dev_distinct']:.0f} different hypotheses for {self.words} words")
        return signs
