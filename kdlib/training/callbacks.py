"""Lightning callbacks of the training loop: validation, progress, and the record of a finished training."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from kdlib.console import progress
from kdlib.errors import DivergedError, UserError
from kdlib.io import atomic_write, write_json
from kdlib.runtime import seed_everything
from kdlib.training.checkpoints import BEST, ENDED, LAST

Validation = Callable[[], dict[str, float]]  # metrics on the dev block by name; the greatest "dev_score" is best
START = ("dev_wra", "dev_score")  # metrics of the start that are recorded
SHOWN = ("dev_wra", "dev_wer")  # in the progress bar
_STATE = ("score", "best_step", "waited", "validated_at", "kept", "start")  # of validations, in checkpoints


class _Validate(pl.Callback):
    """Validates before the first step, every few epochs and at the end; keeps the best weights, the start's among them.

    Training stops when the score no longer improves.

    Lightning's own callbacks use the last logged value, and after a resume there is none: the same run would then stop
    elsewhere. The state of this one is part of the checkpoint.
    """

    def __init__(
        self, validate: Validation, every: int, patience: int, folder: Path, keep: int = 1, *, initial: bool = True
    ) -> None:
        self.validate, self.every, self.patience, self.folder, self.keep = validate, every, patience, folder, keep
        self.initial = initial
        self.score, self.best_step, self.waited, self.validated_at = -math.inf, 0, 0, 0
        self.start: dict[str, float] = {}  # the metrics before the first step
        self.kept: list[tuple[float, int]] = []  # score and step of the best checkpoints, best first
        self.metrics: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop = self.waited >= self.patience  # killed between the stop and the end
        if self.initial and not trainer.global_step:
            self._run_validation(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every == 0:
            self._run_validation(trainer, module)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.validated_at < trainer.global_step:  # also in a run that was killed during its last validation
            self._run_validation(trainer, module)

    def _run_validation(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.eval()
        with torch.inference_mode():
            metrics = self.validate()  # in every process: NeMo's encoder waits for the others
        module.train()
        self.metrics = metrics = trainer.strategy.broadcast(metrics)  # so that all processes decide alike
        self.validated_at = trainer.global_step
        if not trainer.global_step:
            self.start = dict(metrics)
        for callback in trainer.callbacks:
            if hook := getattr(callback, "on_validation", None):
                hook(trainer, module, metrics)
        if trainer.is_global_zero:
            trainer.logger.log_metrics(metrics, trainer.global_step + module.earlier_steps)
        if math.isfinite(metrics["dev_score"]):
            self._keep_best(trainer, module, metrics["dev_score"])
        if metrics["dev_score"] > self.score:
            self.score, self.best_step, self.waited = metrics["dev_score"], trainer.global_step, 0
        else:
            self.waited += 1
            trainer.should_stop = trainer.should_stop or self.waited >= self.patience

    def _keep_best(self, trainer: pl.Trainer, module: pl.LightningModule, score: float) -> None:
        """Keep the weights if they are among the best; of equal scores the earlier."""
        before, new = self.kept, (score, trainer.global_step)
        ranked = sorted([*(kept for kept in before if kept[1] != new[1]), new], key=lambda kept: (-kept[0], kept[1]))
        self.kept = ranked[: self.keep]
        if trainer.is_global_zero and new in self.kept:
            for path in self.folder.glob(BEST.format("*")):  # `before` stays: a run killed now resumes with it
                if path.stem.removeprefix("best-") not in {str(step) for _, step in [*before, *self.kept]}:
                    path.unlink()
            with atomic_write(self.folder / BEST.format(trainer.global_step)) as hidden:
                torch.save(module.model.state_dict(), hidden)


class _Progress(pl.Callback):
    """Shows steps, epoch, losses and the time left; seeds the random numbers from the seed, the epoch and the batch.

    They are seeded before every batch: Lightning draws from the same generator between batches, and after a resume in
    other places.
    """

    def __init__(self, what: str, steps: int, seed: int, parts: int, validations: Sequence[_Validate]) -> None:
        self.what, self.steps, self.seed, self.parts, self.validations = what, steps, seed, parts, validations
        self.bar = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.bar = progress(self.steps, self.what, "step")
        if trainer.global_step:
            self.bar.write(f"{self.what}: resumes from step {trainer.global_step} of {self.steps}")
            self.bar.initial = trainer.global_step
        self.bar.update(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        rank = [trainer.global_rank] if trainer.world_size > 1 else []
        mixed = np.random.SeedSequence([self.seed, trainer.current_epoch, index, *rank]).generate_state(1)
        seed_everything(int(mixed[0]))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.bar is None:
            return
        shown = {name: f"{float(value):.3f}" for name, value in trainer.callback_metrics.items() if name != "step"}
        for validation in self.validations:
            shown |= {name: f"{value:.3f}" for name, value in validation.metrics.items() if name in SHOWN}
        self.bar.set_postfix({"epoch": trainer.current_epoch // self.parts + 1, **shown}, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    on_exception = on_train_end


class _Record(pl.Callback):
    """Writes the record of a finished training, and the last weights."""

    def __init__(self, what: str, steps: int, folder: Path, validations: Sequence[_Validate]) -> None:
        self.what, self.steps, self.folder, self.validations = what, steps, folder, validations

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        steps = trainer.global_step
        if steps < self.steps and not trainer.should_stop:
            raise UserError(f"{self.what}: only {steps} of {self.steps} steps were run: there is no training data")
        record = {"steps": steps}
        for validation in self.validations:
            if not math.isfinite(validation.score):
                raise DivergedError(f"{self.what}: the loss on the dev block is never finite; lower the learning rate")
            record |= {"best_step": validation.best_step, "best_dev_score": round(validation.score, 6)}
            record |= {"best_checkpoints": validation.kept}
            record |= {f"start_{name}": validation.start[name] for name in START if name in validation.start}
        if trainer.is_global_zero:
            with atomic_write(self.folder / LAST) as hidden:
                torch.save({name: weight.cpu() for name, weight in module.model.state_dict().items()}, hidden)
            write_json(self.folder / ENDED, record)
        trainer.strategy.barrier()  # all processes read what the first has written
