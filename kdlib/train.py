"""The one training loop, on Lightning: deterministic epochs, checkpoints, exact resume, dev block, curves, progress.

Every epoch's batches and random numbers follow from the seed and the epoch's number alone, so that a run that was
killed and goes on from its last checkpoint ends with the same weights as an undisturbed one. Training in phases is one
`fit` after the other, each in a folder of its own: one that has ended is not made again.
"""

import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from lightning_utilities.core import rank_zero

from kdlib.errors import UserError
from kdlib.stage import progress, read_json, set_threads, write_json, writing

Step = Callable[[Any], dict[str, torch.Tensor]]  # a batch -> named losses; "loss" is minimised
Check = Callable[[], dict[str, float]]  # a look at the dev block -> named numbers; the greatest "dev_score" is best
Scale = Callable[[int], float]  # a step's number -> what the learning rate is multiplied by

CHECKPOINT, BEST, LAST, ENDED, CURVES = "latest.ckpt", "best-{}.ckpt", "last.pt", "ended.json", "tensorboard"


def cosine(warmup_steps: int, total_steps: int) -> Scale:
    """Linear warm-up, then half a cosine down to zero."""

    def scale(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return scale


def noam(warmup_steps: int, width: int) -> Scale:
    """Linear warm-up, then the inverse square root; scaled by that of the model's width (Vaswani et al. 2017, eq. 3).

    >>> round(noam(100, 176)(99), 6) == round((176 * 100) ** -0.5, 6)
    True
    """
    warm = max(1, warmup_steps)
    return lambda step: width**-0.5 * min((step + 1) ** -0.5, (step + 1) * warm**-1.5)


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
        made_before: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.step = model, step
        self.lr, self.scale, self.weight_decay = lr, scale, weight_decay
        self.made_before = made_before  # steps of earlier phases, on whose curves this one's go on

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
        self.log("step", float(self.global_step + self.made_before), batch_size=1)  # Lightning's name for the abscissa
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


class _Checks(pl.Callback):
    """Looks at the dev block each few epochs and at the end, keeps the best weights, and stops when none come any more.

    Lightning's own callbacks look at what was logged last, and after a resume that is nothing: the same run would then
    stop elsewhere. The state of this one is part of the checkpoint.
    """

    def __init__(self, check: Check, every: int, patience: int, folder: Path, keep: int = 1) -> None:
        self.check, self.every, self.patience, self.folder, self.keep = check, every, patience, folder, keep
        self.score, self.best_step, self.waited, self.looked_at = -math.inf, 0, 0, 0
        self.kept: list[tuple[float, int]] = []  # score and step of the best looks, best first
        self.found: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("score", "best_step", "waited", "looked_at", "kept")}

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
            found = self.check()  # in every process: NeMo's encoder waits for the others
        module.train()
        self.found = found = trainer.strategy.broadcast(found)  # and all decide alike
        self.looked_at = trainer.global_step
        for one in trainer.callbacks:
            if hear := getattr(one, "on_look", None):
                hear(trainer, module, found)
        if trainer.is_global_zero:
            trainer.logger.log_metrics(found, trainer.global_step + module.made_before)
        if math.isfinite(found["dev_score"]):
            self._keep(trainer, module, found["dev_score"])
        if found["dev_score"] > self.score:
            self.score, self.best_step, self.waited = found["dev_score"], trainer.global_step, 0
        else:
            self.waited += 1
            trainer.should_stop = trainer.should_stop or self.waited >= self.patience

    def _keep(self, trainer: pl.Trainer, module: Task, score: float) -> None:
        """Keep the weights if they are among the best; of equal ones the earlier."""
        before, here = self.kept, (score, trainer.global_step)
        ranked = sorted([*(one for one in before if one[1] != here[1]), here], key=lambda one: (-one[0], one[1]))
        self.kept = ranked[: self.keep]
        if trainer.is_global_zero and here in self.kept:
            for path in self.folder.glob(BEST.format("*")):  # a run that is killed now goes on from those before
                if path.stem.removeprefix("best-") not in {str(step) for _, step in [*before, *self.kept]}:
                    path.unlink()
            with writing(self.folder / BEST.format(trainer.global_step)) as hidden:
                torch.save(module.model.state_dict(), hidden)


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

    def __init__(self, what: str, steps: int, seed: int, parts: int, looks: Sequence[_Checks]) -> None:
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

    def __init__(self, what: str, steps: int, folder: Path, looks: Sequence[_Checks]) -> None:
        self.what, self.steps, self.folder, self.looks = what, steps, folder, looks

    def on_fit_end(self, trainer: pl.Trainer, module: Task) -> None:
        made = trainer.global_step
        if made < self.steps and not trainer.should_stop:
            raise UserError(f"{self.what}: only {made} of {self.steps} steps were made: there is nothing to train on")
        record = {"steps": made}
        for one in self.looks:
            if not math.isfinite(one.score):
                raise UserError(f"{self.what}: the loss on the dev block is never a number; lower the learning rate")
            record |= {"best_step": one.best_step, "best_dev_score": round(one.score, 6), "kept": one.kept}
        if trainer.is_global_zero:
            with writing(self.folder / LAST) as hidden:
                torch.save({name: weight.cpu() for name, weight in module.model.state_dict().items()}, hidden)
            write_json(self.folder / ENDED, record)
        trainer.strategy.barrier()  # what the first has written all read


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
    accumulate: int = 1,
    check: Check | None = None,
    check_every: int = 1,
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

    `checkpoint_every` and `check_every` count epochs; where these are parts of epochs, `parts` says how many each has.
    With `check` the model ends with the weights that scored best on the dev block (`last` has those of the last step,
    `kept` those of the `keep` best looks; those of `callbacks` that have `on_look` are told what was found), and after
    `patience` looks without a better one training is over. The curves lie in `board`, or `folder/tensorboard`; the
    checkpoints stay until `tidy`. Returned: steps made, the best score with its step, and scores and steps of what was
    kept. With several `devices` Lightning runs the process's own
    command once more for each: call this from a process that does nothing else, and go on only where `is_first`.
    """
    if (folder / ENDED).is_file():
        return _ended(task, folder, check is not None)
    set_threads()
    rank_zero.log.setLevel(logging.ERROR)  # Lightning's remarks on hardware
    board = board or folder / CURVES
    saver = pl.callbacks.ModelCheckpoint(
        folder,
        CHECKPOINT.removesuffix(".ckpt"),
        every_n_epochs=checkpoint_every,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    looks = [_Checks(check, check_every, patience, folder, keep)] if check else []
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


def kept(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of one of the best looks of a `fit` in a folder."""
    return _weights(folder / BEST.format(step))


def last(folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a `fit` in a folder."""
    return _weights(folder / LAST)


def tidy(folder: Path) -> None:
    """Remove the checkpoints: to be called when what was trained lies safely in the folder."""
    for path in (folder / CHECKPOINT, folder / LAST, folder / ENDED, *folder.glob(BEST.format("*"))):
        path.unlink(missing_ok=True)


def curves(folder: Path) -> pd.DataFrame:
    """What was logged, from a TensorBoard folder: step, name, value. What a resumed run made twice stands once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows: dict[tuple[int, str], float] = {}
    for path in sorted(folder.glob("events.*"), key=lambda file: file.name):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            rows |= {(one.step, name): one.value for one in events.Scalars(name)}
    table = [(step, name, value) for (step, name), value in sorted(rows.items()) if name != "epoch"]
    return pd.DataFrame(table, columns=["step", "name", "value"])


def _accelerator(asked: str) -> str:
    """Where training takes place: a CUDA GPU where there is one, else the processor."""
    found = torch.cuda.is_available()
    if asked == "gpu" and not found:
        raise UserError("student.accelerator is 'gpu', but there is no CUDA GPU here; write accelerator: auto")
    return "gpu" if found and asked != "cpu" else "cpu"


def is_first() -> bool:
    """Whether this is the process that writes: of several that train one model, the first."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(seed)


def _ended(task: Task, folder: Path, chosen: bool) -> dict[str, float]:
    """How training in a folder ended; the task's model gets the weights that scored best, or the last."""
    record = read_json(folder / ENDED)
    task.model.load_state_dict(kept(folder, record["best_step"]) if chosen else last(folder))
    return record


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True, map_location="cpu")
