import json
import shutil
import signal
from dataclasses import replace

import forks
import pytest
import torch
from corpora import own

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import published_speakers
from kdlib.errors import UserError
from kdlib.evaluate import hypotheses
from kdlib.models.nemo_files import SHIPPED_MODEL, NeMoCTC, restore_model
from kdlib.pipeline import Fold
from kdlib.pretrained.model import split_controls, split_fold

RUN = """
import os, sys
from kdlib.training import callbacks
from kdlib.pipeline import Fold

def step_and_die(self, trainer, *rest, step=callbacks._Progress.on_train_batch_end):
    step(self, trainer, *rest)
    if trainer.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), 9)

callbacks._Progress.on_train_batch_end = step_and_die
Fold.load("params/smoke.yaml", "M08", overrides={"outputs": sys.argv[1]}).pretrained_model()
"""


def run(folder, die_at_step):
    return forks.run(RUN, folder, die_at_step)


def weights(path):
    return restore_model(path).state_dict()


def test_only_controls_are_trained_on_and_some_speakers_and_words_are_held_out(smoke, corpus):
    controls = split_controls(corpus, smoke.params.pretraining, smoke.params.seed)
    trained, tested = {utt.speaker for utt in controls.train}, set(controls.test_speakers)
    assert all(map(corpus.is_control, trained | tested))
    assert len(tested) == smoke.params.pretraining.test_controls
    assert not trained & tested
    assert not {utt.text for utt in controls.train} & controls.unseen_words


def test_the_record_names_the_training_speakers(smoke, small_model, corpus):
    record = smoke.pretrained_record()
    controls = split_controls(corpus, smoke.params.pretraining, smoke.params.seed)
    assert set(record["speakers"]) == {utt.speaker for utt in controls.train}
    assert record["tokens"] == NeMoCTC(small_model).tokens.fingerprint


def test_the_shipped_model_was_trained_on_no_speaker_of_any_fold():
    record = Fold.load("params/demo.yaml", "M08").pretrained_record()
    assert all(published_speakers()[name].control for name in record["speakers"])
    assert record["tokens"] == NeMoCTC(SHIPPED_MODEL).tokens.fingerprint


def test_a_killed_and_resumed_run_has_the_same_weights(smoke, small_model, corpus, tmp_path):
    """kill -9 in the middle of the second epoch; the resumed run must end with the weights of the undisturbed one."""
    shutil.copytree(smoke.layout.recipe / "corpus", tmp_path / "smoke" / "corpus")
    assert run(tmp_path, die_at_step=9).returncode == -signal.SIGKILL
    assert not (tmp_path / "smoke" / "pretrained").exists()
    assert (tmp_path / "smoke" / ".pretrained.partial" / "latest.ckpt").exists()

    second = run(tmp_path, die_at_step=0)
    assert second.returncode == 0
    assert "resumes from step" in second.stdout + second.stderr
    resumed, undisturbed = weights(tmp_path / "smoke/pretrained/pretrained.nemo"), weights(small_model)
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


def test_nothing_is_trained_twice(smoke, small_model, capsys):
    before = json.loads((smoke.layout.recipe / "pretrained" / "run.json").read_text())["finished"]
    assert smoke.pretrained_model() == small_model
    assert json.loads((smoke.layout.recipe / "pretrained" / "run.json").read_text())["finished"] == before
    assert "step" not in capsys.readouterr().err


def test_too_few_controls_are_an_error(smoke, corpus):
    few = Corpus(
        tuple(utt for utt in corpus if not corpus.is_control(utt.speaker) or utt.speaker == "CM13"),
        "few",
        corpus.people,
    )
    with pytest.raises(UserError, match="few: 1 control speakers, but pretraining sets 1 aside"):
        split_controls(few, smoke.params.pretraining, smoke.params.seed)


TINY = {"steps": 2, "d_model": 16, "layers": 1, "heads": 2, "conv_channels": 8, "batch_size": 4, "warmup_steps": 1}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Noise of five speakers outside every table; only Ann has a word with a letter that the others lack."""
    folder = tmp_path_factory.mktemp("people")
    own(folder, ("Ann", "Bob", "Cid", "Dee", "Eve"), ("can't", "x-ray"), repetitions=2, spoken=False)
    (folder / "corpus.csv").write_text((folder / "corpus.csv").read_text().replace("Ann,can't", "Ann,café"))
    return folder


def own_fold(folder, name="own", fold=None, **pretraining):
    settings = {"manifest": str(folder / "corpus.csv"), "outputs": str(folder / "out"), "name": name, "folds": "none"}
    settings |= {"pretraining": TINY | pretraining, "speakers": {"Eve": {"level": "CONTROL"}}}
    return Fold.load("params/own.yaml", "Ann", fold={"dev": "Bob"} | (fold or {}), overrides=settings)


def speakers_of(fold):
    """The speakers that the fold's own model is trained on."""
    return {utt.speaker for utt in split_fold(fold.splits, fold.params.pretraining).train}


def test_a_folds_own_model_is_trained_on_its_training_speakers_only(people):
    fold = own_fold(people)
    path = fold.pretrained_model()
    assert path == people / "out/own/Ann/pretrained/pretrained.nemo"
    record = fold.pretrained_record()
    assert record["speakers"] == ["Cid", "Dee"]
    assert record["words"] == ["CAN'T", "X-RAY"]
    tokens = NeMoCTC(path).tokens
    assert tokens.decode(tokens.encode("café")) == "CAFÉ"  # a word that only the held-out speaker has


def test_its_zero_shot_scores_are_of_speakers_that_it_was_not_trained_on(people):
    folder = own_fold(people).zero_shot()
    assert folder == people / "out/own/Ann/zero_shot"
    rows = hypotheses.read_hypotheses(folder / "hypotheses.csv")
    assert {row.speaker for row in rows} == {"Ann", "Bob"}
    assert {row.speaker for row in hypotheses.read_hypotheses(folder / "controls/hypotheses.csv")} == {"Eve"}
    assert {row.reference for row in rows if row.seen == "no"} == {"CAFÉ"}


def test_a_recipe_can_name_controls_to_train_on(people):
    assert speakers_of(own_fold(people, speakers=["Eve"])) == {"Eve"}
    with pytest.raises(
        UserError, match=r"pretraining\.speakers names 'Even', who has no utterances; did you mean 'Eve'"
    ):
        speakers_of(own_fold(people, speakers=["Even"]))
    with pytest.raises(UserError, match=r"pretraining\.speakers names Bob, the held-out or the dev speaker"):
        own_fold(people, speakers=["Bob"])


def test_test_controls_are_of_both_sexes_if_sexes_are_known(smoke, corpus):
    two = smoke.but(pretraining={"test_controls": 2}).params.pretraining
    women = ("CM13", "CM12")
    mixed = {name: replace(person, sex="F" if name in women else "M") for name, person in corpus.people.items()}
    test_speakers = split_controls(replace(corpus, people=mixed), two, smoke.params.seed).test_speakers
    assert len({name in women for name in test_speakers}) == 2
    unknown = {name: replace(person, sex="") for name, person in corpus.people.items()}
    assert len(split_controls(replace(corpus, people=unknown), two, smoke.params.seed).test_speakers) == 2


def test_a_changed_fold_trains_its_model_again(people):
    """A model that was trained on the previous fold file's speakers must not be used with an edited one."""
    before = own_fold(people).pretrained_record()["speakers"]
    after = own_fold(people, fold={"dev": "Cid"}).pretrained_record()["speakers"]
    assert (before, after) == (["Cid", "Dee"], ["Bob", "Dee"])


def test_excluded_speakers_are_not_trained_on_even_if_named(people):
    chosen = own_fold(people, fold={"exclude": ["Cid"]}, speakers=["Cid", "Dee"])
    assert speakers_of(chosen) == {"Dee"}
    with pytest.raises(UserError, match=r"names only speakers that fold\.exclude keeps out of training"):
        speakers_of(own_fold(people, fold={"exclude": ["Cid"]}, speakers=["Cid"]))
    with pytest.raises(UserError, match=r"pretraining\.speakers names Ann, the held-out or the dev speaker"):
        own_fold(people, speakers=["Ann"])


def test_seen_words_are_those_that_the_model_was_trained_on(people):
    rows = hypotheses.read_hypotheses(own_fold(people).baseline() / "hypotheses.csv")
    assert {row.reference: row.seen for row in rows} == {"CAFÉ": "no", "X-RAY": "yes"}


def test_copies_are_not_scored(people, tmp_path):
    lines = (people / "corpus.csv").read_text().splitlines()
    copies = [f"{line.replace('Eve_', 'EveM3_', 1)},{line.split(',')[0]}" for line in lines if line.startswith("Eve_")]
    copies = [line.replace("/EveM3_", "/Eve_") for line in copies]
    (tmp_path / "wav").symlink_to(people / "wav")
    (tmp_path / "corpus.csv").write_text("\n".join([lines[0] + ",copy_of", *lines[1:], *copies]) + "\n")
    folder = own_fold(tmp_path).zero_shot()
    rows = hypotheses.read_hypotheses(folder / "controls/hypotheses.csv")
    assert len(copies) == 4
    assert not any(row.utt_id.startswith("EveM3") for row in rows)


def test_the_shipped_models_speakers_are_not_in_another_corpus():
    assert Fold.load("params/demo.yaml", "M08").pretrained_record()["speakers"]
    other = Fold.load("params/uaspeech.yaml", "M08", overrides={"pretrained": "shipped"})
    assert other.pretrained_record()["speakers"] == []
