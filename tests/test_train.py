import pytest
import torch

from kdlib.errors import UserError
from kdlib.train import Epochs, Task, fit


def task(step, model=None, **settings):
    options = {"lr": 0.1, "warmup_steps": 2, "total_steps": 10} | settings
    return Task(model or torch.nn.Linear(1, 1), step, **options)


def test_the_schedule_warms_up_and_falls_to_zero():
    scales = [task(dict)._scale(step) for step in range(11)]
    assert scales[:3] == [0.5, 1.0, 1.0]
    assert scales[2:] == sorted(scales[2:], reverse=True)
    assert scales[10] == pytest.approx(0)


def test_training_lowers_the_loss_and_draws_each_epochs_batches(tmp_path):
    model, drawn = torch.nn.Linear(1, 1), []

    def batches(epoch):
        drawn.append(epoch)
        return [torch.full((4, 1), float(index)) for index in range(5)]

    def step(batch):
        return {"loss": ((model(batch) - 2 * batch) ** 2).mean()}

    before = step(torch.ones(4, 1))["loss"].item()
    fit(task(step, model), Epochs(batches, torch.clone), folder=tmp_path, what="test", steps=10, seed=1)
    assert step(torch.ones(4, 1))["loss"].item() < before
    assert drawn == [0, 1]


def test_a_loss_that_is_not_finite_is_one_message(tmp_path):
    model = torch.nn.Linear(1, 1)
    epochs = Epochs(lambda epoch: [torch.ones(1, 1)], torch.clone)
    with pytest.raises(UserError, match=r"training: loss is nan at step 0; lower the learning rate"):
        fit(
            task(lambda batch: {"loss": model(batch).sum() * float("nan")}, model),
            epochs,
            folder=tmp_path,
            what="test",
            steps=2,
            seed=1,
        )


def test_frozen_weights_are_not_given_to_the_optimiser():
    model = torch.nn.Linear(2, 1)
    model.weight.requires_grad = False
    optimizer = task(dict, model).configure_optimizers()["optimizer"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
