"""Logits of other code as a fold's teachers: what is refused, and that students are trained on them without a model."""

import json
from pathlib import Path

import pytest
import torch

from kdlib.errors import UserError
from kdlib.logits.store import LogitStore
from kdlib.pipeline import Fold

SPEAKERS = ("M04", "M08", "M10")


@pytest.fixture(scope="module")
def dumped(with_teachers, tmp_path_factory) -> Path:
    """The smoke recipe's teachers as the original study wrote them, on all recordings, by SpeechBrain's ids."""
    folder = tmp_path_factory.mktemp("study") / "logits"
    for name in SPEAKERS:
        write_teacher(folder, name, logits_of(with_teachers, name))
    return folder


def logits_of(fold, name) -> dict[str, dict[str, torch.Tensor]]:
    """A teacher's logits by output and utterance: of training and of test speech."""
    found = {"ctc": {}, "decoder": {}}
    for purpose in ("training", "analysis"):
        store = LogitStore(fold.outputs(name, purpose) / "ctc")
        found["ctc"] |= {utt_id: store.logits(utt_id) for utt_id in store}
    store = LogitStore(fold.outputs(name, "training") / "decoder")
    return found | {"decoder": {utt_id: store.logits(utt_id) for utt_id in store}}


def write_teacher(folder: Path, name: str, logits: dict) -> None:
    """<SPK>/<SPK>_ctc_logits.pt, a list in the order of the metadata, with blank 0, BOS 1 and EOS 2."""
    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    ids = list(logits["ctc"])
    ours = [2, 0, 1]  # theirs: blank, BOS, EOS
    for output, rows in logits.items():
        order = [*ours, *range(3, next(iter(rows.values())).shape[1])]
        torch.save(
            [rows[utt_id][:, order] if utt_id in rows else torch.zeros(0, len(order)) for utt_id in ids],
            own / f"{name}_{output}_logits.pt",
        )
    (own / f"{name}_metadata.json").write_text(json.dumps({"utterance_ids": ids}))


def fold_of(folder: Path, outputs: Path, **teacher) -> Fold:
    """The smoke recipe with these logits in place of its teachers."""
    settings = {"source": "stores", "folder": str(folder), "ids": {"blank": 0, "bos": 1, "eos": 2}} | teacher
    return Fold.load(
        "params/smoke.yaml", "M08", overrides={"outputs": str(outputs), "name": "adopted", "teacher": settings}
    )


def test_adopted_logits_are_those_of_the_teacher(dumped, with_teachers, tmp_path):
    fold = fold_of(dumped, tmp_path)
    for output in ("ctc", "decoder"):
        theirs = LogitStore(with_teachers.outputs("M04", "training") / output)
        ours = LogitStore(fold.outputs("M04", "training") / output)
        assert set(ours) == set(theirs)
        for utt_id in list(ours)[:5]:
            assert torch.allclose(ours.logits(utt_id).log_softmax(-1), theirs.logits(utt_id).log_softmax(-1), atol=5e-3)
    assert ours.header.train_speakers == ("M04",)


def test_a_fold_is_distilled_from_adopted_logits(dumped, tmp_path):
    """03, 04 and 05 without a teacher's model."""
    fold = fold_of(dumped, tmp_path)
    assert fold.target_teachers() == ["M04"]  # M08 is held out, M10 the dev speaker
    fold.target_report()
    fold = fold.of("ctc_kd")
    assert fold.scores(1)
    assert fold.examination(1)
    assert fold.combined_teachers()


@pytest.fixture(scope="module")
def own(with_teachers, tmp_path_factory) -> Path:
    """The same of each teacher's own speaker's recordings alone."""
    folder = tmp_path_factory.mktemp("own") / "logits"
    for name in SPEAKERS:
        rows = logits_of(with_teachers, name)
        write_teacher(
            folder,
            name,
            {
                output: {utt: row for utt, row in found.items() if utt.startswith(name)}
                for output, found in rows.items()
            },
        )
    return folder


def test_teachers_of_their_own_recordings_are_not_averaged(own, tmp_path):
    fold = fold_of(own, tmp_path, trained_on={"M04": ["M04"]})
    fold = Fold.load("params/smoke.yaml", "M08", fold={"dev": None}, overrides=fold_overrides(own, tmp_path))
    with pytest.raises(UserError, match="would mix different recordings"):
        fold.targets("logprob_mean")
    assert fold.best_method()[0] == "own"
    fold = fold.of("ctc_kd").but(aggregation={"method": "own"})
    fold.target_report()
    assert fold.scores(1)
    assert fold.combined_teachers() is None


def fold_overrides(folder, outputs):
    settings = {"source": "stores", "folder": str(folder), "ids": {"blank": 0, "bos": 1, "eos": 2}}
    return {"outputs": str(outputs), "name": "own", "teacher": settings}
