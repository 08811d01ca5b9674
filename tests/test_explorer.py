"""The logic of the failure explorer, without a browser; the page in a browser: tests/browser."""

import pandas as pd
import pytest
import systems

from kdlib.show import explorer, explorer_data


@pytest.fixture
def page(smoke, corpus, tmp_path):
    tokens = smoke.tokens
    tests = [utt for utt in corpus if utt.speaker in ("M08", "M10")]
    folders = {
        name: systems.save(tmp_path / name, tests, tokens, wrong, place, level=corpus.level)
        for place, (name, wrong) in enumerate({"hard": 0.3, "kd": 0.5}.items())
    }
    teachers = systems.save(tmp_path / "teachers", tests, tokens, 0.1, 9)
    data = explorer_data.fold_data(smoke, folders, teachers=teachers)
    data.notes_file = tmp_path / "notes.csv"
    return explorer.Explorer(data, tmp_path / "figures")


def listed_ids(page):
    return [name for _, name in page.list.options]


def test_page_opens_on_the_first_row_with_figure_audio_and_tokens(page):
    assert page.chosen == listed_ids(page)[0]
    assert bytes(page.picture.value[:4]) == b"\x89PNG"
    assert bytes(page.players[0].children[1].value[:4]) == b"RIFF"
    assert "hard" in page.top_tokens.value
    assert page.status.value == ""


def test_filters_search_and_order_change_the_list(page):
    whole = listed_ids(page)
    page.where["speaker"].value = "M10"
    assert listed_ids(page) == [name for name in whole if name.startswith("M10")]
    page.show.value = "broke"
    assert 0 < len(listed_ids(page)) < len(whole)
    assert listed_ids(page) == list(page.data.view("broke", speaker="M10").index)
    page.where["speaker"].value, page.show.value = "", "all"
    page._sort("reference")
    references = [page.data.metadata.reference[name] for name in listed_ids(page)]
    assert references == sorted(references)
    page._sort("reference")
    assert [page.data.metadata.reference[name] for name in listed_ids(page)] == references[::-1]
    page.text.value = "zzzz"
    assert listed_ids(page) == []
    assert "choose another filter" in page.count.value
    assert page.picture.layout.display == "none"
    page.text.value = ""
    assert len(listed_ids(page)) == len(whole)
    assert page.picture.layout.display == ""
    assert "choose" not in page.count.value


def test_filters_are_labelled_with_the_compared_systems(page):
    page.after.value, page.before.value = "hard", "kd"
    assert ("hard fixed: kd was wrong", "fixed") in page.show.options
    page.show.value = "fixed"
    assert listed_ids(page) == list(page.data.view("fixed", before="kd", after="hard").index)


def test_a_single_system_has_no_filters_of_comparison(page, tmp_path):
    alone = explorer_data.ExplorerData({"hard": page.data.systems["hard"].path}, page.data.corpus)
    single = explorer.Explorer(alone, tmp_path / "figures")
    assert [kind for _, kind in single.show.options] == ["all", "wrong"]
    single.show.value = "wrong"
    assert 0 < len(listed_ids(single)) < len(alone.metadata)
    single._guarded(single._save_note)
    assert "no file for notes" in single.status.value


def test_a_chosen_row_is_drawn_and_a_time_is_marked(page):
    before = bytes(page.picture.value)
    page.list.value = listed_ids(page)[4]
    assert page.chosen == listed_ids(page)[4]
    assert bytes(page.picture.value) != before
    before, tokens = bytes(page.picture.value), page.top_tokens.value
    page.time.value = 0.3
    assert bytes(page.picture.value) != before
    assert page.top_tokens.value != tokens


def test_notes_are_saved_and_shown_again(page):
    whole = listed_ids(page)
    name = whole[2]
    page.list.value = name
    page.note.value = "slurred"
    page._save_note()
    page.list.value = listed_ids(page)[0]
    assert page.note.value == ""
    page.list.value = name
    assert page.note.value == "slurred"
    page.note.value = "slurred, and late"
    page.list.value = listed_ids(page)[1]  # without a click on "save note"
    assert page.data.notes() == {name: "slurred, and late"}
    page.note.value = "on the last row"
    page.text.value = "zzzz"
    assert page.data.notes()[whole[1]] == "on the last row"
    page.text.value = ""
    page.data.notes_file.write_text("broken", encoding="utf-8")
    page._guarded(page._save_note)
    assert "not a CSV with the columns" in page.status.value


def test_exports(page):
    page.show.value = "wrong"
    for act in (page._export_picture, page._export_ten, page._export_list):
        act()
        assert "written: " in page.status.value
    names = sorted(path.name for path in page.out.iterdir())
    assert [name.split("_")[0] for name in names] == ["closeup", "closeup", "failures", "failures", "list"]
    assert list(pd.read_csv(page.out / "list_kd_wrong.csv").utt_id) == list(page.view.index)
    page.text.value = "zzzz"
    page._guarded(page._export_picture)
    assert "no utterance is chosen" in page.status.value


def test_long_lists_have_pages(page, monkeypatch):
    monkeypatch.setattr(explorer, "PAGE", 5)
    page._refresh()
    whole = list(page.view.index)
    assert listed_ids(page) == whole[:5]
    page._turn(5)
    assert listed_ids(page) == whole[5:10]
    assert "6 to 10 of" in page.count.value
    assert not page.previous.disabled
    for _ in range(30):
        page._turn(5)
    assert listed_ids(page) == whole[-(len(whole) % 5 or 5) :]
    page._turn(-500)
    assert listed_ids(page) == whole[:5]


def test_columns_are_aligned_for_any_text():
    for text in ("", "A", "A LONGER TEXT THAN THERE IS ROOM FOR", "日本語のことば"):
        fitted = explorer._fit(text, 8)
        width = sum(2 if char in "日本語のことば" else 1 for char in fitted)
        assert width in (7, 8)
        assert " " not in fitted


def test_headless_run_draws_the_most_informative_failures(smoke, corpus, tmp_path):
    tests = [utt for utt in corpus if utt.speaker == "M08"]
    folder = systems.save(tmp_path / "hard", tests, smoke.tokens, 0.5, 1)
    figure = explorer.explore(smoke, {"hard": folder})
    assert "most informative failures" in figure.get_suptitle()
