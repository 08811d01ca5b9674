"""Collapse alarm: raised once dev hypotheses collapse, not before, and not by a model that is still at its start."""

import json

import lightning.pytorch as pl
import pytest
import torch

from kdlib.distill.collapse_alarm import CollapseAlarm
from kdlib.show import live_curves
from kdlib.training.curves import TENSORBOARD, read_curves
from kdlib.training.loop import EpochData, Run, Task, Validations, fit


def metrics(wra, distinct=40, most_frequent=0.05, empty=0.0):
    return {"dev_wra": wra, "dev_distinct": distinct, "dev_most_frequent": most_frequent, "dev_empty": empty}


def test_losing_half_of_the_words_is_a_collapse():
    alarm = CollapseAlarm("student", 100, utterances=96, words=48)
    assert not alarm.judge(metrics(0.5), 10)
    assert not alarm.judge(metrics(0.3), 20)
    assert (
        alarm.judge(metrics(0.2, empty=0.7), 30)
        == "dev WRA falls from 50 % (step 10) to 20 %; 70 % of the hypotheses are empty"
    )
    assert not alarm.judge(metrics(0.4), 40)


def test_a_model_may_recognise_nothing_for_half_of_the_training():
    alarm = CollapseAlarm("student", 100, utterances=96, words=48)
    assert not alarm.judge(metrics(0.0, 1, 1.0, 1.0), 40)
    why = alarm.judge(metrics(0.0, 1, 1.0, 1.0), 50)
    assert why.startswith("half of the training is over and nothing is recognised; 100 % of the hypotheses are empty")
    assert alarm.judge(metrics(0.0, 3, 0.9), 60).endswith(
        "90 % of the hypotheses are the same; 3 different hypotheses for 48 words"
    )
    assert not alarm.judge(metrics(0.05), 70)  # weak, but no collapse


def test_constant_output_is_no_sign_with_few_words():
    assert not CollapseAlarm("student", 10, utterances=96, words=2).judge(metrics(0.05, 1, 1.0), 9)


@pytest.fixture
def run(tmp_path):
    """Train a toy model with given validations (WRA, share of empty hypotheses); return its record and curves."""

    def train(validations, stop=False, name="run", kill_at=None):
        model, remaining = torch.nn.Linear(1, 1), iter(validations)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)

        def step(batch):
            if kill_at is not None and task.global_step == kill_at:
                raise KeyboardInterrupt
            return {"loss": model(batch).pow(2).mean()}

        def validate():
            wra, empty = next(remaining)
            return {"dev_score": wra, **metrics(wra, empty=empty)}

        task = Task(model, step, lr=1e-3, scale=lambda _: 1.0)
        mark = folder / "stopped.json" if stop else None
        alarm = CollapseAlarm("toy", len(validations), utterances=96, words=48, parts=2, stop=mark)
        epochs = EpochData(lambda _: [0], lambda _: torch.ones(1, 1))
        settings = Run(folder, "toy", steps=len(validations), seed=1)
        record = fit(task, epochs, settings, Validations(validate, patience=99, initial=False), [alarm])
        return record, read_curves(folder / TENSORBOARD), alarm

    return train


def test_the_alarm_is_logged_once_and_marked_in_the_curves(run, capsys):
    record, curves, _ = run([(0.6, 0), (0.7, 0), (0.2, 0.8), (0.1, 0.9)])
    printed = capsys.readouterr().out
    assert printed.count("ALARM: toy collapses at epoch 2, step 3 of 4: dev WRA falls from 70 %") == 1
    marks = curves[curves.name == "dev_collapse"].set_index("step").value
    assert marks.to_dict() == {1: 0, 2: 0, 3: 1, 4: 1}
    assert record["steps"] == 4
    figure = live_curves.training(curves)
    assert any("collapse" in text.get_text() for text in figure.axes[1].texts)
    assert not any(line.get_linestyle() == ":" for line in live_curves.training(curves[curves.step < 3]).axes[1].lines)


def test_the_alarm_can_stop_the_training(run, capsys):
    record, _, alarm = run([(0.6, 0), (0.2, 0.8), (0.6, 0), (0.6, 0)], stop=True)
    assert record["steps"] == 2
    assert "training is stopped" in capsys.readouterr().out
    assert alarm.stopped
    assert json.loads(alarm.stop.read_text())["step"] == 2


def test_the_alarm_resumes_from_the_checkpoint():
    alarm = CollapseAlarm("student", 100, utterances=96, words=48)
    alarm.judge(metrics(0.8), 10)
    state = json.loads(json.dumps(alarm.state_dict()))
    resumed = CollapseAlarm("student", 100, utterances=96, words=48)
    resumed.load_state_dict(state)
    assert "from 80 % (step 10)" in resumed.judge(metrics(0.1), 20)
    assert isinstance(resumed, pl.Callback)


def test_the_best_of_an_earlier_phase_counts():
    alarm = CollapseAlarm("student", 100, utterances=96, words=48)
    alarm.remember(0.6, 40)
    assert "from 60 % (step 40)" in alarm.judge(metrics(0.1), 50)


def test_losing_a_few_utterances_is_no_collapse():
    assert not any(CollapseAlarm("student", 9, utterances=10, words=8).judge(metrics(wra, 8), 5) for wra in (0.1, 0.0))
