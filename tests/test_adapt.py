"""Teachers: their training speakers and folders, and the same weights after a killed and resumed training."""

import json
import shutil
import signal

import forks
import pytest
import torch

from kdlib.corpus.speakers import in_blocks
from kdlib.errors import UserError
from kdlib.models import hybrid
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer, restore_model
from kdlib.pipeline import Fold
from kdlib.teachers.base_model import SHIPPED, control_data, shipped_base_model
from kdlib.tokens import Tokens
from kdlib.training.sampling import set_aside

RUN = """
import os, sys
from kdlib.training import callbacks
from kdlib.pipeline import Fold

def step_and_die(self, trainer, *rest, step=callbacks._Progress.on_train_batch_end):
    step(self, trainer, *rest)
    if trainer.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), 9)

callbacks._Progress.on_train_batch_end = step_and_die
pace = {"steps": 20, "batch_size": 16, "validate_every": 1, "warmup_steps": 1}
settings = {"outputs": sys.argv[1], "teacher": {"base_training": pace, "adapt": pace | {"batch_size": 4}}}
Fold.load("params/smoke.yaml", "M08", overrides=settings).teacher("M04")
"""


def run(folder, die_at_step):
    return forks.run(RUN, folder, die_at_step)


def record(folder):
    return json.loads((folder / "model.json").read_text())


def test_a_teacher_is_trained_on_controls_and_its_own_speaker(with_teachers, corpus):
    speakers = record(with_teachers.base_model())["train_speakers"]
    assert len(speakers) > 1
    assert set(record(with_teachers.teacher("M04"))["train_speakers"]) == {*speakers, "M04"}
    assert all(map(corpus.is_control, speakers))


def test_teachers_are_shared_by_folds(with_teachers):
    other_fold = Fold.load("params/smoke.yaml", "M10", overrides={"outputs": with_teachers.params.outputs})
    assert other_fold.teacher("M04") == with_teachers.teacher("M04")
    assert with_teachers.teacher("M04").parent == with_teachers.layout.recipe / "teachers" / "sb"


def test_dev_utterances_are_not_trained_on(corpus):
    own = corpus.where(lambda utt: utt.speaker == "M04" and in_blocks(utt, ("B1", "B3")))
    data = set_aside(own, 0.25, 1)
    assert {utt.utt_id for utt in data.train}.isdisjoint(utt.utt_id for utt in data.dev)
    assert sorted([*data.train, *data.dev], key=own.index) == own
    assert data.dev
    of_all = set_aside(corpus.utterances, 0.25, 1)  # a base model of all speakers has the same dev utterances
    assert [utt for utt in of_all.dev if utt in own] == data.dev
    assert abs(len(of_all.dev) / len(corpus) - 0.25) < 4 * (0.25 * 0.75 / len(corpus)) ** 0.5  # 4 standard errors


def test_other_microphones_follow_their_utterance(corpus):
    own = corpus.where(lambda utt: utt.speaker == "M04")
    copies = [utt.replace(utt_id=f"{utt.utt_id}_M7", copy_of=utt.utt_id) for utt in own]
    data = set_aside([*own, *copies], 0.25, 1)
    dev = {utt.utt_id for utt in data.dev}
    assert not any(utt.copy_of for utt in data.dev)
    assert not any(utt.copy_of in dev for utt in data.train)


def test_a_killed_and_resumed_training_ends_with_the_same_weights(with_teachers, tmp_path):
    for name in ("corpus", "pretrained"):
        shutil.copytree(with_teachers.layout.recipe / name, tmp_path / "smoke" / name)
    shutil.copytree(tmp_path, tmp_path / "whole")
    whole = run(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert run(tmp_path, 18).returncode == -signal.SIGKILL  # in the base model
    again = run(tmp_path, 8)  # in the teacher: the base model is past step 8
    assert again.returncode == -signal.SIGKILL
    assert "base model of the teachers: resumes from step" in again.stdout + again.stderr
    assert not (tmp_path / "smoke/teachers/sb/M04").exists()
    again = run(tmp_path, 0)
    assert "teacher M04: resumes from step" in again.stdout + again.stderr
    resumed, uninterrupted = (
        hybrid.load(folder / "smoke/teachers/sb/M04")[0].state_dict() for folder in (tmp_path, tmp_path / "whole")
    )
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_teachers_with_nemos_encoder_start_from_the_students_checkpoint(outputs):
    fold = Fold.load(
        "params/smoke.yaml",
        "M08",
        overrides={"outputs": str(outputs), "pretrained": "shipped", "teacher": {"encoder": "nemo"}, "name": "nemo"},
    )
    base, _, base_record = hybrid.load(fold.base_model())
    source = restore_model(SHIPPED_MODEL)
    for name, weight in source.encoder.state_dict().items():  # frozen while the decoder is trained
        assert torch.equal(weight, base.encoder.encoder.state_dict()[name]), name
    assert torch.equal(base.ctc_head.weight[5], source.decoder.decoder_layers[0].weight[5, :, 0])
    assert base_record["encoder"] == "nemo"
    teacher, _, teacher_record = hybrid.load(fold.teacher("M04"))
    assert not torch.equal(teacher.ctc_head.weight, base.ctc_head.weight)
    assert set(teacher_record["train_speakers"]) == {"M04", *base_record["train_speakers"]}
    assert set(teacher_record["train_speakers"]) >= set(fold.pretrained_record()["speakers"])


def test_a_teacher_from_scratch_is_trained_on_its_speaker_alone(outputs):
    fold = Fold.load("params/smoke.yaml", "M08", overrides={"outputs": str(outputs), "teacher": {"parent": "none"}})
    assert fold.base_model() is None
    folder = fold.teacher("M04")
    assert folder.parent.name == "sb-scratch"
    assert record(folder)["train_speakers"] == ["M04"]


def test_a_base_model_of_the_folds_speakers_belongs_to_the_fold(outputs):
    fold = Fold.load(
        "params/smoke.yaml", "M08", overrides={"outputs": str(outputs), "teacher": {"parent": "from_corpus"}}
    )
    folder = fold.base_model()
    assert folder == fold.layout.fold / "parents" / "sb"
    assert record(folder)["train_speakers"] == sorted({utt.speaker for utt in fold.splits.train})
    assert not {fold.params.held_out, fold.params.fold.dev} & set(record(folder)["train_speakers"])


def test_without_controls_the_error_names_other_settings(monkeypatch, smoke, corpus):
    monkeypatch.setattr(type(corpus), "is_control", lambda self, name: False)
    with pytest.raises(UserError, match="no control speakers to train the base model of the teachers on;"):
        control_data(corpus, smoke.params.pretraining, smoke.params.seed)


def test_the_shipped_base_model_fits_the_demo_and_no_other_shape(tmp_path):
    tokens = Tokens.for_teachers(SHIPPED / "tokenizer.model")
    assert tokens.model == read_tokenizer(SHIPPED_MODEL)
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 5e6
    demo = Fold.load("params/demo.yaml", "M08").params.teacher
    assert shipped_base_model(demo, tokens) == SHIPPED
    with pytest.raises(UserError, match="another shape than this recipe"):
        shipped_base_model(demo.model_copy(update={"kernel": demo.kernel + 2}), tokens)
    settings = {"outputs": str(tmp_path), "pretrained": "shipped", "teacher": {"parent": "shipped"}}
    with pytest.raises(UserError, match="the shipped base model has other tokens or another shape"):
        Fold.load("params/smoke.yaml", "M08", overrides=settings).base_model()


@pytest.mark.parametrize(
    ("speakers", "names"),
    [
        ((), ["M04"]),  # the fold's: M08 is held out, M10 its dev speaker
        (["M10"], ["M10"]),
        ("all", ["M04", "M08", "M10"]),
        ("1/2 of all", ["M04", "M10"]),
        ("2/2 of all", ["M08"]),
        ("2/2", []),
    ],
)
def test_teachers_are_requested_by_name_or_by_part(smoke, speakers, names):
    assert smoke.teacher_names(speakers) == names


@pytest.mark.parametrize(
    ("speakers", "message"),
    [
        ("3/2", 'expected names, "all", "1/2"'),
        (["M80"], "there is no teacher for 'M80', .*; expected one of M04, M08, M10"),
        ("half", 'expected names, "all", "1/2"'),
    ],
)
def test_unknown_speakers_and_parts_are_refused(smoke, speakers, message):
    with pytest.raises(UserError, match=message):
        smoke.teacher_names(speakers)
