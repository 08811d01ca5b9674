import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import table
from kdlib.errors import UserError
from kdlib.models import nemo
from kdlib.models.pretrain import heard, pretrained, split_controls
from kdlib.params import load

RUN = """
import os, sys
from kdlib import train
from kdlib.models import pretrain
from kdlib.params import load

def step_and_die(self, trainer, *rest, step=train._Progress.on_train_batch_end):
    step(self, trainer, *rest)
    if trainer.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), 9)

train._Progress.on_train_batch_end = step_and_die
pretrain.pretrained(load("params/smoke.yaml", "M08", overrides={"outputs": sys.argv[1]}))
"""


def run(folder, die_at_step):
    command = [sys.executable, "-c", RUN, str(folder), str(die_at_step)]
    return subprocess.run(command, capture_output=True, text=True)


def weights(path):
    return nemo.restore(path).state_dict()


def test_only_controls_are_heard_and_some_voices_and_words_are_not(smoke, corpus):
    controls = split_controls(corpus, smoke)
    trained, tested = {utt.speaker for utt in controls.train}, set(controls.test_speakers)
    assert all(map(corpus.is_control, trained | tested))
    assert len(tested) == smoke.pretraining.test_controls
    assert not trained & tested
    assert not {utt.text for utt in controls.train} & controls.unseen_words


def test_the_record_says_who_was_heard(smoke, small_model, corpus):
    record = heard(smoke)
    assert set(record["speakers"]) == {utt.speaker for utt in split_controls(corpus, smoke).train}
    assert record["tokens"] == nemo.NeMoCTC(small_model).tokens.fingerprint


def test_the_shipped_model_heard_no_speaker_of_any_fold():
    record = heard(load("params/demo.yaml", "M08"))
    assert all(table()[name].control for name in record["speakers"])
    assert record["tokens"] == nemo.NeMoCTC(nemo.SHIPPED).tokens.fingerprint


def test_killed_in_the_middle_and_resumed_the_weights_are_the_same(smoke, small_model, corpus, tmp_path):
    """kill -9 in the middle of the second epoch; the run that goes on must end where the undisturbed one ended."""
    shutil.copytree(smoke.folder / "corpus", tmp_path / "smoke" / "corpus")
    assert run(tmp_path, die_at_step=9).returncode == -signal.SIGKILL
    assert not (tmp_path / "smoke" / "pretrained").exists()
    assert (tmp_path / "smoke" / ".pretrained.partial" / "latest.ckpt").exists()

    again = run(tmp_path, die_at_step=0)
    assert again.returncode == 0
    assert "goes on from step" in again.stdout + again.stderr
    resumed, undisturbed = weights(tmp_path / "smoke/pretrained/pretrained.nemo"), weights(small_model)
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


def test_nothing_is_trained_twice(smoke, small_model, capsys):
    before = json.loads((smoke.folder / "pretrained" / "run.json").read_text())["finished"]
    assert pretrained(smoke) == small_model
    assert json.loads((smoke.folder / "pretrained" / "run.json").read_text())["finished"] == before
    assert "step" not in capsys.readouterr().err


def test_too_few_controls_are_one_message(smoke, corpus):
    few = Corpus(
        tuple(utt for utt in corpus if not corpus.is_control(utt.speaker) or utt.speaker == "CM13"),
        "few",
        corpus.people,
    )
    with pytest.raises(UserError, match="few: 1 control speakers, but pretraining sets 1 aside"):
        split_controls(few, smoke)
