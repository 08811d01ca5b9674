"""The failure explorer's logic, without a browser; what a person sees of it: tests/browser."""

import pandas as pd
import pytest
import systems

from kdlib.pretrained.pieces import load_tokens
from kdlib.show import explorer, explorer_data


@pytest.fixture
def page(smoke, corpus, tmp_path):
    tokens = load_tokens(smoke)
    tests = [utt for utt in corpus if utt.speaker in ("M08", "M10")]
    there = {
        name: systems.written(tmp_path / name, tests, tokens, wrong, place, level=corpus.level)
        for place, (name, wrong) in enumerate({"hard": 0.3, "kd": 0.5}.items())
    }
    found = explorer_data.fold_data(
        smoke, there, teachers=systems.written(tmp_path / "teachers", tests, tokens, 0.1, 9)
    )
    found.notes_file = tmp_path / "notes.csv"
    return explorer.Explorer(found, tmp_path / "figures")


def listed(page):
    return [name for _, name in page.list.options]


def test_it_opens_on_the_first_row_with_picture_sound_and_tokens(page):
    assert page.chosen == listed(page)[0]
    assert bytes(page.picture.value[:4]) == b"\x89PNG"
    assert bytes(page.players[0].children[1].value[:4]) == b"RIFF"
    assert "hard" in page.top.value
    assert page.line.value == ""


def test_filters_search_and_sorting_change_the_list(page):
    whole = listed(page)
    page.where["speaker"].value = "M10"
    assert listed(page) == [name for name in whole if name.startswith("M10")]
    page.show.value = "broke"
    assert 0 < len(listed(page)) < len(whole)
    assert listed(page) == list(page.found.view("broke", speaker="M10").index)
    page.where["speaker"].value, page.show.value = "", "all"
    page._sort("reference")
    references = [page.found.known.reference[name] for name in listed(page)]
    assert references == sorted(references)
    page._sort("reference")
    assert [page.found.known.reference[name] for name in listed(page)] == references[::-1]
    page.text.value = "zzzz"
    assert listed(page) == []
    assert "choose another filter" in page.count.value
    assert page.picture.layout.display == "none"
    page.text.value = ""
    assert len(listed(page)) == len(whole)
    assert page.picture.layout.display == ""
    assert "choose" not in page.count.value


def test_the_systems_that_are_compared_name_the_filters(page):
    page.after.value, page.before.value = "hard", "kd"
    assert ("hard fixed: kd was wrong", "fixed") in page.show.options
    page.show.value = "fixed"
    assert listed(page) == list(page.found.view("fixed", before="kd", after="hard").index)


def test_of_one_system_nothing_is_compared(page, tmp_path):
    alone = explorer_data.ExplorerData({"hard": page.found.systems["hard"].place}, page.found.corpus)
    one = explorer.Explorer(alone, tmp_path / "figures")
    assert [kind for _, kind in one.show.options] == ["all", "wrong"]
    one.show.value = "wrong"
    assert 0 < len(listed(one)) < len(alone.known)
    one._guarded(one._noted)
    assert "no file to keep notes in" in one.line.value


def test_a_row_that_is_chosen_is_drawn_and_a_time_is_marked(page):
    before = bytes(page.picture.value)
    page.list.value = listed(page)[4]
    assert page.chosen == listed(page)[4]
    assert bytes(page.picture.value) != before
    before, tops = bytes(page.picture.value), page.top.value
    page.at.value = 0.3
    assert bytes(page.picture.value) != before
    assert page.top.value != tops


def test_a_note_is_kept_and_comes_back(page):
    whole = listed(page)
    name = whole[2]
    page.list.value = name
    page.note.value = "slurred"
    page._noted()
    page.list.value = listed(page)[0]
    assert page.note.value == ""
    page.list.value = name
    assert page.note.value == "slurred"
    page.note.value = "slurred, and late"
    page.list.value = listed(page)[1]  # without a click on the button
    assert page.found.notes() == {name: "slurred, and late"}
    page.note.value = "on the last row"
    page.text.value = "zzzz"
    assert page.found.notes()[whole[1]] == "on the last row"
    page.text.value = ""
    page.found.notes_file.write_text("broken", encoding="utf-8")
    page._guarded(page._noted)
    assert "not a CSV with the columns" in page.line.value


def test_exports(page):
    page.show.value = "wrong"
    for act in (page._export_picture, page._export_ten, page._export_list):
        act()
        assert "written: " in page.line.value
    names = sorted(one.name for one in page.out.iterdir())
    assert [name.split("_")[0] for name in names] == ["closeup", "closeup", "failures", "failures", "list"]
    assert list(pd.read_csv(page.out / "list_kd_wrong.csv").utt_id) == list(page.view.index)
    page.text.value = "zzzz"
    page._guarded(page._export_picture)
    assert "no utterance is chosen" in page.line.value


def test_long_lists_have_pages(page, monkeypatch):
    monkeypatch.setattr(explorer, "PAGE", 5)
    page._refresh()
    whole = list(page.view.index)
    assert listed(page) == whole[:5]
    page._turn(5)
    assert listed(page) == whole[5:10]
    assert "6 to 10 of" in page.count.value
    assert not page.earlier.disabled
    for _ in range(30):
        page._turn(5)
    assert listed(page) == whole[-(len(whole) % 5 or 5) :]
    page._turn(-500)
    assert listed(page) == whole[:5]


def test_columns_line_up_whatever_the_text():
    for text in ("", "A", "A LONGER TEXT THAN THERE IS ROOM FOR", "日本語のことば"):
        fitted = explorer._fit(text, 8)
        wide = sum(2 if char in "日本語のことば" else 1 for char in fitted)
        assert wide in (7, 8)
        assert " " not in fitted


def test_headless_the_most_telling_failures_are_drawn(smoke, corpus, tmp_path):
    tests = [utt for utt in corpus if utt.speaker == "M08"]
    one = systems.written(tmp_path / "one", tests, load_tokens(smoke), 0.5, 1)
    figure = explorer.explore(smoke, {"one": one})
    assert "most telling failures" in figure.get_suptitle()
