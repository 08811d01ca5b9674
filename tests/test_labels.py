"""Few labels: who is told what, and that nothing of what is denied comes through to anybody."""

import csv
import shutil
from collections import Counter
from dataclasses import replace

import pytest
from test_speakers import SPEAKERS, everybody, fold

from kdlib.corpus import labels, prepare
from kdlib.corpus.speakers import split
from kdlib.distill import ensembles, preflight, students
from kdlib.distill.setup import student_data, teacher_hypotheses
from kdlib.distill.student_scores import student_scores
from kdlib.errors import UserError
from kdlib.evaluate import score
from kdlib.evaluate.decoder_setup import language_model
from kdlib.io import read_json
from kdlib.logits import extract
from kdlib.params import load
from kdlib.pretrained.pieces import load_tokens
from kdlib.show import comparison
from kdlib.targets.choice import target_teachers, weighting
from kdlib.teachers.adapt import speaker_teacher


def few(**settings):
    return fold().model_copy(update={"label_fraction": 0.5} | settings)


def told(corpus, params):
    known = labels.hide_unknown(corpus, params)
    return {utt.utt_id for utt in known if utt.text and labels.trainable(corpus, utt, params)}


def test_of_every_speaker_the_same_share_is_told_and_test_speech_keeps_its_references():
    corpus, params = everybody(), few()
    found = Counter(utt.speaker for utt in corpus if utt.utt_id in told(corpus, params))
    assert found == dict.fromkeys(set(SPEAKERS) - {"M08", "M10"}, 2)  # of 4 in B1 and B3
    known = labels.hide_unknown(corpus, params)
    assert all(utt.text for utt in known if utt.block == "B2" or utt.speaker == "CM01")
    apart = [utt for utt in known if utt.speaker in ("M08", "M10") and utt.block != "B2"]
    assert not any(utt.text for utt in apart)  # of whom nobody may learn


def test_a_larger_share_holds_all_of_a_smaller_one():
    corpus = everybody()
    small, large = (told(corpus, few(label_fraction=share)) for share in (0.25, 0.75))
    assert small < large


def test_by_word_all_utterances_of_some_words_are_told():
    corpus, params = everybody(), few(label_by="word", label_fraction=0.3)
    words = {utt.text for utt in corpus if utt.utt_id in told(corpus, params)}
    assert len(words) == 1  # of three that are said in B1 and B3
    said = [utt for utt in corpus if utt.text in words and labels.trainable(corpus, utt, params)]
    assert told(corpus, params) == {utt.utt_id for utt in said if utt.speaker not in ("M08", "M10")}


def test_other_microphones_go_with_their_utterance():
    corpus = everybody(("M04", "M08", "M10"))
    copies = [replace(utt, utt_id=f"{utt.utt_id}_M6", copy_of=utt.utt_id) for utt in corpus]
    corpus = replace(corpus, utterances=(*corpus.utterances, *copies))
    found = told(corpus, few())
    assert len(found) == 4
    assert all(utt.copy_of in found for utt in copies if utt.utt_id in found)


def test_with_every_label_nothing_changes():
    corpus = everybody()
    assert labels.hide_unknown(corpus, fold()) is corpus


def test_a_corpus_without_blocks_keeps_the_references_of_who_is_tested():
    corpus = everybody()
    corpus = replace(corpus, utterances=tuple(replace(utt, block="") for utt in corpus))
    known = labels.hide_unknown(corpus, few())
    assert all(utt.text for utt in known if utt.speaker in ("M08", "M10"))
    assert Counter(bool(utt.text) for utt in known if utt.speaker == "M04") == {True: 3, False: 3}
    with pytest.raises(UserError, match="use_unlabelled_held_out: M08 says nothing in the training blocks"):
        split(known, few(use_unlabelled_held_out=True))


def test_the_held_out_speakers_other_blocks_are_heard_without_transcripts_when_asked_for():
    params = fold().model_copy(update={"use_unlabelled_held_out": True})
    splits = split(labels.hide_unknown(everybody(), params), params)
    assert {(utt.speaker, utt.block, utt.text) for utt in splits.unlabelled} == {("M08", "B1", ""), ("M08", "B3", "")}
    assert {utt.speaker for utt in splits.train} == set(SPEAKERS) - {"M08", "M10", "M01"}


@pytest.mark.parametrize(
    ("theirs", "leaks"),
    [
        ({"fraction": 0.5, "by": "utterance", "seed": 1}, ""),
        ({"fraction": 0.2, "by": "utterance", "seed": 1}, ""),
        ({"fraction": 0.5, "by": "utterance", "seed": 2}, "drawn with seed 2"),
        ({"fraction": 0.2, "by": "word", "seed": 1}, "by word"),
        ({"fraction": 1.0}, "was trained with all of the labels, the student is given 50 %"),
        (None, "was trained with all"),
        ({"fraction": 0.5, "by": "utterance", "seed": 1, "unlabelled_speakers": ["M08"]}, "has heard M08 without"),
    ],
)
def test_a_teacher_may_have_seen_no_more(theirs, leaks):
    found = labels.leaks(theirs, few())
    assert (leaks in found) if leaks else found == ""


VARIANTS = ("hard_20", "ctc_kd_20", "words_20", "n_best_20", "occupancy_20")


@pytest.fixture(scope="module")
def worlds(taught, tmp_path_factory):
    """Two copies of the smoke corpus; in the second every denied transcript is another word."""
    found = []
    for swapped in (False, True):
        out = tmp_path_factory.mktemp("swapped" if swapped else "plain")
        shutil.copytree(taught.folder / "corpus", out / "smoke" / "corpus")
        for shared in ("pretrained", "tokens", "parents"):
            shutil.copytree(taught.folder / shared, out / "smoke" / shared)
        found.append(out)
        if not swapped:
            continue
        params, manifest = in_world(out, "hard_20"), out / "smoke" / "corpus" / "manifest.csv"
        corpus = prepare.load(params.with_all_labels)
        keep = labels.labelled(corpus, params)
        denied = {utt.utt_id for utt in corpus if labels.trainable(corpus, utt, params)} - keep
        rows = list(csv.DictReader(manifest.open(newline="", encoding="utf-8")))
        words = sorted({row["wrd"] for row in rows if row["ID"] in denied})
        for row in rows:
            if row["ID"] in denied:
                row["wrd"] = words[(words.index(row["wrd"]) + 1) % len(words)]
        with manifest.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        assert len(denied) > len(keep)
    for out in found:  # who teach
        for name in ("hard", "hard_20"):
            students.student(in_world(out, name))
    return found


def in_world(out, variant, **teacher):
    teacher |= {"student_seeds": [1]}
    return load("params/smoke.yaml", "M08", overrides={"outputs": str(out), "teacher": teacher}, variant=variant)


@pytest.mark.parametrize("name", VARIANTS)
def test_students_are_the_same_to_the_byte_whatever_the_denied_labels_say(worlds, name):
    """No teacher, no store, no lexicon's weight, no language model and no student has seen them."""
    made = []
    for out in worlds:
        params = in_world(out, name)
        folder = students.student(params)
        files = [folder / "model.safetensors", language_model(params, load_tokens(params))]
        if params.distill.uses_teachers:
            teacher = target_teachers(params)[0]
            store = extract.extract(params, teacher, "training")
            files += [
                speaker_teacher(params, teacher) / "model.safetensors",
                store / "ctc/frames.bin",
                store / "outputs.csv",
            ]
        made.append([path.read_bytes() for path in files])
        record = read_json(folder / "model.json")
        assert record["unlabelled_utterances"] == (9 if params.distill.uses_teachers else 0)
        assert record["labels"] == {"fraction": 0.2, "by": "utterance", "seed": 1}
    assert made[0] == made[1]


def test_where_labels_are_told_they_make_a_difference(worlds):
    """Or the test above would say nothing."""
    weights = [(students.student(in_world(out, "hard")) / "model.safetensors").read_bytes() for out in worlds]
    assert weights[0] != weights[1]


def test_a_teacher_that_was_told_more_is_refused(worlds):
    params = in_world(worlds[0], "words_20", students=["hard"])
    with pytest.raises(UserError, match=r"teacher hard/seed1 was trained with all of the labels, the student is given"):
        students.student(params)


def test_speech_without_transcripts_has_no_decoder_targets_and_no_loss(worlds):
    params = in_world(worlds[0], "ctc_kd_20")
    splits = split(prepare.load(params), params)
    store, said = (
        extract.open_store(params, "M04", "training", "decoder"),
        extract.teacher_outputs(params, "M04", "training"),
    )
    assert {utt.utt_id in store for utt in splits.train} == {True}
    assert {utt.utt_id in store for utt in splits.unlabelled} == {False}
    assert {said[utt.utt_id].ctc_loss == said[utt.utt_id].ctc_loss for utt in splits.unlabelled} == {False}  # nan
    weights = weighting(params, "weighted_loss", ["M04"]).losses["M04"]
    assert set(weights) == {utt.utt_id for utt in splits.train}


def test_few_labels_or_many_the_same_steps_have_the_same_looks(worlds):
    plans = []
    for name in ("hard", "hard_20", "words_20"):
        params = in_world(worlds[0], name)
        chosen = student_data(params, load_tokens(params))
        plan = students.batch_plan(params, chosen)
        plans.append((plan.groups, plan.parts, plan.steps))
        batches = [utt for part in range(plan.parts) for batch in plan.part(chosen.train, part, 1) for utt in batch]
        assert {utt.utt_id for utt in batches} == {utt.utt_id for utt in chosen.train}
    assert len(set(map(str, plans))) == 1


def test_who_hears_the_held_out_speaker_says_so(worlds):
    params = load(
        "params/smoke.yaml",
        "M08",
        overrides={"outputs": str(worlds[0]), "use_unlabelled_held_out": True},
        variant="one_best",
    ).model_copy(update={"variant": "heard"})
    params = params.model_copy(update={"teacher": params.teacher.model_copy(update={"student_seeds": (1,)})})
    folder = student_scores(params)
    record = read_json(folder.parent / "model.json")
    assert record["labels"]["unlabelled_speakers"] == ["M08"]
    assert record["unlabelled_utterances"] == 12  # B1 and B3 of the held-out speaker
    assert "M08" not in record["train_speakers"]  # with a transcript
    remark = "has heard M08 without transcripts: no leave-one-speaker-out result"
    assert read_json(folder / "scores.json")["remark"] == remark
    assert comparison.fold_table({("heard", 1): folder}).loc[("heard", 1), "remark"] == remark
    assert "speaker independence" in [one.name for one in preflight.preflight(params)]
    strict = in_world(worlds[0], "words", students=["train_speakers"])
    with pytest.raises(UserError, match="heard/seed1 has heard M08 without transcripts, who is held out here"):
        students.student(strict)


def test_what_is_taught_in_place_of_references_is_counted(worlds):
    table = comparison.pseudo_label_table(in_world(worlds[0], "n_best_20"))
    assert table.index.tolist() == ["labelled", "without transcript"]
    assert table.utterances.tolist() == [3, 9]
    assert table["taught %"].tolist() == [100, 100]  # no least confidence
    assert comparison.pseudo_label_table(in_world(worlds[0], "hard_20")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"resume": "hard"}}, "student.resume: .*hard/seed1 was trained with all of the labels"),
        ({"aggregation": {"method": "own"}}, "'own' asks who speaks, but students of all speakers teach here"),
        ({"distill": {"heads": "decoder", "alpha": 0.5, "words": {"weight": 0.0}}}, "hard_20/seed1 has no decoder"),
    ],
    ids=["resume", "own", "decoder"],
)
def test_what_would_leak_or_cannot_be_is_refused_in_a_line(worlds, changes, message):
    more = {"student": {"decoder_layers": 1}} if "distill" in changes else {}
    params = load(
        "params/smoke.yaml",
        "M08",
        overrides={"outputs": str(worlds[0]), "teacher": {"student_seeds": [1]}} | more | changes,
        variant="words_20",
    )
    with pytest.raises(UserError, match=message):
        students.student(params)


def test_another_draw_has_another_language_model(worlds):
    params = in_world(worlds[0], "hard_20")
    tokens = load_tokens(params)
    texts = [language_model(one, tokens).read_bytes() for one in (params, params.model_copy(update={"seed": 4}))]
    assert texts[0] != texts[1]


def test_sentences_are_no_closed_list_to_guess_from(worlds, monkeypatch):
    params = in_world(worlds[0], "n_best_20")
    monkeypatch.setattr(prepare, "spellings", lambda params: {f"GO {word}": [f"GO {word}"] for word in ("UP", "ON")})
    with pytest.raises(UserError, match=r"most of these 2 are whole sentences, the denied and the test speech's among"):
        teacher_hypotheses(params, {})


def test_an_ensemble_knows_what_its_members_were_told(worlds):
    group = {
        "few": {"variants": ["hard_20"], "seeds": [1, 2]},
        "mixed": {"variants": ["hard", "hard_20"], "seeds": [1]},
    }
    params = load("params/smoke.yaml", "M08", overrides={"outputs": str(worlds[0]), "ensembles": group})
    students.student(in_world(worlds[0], "hard_20"), 2)
    folder = ensembles.ensemble_scores(params, "few")
    told = {row.seen for row in score.read_hypotheses(folder / "hypotheses.csv")}
    assert "no" in told
    assert read_json(folder / "run.json")["parameters"]["labels"] == "labels-20"
    with pytest.raises(UserError, match=r"ensembles\.mixed: its members were given other labels than each other"):
        ensembles.ensemble_scores(params, "mixed")
