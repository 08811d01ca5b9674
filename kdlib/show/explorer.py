"""The failure explorer: utterance by utterance, by ear and eye, what several systems made of the same speech.

In JupyterLab it is a page of widgets over saved tables; in a headless run the same call draws the failures that tell
most. No model is loaded.
"""

import html
import io
import itertools
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.corpus import audio
from kdlib.errors import UserError
from kdlib.io import atomic_write, short_path
from kdlib.params import Params
from kdlib.show import explorer_data, figures, utterance_figure
from kdlib.show.explorer_data import FILTERS, ExplorerData
from kdlib.show.explorer_widgets import ExplorerWidgets

COLUMNS = 110  # letters that a line of the list has room for, beside a file browser in a window of 1280 pixels
PAGE = 200  # rows in the list at a time
WIDE_IN, DPI = 8.4, 96  # of a picture on the screen


def explore(
    params: Params, systems: Mapping[str, Path], *, teachers: Path | None = None, before: str = "", after: str = ""
):
    """Systems of a fold to look into: the explorer where somebody sits before it, else the most telling failures.

    `systems` are folders of scores, or files of answers of other code; `before` and `after` are compared.
    """
    found = explorer_data.fold_data(params, systems, teachers=teachers, before=before, after=after)
    if not attended():
        return utterance_figure.telling_failures(found)
    return Explorer(found, params.fold_folder / "figures").page


def attended() -> bool:
    """Whether a person can answer this notebook: papermill's runs take no input."""
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return bool(kernel and kernel.get_parent().get("content", {}).get("allow_stdin"))


class Explorer(ExplorerWidgets):
    """The page over `Failures`, alive; `page` is what a notebook shows."""

    def __init__(self, found: ExplorerData, out: Path) -> None:
        super().__init__(found)
        self.found, self.out = found, out
        self.view, self.first, self.by, self.falling = found.table(), 0, "", False
        self.chosen = ""
        self._quiet, self._drawn, self._headed, self._loaded = False, ("", ""), [], ""
        self.show.options = self._kinds()
        self._wire()
        self._refresh()

    def _wire(self) -> None:
        """What happens when something is touched."""
        for one in self.asked:
            one.observe(self._asked, "value")
        self.list.observe(self._picked, "value")
        self.at.observe(self._moved, "value")
        self.tabs.observe(lambda _: self._guarded(self._tab), "selected_index")
        self.earlier.on_click(lambda _: self._turn(-PAGE))
        self.later.on_click(lambda _: self._turn(PAGE))
        self.keep.on_click(lambda _: self._guarded(self._noted))
        acts = self._export_picture, self._export_ten, self._export_list
        for button, act in zip(self.exports, acts, strict=True):
            button.on_click(lambda _, act=act: self._guarded(act))

    def _kinds(self) -> list[tuple[str, str]]:
        named = {"before": self.before.value, "after": self.after.value}
        needed = {"teachers": self.found.teachers, "noted": self.found.notes_file}
        without = {kind for kind, there in needed.items() if not there}
        if len(self.found.systems) == 1:
            without |= {"fixed", "broke", "differ", "all wrong"}
        there = [kind for kind in FILTERS if kind not in without]
        return [(FILTERS[kind].format(**named), kind) for kind in there]

    # what follows from it

    def _asked(self, change) -> None:
        if not self._quiet:
            self._guarded(lambda: self._refresh(renamed=change.owner in (self.before, self.after)))

    def _refresh(self, renamed: bool = False) -> None:
        self.found.before, self.found.after, self.found.decoder = (
            one.value for one in (self.before, self.after, self.decoder)
        )
        if renamed:
            with self._still():
                value = self.show.value
                self.show.options = self._kinds()
                self.show.value = value
        self.view = self.found.view(
            self.show.value,
            text=self.text.value,
            by=self.by,
            falling=self.falling,
            **{column: one.value for column, one in self.where.items()},
        )
        self.first = 0
        self._fill()
        self._tab()

    def _fill(self) -> None:
        rows = self.view.iloc[self.first : self.first + PAGE]
        columns = self._columns()
        self._head(columns)
        lines = [(self._row(name, row, columns), name) for name, row in rows.to_dict("index").items()]
        with self._still():
            self.list.options = lines
        last = self.first + len(rows)
        what = f"{self.first + 1:,} to {last:,} of " if len(self.view) > PAGE else ""
        whole = f" (of {len(self.found.known):,})" if len(self.view) < len(self.found.known) else ""
        self.count.value = f"{what}{len(self.view):,} utterances{whole}"
        self.earlier.disabled, self.later.disabled = self.first == 0, last >= len(self.view)
        if not len(rows):
            self._nothing()
            return
        there = self.chosen if self.chosen in rows.index else rows.index[0]
        with self._still():
            self.list.value = there
        if there != self.chosen or self._stale():
            self._look(there)

    def _columns(self) -> list[tuple[str, str, int]]:
        """Column, how it is called, and how wide it is: only those that tell rows apart."""
        table = self.found.known
        names = list(self.found.everybody)

        def wide(texts, least: int, most: int) -> int:
            return max(least, min(most, max(map(len, texts), default=0) + 1))

        found = [("utt_id", "utterance", wide(table.index, 10, 34))]
        spoken = all(name.startswith(f"{speaker}_") for name, speaker in table.speaker.items())  # it says who speaks
        for name, label, least in (("speaker", "speaker", 8), ("level", "level", 6), ("word_type", "type", 5)):
            if table[name].nunique() > 1 and not (name == "speaker" and spoken):
                found.append((name, label, wide(table[name], least, 12)))
        if table.seen.nunique() > 1:
            found.append(("seen", "seen", 5))
        found.append(("reference", "reference", wide(table.reference, 10, 15)))
        room = (COLUMNS - sum(width for _, _, width in found)) // len(names)
        return [*found, *((name, name, max(9, min(18, room))) for name in names)]

    def _head(self, columns: list[tuple[str, str, int]]) -> None:
        """A button a column; they are made anew only where the columns are others."""
        import ipywidgets as w

        if columns != self._headed:
            buttons = []
            for name, label, wide in columns:
                layout = w.Layout(width=f"{wide}ch", min_width=f"{wide}ch", height="20px")
                button = w.Button(tooltip=f"sort by {label}", layout=layout)
                button.on_click(lambda _, name=name: self._guarded(lambda: self._sort(name)))
                buttons.append(button)
            self.head.children, self._headed = buttons, columns
        for button, (name, label, wide) in zip(self.head.children, columns, strict=True):
            sign = ("▼" if self.falling else "▲") if name == self.by else ""
            button.description = _fit(label + sign, wide - 1)

    def _sort(self, name: str) -> None:
        self.falling = self.by == name and not self.falling
        self.by = name
        self._refresh()

    def _row(self, utt_id: str, row: dict, columns: list[tuple[str, str, int]]) -> str:
        cells, marks = [], self.found.marks(row)
        for name, _, wide in columns:
            value = utt_id if name == "utt_id" else row[name]
            if name in self.found.everybody:
                value = "?" if not isinstance(value, str) else ("✓ " if marks[name] else "✗ ") + value
            cells.append(_fit(value, wide - 1))
        return "\u00a0".join(cells)

    def _turn(self, by: int) -> None:
        if self.first + by < len(self.view):
            self.first = max(0, self.first + by)
            self._guarded(self._fill)

    def _picked(self, change) -> None:
        if not self._quiet and change.new:
            self._guarded(lambda: self._look(change.new))

    def _stale(self) -> bool:
        return self._drawn != (self.chosen, self.decoder.value)

    def _look(self, utt_id: str) -> None:
        """Show an utterance."""
        self._leave()
        self.chosen = utt_id
        self._loaded = self.found.notes().get(utt_id, "")
        with self._still():
            utt = self.found.utterance(utt_id)
            self.at.max = max(0.1, utt.duration_s) if utt else 1.0
            self.at.value = 0.0
            self.note.value = self._loaded
        self.line.value = ""
        self._draw(None)
        self._tops(0.0)
        self._hear(utt_id)

    def _leave(self) -> None:
        """Keep a note that was written and not kept, before another utterance takes its place."""
        if self.chosen and self.found.notes_file and self.note.value.strip() != self._loaded.strip():
            self.found.note(self.chosen, self.note.value)

    def _draw(self, at_s: float | None) -> None:
        drawn = utterance_figure.utterance_figure(self.found, self.chosen, at_s=at_s, width_in=WIDE_IN)
        with io.BytesIO() as file:
            drawn.savefig(file, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
            self.picture.value = file.getvalue()
        self.picture.layout.display = ""
        self._drawn = (self.chosen, self.decoder.value)

    def _moved(self, change) -> None:
        if not self._quiet and self.chosen:
            self._guarded(lambda: (self._draw(change.new), self._tops(change.new)))

    def _tops(self, at_s: float) -> None:
        """The likeliest tokens of every system at a time."""
        rows = []
        for name, (kept, logprobs) in self.found.frames(self.chosen).items():
            cells = "".join(
                f"<td>{html.escape(piece)} {100 * share:.0f} %</td>"
                for piece, share in utterance_figure.top_tokens(kept, logprobs, at_s)
            )
            rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
        body = "".join(rows) or "<tr><td>no posteriors were kept of this utterance</td></tr>"
        self.top.value = f'<table class="kd-top" title="{html.escape(self.chosen)}">{body}</table>'

    def _hear(self, utt_id: str) -> None:
        """Load the players: the recording, and the same word by others."""
        there = {"this utterance": self.found.utterance(utt_id), **self.found.alike(utt_id)}
        for player, (label, utt) in itertools.zip_longest(self.players, there.items(), fillvalue=("", None)):
            hint, sound = player.children
            heard, why = _wav(utt) if utt else (None, "the corpus has no recording of this id")
            hint.value = f'<span class="kd-line">{html.escape(label)}{"" if heard else ": no recording"}</span>'
            sound.layout.display = "" if heard else "none"
            player.layout.display = "" if label else "none"
            if heard:
                sound.value = heard
            elif label and utt is there["this utterance"]:
                self.line.value = html.escape(why)

    def _nothing(self) -> None:
        """The list is empty."""
        self._leave()
        self.chosen, self.note.value = "", ""
        self._drawn = ("", "")
        self.top.value = ""
        for player in self.players:
            player.layout.display = "none"
        self.picture.layout.display = "none"
        self.count.value += ": none is like this; choose another filter, or clear the search"

    def _tab(self) -> None:
        """Draw the page in front, if it is not the list."""
        from IPython.display import display

        after = self.after.value
        if self.tabs.selected_index == 1:
            drawn = utterance_figure.confusion_figure(self.found.confusions(self.view, after), after)
            _into(self.confused, lambda: display(drawn))
        elif self.tabs.selected_index == 2:
            people = self.found.by_speaker(self.view)
            _into(self.people, lambda: self._speakers(people, display))

    def _speakers(self, people: pd.DataFrame, display: Callable) -> None:
        import matplotlib.pyplot as plt

        if people.empty:
            print("No utterance is like this; choose another filter, or clear the search.")
            return
        figure = figures.wra_by_speaker(people, "")
        plt.close(figure)
        display(figure)
        table = people.assign(
            **{"WRA %": (100 * people.wra).round(1)},
            interval=[f"{100 * low:.1f} - {100 * high:.1f}" for low, high in zip(people.low, people.high, strict=True)],
        ).rename(columns={"decoder": "system", "interval": "95 %"})
        display(table[["speaker", "level", "system", "n", "WRA %", "95 %"]].set_index(["speaker", "system"]))

    # what is kept

    def _noted(self) -> None:
        if self.chosen and self.found.notes_file is None:
            raise UserError("there is no file to keep notes in: give Failures(notes=...)")
        path = self.found.note(self.chosen, self.note.value) if self.chosen else None
        self._loaded = self.note.value
        self.line.value = (
            f"kept in {html.escape(short_path(path))}" if path else "There is no utterance to note something of."
        )

    def _export_picture(self) -> None:
        if not self.chosen:
            raise UserError("no utterance is chosen: there is no picture to export")
        drawn = utterance_figure.utterance_figure(self.found, self.chosen)
        self._written(figures.save(drawn, self.out, f"closeup_{_name(self.chosen)}"), " and .pdf")

    def _export_ten(self) -> None:
        drawn = utterance_figure.telling_failures(self.found, self.view)
        self._written(figures.save(drawn, self.out, f"failures_{_name(self.after.value)}"), " and .pdf")

    def _export_list(self) -> None:
        path = self.out / f"list_{_name(self.after.value)}_{self.show.value.replace(' ', '_')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = self.found.notes()
        table = self.view.assign(note=[notes.get(name, "") for name in self.view.index])
        with atomic_write(path) as hidden:
            table.to_csv(hidden, index_label="utt_id")
        self._written(path)

    def _written(self, path: Path, more: str = "") -> None:
        self.line.value = f"written: {html.escape(short_path(path))}{more}"

    def _guarded(self, act: Callable) -> None:
        """Do something; what goes wrong is said in the line below."""
        try:
            act()
        except UserError as error:
            self.line.value = f"<b>{html.escape(str(error))}</b>"
        except Exception as error:  # a widget's callback would swallow it
            self.line.value = f"<b>that failed: {html.escape(f'{type(error).__name__}: {error}')}</b>"

    @contextmanager
    def _still(self) -> Iterator[None]:
        """While it lasts, widgets that are changed by us ask for nothing."""
        was, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = was


def _fit(text: str, wide: int) -> str:
    """A text in so many columns of a typewriter, with spaces that do not collapse."""
    sizes = [2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text]
    if sum(sizes) > wide:
        kept = int((np.cumsum(sizes) <= wide - 1).sum())
        text, sizes = text[:kept] + "…", [*sizes[:kept], 1]
    return text.replace(" ", "\u00a0") + "\u00a0" * (wide - sum(sizes))


def _wav(utt) -> tuple[bytes | None, str]:
    """A recording as a browser plays it, or why there is none."""
    import soundfile

    try:
        samples = audio.load(utt)
    except UserError:
        return None, f"the recording is missing: {utt.wav}"
    with io.BytesIO() as file:
        soundfile.write(file, samples, audio.RATE_HZ, format="WAV", subtype="PCM_16")
        return file.getvalue(), ""


def _into(place, act: Callable) -> None:
    place.clear_output(wait=True)
    with place:
        act()


def _name(text: str) -> str:
    return "".join(char if char.isalnum() or char in "-_+" else "_" for char in text)
