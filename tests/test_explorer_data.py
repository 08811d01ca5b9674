"""Systems side by side: filters, search, order, confusions and notes, without a model or a browser."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import systems

from kdlib.corpus.manifest import Corpus, Speaker
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.evaluate import posteriors
from kdlib.show import explorer_data, figures
from kdlib.show.explorer_data import FILTERS, ExplorerData
from kdlib.tokens import Tokens, train_tokenizer

WORDS = ["ONE", "TWO", "SEVEN", "COME", "ALPHA", "WATER"]


def rows(folder, pairs, **columns):
    """Write a hypotheses.csv of pairs (reference, hypothesis) of speaker M08."""
    folder.mkdir()
    table = pd.DataFrame(
        [(f"M08_{place}", "M08", *pair) for place, pair in enumerate(pairs)],
        columns=["utt_id", "speaker", "reference", "greedy"],
    ).assign(level="", word_type="", seen="", **columns)
    table.to_csv(folder / "hypotheses.csv", index=False)
    return folder


@pytest.fixture
def data(tmp_path):
    references = ["ONE", "TWO", "SEVEN", "COME"]
    folders = {
        "hard": rows(tmp_path / "hard", zip(references, ["ONE", "TWO", "SEVEN", ""], strict=True)),
        "kd": rows(tmp_path / "kd", zip(references, ["ONE", "TOO", "EVEN", "COME"], strict=True)),
    }
    teachers = rows(tmp_path / "teachers", zip(references, ["TWO", "TOO", "SEVEN", "COME"], strict=True))
    return ExplorerData(folders, teachers=teachers, notes=tmp_path / "notes.csv")


@pytest.mark.parametrize(
    ("show", "expected"),
    [
        ("all", [0, 1, 2, 3]),
        ("fixed", [3]),
        ("broke", [1, 2]),
        ("wrong", [1, 2]),
        ("all wrong", []),
        ("teachers", [2]),
        ("differ", [1, 2, 3]),
        ("noted", []),
    ],
)
def test_each_filter_selects_its_rows(data, show, expected):
    assert list(data.view(show).index) == [f"M08_{place}" for place in expected]


def test_the_compared_systems_can_be_changed(data):
    assert list(data.view("fixed", before="kd", after="hard").index) == ["M08_1", "M08_2"]
    assert list(data.view("wrong", after="hard").index) == ["M08_3"]
    with pytest.raises(UserError, match="cannot show 'brok'; did you mean 'broke'"):
        data.view("brok")


def test_rows_are_sorted_and_searched(data):
    assert list(data.view(by="reference").reference) == ["COME", "ONE", "SEVEN", "TWO"]
    assert list(data.view(by="utt_id", descending=True).index) == ["M08_3", "M08_2", "M08_1", "M08_0"]
    assert list(data.view(text="even").reference) == ["SEVEN"]
    assert list(data.view(text="too").reference) == ["TWO"]
    assert list(data.view(text="m08_3").reference) == ["COME"]
    assert data.view(speaker="M05").empty


def test_notes_are_saved_searched_and_removed(data):
    data.note("M08_2", ' lost its "S", early ')
    data.note("M08_0", "fine")
    assert data.notes() == {"M08_0": "fine", "M08_2": 'lost its "S", early'}
    assert list(data.view("noted").index) == ["M08_0", "M08_2"]
    assert list(data.view(text="early").index) == ["M08_2"]
    data.note("M08_0", "")
    assert data.notes() == {"M08_2": 'lost its "S", early'}
    data.notes_file.write_text("something else\n1\n", encoding="utf-8")
    with pytest.raises(UserError, match="not a CSV with the columns utt_id and note"):
        data.notes()


def test_most_informative_failures_come_first(data):
    assert list(data.top_failures().index) == ["M08_2", "M08_1"]  # broken where the teachers are correct; broken
    assert list(data.top_failures(1).index) == ["M08_2"]


def test_no_reference_comes_twice_before_all_came_once(tmp_path):
    references = ["ONE", "ONE", "ONE", "TWO"]
    folder = rows(tmp_path / "one", zip(references, ["XXXX", "XXXX", "XXXX", "TWOO"], strict=True))
    failures = ExplorerData({"one": folder}).top_failures(3)
    assert sorted(failures.reference) == ["ONE", "ONE", "TWO"]


def test_confusions_count_wrong_hypotheses(data):
    table = data.confusions(data.table(), "kd")
    assert table.loc["SEVEN", "EVEN"] == 1
    assert table.loc["TWO", "TOO"] == 1
    assert table.to_numpy().sum() == 2
    assert data.confusions(data.table(), "hard").columns.tolist() == ["(empty)"]


def test_speakers_have_scores_with_intervals(data):
    table = data.by_speaker(data.table()).set_index("decoder")
    assert table.wra.to_dict() == {"hard": 0.75, "kd": 0.5, "teachers": 0.5}
    assert (table.low <= table.wra).all()
    assert (table.wra <= table.high).all()


def test_systems_with_different_utterances_are_joined(tmp_path):
    few = rows(tmp_path / "few", [("ONE", "ONE")])
    more = rows(tmp_path / "more", [("ONE", "TWO"), ("TWO", "TWO")])
    data = ExplorerData({"few": few, "more": more})
    assert len(data.view()) == 2
    assert math.isnan(data.row("M08_1")["few"])
    assert list(data.view("broke").index) == ["M08_0"]
    other = rows(tmp_path / "other", [("SIX", "SIX")])
    with pytest.raises(UserError, match="M08_0 has the references 'ONE' and 'SIX'"):
        ExplorerData({"few": few, "other": other})


def test_invalid_systems_are_refused_in_one_sentence(tmp_path, data):
    with pytest.raises(UserError, match="needs at least one system"):
        ExplorerData({})
    with pytest.raises(UserError, match="no predictions found"):
        ExplorerData({"none": tmp_path / "none"})
    with pytest.raises(UserError, match="has no system 'hart'; did you mean 'hard'"):
        ExplorerData({"hard": data.systems["hard"].path}, after="hart")
    for text, message in (
        ("a,reference,b\n1,2,x\n", "not a hypotheses.csv of kdlib"),
        ("utt,target,prediction\nu,ONE,TWO\n", "not a hypotheses.csv of kdlib"),
        ("utt_id,speaker,reference,greedy\nu,M08,ONE,TWO\nu,M08,ONE,ONE\n", "duplicate id 'u'"),
    ):
        (tmp_path / "other.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            ExplorerData({"other": tmp_path / "other.csv"})


def test_metadata_missing_in_one_system_is_taken_from_another(tmp_path):
    imported = tmp_path / "imported.json"
    predictions = [{"utterance_id": "M08_0", "target": "ONE", "prediction_text": "ONE"}]
    imported.write_text(json.dumps({"predictions": predictions}), encoding="utf-8")
    ours = rows(tmp_path / "ours", [("ONE", "ONE")], lexicon="ONE")
    table = pd.read_csv(ours / "hypotheses.csv").assign(seen="yes", word_type="digit", level="HIGH")
    table.to_csv(ours / "hypotheses.csv", index=False)
    data = ExplorerData({"imported": imported, "ours": ours})
    assert data.row("M08_0")["seen"] == "yes"
    assert list(data.view(level="HIGH", word_type="digit").index) == ["M08_0"]


def test_homophones_are_correct_where_the_recipe_folds_them(tmp_path):
    folder = rows(tmp_path / "one", [("TWO", "TO"), ("ONE", "TEN")])
    assert list(ExplorerData({"one": folder}).view("wrong").index) == ["M08_0", "M08_1"]
    folded = ExplorerData({"one": folder}, normaliser="homophones")
    assert list(folded.view("wrong").index) == ["M08_1"]
    assert folded.marks(folded.row("M08_0")) == {"one": True}
    assert folded.by_speaker(folded.table()).wra.tolist() == [0.5]
    assert list(folded.confusions(folded.table()).index) == ["ONE"]


def test_speakers_of_only_some_systems_are_drawn(tmp_path):
    few = rows(tmp_path / "few", [("ONE", "ONE")])
    more = rows(tmp_path / "more", [("ONE", "ONE"), ("TWO", "TWO")])
    table = pd.read_csv(more / "hypotheses.csv").assign(speaker=["M08", "M10"], level="HIGH")
    table.to_csv(more / "hypotheses.csv", index=False)
    data = ExplorerData({"few": few, "more": more})
    people = data.by_speaker(data.table())
    assert len(people) == 3
    plt.close(figures.wra_by_speaker(people, "", data.speaker_order))


def test_a_missing_decoder_is_replaced_by_the_first(tmp_path):
    both = rows(tmp_path / "both", [("ONE", "TWO")], lexicon="ONE")
    greedy = rows(tmp_path / "greedy", [("ONE", "ONE")])
    data = ExplorerData({"both": both, "greedy": greedy})
    assert data.decoders == ("greedy", "lexicon")
    assert data.row("M08_0", "lexicon") | {"both": "ONE", "greedy": "ONE"} == data.row("M08_0", "lexicon")
    assert list(data.view("all wrong").index) == []
    assert list(data.view("fixed").index) == ["M08_0"]
    assert list(data.view("fixed", decoder="lexicon").index) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus of four speakers, its first speaker's test utterance, and systems with posteriors of that speaker."""
    folder = tmp_path_factory.mktemp("world")
    tokens = Tokens.for_teachers(train_tokenizer(WORDS, 40, folder))
    utterances = [
        Utterance(f"{name}_{block}_{word}", name, folder / f"{name}.wav", 1.0, word, block=block)
        for name in ("M08", "M10", "F02", "CM01")
        for block in ("B1", "B2")
        for word in WORDS
    ]
    people = {
        name: Speaker(name, name[-3], percent, level)
        for name, percent, level in (
            ("M08", 90.0, "HIGH"), ("M10", 88.0, "HIGH"), ("F02", 30.0, "LOW"), ("CM01", None, "CONTROL"),
        )
    }  # fmt: skip
    tests = [utt for utt in utterances if utt.speaker == "M08" and utt.block == "B2"]
    folders = {name: systems.save(folder / name, tests, tokens, 0.5, place) for place, name in enumerate(("a", "b"))}
    teachers = systems.save(folder / "teachers", tests, tokens, 0.2, 7)
    data = ExplorerData(
        folders, Corpus(tuple(utterances), "made", people), teachers=teachers, teacher_speakers=("F02", "M10")
    )
    return data, tests[0].utt_id


def test_same_word_by_other_speakers(world):
    data, utt_id = world
    others = data.same_word(utt_id)
    assert list(others) == ["control CM01", "teacher's speaker M10", "same speaker, repetition"]
    assert {utt.text for utt in others.values()} == {data.utterance(utt_id).text}
    assert others["same speaker, repetition"].block == "B1"
    assert data.same_word("nobody") == {}


def test_divergence_needs_the_same_tokens(world, tmp_path):
    data, utt_id = world
    assert set(data.frames(utt_id)) == {"a", "b", "teachers"}
    distance = data.divergence(utt_id)
    assert set(distance) == {"a", "b"}
    stride_ms, values = distance["a"]
    assert stride_ms == systems.STRIDE_MS
    frames = data.frames(utt_id)
    assert values == pytest.approx(posteriors.frame_kl(frames["teachers"][1], frames["a"][1]))
    assert (values >= 0).all()
    tokens = Tokens.for_teachers(train_tokenizer(["XYLOPHONE", *WORDS], 42, tmp_path))
    tests = [data.utterance(name) for name in data.metadata.index]
    other_tokens = systems.save(tmp_path / "other_tokens", tests, tokens, 0.1, 3)
    mixed = ExplorerData({"other_tokens": other_tokens}, data.corpus, teachers=data.teachers.path)
    assert mixed.divergence(utt_id) == {}


def test_every_filter_has_a_label():
    assert all(text.format(before="A", after="B") for text in FILTERS.values())


def test_data_of_a_fold(smoke, tmp_path):
    tests = [utt for utt in smoke.corpus if utt.speaker == "M08"]
    tokens = Tokens.for_teachers(train_tokenizer(sorted({utt.text for utt in tests}), 40, tmp_path))
    data = explorer_data.fold_data(smoke, {"one": systems.save(tmp_path / "one", tests, tokens, 0.5, 1)})
    assert data.notes_file == smoke.layout.fold / "notes.csv"
    assert data.teacher_speakers
    assert set(data.metadata.level) == {"HIGH"}
    assert np.isfinite(data.by_speaker(data.table()).wra).all()
