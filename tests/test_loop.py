import signal

import forks
import pytest
import torch

from kdlib.errors import UserError
from kdlib.training.curves import read_curves
from kdlib.training.loop import EpochData, Run, Task, Validations, fit
from kdlib.training.schedules import cosine


def task(step, model=None, **settings):
    options = {"lr": 0.1, "scale": cosine(2, 10)} | settings
    return Task(model or torch.nn.Linear(1, 1), step, **options)


def test_the_schedule_warms_up_and_falls_to_zero():
    scales = [cosine(2, 10)(step) for step in range(11)]
    assert scales[:3] == [0.5, 1.0, 1.0]
    assert scales[2:] == sorted(scales[2:], reverse=True)
    assert scales[10] == pytest.approx(0)


def test_training_lowers_the_loss_and_shuffles_each_epoch(tmp_path):
    model, drawn = torch.nn.Linear(1, 1), []

    def batches(epoch):
        drawn.append(epoch)
        return [torch.full((4, 1), float(index)) for index in range(5)]

    def step(batch):
        return {"loss": ((model(batch) - 2 * batch) ** 2).mean()}

    before = step(torch.ones(4, 1))["loss"].item()
    fit(task(step, model), EpochData(batches, torch.clone), Run(tmp_path, "test", steps=10, seed=1))
    assert step(torch.ones(4, 1))["loss"].item() < before
    assert drawn == [0, 1]


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    model = torch.nn.Linear(1, 1)
    epochs = EpochData(lambda epoch: [torch.ones(1, 1)], torch.clone)
    with pytest.raises(
        UserError,
        match=r"training: loss is nan at step 0; lower the learning rate",
    ):
        fit(
            task(lambda batch: {"loss": model(batch).sum() * float("nan")}, model),
            epochs,
            Run(tmp_path, "test", steps=2, seed=1),
        )


def test_frozen_weights_are_not_optimised():
    model = torch.nn.Linear(2, 1)
    model.weight.requires_grad = False
    optimizer = task(dict, model).configure_optimizers()["optimizer"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


TRAINING = """
import os, sys
import torch
from pathlib import Path
from kdlib.training import callbacks, loop, schedules

model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
weights = []

def validate():  # best in the middle: from then on the weight overshoots
    weights.append(float(model.weight))
    print("validated", len(weights), round(weights[-1], 6), flush=True)
    return {"dev_score": -abs(float(model.weight) - 0.5)}

def step(batch):
    return {"loss": ((model(batch) - 2 * batch) ** 2).mean()}

def die(self, trainer, *rest, end=callbacks._Progress.on_train_batch_end):
    end(self, trainer, *rest)
    if trainer.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), 9)

callbacks._Progress.on_train_batch_end = die
task = loop.Task(model, step, lr=0.05, scale=schedules.cosine(0, 100))
epochs = loop.EpochData(lambda epoch: [torch.ones(1, 1)] * 3, torch.clone)
run = loop.Run(Path(sys.argv[1]), "test", steps=100, seed=1)
record = loop.fit(task, epochs, run, loop.Validations(validate, every=2, patience=3))
print("END", record, float(model.weight))
"""


def train(folder, die_at):
    return forks.run(TRAINING, folder, die_at)


def test_the_best_weights_are_kept_and_a_killed_run_stops_at_the_same_step(tmp_path):
    whole = train(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    end = next(line for line in whole.stdout.splitlines() if line.startswith("END"))
    assert "'steps': 30, 'best_step': 12" in end  # every 6 steps of 0.05: 0.6 is nearest to 0.5, then 3 in vain
    assert float(end.split()[-1]) == pytest.approx(0.6, abs=0.02)
    assert any((tmp_path / "whole" / "tensorboard").iterdir())
    assert train(tmp_path / "killed", 17).returncode == -signal.SIGKILL
    resumed = train(tmp_path / "killed", 0)
    assert next(line for line in resumed.stdout.splitlines() if line.startswith("END")) == end
    assert resumed.stdout.count("validated") < whole.stdout.count("validated")


def test_the_start_is_validated_first_and_kept_where_training_makes_it_worse(tmp_path):
    model, seen = torch.nn.Linear(1, 1, bias=False), []
    torch.nn.init.constant_(model.weight, 2.0)

    def validate():
        seen.append(float(model.weight.detach()))
        return {"dev_score": -abs(seen[-1] - 2), "dev_wra": 0.5}

    def fitted(folder, **options):
        folder.mkdir()
        validations = Validations(validate, patience=100, **options)
        epochs = EpochData(lambda epoch: [torch.ones(1, 1)] * 3, torch.clone)
        step = lambda batch: {"loss": (model(batch) ** 2).mean()}  # noqa: E731
        return fit(task(step, model), epochs, Run(folder, "test", steps=9, seed=1), validations)

    record = fitted(tmp_path / "first")
    assert record["best_step"] == 0
    assert record["start_dev_wra"] == 0.5
    assert seen[0] == 2.0
    assert len(seen) == 4
    assert seen[-1] < 1.9
    assert float(model.weight.detach()) == 2.0  # the best weights are those of the start
    assert fitted(tmp_path / "second", initial=False)["best_step"] == 3


def test_a_run_that_stops_in_its_last_validation_makes_it_when_it_resumes(tmp_path):
    """With a validation every two epochs, the last is after training."""

    def fitted(folder, fails_at=0):
        model, seen = torch.nn.Linear(1, 1, bias=False), []
        torch.nn.init.constant_(model.weight, 0.0)

        def validate():
            seen.append(float(model.weight.detach()))
            if len(seen) == fails_at:
                raise RuntimeError("stopped")
            return {"dev_score": -abs(seen[-1] - 2)}

        folder.mkdir(exist_ok=True)
        epochs = EpochData(lambda epoch: [torch.ones(1, 1)] * 2, torch.clone)
        step = lambda batch: {"loss": ((model(batch) - 2) ** 2).mean()}  # noqa: E731
        return fit(
            task(step, model), epochs, Run(folder, "test", steps=6, seed=1), Validations(validate, every=2, patience=9)
        )

    whole = fitted(tmp_path / "whole")
    assert whole["best_step"] == 6
    with pytest.raises(RuntimeError, match="stopped"):
        fitted(tmp_path / "stopped", fails_at=3)
    assert fitted(tmp_path / "stopped") == whole
    curves = [read_curves(tmp_path / name / "tensorboard") for name in ("whole", "stopped")]
    assert [table[table.name == "dev_score"].step.max() for table in curves] == [6, 6]


class Numbers(list):
    """A batch that knows its utterances."""

    @property
    def utt_ids(self):
        return [f"u{value:g}" for value in self]

    def select(self, rows):
        return Numbers(self[row] for row in rows)


def test_a_nan_loss_names_the_utterance(tmp_path):
    model = torch.nn.Linear(1, 1)

    def step(batch):
        values = torch.tensor([torch.nan if value == 3 else value for value in batch])
        return {"loss": (model.weight * values).sum()}

    with pytest.raises(
        UserError, match=r"loss is nan at step 0, of the utterance u3; lower the learning rate, or leave"
    ):
        fit(task(step, model), EpochData(lambda epoch: [[1.0, 3.0, 5.0]], Numbers), Run(tmp_path, "test", 4, 1))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: 8 bytes")],
)
def test_too_little_memory_says_which_batch_size_to_try(tmp_path, error):
    def step(batch):
        raise error

    run = Run(tmp_path, "student hard", 4, 1, batch_size=16)
    expected = r"student hard: out of memory at step 0 of 4 with batches of 16; write batch_size: 8 .*accumulate: 2"
    with pytest.raises(UserError, match=expected):
        fit(task(step), EpochData(lambda epoch: [1.0], torch.tensor), run)


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path):
    def step(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        fit(task(step), EpochData(lambda epoch: [1.0], torch.tensor), Run(tmp_path, "x", 4, 1))
