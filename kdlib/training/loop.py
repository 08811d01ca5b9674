"""The one training loop, on Lightning: deterministic epochs, checkpoints, exact resume, dev block, curves, progress.

Every epoch's batches and random numbers follow from the seed and the epoch's number alone, so that a run that was
killed and goes on from its last checkpoint ends with the same weights as an undisturbed one. Training in phases is one
`fit` after the other, each in a folder of its own: one that has ended is not made again.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core import rank_zero

from kdlib.errors import UserError
from kdlib.io import read_json
from kdlib.runtime import set_threads
from kdlib.training.callbacks import Validation, _Progress, _Record, _Validate
from kdlib.training.checkpoints import CHECKPOINT, ENDED, TENSORBOARD, checkpoint_weights, last_weights
from kdlib.training.schedules import Scale

Step = Callable[[Any], dict[str, torch.Tensor]]  # a batch -> named losses; "loss" is minimised


class Task(pl.LightningModule):
    """A model, what a step computes, and its optimiser: AdamW under a schedule of the learning rate."""

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
        self.earlier_steps = earlier_steps  # steps of earlier phases, on whose curves this one's go on

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
        self.log(
            "step", float(self.global_step + self.earlier_steps), batch_size=1
        )  # Lightning's name for the abscissa
        return losses["loss"]

    def configure_optimizers(self) -> dict:
        """AdamW; the schedule counts steps."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        fused = self._trainer is None or self.trainer.precision == "32-true"  # else Lightning cannot clip
        optimizer = torch.optim.AdamW(
            trained, lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.98), fused=fused
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say that the epoch is over: Lightning 2.4 saves before it counts it, and would repeat a batch of it."""
        loop = checkpoint["loops"]["fit_loop"]
        loop["epoch_progress"]["current"]["completed"] = loop["epoch_progress"]["current"]["processed"]
        batches = loop["epoch_loop.batch_progress"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


class EpochData(pl.LightningDataModule):
    """Each epoch's batches, made anew from its number."""

    def __init__(self, batches: Callable[[int], Iterable[Any]], load: Callable[[Any], Any]) -> None:
        super().__init__()
        self.batches, self.load = batches, load

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """The batches of the trainer's current epoch, in their order."""
        chosen = list(self.batches(self.trainer.current_epoch))
        return torch.utils.data.DataLoader(chosen, batch_size=None, shuffle=False, collate_fn=self.load)


def fit(
    task: Task,
    epochs: EpochData,
    *,
    folder: Path,
    what: str,
    steps: int,
    seed: int,
    checkpoint_every: int = 1,
    clip: float = 1.0,
    accumulate: int = 1,
    check: Validation | None = None,
    validate_every: int = 1,
    patience: int = 1,
    keep: int = 1,
    board: Path | None = None,
    precision: str = "32-true",
    accelerator: str = "auto",
    devices: int = 1,
    parts: int = 1,
    callbacks: Sequence[pl.Callback] = (),
) -> dict[str, float]:
    """Train `task` for `steps` steps; go on from `folder`'s last checkpoint where there is one.

    `checkpoint_every` and `validate_every` count epochs; where these are parts of epochs, `parts` says how many each has.
    With `check` the model ends with the weights that scored best on the dev block (`last` has those of the last step,
    `kept` those of the `keep` best looks; those of `callbacks` that have `on_validation` are told what was found), and after
    `patience` looks without a better one training is over. The curves lie in `board`, or `folder/tensorboard`; the
    checkpoints stay until `tidy`. Returned: steps made, the best score with its step, and scores and steps of what was
    kept. With several `devices` Lightning runs the process's own
    command once more for each: call this from a process that does nothing else, and go on only where `is_first`.
    """
    if (folder / ENDED).is_file():
        return _ended(task, folder, check is not None)
    set_threads()
    rank_zero.log.setLevel(logging.ERROR)  # Lightning's remarks on hardware
    board = board or folder / TENSORBOARD
    saver = pl.callbacks.ModelCheckpoint(
        folder,
        CHECKPOINT.removesuffix(".ckpt"),
        every_n_epochs=checkpoint_every,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    looks = [_Validate(check, validate_every, patience, folder, keep)] if check else []
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator=_accelerator(accelerator),
        devices=devices,
        strategy="auto" if devices == 1 else "ddp_find_unused_parameters_true",
        precision=precision,
        logger=pl.loggers.TensorBoardLogger(board.parent, name="", version=board.name),
        log_every_n_steps=max(1, min(10, steps // 20)),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            _Progress(what, steps, seed, parts, looks),
            *callbacks,
            *looks,
            _Record(what, steps, folder, looks),
            saver,
        ],
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
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
    return _ended(task, folder, bool(looks))


def _accelerator(asked: str) -> str:
    """Where training takes place: a CUDA GPU where there is one, else the processor."""
    found = torch.cuda.is_available()
    if asked == "gpu" and not found:
        raise UserError("student.accelerator is 'gpu', but there is no CUDA GPU here; write accelerator: auto")
    return "gpu" if found and asked != "cpu" else "cpu"


def _ended(task: Task, folder: Path, chosen: bool) -> dict[str, float]:
    """How training in a folder ended; the task's model gets the weights that scored best, or the last."""
    record = read_json(folder / ENDED)
    task.model.load_state_dict(checkpoint_weights(folder, record["best_step"]) if chosen else last_weights(folder))
    return record
