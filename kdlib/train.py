"""The one training loop, on Lightning: deterministic epochs, checkpoints, exact resume, dev block, curves, progress.

Every epoch's batches and random numbers follow from the seed and the epoch's number alone, so that a run that was
killed and goes on from its last checkpoint ends with the same weights as an undisturbed one.
"""

import logging
import math
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning_utilities.core import rank_zero

from kdlib.errors import UserError
from kdlib.stage import progress, set_threads, writing

Step = Callable[[Any], dict[str, torch.Tensor]]  # a batch -> named losses; "loss" is minimised
Check = Callable[[], dict[str, float]]  # a look at the dev block -> named numbers; the greatest "dev_score" is best

CHECKPOINT, BEST = "latest.ckpt", "best-{}.ckpt"


class Task(pl.LightningModule):
    """A model, what a step computes, and its optimiser: AdamW with warm-up and cosine decay."""

    def __init__(
        self,
        model: torch.nn.Module,
        step: Step,
        *,
        lr: float,
        warmup_steps: int,
        total_steps: int,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__()
        self.model, self.step = model, step
        self.lr, self.warmup_steps, self.total_steps, self.weight_decay = lr, warmup_steps, total_steps, weight_decay

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """One step; every named loss is logged."""
        losses = self.step(batch)
        for name, value in losses.items():
            if not torch.isfinite(value):
                raise UserError(
                    f"training: {name} is {value.item()} at step {self.global_step}; lower the learning rate "
                    "or look at the data of this batch"
                )
            self.log(name, value.detach(), batch_size=1)
        return losses["loss"]

    def configure_optimizers(self) -> dict:
        """AdamW; the schedule counts steps."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say that the epoch is over: Lightning 2.4 saves before it counts it, and would repeat a batch of it."""
        loop = checkpoint["loops"]["fit_loop"]
        loop["epoch_progress"]["current"]["completed"] = loop["epoch_progress"]["current"]["processed"]
        batches = loop["epoch_loop.batch_progress"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False

    def _scale(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class _Checks(pl.Callback):
    """Looks at the dev block each few epochs and at the end, keeps the best weights, and stops when none come any more.

    Lightning's own callbacks look at what was logged last, and after a resume that is nothing: the same run would then
    stop elsewhere. The state of this one is part of the checkpoint.
    """

    def __init__(self, check: Check, every: int, patience: int, folder: Path) -> None:
        self.check, self.every, self.patience, self.folder = check, every, patience, folder
        self.score, self.best_step, self.waited, self.looked_at = -math.inf, 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("score", "best_step", "waited", "looked_at")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def on_train_start(self, trainer: pl.Trainer, module: Task) -> None:
        trainer.should_stop = self.waited >= self.patience  # killed between the stop and the end

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Task) -> None:
        if (trainer.current_epoch + 1) % self.every == 0:
            self._look(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Task) -> None:
        if self.looked_at < trainer.global_step:
            self._look(trainer, module)

    def _look(self, trainer: pl.Trainer, module: Task) -> None:
        module.eval()
        with torch.inference_mode():
            found = self.check()
        module.train()
        self.looked_at = trainer.global_step
        trainer.logger.log_metrics(found, trainer.global_step)
        if found["dev_score"] > self.score:
            kept = {self.best_step, trainer.global_step}  # a run that is killed now goes on from the former
            for path in self.folder.glob(BEST.format("*")):
                if path.stem.removeprefix("best-") not in map(str, kept):
                    path.unlink()
            self.score, self.best_step, self.waited = found["dev_score"], trainer.global_step, 0
            with writing(self.folder / BEST.format(self.best_step)) as hidden:
                torch.save(module.model.state_dict(), hidden)
        else:
            self.waited += 1
            trainer.should_stop = trainer.should_stop or self.waited >= self.patience


class Epochs(pl.LightningDataModule):
    """Each epoch's batches, made anew from its number."""

    def __init__(self, batches: Callable[[int], Iterable[Any]], load: Callable[[Any], Any]) -> None:
        super().__init__()
        self.batches, self.load = batches, load

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """The batches of the trainer's current epoch, in their order."""
        chosen = list(self.batches(self.trainer.current_epoch))
        return torch.utils.data.DataLoader(chosen, batch_size=None, shuffle=False, collate_fn=self.load)


class _Progress(pl.Callback):
    """Steps, epoch, losses and the time left; random numbers that follow from the seed, the epoch and the batch.

    They are set before every batch: Lightning draws from the same generator between batches, and not in the same
    places after a resume.
    """

    def __init__(self, what: str, steps: int, seed: int) -> None:
        self.what, self.steps, self.seed = what, steps, seed
        self.bar = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar = progress(self.steps, self.what, "step")
        if trainer.global_step:
            self.bar.write(f"{self.what}: goes on from step {trainer.global_step} of {self.steps}")
            self.bar.initial = trainer.global_step
        self.bar.update(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        mixed = np.random.SeedSequence([self.seed, trainer.current_epoch, index]).generate_state(1)
        seed_everything(int(mixed[0]))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        losses = {name: f"{float(value):.3f}" for name, value in trainer.callback_metrics.items()}
        self.bar.set_postfix(epoch=trainer.current_epoch + 1, **losses, refresh=False)
        self.bar.update(1)

    def on_train_end(self, *_: Any) -> None:
        self.bar.close()

    def on_exception(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def fit(
    task: Task,
    epochs: Epochs,
    *,
    folder: Path,
    what: str,
    steps: int,
    seed: int,
    checkpoint_every: int = 1,
    clip: float = 1.0,
    check: Check | None = None,
    check_every: int = 1,
    patience: int = 1,
) -> dict[str, float]:
    """Train `task` for `steps` steps; go on from `folder`'s last checkpoint where there is one.

    `checkpoint_every` and `check_every` count epochs. With `check` the model ends with the weights that scored best on
    the dev block, and after `patience` looks without a better one training is over. The curves lie in
    `folder/tensorboard`; the checkpoints stay until `tidy`. Returned: steps made, and the best score with its step.
    """
    set_threads()
    rank_zero.log.setLevel(logging.ERROR)  # Lightning's remarks on hardware
    saver = pl.callbacks.ModelCheckpoint(
        folder,
        CHECKPOINT.removesuffix(".ckpt"),
        every_n_epochs=checkpoint_every,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    looks = [_Checks(check, check_every, patience, folder)] if check else []
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=pl.loggers.TensorBoardLogger(folder, name="", version="tensorboard"),
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Progress(what, steps, seed), *looks, saver],
        gradient_clip_val=clip,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
    )
    latest = folder / CHECKPOINT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(task, epochs, ckpt_path=latest if latest.is_file() else None)
        except SystemExit:  # Lightning ends the whole process on Ctrl-C
            stopped = f"{what}: stopped at step {trainer.global_step} of {steps}; run it again to go on"
            raise KeyboardInterrupt(stopped) from None
    if trainer.global_step < steps and not trainer.should_stop:
        raise UserError(f"{what}: only {trainer.global_step} of {steps} steps were made: there is nothing to train on")
    record = {"steps": trainer.global_step}
    if looks:
        if not math.isfinite(looks[0].score):
            raise UserError(f"{what}: the loss on the dev block is never a number; lower the learning rate")
        best = torch.load(folder / BEST.format(looks[0].best_step), weights_only=True, map_location="cpu")
        task.model.load_state_dict(best)
        record |= {"best_step": looks[0].best_step, "best_dev_score": round(looks[0].score, 6)}
    return record


def tidy(folder: Path) -> None:
    """Remove the checkpoints: to be called when what was trained lies safely in the folder."""
    for path in (folder / CHECKPOINT, *folder.glob(BEST.format("*"))):
        path.unlink(missing_ok=True)


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(seed)
