"""Lightning callbacks of the training loop: validation, progress, and the record of how a training ended."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch

from kdlib.console import progress
from kdlib.errors import UserError
from kdlib.io import atomic_write, write_json
from kdlib.runtime import seed_everything
from kdlib.training.checkpoints import BEST, ENDED, LAST

if TYPE_CHECKING:
    from kdlib.training.loop import Task

Validation = Callable[
    [], dict[str, float]
]  # a look at the dev block -> named numbers; the greatest "dev_score" is best


class _Validate(pl.Callback):
    """Looks at the dev block each few epochs and at the end, keeps the best weights, and stops when none come any more.

    Lightning's own callbacks look at what was logged last, and after a resume that is nothing: the same run would then
    stop elsewhere. The state of this one is part of the checkpoint.
    """

    def __init__(self, check: Validation, every: int, patience: int, folder: Path, keep: int = 1) -> None:
        self.check, self.every, self.patience, self.folder, self.keep = check, every, patience, folder, keep
        self.score, self.best_step, self.waited, self.validated_at = -math.inf, 0, 0, 0
        self.kept: list[tuple[float, int]] = []  # score and step of the best looks, best first
        self.found: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("score", "best_step", "waited", "validated_at", "kept")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def on_train_start(self, trainer: pl.Trainer, module: "Task") -> None:
        trainer.should_stop = self.waited >= self.patience  # killed between the stop and the end

    def on_train_epoch_end(self, trainer: pl.Trainer, module: "Task") -> None:
        if (trainer.current_epoch + 1) % self.every == 0:
            self._look(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: "Task") -> None:
        if self.validated_at < trainer.global_step:
            self._look(trainer, module)

    def _look(self, trainer: pl.Trainer, module: "Task") -> None:
        module.eval()
        with torch.inference_mode():
            found = self.check()  # in every process: NeMo's encoder waits for the others
        module.train()
        self.found = found = trainer.strategy.broadcast(found)  # and all decide alike
        self.validated_at = trainer.global_step
        for one in trainer.callbacks:
            if hear := getattr(one, "on_validation", None):
                hear(trainer, module, found)
        if trainer.is_global_zero:
            trainer.logger.log_metrics(found, trainer.global_step + module.earlier_steps)
        if math.isfinite(found["dev_score"]):
            self._keep(trainer, module, found["dev_score"])
        if found["dev_score"] > self.score:
            self.score, self.best_step, self.waited = found["dev_score"], trainer.global_step, 0
        else:
            self.waited += 1
            trainer.should_stop = trainer.should_stop or self.waited >= self.patience

    def _keep(self, trainer: pl.Trainer, module: "Task", score: float) -> None:
        """Keep the weights if they are among the best; of equal ones the earlier."""
        before, here = self.kept, (score, trainer.global_step)
        ranked = sorted([*(one for one in before if one[1] != here[1]), here], key=lambda one: (-one[0], one[1]))
        self.kept = ranked[: self.keep]
        if trainer.is_global_zero and here in self.kept:
            for path in self.folder.glob(BEST.format("*")):  # a run that is killed now goes on from those before
                if path.stem.removeprefix("best-") not in {str(step) for _, step in [*before, *self.kept]}:
                    path.unlink()
            with atomic_write(self.folder / BEST.format(trainer.global_step)) as hidden:
                torch.save(module.model.state_dict(), hidden)


class _Progress(pl.Callback):
    """Steps, epoch, losses and the time left; random numbers that follow from the seed, the epoch and the batch.

    They are set before every batch: Lightning draws from the same generator between batches, and not in the same
    places after a resume.
    """

    def __init__(self, what: str, steps: int, seed: int, parts: int, looks: Sequence[_Validate]) -> None:
        self.what, self.steps, self.seed, self.parts, self.looks = what, steps, seed, parts, looks
        self.bar = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.bar = progress(self.steps, self.what, "step")
        if trainer.global_step:
            self.bar.write(f"{self.what}: goes on from step {trainer.global_step} of {self.steps}")
            self.bar.initial = trainer.global_step
        self.bar.update(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        rank = [trainer.global_rank] if trainer.world_size > 1 else []
        mixed = np.random.SeedSequence([self.seed, trainer.current_epoch, index, *rank]).generate_state(1)
        seed_everything(int(mixed[0]))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.bar is None:
            return
        losses = {name: f"{float(value):.3f}" for name, value in trainer.callback_metrics.items() if name != "step"}
        dev = {name: f"{one.found[name]:.3f}" for one in self.looks for name in ("dev_wra",) if name in one.found}
        self.bar.set_postfix({"epoch": trainer.current_epoch // self.parts + 1, **losses, **dev}, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class _Record(pl.Callback):
    """Writes down how training ended, and the last weights."""

    def __init__(self, what: str, steps: int, folder: Path, looks: Sequence[_Validate]) -> None:
        self.what, self.steps, self.folder, self.looks = what, steps, folder, looks

    def on_fit_end(self, trainer: pl.Trainer, module: "Task") -> None:
        made = trainer.global_step
        if made < self.steps and not trainer.should_stop:
            raise UserError(f"{self.what}: only {made} of {self.steps} steps were made: there is nothing to train on")
        record = {"steps": made}
        for one in self.looks:
            if not math.isfinite(one.score):
                raise UserError(f"{self.what}: the loss on the dev block is never a number; lower the learning rate")
            record |= {"best_step": one.best_step, "best_dev_score": round(one.score, 6), "best_checkpoints": one.kept}
        if trainer.is_global_zero:
            with atomic_write(self.folder / LAST) as hidden:
                torch.save({name: weight.cpu() for name, weight in module.model.state_dict().items()}, hidden)
            write_json(self.folder / ENDED, record)
        trainer.strategy.barrier()  # what the first has written all read
