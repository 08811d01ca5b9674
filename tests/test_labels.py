"""Few labels: the share of labelled utterances, and that withheld transcripts do not leak into any model."""

import csv
import shutil
from collections import Counter
from dataclasses import replace

import pytest
from test_speakers import SPEAKERS, all_speakers, settings

from kdlib.corpus import labels, prepare
from kdlib.corpus.speakers import Splits
from kdlib.decode.lm import ARPA
from kdlib.distill import students
from kdlib.errors import UserError
from kdlib.evaluate import hypotheses
from kdlib.io import read_json
from kdlib.logits.extract import OUTPUTS, read_outputs
from kdlib.objectives import terms
from kdlib.pipeline import Fold
from kdlib.show import comparison, format


def few(**changes):
    return settings().model_copy(update={"label_fraction": 0.5} | changes)


def labelled_ids(corpus, fold):
    hidden = labels.hide_unknown(corpus, fold)
    return {utt.utt_id for utt in hidden if utt.text and labels.trainable(corpus, utt, fold)}


def test_the_same_share_of_every_speaker_is_labelled_and_test_speech_keeps_its_references():
    corpus, fold = all_speakers(), few()
    counts = Counter(utt.speaker for utt in corpus if utt.utt_id in labelled_ids(corpus, fold))
    assert counts == dict.fromkeys(set(SPEAKERS) - {"M08", "M10"}, 2)  # of 4 in B1 and B3
    hidden = labels.hide_unknown(corpus, fold)
    assert all(utt.text for utt in hidden if utt.block == "B2" or utt.speaker == "CM01")
    assert not any(utt.text for utt in hidden if utt.speaker in ("M08", "M10") and utt.block != "B2")  # held out, dev


def test_a_larger_share_includes_a_smaller_one():
    corpus = all_speakers()
    small, large = (labelled_ids(corpus, few(label_fraction=share)) for share in (0.25, 0.75))
    assert small < large


def test_by_word_all_utterances_of_some_words_are_labelled():
    corpus, fold = all_speakers(), few(label_by="word", label_fraction=0.3)
    words = {utt.text for utt in corpus if utt.utt_id in labelled_ids(corpus, fold)}
    assert len(words) == 1  # of three in B1 and B3
    utterances = [utt for utt in corpus if utt.text in words and labels.trainable(corpus, utt, fold)]
    assert labelled_ids(corpus, fold) == {utt.utt_id for utt in utterances if utt.speaker not in ("M08", "M10")}


def test_other_microphones_go_with_their_utterance():
    corpus = all_speakers(("M04", "M08", "M10"))
    copies = [utt.replace(utt_id=f"{utt.utt_id}_M6", copy_of=utt.utt_id) for utt in corpus]
    corpus = replace(corpus, utterances=(*corpus.utterances, *copies))
    ids = labelled_ids(corpus, few())
    assert len(ids) == 4
    assert all(utt.copy_of in ids for utt in copies if utt.utt_id in ids)


def test_with_every_label_nothing_changes():
    corpus = all_speakers()
    assert labels.hide_unknown(corpus, settings()) is corpus


def test_a_corpus_without_blocks_keeps_the_references_of_dev_and_test_speakers():
    corpus = all_speakers()
    corpus = replace(corpus, utterances=tuple(utt.replace(block="") for utt in corpus))
    hidden = labels.hide_unknown(corpus, few())
    assert all(utt.text for utt in hidden if utt.speaker in ("M08", "M10"))
    assert Counter(bool(utt.text) for utt in hidden if utt.speaker == "M04") == {True: 3, False: 3}
    with pytest.raises(UserError, match="use_unlabelled_held_out: M08 has no utterance in the training blocks"):
        Splits(hidden, few(use_unlabelled_held_out=True))


def test_the_held_out_speakers_other_blocks_may_be_used_without_transcripts():
    fold = settings().model_copy(update={"use_unlabelled_held_out": True})
    splits = Splits(labels.hide_unknown(all_speakers(), fold), fold)
    assert {(utt.speaker, utt.block, utt.text) for utt in splits.unlabelled} == {("M08", "B1", ""), ("M08", "B3", "")}
    assert {utt.speaker for utt in splits.train} == set(SPEAKERS) - {"M08", "M10", "M01"}


@pytest.mark.parametrize(
    ("teacher_labels", "leak"),
    [
        ({"fraction": 0.5, "by": "utterance", "seed": 1}, ""),
        ({"fraction": 0.2, "by": "utterance", "seed": 1}, ""),
        ({"fraction": 0.5, "by": "utterance", "seed": 2}, "drawn with seed 2"),
        ({"fraction": 0.2, "by": "word", "seed": 1}, "by word"),
        ({"fraction": 1.0}, "was trained with all of the labels, but the student has 50 %"),
        (None, "was trained with all"),
        ({"fraction": 0.5, "by": "utterance", "seed": 1, "unlabelled_speakers": ["M08"]}, "was trained on M08 without"),
    ],
)
def test_a_teacher_may_not_have_more_labels_than_the_student(teacher_labels, leak):
    reason = labels.leaks(teacher_labels, few())
    assert (leak in reason) if leak else reason == ""


VARIANTS = ("hard_20", "ctc_kd_20", "words_20", "n_best_20", "occupancy_20")


@pytest.fixture(scope="module")
def worlds(with_teachers, tmp_path_factory):
    """Two copies of the smoke corpus; in the second every withheld transcript is another word."""
    folders = []
    for swapped in (False, True):
        out = tmp_path_factory.mktemp("swapped" if swapped else "plain")
        shutil.copytree(with_teachers.layout.recipe / "corpus", out / "smoke" / "corpus")
        for shared in ("pretrained", "tokens", "parents"):
            shutil.copytree(with_teachers.layout.recipe / shared, out / "smoke" / shared)
        folders.append(out)
        if not swapped:
            continue
        fold, manifest = in_world(out, "hard_20"), out / "smoke" / "corpus" / "manifest.csv"
        corpus, condition = fold.all_labels.corpus, fold.split_settings
        labelled = labels.labelled(corpus, condition)
        hidden = {utt.utt_id for utt in corpus if labels.trainable(corpus, utt, condition)} - labelled
        rows = list(csv.DictReader(manifest.open(newline="", encoding="utf-8")))
        words = sorted({row["wrd"] for row in rows if row["ID"] in hidden})
        for row in rows:
            if row["ID"] in hidden:
                row["wrd"] = words[(words.index(row["wrd"]) + 1) % len(words)]
        with manifest.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        assert len(hidden) > len(labelled)
    for out in folders:  # the teachers
        for name in ("hard", "hard_20"):
            in_world(out, name).student()
    return folders


def in_world(out, variant, **teacher):
    teacher |= {"student_seeds": [1]}
    return Fold.load("params/smoke.yaml", "M08", variant, overrides={"outputs": str(out), "teacher": teacher})


@pytest.mark.parametrize("name", VARIANTS)
def test_students_do_not_depend_on_withheld_transcripts(worlds, name):
    """Nor does any teacher, store, lexicon weight or language model."""
    contents = []
    for out in worlds:
        fold = in_world(out, name)
        folder, uses_teachers = fold.student(), terms.uses_teachers(fold.params.distill)
        files = [folder / "model.safetensors", fold.language_model() / ARPA]
        if uses_teachers:
            teacher = fold.target_teachers()[0]
            store = fold.outputs(teacher, "training")
            files += [
                fold.teacher(teacher) / "model.safetensors",
                store / "ctc/frames.bin",
                store / "outputs.csv",
            ]
        contents.append([path.read_bytes() for path in files])
        record = read_json(folder / "model.json")
        assert record["unlabelled_utterances"] == (9 if uses_teachers else 0)
        assert record["labels"] == {"fraction": 0.2, "by": "utterance", "seed": 1}
    assert contents[0] == contents[1]


def test_students_depend_on_available_transcripts(worlds):
    """Otherwise the test above would prove nothing."""
    weights = [(in_world(out, "hard").student() / "model.safetensors").read_bytes() for out in worlds]
    assert weights[0] != weights[1]


def test_a_teacher_with_more_labels_is_refused(worlds):
    fold = in_world(worlds[0], "words_20", students=["hard"])
    with pytest.raises(UserError, match=r"teacher hard/seed1 was trained with all of the labels, but the student"):
        fold.student()


def test_speech_without_transcripts_has_no_decoder_targets_and_no_loss(worlds):
    fold = in_world(worlds[0], "ctc_kd_20")
    splits = fold.splits
    store = fold.store("M04", "training", "decoder")
    outputs = read_outputs(fold.outputs("M04", "training") / OUTPUTS)
    assert {utt.utt_id in store for utt in splits.train} == {True}
    assert {utt.utt_id in store for utt in splits.unlabelled} == {False}
    assert {outputs[utt.utt_id].ctc_loss == outputs[utt.utt_id].ctc_loss for utt in splits.unlabelled} == {False}  # nan
    assert fold.target_teachers() == ["M04"]
    weights = fold.targets("weighted_loss").weighting.losses["M04"]
    assert set(weights) == {utt.utt_id for utt in splits.train}


def test_the_validations_do_not_depend_on_the_number_of_labels(worlds):
    plans = []
    for name in ("hard", "hard_20", "words_20"):
        fold = in_world(worlds[0], name)
        data = fold.student_data()
        plan = students.batch_plan(fold.params.student, data)
        plans.append((plan.groups, plan.parts, plan.steps))
        batches = [utt for part in range(plan.parts) for batch in plan.part(data.train, part, 1) for utt in batch]
        assert {utt.utt_id for utt in batches} == {utt.utt_id for utt in data.train}
    assert len(set(map(str, plans))) == 1


def test_training_on_the_held_out_speaker_without_transcripts_is_recorded(worlds):
    fold = Fold.load(
        "params/smoke.yaml", "M08", "one_best", overrides={"outputs": str(worlds[0]), "use_unlabelled_held_out": True}
    ).but(variant="unlabelled", teacher={"student_seeds": (1,)})
    folder = fold.scores()
    record = read_json(folder.parent / "model.json")
    assert record["labels"]["unlabelled_speakers"] == ["M08"]
    assert record["unlabelled_utterances"] == 12  # B1 and B3 of the held-out speaker
    assert "M08" not in record["train_speakers"]  # with a transcript
    remark = "trained on M08 without transcripts: no leave-one-speaker-out result"
    assert read_json(folder / "scores.json")["remark"] == remark
    shown = format.fold_table(comparison.fold_scores({("unlabelled", 1): folder}), "wra")
    assert shown.loc[("", "unlabelled", 1), "remark"] == remark
    assert "speaker independence" in [check.name for check in fold.preflight()]
    strict = in_world(worlds[0], "words", students=["unlabelled"])
    with pytest.raises(UserError, match="unlabelled/seed1 was trained on M08 without transcripts, who is held out"):
        strict.student()


def test_pseudo_labels_are_counted(worlds):
    table = comparison.pseudo_label_table(in_world(worlds[0], "n_best_20"))
    assert table.index.tolist() == ["labelled", "without transcript"]
    assert table.utterances.tolist() == [3, 9]
    assert table["used %"].tolist() == [100, 100]  # no minimum confidence
    assert comparison.pseudo_label_table(in_world(worlds[0], "hard_20")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"resume": "hard"}}, "student.resume: .*hard/seed1 was trained with all of the labels"),
        ({"aggregation": {"method": "own"}}, "'own' needs teachers of single speakers, but those here are of all"),
        ({"distill": {"heads": "decoder", "alpha": 0.5, "words": {"weight": 0.0}}}, "hard_20/seed1 has no decoder"),
    ],
    ids=["resume", "own", "decoder"],
)
def test_leaks_and_impossible_settings_are_refused_in_one_line(worlds, changes, message):
    more = {"student": {"decoder_layers": 1}} if "distill" in changes else {}
    fold = Fold.load(
        "params/smoke.yaml",
        "M08",
        "words_20",
        overrides={"outputs": str(worlds[0]), "teacher": {"student_seeds": [1]}} | more | changes,
    )
    with pytest.raises(UserError, match=message):
        fold.student()


def test_another_draw_of_labels_has_another_language_model(worlds):
    fold = in_world(worlds[0], "hard_20")
    texts = [(draw.language_model() / ARPA).read_bytes() for draw in (fold, fold.but(seed=4))]
    assert texts[0] != texts[1]


def test_sentences_are_not_a_closed_lexicon(worlds, monkeypatch):
    fold = in_world(worlds[0], "n_best_20")
    monkeypatch.setattr(prepare, "read_lexicon", lambda folder: {f"GO {word}": [f"GO {word}"] for word in ("UP", "ON")})
    with pytest.raises(UserError, match=r"most of these 2 are whole sentences, including those of unlabelled"):
        fold.teacher_hypotheses()


def test_an_ensemble_has_the_labels_of_its_members(worlds):
    group = {
        "few": {"variants": ["hard_20"], "seeds": [1, 2]},
        "mixed": {"variants": ["hard", "hard_20"], "seeds": [1]},
    }
    fold = Fold.load("params/smoke.yaml", "M08", overrides={"outputs": str(worlds[0]), "ensembles": group})
    in_world(worlds[0], "hard_20").student(2)
    folder = fold.ensemble("few")
    seen = {row.seen for row in hypotheses.read_hypotheses(folder / "hypotheses.csv")}
    assert "no" in seen
    assert read_json(folder / "run.json")["parameters"]["labels"] == "labels-20"
    with pytest.raises(UserError, match=r"ensembles\.mixed: its members were trained with different labels"):
        fold.ensemble("mixed")
