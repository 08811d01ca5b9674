"""Systems side by side: what is shown, found, sorted, told apart, noted - without a model or a browser."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import systems

from kdlib.corpus.manifest import Corpus, Speaker, Utterance
from kdlib.errors import UserError
from kdlib.evaluate import posteriors
from kdlib.show import explorer_data, figures
from kdlib.show.explorer_data import FILTERS, ExplorerData
from kdlib.tokens import Tokens, train_tokenizer

WORDS = ["ONE", "TWO", "SEVEN", "COME", "ALPHA", "WATER"]


def rows(folder, answers, **columns):
    """A hypotheses.csv: reference -> answer, by speaker M08."""
    folder.mkdir()
    table = pd.DataFrame(
        [(f"M08_{place}", "M08", told, said) for place, (told, said) in enumerate(answers)],
        columns=["utt_id", "speaker", "reference", "greedy"],
    ).assign(level="", word_type="", seen="", **columns)
    table.to_csv(folder / "hypotheses.csv", index=False)
    return folder


@pytest.fixture
def found(tmp_path):
    told = ["ONE", "TWO", "SEVEN", "COME"]
    there = {
        "hard": rows(tmp_path / "hard", zip(told, ["ONE", "TWO", "SEVEN", ""], strict=True)),
        "kd": rows(tmp_path / "kd", zip(told, ["ONE", "TOO", "EVEN", "COME"], strict=True)),
    }
    teachers = rows(tmp_path / "teachers", zip(told, ["TWO", "TOO", "SEVEN", "COME"], strict=True))
    return ExplorerData(there, teachers=teachers, notes=tmp_path / "notes.csv")


@pytest.mark.parametrize(
    ("show", "which"),
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
def test_every_kind_shows_what_it_says(found, show, which):
    assert list(found.view(show).index) == [f"M08_{place}" for place in which]


def test_the_two_that_are_compared_can_be_others(found):
    assert list(found.view("fixed", before="kd", after="hard").index) == ["M08_1", "M08_2"]
    assert list(found.view("wrong", after="hard").index) == ["M08_3"]
    with pytest.raises(UserError, match="cannot show 'brok'; did you mean 'broke'"):
        found.view("brok")


def test_rows_are_sorted_and_searched(found):
    assert list(found.view(by="reference").reference) == ["COME", "ONE", "SEVEN", "TWO"]
    assert list(found.view(by="utt_id", falling=True).index) == ["M08_3", "M08_2", "M08_1", "M08_0"]
    assert list(found.view(text="even").reference) == ["SEVEN"]
    assert list(found.view(text="too").reference) == ["TWO"]
    assert list(found.view(text="m08_3").reference) == ["COME"]
    assert found.view(speaker="M05").empty


def test_notes_are_kept_searched_and_taken_away(found):
    found.note("M08_2", ' lost its "S", early ')
    found.note("M08_0", "fine")
    assert found.notes() == {"M08_0": "fine", "M08_2": 'lost its "S", early'}
    assert list(found.view("noted").index) == ["M08_0", "M08_2"]
    assert list(found.view(text="early").index) == ["M08_2"]
    found.note("M08_0", "")
    assert found.notes() == {"M08_2": 'lost its "S", early'}
    found.notes_file.write_text("something else\n1\n", encoding="utf-8")
    with pytest.raises(UserError, match="not a CSV with the columns utt_id and note"):
        found.notes()


def test_what_tells_most_comes_first(found):
    assert list(found.telling().index) == ["M08_2", "M08_1"]  # broken though teachers knew; broken
    assert list(found.telling(1).index) == ["M08_2"]


def test_no_reference_comes_twice_before_all_came_once(tmp_path):
    told = ["ONE", "ONE", "ONE", "TWO"]
    one = rows(tmp_path / "one", zip(told, ["XXXX", "XXXX", "XXXX", "TWOO"], strict=True))
    found = ExplorerData({"one": one}).telling(3)
    assert sorted(found.reference) == ["ONE", "ONE", "TWO"]


def test_confusions_count_pairs_of_wrong_answers(found):
    table = found.confusions(found.table(), "kd")
    assert table.loc["SEVEN", "EVEN"] == 1
    assert table.loc["TWO", "TOO"] == 1
    assert table.to_numpy().sum() == 2
    assert found.confusions(found.table(), "hard").columns.tolist() == ["(nothing)"]


def test_speakers_have_scores_with_intervals(found):
    table = found.by_speaker(found.table()).set_index("decoder")
    assert table.wra.to_dict() == {"hard": 0.75, "kd": 0.5, "teachers": 0.5}
    assert (table.low <= table.wra).all()
    assert (table.wra <= table.high).all()


def test_systems_that_heard_other_utterances_stand_side_by_side(tmp_path):
    few = rows(tmp_path / "few", [("ONE", "ONE")])
    more = rows(tmp_path / "more", [("ONE", "TWO"), ("TWO", "TWO")])
    found = ExplorerData({"few": few, "more": more})
    assert len(found.view()) == 2
    assert math.isnan(found.row("M08_1")["few"])
    assert list(found.view("broke").index) == ["M08_0"]
    other = rows(tmp_path / "other", [("SIX", "SIX")])
    with pytest.raises(UserError, match="M08_0 has the references 'ONE' and 'SIX'"):
        ExplorerData({"few": few, "other": other})


def test_what_is_no_answer_is_refused_in_a_sentence(tmp_path, found):
    with pytest.raises(UserError, match="needs at least one system"):
        ExplorerData({})
    with pytest.raises(UserError, match="no answers there"):
        ExplorerData({"none": tmp_path / "none"})
    with pytest.raises(UserError, match="has no system 'hart'; did you mean 'hard'"):
        ExplorerData({"hard": found.systems["hard"].place}, after="hart")
    for text, told in (
        ("a,reference,b\n1,2,x\n", "not a hypotheses.csv of kdlib"),
        ("utt,target,prediction\nu,ONE,TWO\n", "not a hypotheses.csv of kdlib"),
        ("utt_id,speaker,reference,greedy\nu,M08,ONE,TWO\nu,M08,ONE,ONE\n", "'u' stands twice in it"),
    ):
        (tmp_path / "other.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=told):
            ExplorerData({"other": tmp_path / "other.csv"})


def test_what_one_system_does_not_know_another_does(tmp_path):
    theirs = tmp_path / "theirs.json"
    said = [{"utterance_id": "M08_0", "target": "ONE", "prediction_text": "ONE"}]
    theirs.write_text(json.dumps({"predictions": said}), encoding="utf-8")
    ours = rows(tmp_path / "ours", [("ONE", "ONE")], lexicon="ONE")
    table = pd.read_csv(ours / "hypotheses.csv").assign(seen="yes", word_type="digit", level="HIGH")
    table.to_csv(ours / "hypotheses.csv", index=False)
    found = ExplorerData({"theirs": theirs, "ours": ours})
    assert found.row("M08_0")["seen"] == "yes"
    assert list(found.view(level="HIGH", word_type="digit").index) == ["M08_0"]


def test_homophones_are_right_where_the_recipe_says_so(tmp_path):
    one = rows(tmp_path / "one", [("TWO", "TO"), ("ONE", "TEN")])
    assert list(ExplorerData({"one": one}).view("wrong").index) == ["M08_0", "M08_1"]
    folded = ExplorerData({"one": one}, fold_homophones=True)
    assert list(folded.view("wrong").index) == ["M08_1"]
    assert folded.marks(folded.row("M08_0")) == {"one": True}
    assert folded.by_speaker(folded.table()).wra.tolist() == [0.5]
    assert list(folded.confusions(folded.table()).index) == ["ONE"]


def test_speakers_whom_only_some_systems_heard_are_drawn(tmp_path):
    one = rows(tmp_path / "one", [("ONE", "ONE")])
    more = rows(tmp_path / "more", [("ONE", "ONE"), ("TWO", "TWO")])
    table = pd.read_csv(more / "hypotheses.csv").assign(speaker=["M08", "M10"], level="HIGH")
    table.to_csv(more / "hypotheses.csv", index=False)
    found = ExplorerData({"one": one, "more": more})
    people = found.by_speaker(found.table())
    assert len(people) == 3
    plt.close(figures.wra_by_speaker(people, ""))


def test_a_decoder_that_a_system_lacks_is_its_first(tmp_path):
    one = rows(tmp_path / "one", [("ONE", "TWO")], lexicon="ONE")
    two = rows(tmp_path / "two", [("ONE", "ONE")])
    found = ExplorerData({"one": one, "two": two})
    assert found.decoders == ("greedy", "lexicon")
    assert found.row("M08_0", "lexicon") | {"one": "ONE", "two": "ONE"} == found.row("M08_0", "lexicon")
    assert list(found.view("all wrong").index) == []
    assert list(found.view("fixed").index) == ["M08_0"]
    assert list(found.view("fixed", decoder="lexicon").index) == []


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Utterances of four people, and systems that say something of every frame of the first one's."""
    folder = tmp_path_factory.mktemp("spoken")
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
    there = {name: systems.written(folder / name, tests, tokens, 0.5, place) for place, name in enumerate(("a", "b"))}
    teachers = systems.written(folder / "teachers", tests, tokens, 0.2, 7)
    found = ExplorerData(there, Corpus(tuple(utterances), "made", people), teachers=teachers, taught_by=("F02", "M10"))
    return found, tests[0].utt_id


def test_who_else_says_the_word(spoken):
    found, utt_id = spoken
    others = found.alike(utt_id)
    assert list(others) == ["control CM01", "teacher's speaker M10", "same speaker, once more"]
    assert {utt.text for utt in others.values()} == {found.utterance(utt_id).text}
    assert others["same speaker, once more"].block == "B1"
    assert found.alike("nobody") == {}


def test_the_distance_from_the_teachers_is_asked_of_the_same_tokens_alone(spoken, tmp_path):
    found, utt_id = spoken
    assert set(found.frames(utt_id)) == {"a", "b", "teachers"}
    distance = found.divergence(utt_id)
    assert set(distance) == {"a", "b"}
    stride_ms, values = distance["a"]
    assert stride_ms == systems.STRIDE_MS
    said = found.frames(utt_id)
    assert values == pytest.approx(posteriors.frame_kl(said["teachers"][1], said["a"][1]))
    assert (values >= 0).all()
    others = Tokens.for_teachers(train_tokenizer(["XYLOPHONE", *WORDS], 42, tmp_path))
    tests = [found.utterance(name) for name in found.known.index]
    alien = systems.written(tmp_path / "alien", tests, others, 0.1, 3)
    mixed = ExplorerData({"alien": alien}, found.corpus, teachers=found.teachers.place)
    assert mixed.divergence(utt_id) == {}


def test_kinds_are_said_in_words():
    assert all(text.format(before="A", after="B") for text in FILTERS.values())


def test_what_a_fold_knows(smoke, tmp_path):
    from kdlib.corpus import prepare

    tests = [utt for utt in prepare.load(smoke) if utt.speaker == "M08"]
    tokens = Tokens.for_teachers(train_tokenizer(sorted({utt.text for utt in tests}), 40, tmp_path))
    found = explorer_data.fold_data(smoke, {"one": systems.written(tmp_path / "one", tests, tokens, 0.5, 1)})
    assert found.notes_file == smoke.fold_folder / "notes.csv"
    assert found.taught_by
    assert set(found.known.level) == {"HIGH"}
    assert np.isfinite(found.by_speaker(found.table()).wra).all()
