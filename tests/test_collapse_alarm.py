"""The alarm in training: raised when dev answers begin to collapse, not before, and not by what has never begun."""

import json

import lightning.pytorch as pl
import pytest
import torch

from kdlib.distill.collapse_alarm import CollapseAlarm
from kdlib.show import figures
from kdlib.training.checkpoints import TENSORBOARD, read_curves
from kdlib.training.loop import EpochData, Task, fit


def look(wra, distinct=40, commonest=0.05, empty=0.0):
    return {"dev_wra": wra, "dev_distinct": distinct, "dev_most_frequent": commonest, "dev_empty": empty}


def test_half_of_the_words_lost_is_a_collapse():
    alarm = CollapseAlarm("student", 100, utterances=96, words=48)
    assert not alarm.judge(look(0.5), 10)
    assert not alarm.judge(look(0.3), 20)
    assert (
        alarm.judge(look(0.2, empty=0.7), 30)
        == "dev words right fall from 50 % (step 10) to 20 %; 70 % of the answers are empty"
    )
    assert not alarm.judge(look(0.4), 40)


def test_what_has_not_begun_may_take_half_of_the_training():
    alarm = CollapseAlarm("student", 100, utterances=96, words=48)
    assert not alarm.judge(look(0.0, 1, 1.0, 1.0), 40)
    why = alarm.judge(look(0.0, 1, 1.0, 1.0), 50)
    assert why.startswith("half of the training is over and nothing is recognised; 100 % of the answers are empty")
    assert alarm.judge(look(0.0, 3, 0.9), 60).endswith(
        "90 % of the answers are the same; 3 different answers for 48 words"
    )
    assert not alarm.judge(look(0.05), 70)  # weak, and alive


def test_few_words_may_be_answered_alike():
    assert not CollapseAlarm("student", 10, utterances=96, words=2).judge(look(0.05, 1, 1.0), 9)


@pytest.fixture
def run(tmp_path):
    """A training of a toy model with given looks; returns its record and curves."""

    def made(looks, stop=False, name="run", kill_at=None):
        model, left = torch.nn.Linear(1, 1), iter(looks)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)

        def step(batch):
            if kill_at is not None and task.global_step == kill_at:
                raise KeyboardInterrupt
            return {"loss": model(batch).pow(2).mean()}

        def check():
            wra, empty = next(left)
            return {"dev_score": wra, **look(wra, empty=empty)}

        task = Task(model, step, lr=1e-3, scale=lambda _: 1.0)
        mark = folder / "stopped.json" if stop else None
        alarm = CollapseAlarm("toy", len(looks), utterances=96, words=48, parts=2, stop=mark)
        epochs = EpochData(lambda _: [0], lambda _: torch.ones(1, 1))
        record = fit(
            task,
            epochs,
            folder=folder,
            what="toy",
            steps=len(looks),
            seed=1,
            check=check,
            patience=99,
            callbacks=[alarm],
        )
        return record, read_curves(folder / TENSORBOARD), alarm

    return made


def test_the_log_says_it_once_and_the_curves_are_marked(run, capsys):
    record, curves, _ = run([(0.6, 0), (0.7, 0), (0.2, 0.8), (0.1, 0.9)])
    said = capsys.readouterr().out
    assert said.count("ALARM: toy collapses at epoch 2, step 3 of 4: dev words right fall from 70 %") == 1
    marks = curves[curves.name == "dev_collapse"].set_index("step").value
    assert marks.to_dict() == {1: 0, 2: 0, 3: 1, 4: 1}
    assert record["steps"] == 4
    drawn = figures.training(curves)
    assert any("collapse" in text.get_text() for text in drawn.axes[1].texts)
    assert not any(line.get_linestyle() == ":" for line in figures.training(curves[curves.step < 3]).axes[1].lines)


def test_it_can_stop_the_training(run, capsys):
    record, _, alarm = run([(0.6, 0), (0.2, 0.8), (0.6, 0), (0.6, 0)], stop=True)
    assert record["steps"] == 2
    assert "training is stopped" in capsys.readouterr().out
    assert alarm.stopped
    assert json.loads(alarm.stop.read_text())["step"] == 2


def test_its_memory_is_that_of_the_checkpoint():
    alarm = CollapseAlarm("student", 100, utterances=96, words=48)
    alarm.judge(look(0.8), 10)
    state = json.loads(json.dumps(alarm.state_dict()))
    other = CollapseAlarm("student", 100, utterances=96, words=48)
    other.load_state_dict(state)
    assert "from 80 % (step 10)" in other.judge(look(0.1), 20)
    assert isinstance(other, pl.Callback)


def test_a_phase_that_ended_before_is_remembered():
    alarm = CollapseAlarm("student", 100, utterances=96, words=48)
    alarm.remember(0.6, 40)
    assert "from 60 % (step 40)" in alarm.judge(look(0.1), 50)


def test_a_few_utterances_lost_are_no_collapse():
    assert not any(CollapseAlarm("student", 9, utterances=10, words=8).judge(look(wra, 8), 5) for wra in (0.1, 0.0))
