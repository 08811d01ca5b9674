"""The failure explorer in use: JupyterLab, a real browser, clicks."""

import re

import lab
import pandas as pd
import pytest
import systems

from kdlib.io import repository_root
from kdlib.pipeline import Fold

pytestmark = pytest.mark.skipif(
    not lab.CHROMIUM.is_file(), reason=f"no browser: {lab.CHROMIUM} is missing (apt install chromium)"
)
NAMES = {"pretrained": 0.6, "hard": 0.3, "ctc_kd": 0.35}


@pytest.fixture(scope="module")
def fold(tmp_path_factory):
    """A fold of the smoke corpus, with hypotheses of several systems."""
    folder = tmp_path_factory.mktemp("lab")
    overrides = {"outputs": str(folder / "outputs"), "pretrained": "shipped"}
    smoke = Fold.load("params/smoke.yaml", "M08", overrides=overrides)
    corpus, tokens = smoke.corpus, smoke.tokens
    tests = [utt for utt in corpus if utt.speaker in ("M08", "M10")]
    for place, (name, wrong) in enumerate((NAMES | {"teachers": 0.2}).items()):
        systems.save(folder / name, tests, tokens, wrong, place, level=corpus.level)
    lab.notebook(
        folder / "explore.ipynb",
        f"""
from pathlib import Path
from kdlib.pipeline import Fold
from kdlib.show import explorer
fold = Fold.load("params/smoke.yaml", "M08", overrides={overrides})
folder = Path({str(folder)!r})""",
        f"""
explorer.explore(fold, {{name: folder / name for name in {list(NAMES)}}}, teachers=folder / "teachers", before="hard")
""",
    )
    return folder, smoke, next(utt for utt in tests if utt.speaker == "M10")


@pytest.fixture(scope="module")
def page(fold):
    """The notebook, run in JupyterLab."""
    with lab.server(fold[0]) as address, lab.browser() as page:
        lab.run_all(page, address, "explore.ipynb")
        page.locator(".kd-picture img").wait_for()
        fold[2].wav.rename(fold[2].wav.with_suffix(".away"))  # it goes missing while the explorer is open
        yield page


@pytest.fixture
def clean(page):
    """The explorer without filters."""
    choose(page, "show", "everything")
    choose(page, "speaker", "all")
    search(page, "")
    wait_until(page, lambda: len({row.split("_")[0] for row in rows(page)}) == 2)
    return page


def choose(page, label, value):
    box = page.locator(".kd-explorer .widget-dropdown").filter(has=page.locator(f"label:text-is('{label}')"))
    box.locator("select").select_option(label=value)


def search(page, text):
    box = page.get_by_placeholder("search ids, words, hypotheses, notes")
    box.fill(text)
    box.press("Enter")


def rows(page):
    return page.locator(".kd-list select option").all_inner_texts()


def wait_until(page, ready, seconds=20):
    for _ in range(seconds * 10):
        if ready():
            return
        page.wait_for_timeout(100)
    state = page.locator(".jp-StatusBar-Widget").inner_text()
    shown = [page.locator(part).all_inner_texts() for part in (".kd-top", ".jp-Dialog", ".jp-OutputArea-output")]
    raise AssertionError(f"timed out; {state}; {rows(page)[:3]}; {[''.join(text)[-400:] for text in shown]}")


def pick(page, text):
    """Choose the first row that contains a text; wait for its figure and return its id."""
    place = next(at for at, row in enumerate(rows(page)) if text in row)
    name = rows(page)[place].split("\u00a0")[0]
    page.locator(".kd-list select").select_option(index=place)
    wait_until(page, lambda: page.locator(".kd-top").get_attribute("title") == name)
    return name


def test_a_click_sorts_the_list_and_a_second_reverses_it(clean):
    page = clean
    head = page.locator(".kd-head button").filter(has_text="reference")
    first = page.locator(".kd-list select option").first.inner_text()
    head.click()
    wait_until(page, lambda: "▲" in head.inner_text())
    page.wait_for_timeout(1000)  # the list follows the arrow
    ascending = rows(page)
    head.click()
    wait_until(page, lambda: "▼" in head.inner_text() and rows(page) != ascending)
    descending = rows(page)
    assert sorted(ascending) == sorted(descending)
    assert first in ascending


def test_filters_and_search_select_the_matching_rows(clean):
    page = clean
    whole = len(rows(page))
    choose(page, "show", "ctc_kd broke: hard was right")
    wait_until(page, lambda: 0 < len(rows(page)) < whole)
    assert all(row.count("✓") >= 1 and "✗" in row for row in rows(page))
    choose(page, "show", "everything")
    choose(page, "speaker", "M10")
    wait_until(page, lambda: {row.split("_")[0] for row in rows(page)} == {"M10"})
    search(page, "M10_B2")
    wait_until(page, lambda: {row[:6] for row in rows(page)} == {"M10_B2"})


def test_a_row_shows_its_figure_and_audio(clean):
    page = clean
    choose(page, "speaker", "M08")
    wait_until(page, lambda: {row.split("_")[0] for row in rows(page)} == {"M08"})
    pick(page, rows(page)[3])
    assert page.locator(".kd-picture img").evaluate("image => image.naturalWidth") > 600
    players = page.locator(".kd-explorer audio")
    assert players.count() >= 2  # the recording, and the same word by other speakers
    wait_until(page, lambda: players.first.evaluate("audio => audio.duration") > 0.2)
    assert "%" in page.locator(".kd-top").inner_text()


def test_a_missing_recording_is_reported(clean, fold):
    page = clean
    search(page, fold[2].utt_id)
    wait_until(page, lambda: len(rows(page)) == 1)
    wait_until(page, lambda: "the recording is missing" in page.locator(".kd-explorer").inner_text())
    assert "Traceback" not in page.locator(".kd-explorer").inner_text()


def test_an_empty_list_is_reported_and_refilled(clean):
    page = clean
    search(page, "zzzz")
    wait_until(page, lambda: "choose another filter" in page.locator(".kd-explorer").inner_text())
    assert rows(page) == []
    search(page, "")
    wait_until(page, lambda: len(rows(page)) > 10)
    assert "choose another filter" not in page.locator(".kd-explorer").inner_text()


def test_notes_are_saved_filtered_and_survive_a_new_run(clean, fold):
    page = clean
    _, smoke, _ = fold
    name = pick(page, rows(page)[5])
    page.get_by_placeholder("a note on this utterance").fill('breathy onset, "K" lost')
    page.get_by_role("button", name="save note").click()
    path = smoke.layout.fold / "notes.csv"
    wait_until(page, path.is_file)
    assert pd.read_csv(path).set_index("utt_id").note.to_dict() == {name: 'breathy onset, "K" lost'}
    choose(page, "show", "with a note")
    wait_until(page, lambda: len(rows(page)) == 1)
    page.locator(".jp-Notebook .jp-CodeCell").nth(1).click()
    page.keyboard.press("Control+Enter")
    wait_until(page, lambda: len(rows(page)) > 10)
    choose(page, "show", "with a note")
    wait_until(page, lambda: len(rows(page)) == 1)
    note = page.get_by_placeholder("a note on this utterance")
    wait_until(page, lambda: note.input_value() == 'breathy onset, "K" lost')  # the utterance is chosen after the list


def test_pages_of_confusions_and_speakers(clean):
    page = clean
    page.get_by_role("tab", name="Confusions").click()
    wait_until(page, lambda: page.locator(".kd-explorer .jp-OutputArea img").count() >= 1)
    page.get_by_role("tab", name="Speakers").click()
    wait_until(page, lambda: page.locator(".kd-explorer .jp-OutputArea table").count() >= 1)
    assert re.search(r"M08\s", page.locator(".kd-explorer .jp-OutputArea table").inner_text())
    page.get_by_role("tab", name="Utterances").click()


def test_figures_and_list_can_be_exported(clean, fold):
    page = clean
    out = fold[1].layout.fold / "figures"
    choose(page, "show", "ctc_kd wrong")
    wait_until(page, lambda: rows(page) and all("✗" in row for row in rows(page)))
    for button, name in (("picture", "closeup_"), ("ten of these", "failures_"), ("list", "list_")):
        page.locator(".kd-explorer button").filter(has_text=button).last.click()
        wait_until(page, lambda name=name: re.search(f"written: .*/{name}", page.locator(".kd-explorer").inner_text()))
        assert list(out.glob(f"{name}*"))
    (path,) = out.glob("list_*.csv")
    assert len(pd.read_csv(path)) == len(rows(page))


def test_the_page_is_not_cut_off_and_a_screenshot_is_saved(clean):
    page = clean
    pick(page, "✗")
    page.mouse.move(0, 0)
    place = repository_root() / "outputs" / "browser"
    place.mkdir(parents=True, exist_ok=True)
    page.locator(".kd-explorer").screenshot(path=str(place / "explorer.png"))
    page.screenshot(path=str(place / "lab.png"))
    widths = page.locator(".kd-explorer").evaluate("page => [page.scrollWidth, page.clientWidth]")
    assert widths[0] <= widths[1] + 1  # nothing is cut off to the right
