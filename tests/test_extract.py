"""Extraction: the same recordings for every teacher, the same bytes after a kill, and the printed estimate."""

import shutil
import signal

import forks
import pytest
import torch

from kdlib.corpus import inputs
from kdlib.logits import extract
from kdlib.models import hybrid
from kdlib.models.decoder import teacher_forced
from kdlib.tokens import BLANK

RUN = """
import os, sys
from kdlib.pipeline import Fold
from kdlib.logits import extract, store

extract.BATCH = 4
calls = []

def die(self, *rest, add=store.Writer.add):
    add(self, *rest)
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        self.flush()
        os.kill(os.getpid(), 9)

store.Writer.add = die
for purpose in ("training", "analysis"):
    Fold.load("params/smoke.yaml", "M08", overrides={"outputs": sys.argv[1]}).outputs("M04", purpose)
"""


def run(folder, die_at):
    return forks.run(RUN, folder, die_at)


@pytest.fixture(scope="module")
def teacher(with_teachers):
    return hybrid.TrainedModel(with_teachers.teacher("M04"))


def rows_of(fold, purpose):
    return extract.read_outputs(fold.outputs("M04", purpose) / extract.OUTPUTS)


def test_every_teacher_is_extracted_on_the_same_recordings(with_teachers):
    utt_ids = [utt.utt_id for utt in with_teachers.splits.speech_of_all()]
    for name in ("M04", "M08", "M10"):
        for output in ("ctc", "decoder"):
            assert sorted(with_teachers.store(name, "training", output)) == sorted(utt_ids)
    assert {utt.block for utt in with_teachers.splits.speech_of_all()} == {"B1", "B3"}
    assert {utt.block for utt in with_teachers.splits.speech_of_all(test=True)} == {"B2"}


def test_stored_outputs_are_those_of_the_teacher(with_teachers, teacher):
    stores = {output: with_teachers.store("M04", "training", output) for output in ("ctc", "decoder")}
    rows = rows_of(with_teachers, "training")
    for utt in with_teachers.splits.speech_of_all()[::5]:
        ids = teacher.tokens.encode(utt.text)
        given, _, _ = teacher_forced([ids])
        samples, lengths = inputs.collate([utt])
        with torch.inference_mode():
            outputs = teacher.model(samples, lengths, given)
        assert torch.allclose(stores["ctc"].logits(utt.utt_id), outputs.ctc.logits[0], atol=1e-2)  # fp16
        assert torch.allclose(stores["decoder"].logits(utt.utt_id), outputs.decoder_logits[0], atol=1e-2)
        assert stores["decoder"].frames(utt.utt_id) == len(ids) + 1  # the tokens and EOS
        loss = torch.nn.functional.ctc_loss(
            outputs.ctc.logits[0].log_softmax(-1), torch.tensor(ids), outputs.lengths, torch.tensor([len(ids)]), BLANK
        )
        assert rows[utt.utt_id].ctc_loss == pytest.approx(float(loss), rel=1e-3)


def test_the_decoder_runs_free_on_analysis_speech(with_teachers, teacher):
    rows = rows_of(with_teachers, "analysis")
    for utt in with_teachers.splits.speech_of_all(test=True)[::5]:
        with torch.inference_mode():
            outputs = teacher(*inputs.collate([utt]))
        free = teacher.model.decode_greedy(outputs.encoded, 40, outputs.lengths)[0]
        hypothesis = list(rows[utt.utt_id].free_running)
        assert hypothesis == free[: len(hypothesis)]
        assert hypothesis == free or len(hypothesis) >= 4
    assert not any(row.free_running for row in rows_of(with_teachers, "training").values())


def test_headers_state_the_permitted_use(with_teachers):
    training, analysis = (with_teachers.store("M04", purpose).header for purpose in ("training", "analysis"))
    assert (training.purpose, analysis.purpose) == ("training", "analysis")
    assert "M04" in training.train_speakers
    assert training.stride_ms == 40
    assert with_teachers.store("M04", "training", "decoder").header.stride_ms == 0


def test_a_killed_and_resumed_extraction_has_the_same_bytes(with_teachers, tmp_path):
    for name in ("corpus", "pretrained", "tokens", "parents", "teachers"):
        shutil.copytree(with_teachers.layout.recipe / name, tmp_path / "smoke" / name)
    shutil.copytree(tmp_path, tmp_path / "whole")
    assert run(tmp_path / "whole", 0).returncode == 0
    for die_at in (6, 5, 30):  # in a batch of four, twice; then in the analysis
        assert run(tmp_path, die_at).returncode == -signal.SIGKILL
    assert run(tmp_path, 0).returncode == 0
    places = [folder / "smoke/logits/sb/M04" for folder in (tmp_path, tmp_path / "whole")]
    names = sorted(path.relative_to(places[1]) for path in places[1].rglob("*") if path.is_file())
    names = [name for name in names if name.name != ".files.json"]  # it has the files' times
    assert len(names) > 10
    for name in names:
        if name.name != "run.json":
            assert (places[0] / name).read_bytes() == (places[1] / name).read_bytes(), name


def test_time_and_size_are_estimated_beforehand(with_teachers, teacher, capsys):
    utts = with_teachers.splits.speech_of_all()
    job = extract.Extraction("M04", "training", with_teachers.params.aggregation.encoding)
    headers = [extract._header(teacher, output, job)[0] for output in ("ctc", "decoder")]
    extract._announce("M04", teacher, utts, headers)
    printed = capsys.readouterr().out
    assert f"outputs of M04 for training: {len(utts)} utterances" in printed
    assert "MB (as float32 logits" in printed


def test_sizes_are_those_of_the_files(with_teachers):
    folder = with_teachers.outputs("M04", "training")
    row = extract.store_sizes({"M04": folder}).loc["M04"]
    stores = [with_teachers.store("M04", "training", output) for output in ("ctc", "decoder")]
    assert row["CTC frames"] == sum(map(stores[0].frames, stores[0]))
    dense = sum(4 * store.header.size * sum(map(store.frames, store)) for store in stores)
    assert row["MB as float32 logits"] == round(dense / 1e6, 1)
