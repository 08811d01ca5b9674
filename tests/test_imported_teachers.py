"""Logits of other code as a fold's teachers: what is refused, and that students are trained on them without a model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdlib.corpus.inputs import Batch
from kdlib.errors import UserError
from kdlib.logits import adopt
from kdlib.logits.adopt import FoundTeacher
from kdlib.logits.found import FoundLogits
from kdlib.logits.store import LogitStore
from kdlib.pipeline import Fold
from kdlib.settings.distill import WordTerm
from kdlib.settings.schedule import constant
from kdlib.settings.teacher import TokenIds
from kdlib.teachers.teacher_sets import by_speaker, trained_on

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


def fold_of(logits: Path, outputs: Path, **teacher) -> Fold:
    """The smoke recipe with these logits in place of its teachers."""
    settings = {"source": "stores", "folder": str(logits), "ids": {"blank": 0, "bos": 1, "eos": 2}} | teacher
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
    fold = Fold.load("params/smoke.yaml", "M08", fold={"dev": None}, overrides=fold_overrides(own, tmp_path))
    with pytest.raises(UserError, match="would mix different recordings"):
        fold.targets("logprob_mean")
    assert fold.best_method()[0] == "own"
    fold = fold.of("ctc_kd").but(aggregation={"method": "own"})
    fold.target_report()
    assert fold.scores(1)
    assert fold.combined_teachers() is None
    words = WordTerm(weight=constant(1.0), pooled=True)
    pooled = fold.but(distill={"alpha": constant(0.0), "words": words})
    hypotheses = pooled._hypotheses({"ctc": pooled.targets()})
    by_word = {(utt.text, utt.speaker): utt for utt in fold.splits.train}
    word = fold.splits.train[0].text  # by two speakers, each with a teacher of its own
    first, second = by_word[word, "M04"], by_word[word, "M10"]
    one, other = hypotheses.posterior(Batch([first])), hypotheses.posterior(Batch([second]))
    assert torch.equal(one, other)


def fold_overrides(folder, outputs):
    settings = {"source": "stores", "folder": str(folder), "ids": {"blank": 0, "bos": 1, "eos": 2}}
    return {"outputs": str(outputs), "name": "own", "teacher": settings}


def broken(source: Path, tmp_path: Path, change) -> Fold:
    """The fold with a copy of the logits that one change has spoilt."""
    folder = tmp_path / "logits"
    shutil.copytree(source, folder)
    more = change(folder)
    return fold_of(folder, tmp_path / "outputs", **(more if isinstance(more, dict) else {}))


def rewrite(folder: Path, change, name="M04", output="ctc") -> None:
    path = folder / name / f"{name}_{output}_logits.pt"
    torch.save(change(torch.load(path)), path)


def truncated(folder: Path) -> None:
    path = folder / "M04" / "M04_ctc_logits.pt"
    path.write_bytes(path.read_bytes()[:2000])


def of_nobody(folder: Path) -> None:
    for path in (folder / "M04").iterdir():
        path.rename(path.with_name(path.name.replace("M04", "best")))
    (folder / "M04").rename(folder / "best")


BAD = {
    "truncated": (truncated, r"M04_ctc_logits.pt: cannot be read as tensors .*without: \[M04\]"),
    "fewer than named": (lambda folder: rewrite(folder, lambda rows: rows[:-1]), "its metadata names"),
    "other vocabulary": (lambda folder: rewrite(folder, lambda rows: [r[:, :30] for r in rows]), "30 tokens, but"),
    "no teacher left": (lambda folder: {"without": ["M04", "M08", "M10"]}, "no teacher is left"),
    "no CTC": (lambda folder: (folder / "M04" / "M04_ctc_logits.pt").unlink(), "M04 has no CTC logits"),
    "nobody's": (of_nobody, "best does not say whom this teacher was trained on"),
    "nan": (lambda folder: rewrite(folder, lambda rows: [r * float("nan") for r in rows]), "NaN"),
    "held out": (lambda folder: {"trained_on": {"M04": ["M08"]}}, "none is of the fold's training speakers alone"),
    "beyond": (lambda folder: {"ids": {"blank": 0, "bos": 99, "eos": 2}}, "99 is beyond"),
    "no folder": (lambda folder: {"folder": str(folder / "nowhere")}, "there is no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_logits_that_cannot_be_used_are_refused_in_a_sentence(dumped, tmp_path, case):
    change, message = BAD[case]
    fold = broken(dumped, tmp_path, change)
    with pytest.raises(UserError, match=message):
        adopted(fold)


def adopted(fold: Fold) -> None:
    fold.target_teachers()
    fold.outputs("M04", "training")


def test_probabilities_are_taken_by_their_logarithm_and_a_temperature_is_undone(dumped, with_teachers, tmp_path):
    def change(folder: Path) -> dict:
        for name in SPEAKERS:
            rewrite(folder, lambda rows: [(row / 2.0).softmax(-1) for row in rows], name)
            (folder / name / f"{name}_decoder_logits.pt").unlink()
        return {"logits_temperature": 2.0}

    fold = broken(dumped, tmp_path, change)
    theirs = LogitStore(with_teachers.outputs("M04", "training") / "ctc")
    ours = LogitStore(fold.outputs("M04", "training") / "ctc")
    utt_id = next(iter(ours))
    assert torch.allclose(ours.logits(utt_id).log_softmax(-1), theirs.logits(utt_id).log_softmax(-1), atol=2e-2)


def test_a_blank_elsewhere_is_named(tmp_path):
    best = {"u": np.array([0, 7, 0, 0, 9, 0])}
    source = FoundLogits("M04", "ctc", tmp_path / "x.pt", {"u": lambda: np.zeros((6, 40))})
    with pytest.raises(UserError, match="token 0 is the best in 67 % of the frames, and 2"):
        adopt._check_blank(source, best, TokenIds())
    adopt._check_blank(source, best, TokenIds(blank=0, bos=1, eos=2))


def test_batches_of_speechbrains_recipe_for_timit(with_teachers, tmp_path):
    """One file of several teachers, padded, log-probabilities of CTC and probabilities of the decoder at T = 2."""
    import h5py

    speech = sorted(with_teachers.splits.speech_of_all(), key=lambda utt: utt.duration_s)
    folder = tmp_path / "logits"
    folder.mkdir()
    stores = {
        (name, output): LogitStore(with_teachers.outputs(name, "training") / output)
        for name in SPEAKERS
        for output in ("ctc", "decoder")
    }
    with h5py.File(folder / "tea_infer_8batch.hdf5", "w") as file:
        for number, start in enumerate(range(0, len(speech), 8)):
            batch = speech[start : start + 8]
            for (name, output), store in stores.items():
                rows = [store.logits(utt.utt_id) / 2 for utt in batch]
                padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                values = padded.log_softmax(-1) if output == "ctc" else padded.softmax(-1)
                place = {"ctc": "p_ctc_tea", "decoder": "p_seq_tea"}[output]
                file[f"train/{number}/{name}/{place}"] = values.numpy()
    metadata = folder / "tea_infer_8batch_metadata.json"
    metadata.write_text(json.dumps({"utterance_ids": {"train": [utt.utt_id for utt in speech]}}))
    fold = fold_of(folder, tmp_path / "outputs", ids={"blank": 2, "bos": 0, "eos": 1}, logits_temperature=2.0)
    assert fold.target_teachers() == ["M04"]
    for output in ("ctc", "decoder"):
        ours = LogitStore(fold.outputs("M04", "training") / output)
        for utt in speech[:9]:
            theirs = stores["M04", output].logits(utt.utt_id).log_softmax(-1)
            found = ours.logits(utt.utt_id).log_softmax(-1)
            assert 0 <= len(found) - len(theirs) <= (output == "ctc")
            assert torch.allclose(found[: len(theirs)], theirs, atol=3e-2)
    metadata.write_text(json.dumps({"utterance_ids": {"train": ["one"]}}))
    with pytest.raises(UserError, match="utterances of M04 in 'train', but its metadata names 1"):
        fold_of(folder, tmp_path / "other").target_teachers()


def test_metadata_that_is_corrected_makes_the_stores_anew(dumped, tmp_path):
    """The order of a list is in its metadata alone."""
    folder = tmp_path / "logits"
    shutil.copytree(dumped, folder)
    before = adopt.find_teachers(fold_of(folder, tmp_path).params.teacher, fold_of(folder, tmp_path).corpus)
    path = folder / "M04" / "M04_metadata.json"
    path.write_text(json.dumps({"utterance_ids": json.loads(path.read_text())["utterance_ids"][::-1]}))
    after = adopt.find_teachers(fold_of(folder, tmp_path).params.teacher, fold_of(folder, tmp_path).corpus)
    assert before["M04"].files != after["M04"].files
    assert before["M10"].files == after["M10"].files


def test_logits_on_training_speech_alone_train_students(dumped, tmp_path):
    """Teachers that were extracted on no test block: nothing to compare there, and no error."""

    def change(folder: Path) -> None:
        for name in SPEAKERS:
            metadata = folder / name / f"{name}_metadata.json"
            ids = json.loads(metadata.read_text())["utterance_ids"]
            kept = [place for place, utt_id in enumerate(ids) if "_B2_" not in utt_id]
            metadata.write_text(json.dumps({"utterance_ids": [ids[place] for place in kept]}))
            for output in ("ctc", "decoder"):
                rewrite(folder, lambda rows, kept=kept: [rows[place] for place in kept], name, output)

    fold = broken(dumped, tmp_path, change)
    fold.target_report()
    student = fold.of("ctc_kd").but(aggregation={"method": "logprob_mean"})
    assert student.scores(1)
    with pytest.raises(UserError, match="no outputs on dev speech; name a method"):
        fold.best_method()


def test_two_teachers_of_one_name_are_refused():
    one, other = (FoundTeacher("", speakers, {}) for speakers in (("M05", "M08"), ("M08",)))
    assert by_speaker({"both": one, "theirs": other}) == {"both": one, "M08": other}
    with pytest.raises(UserError, match="two teachers are called M08"):
        by_speaker({"M08": one, "theirs": other})


def test_folders_named_after_a_speaker_are_that_speakers_teacher(own, tmp_path):
    folder = tmp_path / "logits"
    for name in SPEAKERS:
        shutil.copytree(own / name, folder / f"conformer_{name}")
        for path in (folder / f"conformer_{name}").iterdir():
            path.rename(path.with_name(path.name.replace(name, f"conformer_{name}")))
    fold = fold_of(folder, tmp_path / "outputs")
    assert fold.target_teachers() == ["M04"]
    assert trained_on("conformer_M04", fold.params.teacher, fold.corpus) == ("M04",)
    for name in ("loso_M08", "without-M08", "M04_M10", "best"):
        with pytest.raises(UserError, match=f"{name} does not say whom this teacher was trained on"):
            trained_on(name, fold.params.teacher, fold.corpus)


def test_logits_of_other_utterances_than_the_corpus_are_refused(dumped, tmp_path):
    def change(folder: Path) -> None:
        path = folder / "M04" / "M04_metadata.json"
        ids = json.loads(path.read_text())["utterance_ids"]
        path.write_text(json.dumps({"utterance_ids": [f"x{utt_id}" for utt_id in ids]}))

    with pytest.raises(UserError, match=r"none of its utterances is in the corpus: it has xM"):
        broken(dumped, tmp_path, change).target_teachers()
