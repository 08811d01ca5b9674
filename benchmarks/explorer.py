"""How long does a user wait for the failure explorer, in JupyterLab and a real browser?

It shows 1,785 utterances of four systems and the combined teachers, and a list of 20,000. Times are measured inside the
browser: from running the cell to the first picture, the modules being imported, and from a click on a row, on a filter
and on a column to what it shows. The peer is the same picture drawn the plain way by matplotlib, a panel with axes of
its own for everything.
"""

import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import lab  # with systems in tests/: PYTHONPATH=tests, as `make bench` has it
import matplotlib.pyplot as plt
import numpy as np
import report
import systems

from kdlib.evaluate import posteriors
from kdlib.io import repository_root
from kdlib.pipeline import Fold
from kdlib.show import explorer_data, utterance_figure

FULL, SMOKE = (20, 1785, 20_000, 1.5), (2, 12, 0, 0.3)  # repeats, utterances, of the long list, seconds between clicks
PEER, DRAWN = "matplotlib: the picture, drawn plainly", "kdlib: the picture, drawn"
NAMES = {"pretrained": 0.6, "hard": 0.25, "ctc_kd": 0.3, "words": 0.28}
CLICK = """async index => {
  const list = document.querySelector(".kd-list select"), image = () => document.querySelector(".kd-picture img");
  const before = image().src, start = performance.now();
  list.selectedIndex = index;
  list.dispatchEvent(new Event("change", {bubbles: true}));
  while (image().src === before || !image().complete) await new Promise(done => setTimeout(done, 2));
  return (performance.now() - start) / 1000;
}"""
CHANGE = """async label => {
  const count = () => document.querySelector(".kd-list select").innerText, before = count(), start = performance.now();
  const box = [...document.querySelectorAll(".kd-explorer .widget-dropdown")].find(
    one => one.querySelector("label").innerText === "show").querySelector("select");
  box.selectedIndex = [...box.options].findIndex(one => one.innerText.includes(label));
  box.dispatchEvent(new Event("change", {bubbles: true}));
  while (count() === before) await new Promise(done => setTimeout(done, 2));
  return (performance.now() - start) / 1000;
}"""
SORT = """async label => {
  const rows = () => document.querySelector(".kd-list select").innerText, before = rows(), start = performance.now();
  [...document.querySelectorAll(".kd-head button")].find(one => one.innerText.includes(label)).click();
  while (rows() === before) await new Promise(done => setTimeout(done, 2));
  return (performance.now() - start) / 1000;
}"""


def plain(found: explorer_data.ExplorerData, utt_id: str) -> bytes:
    """The same picture, as one would write it at first."""
    from kdlib.corpus import audio

    frames, samples = found.frames(utt_id), audio.load(found.utterance(utt_id))
    others = found.same_word(utt_id)
    figure, panels = plt.subplots(4 + len(frames), 1, figsize=(8.4, 9), constrained_layout=True)
    panels[0].plot(np.arange(len(samples)) / audio.RATE_HZ, samples)
    panels[1].specgram(samples, NFFT=400, noverlap=240, Fs=audio.RATE_HZ)
    for axes, (name, (kept, logprobs)) in zip(panels[2:], frames.items(), strict=False):
        tracks, labels = utterance_figure._tracks(kept, logprobs)
        axes.imshow(tracks, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(name)
    for name, (_, values) in found.divergence(utt_id).items():
        panels[-2].plot(values, label=name)
    panels[-2].legend()
    panels[-1].specgram(np.concatenate([audio.load(one) for one in others.values()]), Fs=audio.RATE_HZ)
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=96)
        plt.close(figure)
        return file.getvalue()


def drawn(found: explorer_data.ExplorerData, utt_id: str) -> bytes:
    """The explorer's picture."""
    with io.BytesIO() as file:
        utterance_figure.utterance_figure(found, utt_id, width_in=8.4).savefig(
            file, format="png", dpi=96, pil_kwargs={"compress_level": 1}
        )
        return file.getvalue()


def cells(folder: Path, settings: tuple[str, str, dict]) -> tuple[str, str]:
    """A notebook that opens the explorer on the systems in a folder."""
    recipe, held_out, overrides = settings
    return (
        "from pathlib import Path\nimport matplotlib.pyplot as plt\nimport ipywidgets\n"
        "from kdlib.pipeline import Fold\nfrom kdlib.show import explorer\n"
        f"fold = Fold.load({recipe!r}, {held_out!r}, overrides={overrides!r})\nfolder = Path({str(folder)!r})",
        f"explorer.explore(fold, {{name: folder / name for name in {list(NAMES)}}}, teachers=folder / 'teachers')",
    )


def opened(page) -> float:
    """Run the explorer's cell once more; until its first picture is there."""
    cell = page.locator(".jp-Notebook .jp-CodeCell").nth(1)
    cell.locator(".jp-InputArea-editor").click()
    old = page.locator(".kd-explorer").evaluate("one => one.dataset.old = 'yes'")
    assert old == "yes"
    start = time.perf_counter()
    page.keyboard.press("Control+Enter")
    fresh = ".kd-explorer:not([data-old]) .kd-picture img"
    page.wait_for_function(
        f"() => {{const one = document.querySelector('{fresh}'); return one && one.naturalWidth > 0}}"
    )
    return time.perf_counter() - start


def waited(folder: Path, repeats: int, pause_s: float, *, clicks: bool, picture: Path) -> dict[str, list[float]]:
    """Seconds in the browser, of a folder's notebook, with clicks on rows or without; a screenshot is in `picture`."""

    def times(script: str, values: Sequence[object]) -> list[float]:
        found = []
        for value in values:
            page.wait_for_timeout(1000 * pause_s)  # a person looks at what was there
            found.append(page.evaluate(script, value))
        return found

    with lab.server(folder) as address, lab.browser() as page:
        lab.run_all(page, address, "explore.ipynb")
        page.locator(".kd-picture img").wait_for()
        page.wait_for_timeout(2000 * pause_s)
        found = {"open": [opened(page) for _ in range(repeats)]}
        if clicks:
            found["click a row, see its picture"] = times(CLICK, range(1, repeats + 1))
        found["filter the list"] = times(CHANGE, ["broke", "everything"] * (repeats // 2))
        found["sort the list"] = times(SORT, ["reference"] * repeats)
        page.screenshot(path=str(picture))
    return found


def main() -> None:
    run = report.start(__file__, __doc__)
    if not lab.CHROMIUM.is_file():
        print(f"explorer: not measured, for there is no browser at {lab.CHROMIUM}")
        return
    repeats, count, many, pause_s = SMOKE if run.smoke else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = ("params/demo.yaml", "M08", {})
        if run.smoke:
            settings = ("params/smoke.yaml", "M08", {"outputs": f"{name}/outputs", "pretrained": "shipped"})
        fold = Fold.load(*settings[:2], overrides=settings[2])
        corpus, tokens = fold.corpus, fold.tokens
        copies = (
            utt.replace(utt_id=f"{utt.utt_id}x{copy}") for copy in range(many // len(corpus) + 1) for utt in corpus
        )
        lists = {"usual": list(corpus)[:count], "many": list(itertools.islice(copies, many))}
        parts = {part: some for part, some in lists.items() if some}
        for part, some in parts.items():
            for place, (system, wrong) in enumerate((NAMES | {"teachers": 0.2}).items()):
                keep = part == "usual"
                systems.save(folder / part / system, some, tokens, wrong, place, posteriors=keep, level=corpus.level)
            lab.notebook(folder / part / "explore.ipynb", *cells(folder / part, settings))
        size = (folder / "usual/hard/posteriors" / posteriors.FILE).stat().st_size
        there = {one: folder / "usual" / one for one in NAMES}
        looked = explorer_data.fold_data(fold, there, teachers=folder / "usual/teachers")
        forms = {PEER: lambda utt_id: plain(looked, utt_id), DRAWN: lambda utt_id: drawn(looked, utt_id)}
        times = report.interleaved(forms, repeats, lambda number: looked.metadata.index[number % len(looked.metadata)])
        ratios = {name: ratio for name, (_, ratio) in report.against(times, PEER).items()}
        pictures = folder if run.smoke else repository_root() / "outputs" / "browser"
        pictures.mkdir(parents=True, exist_ok=True)
        for part, some in parts.items():
            shot = pictures / f"benchmark_{part}.png"
            found = waited(folder / part, repeats, pause_s, clicks=part == "usual", picture=shot)
            times |= {f"explorer, {len(some):,} utterances: {what}": taken for what, taken in found.items()}
    rows = [
        {"work": work, "s": statistics.median(taken), "slowest s": max(taken), "ratio of times": ratios.get(work)}
        for work, taken in times.items()
    ]
    run.save(rows, [f"The posteriors of {count:,} utterances take {size / 1e6:.2g} MB for each system."])


if __name__ == "__main__":
    main()
