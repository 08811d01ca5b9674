"""The alarm in training: says at once, in the progress log, when answers on dev speech begin to collapse.

A collapse is half of the words lost that were right before; or, once half of the training is over, answers that are
mostly empty, mostly the same, or far fewer different ones than there are words, while nothing is recognised.
"""

from typing import Any

import lightning.pytorch as pl

LEAST = 0.1  # words right from which on a model has begun to recognise


class Alarm(pl.Callback):
    """Watches the looks at dev speech; its memory is part of the checkpoint, so that a resumed run has it."""

    def __init__(self, what: str, steps: int, *, words: int, stop: bool = False) -> None:
        """`words` is how many different words dev speech has."""
        self.what, self.steps, self.words, self.stop = what, steps, words, stop
        self.best, self.best_step, self.raised = 0.0, 0, False

    def state_dict(self) -> dict[str, Any]:
        """What has been seen."""
        return {"best": self.best, "best_step": self.best_step, "raised": self.raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what has been seen."""
        vars(self).update(state)

    def on_look(self, trainer: pl.Trainer, module: pl.LightningModule, found: dict[str, float]) -> None:
        """Look at what was found, and mark it in the curves."""
        step = trainer.global_step
        why = self.judge(found, step)
        found["dev_collapse"] = float(bool(why))
        if not why:
            self.raised = False
            return
        if not self.raised and trainer.is_global_zero:
            epoch = f"epoch {trainer.current_epoch + 1}, step {step} of {self.steps}"
            end = "; training is stopped (student.on_collapse)" if self.stop else ""
            print(f"ALARM: {self.what} collapses at {epoch}: {why}{end}", flush=True)
        self.raised = True
        trainer.should_stop = trainer.should_stop or self.stop

    def judge(self, found: dict[str, float], step: int) -> str:
        """Why this look is a collapse; nothing if it is none."""
        wra = found["dev_wra"]
        if wra > self.best:
            self.best, self.best_step = wra, step
        signs = self._signs(found)
        if self.best >= LEAST and wra < self.best / 2:
            fallen = f"dev words right fall from {100 * self.best:.0f} % (step {self.best_step}) to {100 * wra:.0f} %"
            return "; ".join([fallen, *signs])
        if self.best < LEAST and step >= self.steps / 2 and signs:
            return "; ".join(["half of the training is over and nothing is recognised", *signs])
        return ""

    def _signs(self, found: dict[str, float]) -> list[str]:
        signs = []
        if found["dev_empty"] >= 0.5:
            signs.append(f"{100 * found['dev_empty']:.0f} % of the answers are empty")
        elif found["dev_commonest"] >= 0.5 and self.words > 3:
            signs.append(f"{100 * found['dev_commonest']:.0f} % of the answers are the same")
        if found["dev_distinct"] < self.words / 4:
            signs.append(f"{found['dev_distinct']:.0f} different answers for {self.words} words")
        return signs
