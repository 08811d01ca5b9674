"""How long a user waits for the failure explorer, in JupyterLab and a real browser.

1,785 utterances of the demo's corpus by four systems and the combined teachers, and a list of 20,000. Measured inside
the browser: from running the cell to the first picture (the modules imported before), and from a click on a row, on a
filter, and on a column to what it shows. The peer is the same picture drawn the plain way by matplotlib: a panel of its
own, with its own axes, for everything (`plain`). Medians of 20.
"""

import io
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import lab
import matplotlib.pyplot as plt
import numpy as np
import systems  # with lab in tests/: PYTHONPATH=tests, as `make bench` has it

from kdlib.evaluate import posteriors
from kdlib.io import repository_root, write_json
from kdlib.pipeline import Fold
from kdlib.show import explorer_data, utterance_figure

REPEATS, UTTERANCES, MANY = 20, 1785, 20_000
NAMES = {"pretrained": 0.6, "hard": 0.25, "ctc_kd": 0.3, "words": 0.28}
CLICK = """async index => {
  await new Promise(done => setTimeout(done, 1500));  // a person looks at what was there
  const list = document.querySelector(".kd-list select"), image = () => document.querySelector(".kd-picture img");
  const before = image().src, start = performance.now();
  list.selectedIndex = index;
  list.dispatchEvent(new Event("change", {bubbles: true}));
  while (image().src === before || !image().complete) await new Promise(done => setTimeout(done, 2));
  return (performance.now() - start) / 1000;
}"""
CHANGE = """async label => {
  await new Promise(done => setTimeout(done, 1500));
  const count = () => document.querySelector(".kd-list select").innerText, before = count(), start = performance.now();
  const box = [...document.querySelectorAll(".kd-explorer .widget-dropdown")].find(
    one => one.querySelector("label").innerText === "show").querySelector("select");
  box.selectedIndex = [...box.options].findIndex(one => one.innerText.includes(label));
  box.dispatchEvent(new Event("change", {bubbles: true}));
  while (count() === before) await new Promise(done => setTimeout(done, 2));
  return (performance.now() - start) / 1000;
}"""
SORT = """async label => {
  await new Promise(done => setTimeout(done, 1500));
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


def cells(folder: Path, name: str) -> tuple[str, str]:
    """A notebook that opens the explorer."""
    return (
        "from pathlib import Path\nimport matplotlib.pyplot as plt\nimport ipywidgets\n"
        "from kdlib.pipeline import Fold\nfrom kdlib.show import explorer\n"
        f'fold = Fold.load("params/demo.yaml", "M08")\nfolder = Path({str(folder / name)!r})',
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


def main() -> None:
    """Measure, print, and write outputs/benchmarks/explorer.json."""
    if not lab.CHROMIUM.is_file():
        print(f"explorer: not measured, for there is no browser at {lab.CHROMIUM}")
        return
    fold = Fold.load("params/demo.yaml", "M08")
    corpus, tokens = fold.corpus, fold.tokens
    utterances = list(corpus)[:UTTERANCES]
    many = [replace(utt, utt_id=f"{utt.utt_id}x{copy}") for copy in range(MANY // len(corpus) + 1) for utt in corpus][
        :MANY
    ]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, some, keep in (("usual", utterances, True), ("many", many, False)):
            for place, (system, wrong) in enumerate((NAMES | {"teachers": 0.2}).items()):
                systems.save(folder / part / system, some, tokens, wrong, place, posteriors=keep, level=corpus.level)
            lab.notebook(folder / part / "explore.ipynb", *cells(folder, part))
        bytes_kept = (folder / "usual/hard/posteriors" / posteriors.FILE).stat().st_size
        there = {one: folder / "usual" / one for one in NAMES}
        looked = explorer_data.fold_data(fold, there, teachers=folder / "usual/teachers")
        for utt_id in looked.metadata.index[:REPEATS]:
            for what, act in (("picture, drawn", drawn), ("picture, plain", plain)):
                start = time.perf_counter()
                act(looked, utt_id)
                found.setdefault(what, []).append(time.perf_counter() - start)
        for part in ("usual", "many"):
            with lab.server(folder / part) as address, lab.browser() as page:
                lab.run_all(page, address, "explore.ipynb")
                page.locator(".kd-picture img").wait_for()
                page.wait_for_timeout(3000)
                found[f"{part}: opening"] = [opened(page) for _ in range(REPEATS)]
                page.wait_for_timeout(1000)
                if part == "usual":
                    found["usual: click to picture"] = [page.evaluate(CLICK, at + 1) for at in range(REPEATS)]
                kinds = ["broke", "everything"] * (REPEATS // 2)
                found[f"{part}: filter"] = [page.evaluate(CHANGE, kind) for kind in kinds]
                found[f"{part}: sort"] = [page.evaluate(SORT, "reference") for _ in range(REPEATS)]
                place = repository_root() / "outputs" / "browser"
                place.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=str(place / f"benchmark_{part}.png"))
    medians = {what: round(statistics.median(times), 3) for what, times in found.items()}
    for what, seconds in medians.items():
        print(f"{what:28} {seconds:7.3f} s   (slowest {max(found[what]):.3f})")
    ratio = medians["picture, drawn"] / medians["picture, plain"]
    print(
        f"the picture takes {ratio:.2f} of the plain one; posteriors of {UTTERANCES} utterances: "
        f"{bytes_kept / 1e6:.1f} MB a system"
    )
    write_json(
        repository_root() / "outputs" / "benchmarks" / "explorer.json",
        {"medians_s": medians, "picture_of_plain": round(ratio, 3), "posteriors_bytes": bytes_kept},
    )


if __name__ == "__main__":
    main()
