"""The training loop, on Lightning: deterministic epochs, checkpoints, exact resume, validation, curves, progress.

Every epoch's batches and random numbers follow from the seed and the epoch's number alone, so that a run that was
killed and resumes from its last checkpoint ends with the same weights as an undisturbed one. Training in phases is one
`fit` after the other, each in its own folder: a finished one is not run again.
"""

import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_utilities.core import rank_zero

from kdlib.errors import DivergedError, UserError
from kdlib.failures import MEMORY
from kdlib.io import read_json
from kdlib.runtime import set_threads, torch_device
from kdlib.training.callbacks import Validation, _Progress, _Record, _Validate
from kdlib.training.checkpoints import CHECKPOINT, ENDED, checkpoint_weights, last_weights
from kdlib.training.curves import TENSORBOARD
from kdlib.training.schedules import Scale

Step = Callable[[Any], dict[str, torch.Tensor]]  # batch -> named losses; "loss" is minimised


class Task(pl.LightningModule):
    """A model, its training step, and its optimiser: AdamW with a learning-rate schedule."""

    def __init__(
        self,
        model: torch.nn.Module,
        step: Step,
        *,
        lr: float,
        scale: Scale,
        weight_decay: float = 1e-3,
        earlier_steps: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.step = model, step
        self.lr, self.scale, self.weight_decay = lr, scale, weight_decay
        self.earlier_steps = earlier_steps  # of earlier phases, whose curves this one continues

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """One step; every named loss is logged."""
        losses = self.step(batch)
        for name, value in losses.items():
            if not torch.isfinite(value):
                raise DivergedError(
                    f"training: {name} is {value.item()} at step {self.global_step}{self._culprit(batch)}; lower the "
                    "learning rate, or leave the utterance out. The last checkpoint is kept"
                )
            self.log(name, value.detach(), batch_size=1)
        step = float(self.global_step + self.earlier_steps)
        self.log("step", step, batch_size=1)  # Lightning's name for the x axis
        return losses["loss"]

    def _culprit(self, batch: Any) -> str:
        """The first utterance of a batch whose own loss is not finite."""
        for row, utt_id in enumerate(getattr(batch, "utt_ids", ())):
            with torch.no_grad():
                alone = self.step(batch.select([row]))
            if not torch.isfinite(alone["loss"]):
                return f", of the utterance {utt_id}"
        return ""

    def configure_optimizers(self) -> dict:
        """AdamW; the schedule counts steps."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        fused = self._trainer is None or self.trainer.precision == "32-true"  # else Lightning cannot clip
        options = {"lr": self.lr, "weight_decay": self.weight_decay, "betas": (0.9, 0.98), "fused": fused}
        optimizer = torch.optim.AdamW(trained, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Mark the epoch as complete: Lightning 2.4 saves before it counts it, and would repeat one of its batches."""
        loop = checkpoint["loops"]["fit_loop"]
        loop["epoch_progress"]["current"]["completed"] = loop["epoch_progress"]["current"]["processed"]
        batches = loop["epoch_loop.batch_progress"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


class EpochData(pl.LightningDataModule):
    """The batches of each epoch, computed from its number; of several processes each has every n-th of them."""

    def __init__(self, batches: Callable[[int], Sequence[Any]], load: Callable[[Any], Any]) -> None:
        super().__init__()
        self.batches, self.load = batches, load

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """The batches of the trainer's current epoch, in order."""
        batches, world = self.batches(self.trainer.current_epoch), self.trainer.world_size
        if world > 1 and batches:  # all processes make as many steps: the first batches fill up the last step
            rows = [row % len(batches) for row in range(-(-len(batches) // world) * world)]
            batches = torch.utils.data.Subset(batches, rows[self.trainer.global_rank :: world])
        return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False, collate_fn=self.load)


@dataclass(frozen=True)
class Run:
    """One call of `fit`: where it writes, how long it trains, and on what hardware."""

    folder: Path
    what: str  # in the progress bar
    steps: int
    seed: int
    checkpoint_every: int = 1  # epochs; if these are parts of real epochs, `parts` is their number per epoch
    parts: int = 1
    clip: float = 1.0  # gradient norm
    accumulate: int = 1
    tensorboard: Path | None = None  # folder of the curves; by default folder/tensorboard
    precision: str = "32-true"
    device: str = "auto"  # of a recipe
    batch_size: int = 0  # for the message that memory is short
    devices: int = 1


@dataclass(frozen=True)
class Validations:
    """Validations during a training: the best checkpoints are kept, and `patience` without improvement ends it.

    The first is of the start, before any step, unless an earlier phase ended with it.
    """

    validate: Validation
    every: int = 1  # epochs
    patience: int = 1
    keep: int = 1
    initial: bool = True


def fit(
    task: Task,
    epochs: EpochData,
    run: Run,
    validations: Validations | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> dict[str, float]:
    """Train `task` for `run.steps` steps, or resume from the last checkpoint in its folder.

    With validations the model ends with the weights that scored best on the dev block (`last_weights` reads those of
    the last step, `checkpoint_weights` those of the best; `callbacks` that have `on_validation` get the metrics). The
    checkpoints stay until `remove_checkpoints`. Returned are the number of steps, the best score with its step, and
    scores and steps of the best checkpoints. With several devices Lightning runs the process's own command again for
    each: call this from a process that does nothing else, and continue only if `is_main_process`.
    """
    folder, what, steps = run.folder, run.what, run.steps
    if (folder / ENDED).is_file():
        return _restore(task, folder, validations is not None)
    set_threads()
    rank_zero.log.setLevel(logging.ERROR)  # silences Lightning's remarks on hardware
    curves, latest = run.tensorboard or folder / TENSORBOARD, folder / CHECKPOINT
    saver = pl.callbacks.ModelCheckpoint(
        folder,
        latest.stem,
        every_n_epochs=run.checkpoint_every,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    validators = []
    if validations:
        every, patience, keep = validations.every, validations.patience, validations.keep
        validators = [_Validate(validations.validate, every, patience, folder, keep, initial=validations.initial)]
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator={"cpu": "cpu", "cuda": "gpu"}[torch_device(run.device).type],
        devices=run.devices,
        strategy="auto" if run.devices == 1 else "ddp_find_unused_parameters_true",
        precision=run.precision,
        logger=pl.loggers.TensorBoardLogger(curves.parent, name="", version=curves.name),
        log_every_n_steps=max(1, min(10, steps // 20)),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            _Progress(what, steps, run.seed, run.parts, validators),
            *callbacks,
            *validators,
            _Record(what, steps, folder, validators),
            saver,
        ],
        gradient_clip_val=run.clip,
        accumulate_grad_batches=run.accumulate,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,  # it would shuffle the batches
        plugins=_processes(run.devices),
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(task, epochs, ckpt_path=latest if latest.is_file() else None)
        except SystemExit:  # Lightning ends the whole process on Ctrl-C
            stopped = f"{what}: stopped at step {trainer.global_step} of {steps}; run it again to resume"
            raise KeyboardInterrupt(stopped) from None
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not re.search(MEMORY, str(error)):
                raise
            half = f"batch_size: {max(1, run.batch_size // 2)}" if run.batch_size else "a smaller batch_size"
            raise UserError(
                f"{what}: out of memory at step {trainer.global_step} of {steps} with batches of "
                f"{run.batch_size or '?'}; write {half} in the recipe (for the same step of a student also accumulate: "
                "2). The last checkpoint is kept"
            ) from error
    return _restore(task, folder, bool(validators))


def _processes(devices: int) -> list[LightningEnvironment]:
    """Lightning starts the processes itself, also in a job of a cluster, unless torchrun or srun has started them."""
    by_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return [LightningEnvironment()] if devices > 1 and not by_srun and not TorchElasticEnvironment.detect() else []


def _restore(task: Task, folder: Path, best: bool) -> dict[str, float]:
    """Load the best or the last weights of a finished training into the task's model; returns its record."""
    record = read_json(folder / ENDED)
    task.model.load_state_dict(checkpoint_weights(folder, record["best_step"]) if best else last_weights(folder))
    return record
