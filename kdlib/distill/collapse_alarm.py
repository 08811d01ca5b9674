"""The alarm in training: says at once, in the progress log, when answers on dev speech begin to collapse.

A collapse is half of the words lost that were right before; or, once half of the training is over, answers that are
mostly empty, mostly the same, or far fewer different ones than there are words, while nothing is recognised.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from kdlib.io import write_json

MIN_WRA = 0.1  # words right from which on a model has begun to recognise
MIN_LOST = 5  # utterances, at least, that must be lost


class CollapseAlarm(pl.Callback):
    """Watches the looks at dev speech through all phases of a training; its memory is part of the checkpoints."""

    def __init__(
        self,
        what: str,
        steps: int,
        *,
        utterances: int,
        words: int,
        parts: int = 1,
        stop: Path | None = None,
    ) -> None:
        """`utterances` and different `words` of dev speech; an epoch has `parts`; `stop`: a file that ends training."""
        self.what, self.steps, self.utterances, self.words = what, steps, utterances, words
        self.parts, self.stop = parts, stop
        self.best, self.best_step, self.raised = 0.0, 0, False

    @property
    def stopped(self) -> bool:
        """Whether it has ended the training."""
        return self.stop is not None and self.stop.is_file()

    def state_dict(self) -> dict[str, Any]:
        """What has been seen."""
        return {"best": self.best, "best_step": self.best_step, "raised": self.raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what has been seen."""
        vars(self).update(state)

    def remember(self, score: float, step: int) -> None:
        """Take note of the best look of a phase that had ended before this process began."""
        if score > self.best:
            self.best, self.best_step = score, step

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A training that it has ended is not gone on with, when it was killed just then."""
        trainer.should_stop = trainer.should_stop or self.stopped

    def on_validation(self, trainer: pl.Trainer, module: Any, found: dict[str, float]) -> None:
        """Look at what was found, and mark it in the curves."""
        step = trainer.global_step + module.earlier_steps
        why = self.judge(found, step)
        found["dev_collapse"] = float(bool(why))
        if why and not self.raised and trainer.is_global_zero:
            epoch = f"epoch {trainer.current_epoch // self.parts + 1}, step {step} of {self.steps}"
            end = "; training is stopped (student.on_collapse)" if self.stop else ""
            print(f"ALARM: {self.what} collapses at {epoch}: {why}{end}", flush=True)
            if self.stop:
                write_json(self.stop, {"step": step, "why": why})
        self.raised = bool(why)
        if why and self.stop:
            trainer.should_stop = True

    def judge(self, found: dict[str, float], step: int) -> str:
        """Why this look is a collapse; nothing if it is none."""
        wra = found["dev_wra"]
        self.remember(wra, step)
        signs = self._signs(found)
        lost = (self.best - wra) * self.utterances
        if self.best >= MIN_WRA and wra < self.best / 2 and lost > MIN_LOST - 0.5:
            fallen = f"dev words right fall from {100 * self.best:.0f} % (step {self.best_step}) to {100 * wra:.0f} %"
            return "; ".join([fallen, *signs])
        if self.best < MIN_WRA and step >= self.steps / 2 and signs:
            return "; ".join(["half of the training is over and nothing is recognised", *signs])
        return ""

    def _signs(self, found: dict[str, float]) -> list[str]:
        signs = []
        if found["dev_empty"] >= 0.5:
            signs.append(f"{100 * found['dev_empty']:.0f} % of the answers are empty")
        elif found["dev_most_frequent"] >= 0.5 and self.words > 3:
            signs.append(f"{100 * found['dev_most_frequent']:.0f} % of the answers are the same")
        if found["dev_distinct"] < self.words / 4:
            signs.append(f"{found['dev_distinct']:.0f} different answers for {self.words} words")
        return signs
