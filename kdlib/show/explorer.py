"""The failure explorer: hypotheses, posteriors and audio of several systems, utterance by utterance.

In JupyterLab it is a page of widgets over saved tables; in a headless run the same call draws the most informative
failures. No model is loaded.
"""

import html
import io
import itertools
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import soundfile
from IPython.display import display

from kdlib.console import attended
from kdlib.corpus import audio
from kdlib.errors import UserError
from kdlib.evaluate.rounding import percent
from kdlib.io import atomic_write, short_path
from kdlib.pipeline import Fold
from kdlib.show import explorer_data, figures, utterance_figure
from kdlib.show.drawing import SILENT, Signal
from kdlib.show.explorer_data import FILTERS, ExplorerData
from kdlib.show.explorer_widgets import ExplorerWidgets

COLUMNS = 110  # characters in a row of the list, in a window of 1280 pixels with the file browser open
PAGE = 200  # rows in the list at a time
PICTURE_IN, DPI = 8.4, 96  # width and resolution of a figure on the screen


def explore(
    fold: Fold, systems: Mapping[str, Path], *, teachers: Path | None = None, before: str = "", after: str = ""
):
    """Explore systems of a fold: widgets in an interactive notebook, the most informative failures in a headless run.

    `systems` are folders of scores, or files of hypotheses of other code; `before` and `after` are compared.
    """
    data = explorer_data.fold_data(fold, systems, teachers=teachers, before=before, after=after)
    if not attended():
        return utterance_figure.failures_figure(data)
    return Explorer(data, fold.layout.figures).page


class Explorer(ExplorerWidgets):
    """The interactive page over `ExplorerData`; a notebook displays `page`."""

    def __init__(self, data: ExplorerData, out: Path) -> None:
        super().__init__(data)
        self.data, self.out = data, out
        self.view, self.first, self.by, self.descending = data.table(), 0, "", False
        self.chosen = ""
        self._quiet, self._drawn, self._shown_columns, self._loaded = False, ("", ""), [], ""
        self.show.options = self._filter_options()
        self._connect()
        self._refresh()

    def _connect(self) -> None:
        """Register the callbacks of the widgets."""
        for widget in self.filters:
            widget.observe(self._on_filter, "value")
        self.list.observe(self._on_select, "value")
        self.time.observe(self._on_time, "value")
        self.tabs.observe(lambda _: self._guarded(self._draw_tab), "selected_index")
        self.previous.on_click(lambda _: self._turn(-PAGE))
        self.next.on_click(lambda _: self._turn(PAGE))
        self.save_note.on_click(lambda _: self._guarded(self._save_note))
        acts = self._export_picture, self._export_ten, self._export_list
        for button, act in zip(self.exports, acts, strict=True):
            button.on_click(lambda _, act=act: self._guarded(act))

    def _filter_options(self) -> list[tuple[str, str]]:
        """Label and name of the filters that apply to these systems."""
        names = {"before": self.before.value, "after": self.after.value}
        needed = {"teachers": self.data.teachers, "noted": self.data.notes_file}
        without = {kind for kind, value in needed.items() if not value}
        if len(self.data.systems) == 1:
            without |= {"fixed", "broke", "differ", "all wrong"}
        return [(label.format(**names), kind) for kind, label in FILTERS.items() if kind not in without]

    # the list

    def _on_filter(self, change) -> None:
        if not self._quiet:
            self._guarded(lambda: self._refresh(renamed=change.owner in (self.before, self.after)))

    def _refresh(self, renamed: bool = False) -> None:
        """Select the rows again after a change of filters."""
        self.data.before, self.data.after, self.data.decoder = self.before.value, self.after.value, self.decoder.value
        if renamed:
            with self._muted():
                value = self.show.value
                self.show.options = self._filter_options()
                self.show.value = value
        self.view = self.data.view(
            self.show.value,
            text=self.text.value,
            by=self.by,
            descending=self.descending,
            **{column: widget.value for column, widget in self.where.items()},
        )
        self.first = 0
        self._fill()
        self._draw_tab()

    def _fill(self) -> None:
        """Show a page of rows, and the chosen utterance."""
        rows = self.view.iloc[self.first : self.first + PAGE]
        columns = self._columns()
        self._head(columns)
        lines = [(self._row(name, row, columns), name) for name, row in rows.to_dict("index").items()]
        with self._muted():
            self.list.options = lines
        last = self.first + len(rows)
        span = f"{self.first + 1:,} to {last:,} of " if len(self.view) > PAGE else ""
        whole = f" (of {len(self.data.metadata):,})" if len(self.view) < len(self.data.metadata) else ""
        self.count.value = f"{span}{len(self.view):,} utterances{whole}"
        self.previous.disabled, self.next.disabled = self.first == 0, last >= len(self.view)
        if not len(rows):
            self._clear()
            return
        utt_id = self.chosen if self.chosen in rows.index else rows.index[0]
        with self._muted():
            self.list.value = utt_id
        if utt_id != self.chosen or self._drawn != (self.chosen, self.decoder.value):
            self._open(utt_id)

    def _columns(self) -> list[tuple[str, str, int]]:
        """Name, label and width of the columns: only those whose values differ between rows."""
        table = self.data.metadata
        names = list(self.data.all_systems)

        def width(texts, least: int, most: int) -> int:
            return max(least, min(most, max(map(len, texts), default=0) + 1))

        found = [("utt_id", "utterance", width(table.index, 10, 34))]
        in_id = all(name.startswith(f"{speaker}_") for name, speaker in table.speaker.items())  # the id has the speaker
        for name, label, least in (("speaker", "speaker", 8), ("level", "level", 6), ("word_type", "type", 5)):
            if table[name].nunique() > 1 and not (name == "speaker" and in_id):
                found.append((name, label, width(table[name], least, 12)))
        if table.seen.nunique() > 1:
            found.append(("seen", "seen", 5))
        found.append(("reference", "reference", width(table.reference, 10, 15)))
        left = (COLUMNS - sum(size for _, _, size in found)) // len(names)
        return [*found, *((name, name, max(9, min(18, left))) for name in names)]

    def _head(self, columns: list[tuple[str, str, int]]) -> None:
        """Show one button per column; the buttons are created again only if the columns change."""
        import ipywidgets as w

        if columns != self._shown_columns:
            buttons = []
            for name, label, width in columns:
                layout = w.Layout(width=f"{width}ch", min_width=f"{width}ch", height="20px")
                button = w.Button(tooltip=f"sort by {label}", layout=layout)
                button.on_click(lambda _, name=name: self._guarded(lambda: self._sort(name)))
                buttons.append(button)
            self.head.children, self._shown_columns = buttons, columns
        for button, (name, label, width) in zip(self.head.children, columns, strict=True):
            sign = ("▼" if self.descending else "▲") if name == self.by else ""
            button.description = _fit(label + sign, width - 1)

    def _sort(self, name: str) -> None:
        self.descending = self.by == name and not self.descending
        self.by = name
        self._refresh()

    def _row(self, utt_id: str, row: dict, columns: list[tuple[str, str, int]]) -> str:
        cells, marks = [], self.data.marks(row)
        for name, _, width in columns:
            value = utt_id if name == "utt_id" else row[name]
            if name in self.data.all_systems:
                value = "?" if not isinstance(value, str) else ("✓ " if marks[name] else "✗ ") + value
            cells.append(_fit(value, width - 1))
        return "\u00a0".join(cells)

    def _turn(self, by: int) -> None:
        if self.first + by < len(self.view):
            self.first = max(0, self.first + by)
            self._guarded(self._fill)

    # the chosen utterance

    def _on_select(self, change) -> None:
        if not self._quiet and change.new:
            self._guarded(lambda: self._open(change.new))

    def _open(self, utt_id: str) -> None:
        """Show an utterance."""
        self._save_pending_note()
        self.chosen = utt_id
        self._loaded = self.data.notes().get(utt_id, "")
        with self._muted():
            utt = self.data.utterance(utt_id)
            self.time.max = max(0.1, utt.duration_s) if utt else 1.0
            self.time.value = 0.0
            self.note.value = self._loaded
        self.status.value = ""
        self._draw(None)
        self._show_top_tokens(0.0)
        self._load_players(utt_id)

    def _save_pending_note(self) -> None:
        """Save an edited note before another utterance is opened."""
        if self.chosen and self.data.notes_file and self.note.value.strip() != self._loaded.strip():
            self.data.note(self.chosen, self.note.value)

    def _draw(self, at_s: float | None) -> None:
        figure = utterance_figure.utterance_figure(self.data, self.chosen, at_s=at_s, width_in=PICTURE_IN)
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
            self.picture.value = file.getvalue()
        self.picture.layout.display = ""
        self._drawn = (self.chosen, self.decoder.value)

    def _on_time(self, change) -> None:
        if not self._quiet and self.chosen:
            self._guarded(lambda: (self._draw(change.new), self._show_top_tokens(change.new)))

    def _show_top_tokens(self, at_s: float) -> None:
        """Show the most probable tokens of every system at a time."""
        rows = []
        for name, (kept, logprobs) in self.data.frames(self.chosen).items():
            cells = "".join(
                f"<td>{html.escape(piece)} {100 * share:.0f} %</td>"
                for piece, share in utterance_figure.top_tokens(kept, logprobs, at_s)
            )
            rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
        body = "".join(rows) or "<tr><td>no posteriors were saved for this utterance</td></tr>"
        for name, (word, value, meaning) in self.data.confidence(self.chosen).items():
            text = f"{word or '(no word fits)'}, confidence {value:.2f}{': ' if meaning else ''}{meaning}"
            body += f"<tr><th>{html.escape(name)}</th><td colspan=6>closed lexicon: {html.escape(text)}</td></tr>"
        self.top_tokens.value = f'<table class="kd-top" title="{html.escape(self.chosen)}">{body}</table>'

    def _load_players(self, utt_id: str) -> None:
        """Load the players: this recording, and the same word by other speakers."""
        shown = {"this utterance": self.data.utterance(utt_id), **self.data.same_word(utt_id)}
        for player, (label, utt) in itertools.zip_longest(self.players, shown.items(), fillvalue=("", None)):
            hint, sound = player.children
            wav, reason = _wav(utt) if utt else (None, "the corpus has no recording of this id")
            hint.value = f'<span class="kd-line">{html.escape(label)}{"" if wav else ": no recording"}</span>'
            sound.layout.display = "" if wav else "none"
            player.layout.display = "" if label else "none"
            if wav:
                sound.value = wav
            elif label and utt is shown["this utterance"]:
                self.status.value = html.escape(reason)

    def _clear(self) -> None:
        """Hide the utterance: the list is empty."""
        self._save_pending_note()
        self.chosen, self.note.value = "", ""
        self._drawn = ("", "")
        self.top_tokens.value = ""
        for player in self.players:
            player.layout.display = "none"
        self.picture.layout.display = "none"
        self.count.value += ": no matches; choose another filter, or clear the search"

    # the other pages

    def _draw_tab(self) -> None:
        """Draw the page in front, if it is not the list."""
        after = self.after.value
        if self.tabs.selected_index == 1:
            figure = utterance_figure.confusion_figure(self.data.confusions(self.view, after), after)
            _into(self.confusions, lambda: display(figure))
        elif self.tabs.selected_index == 2:
            scores = self.data.by_speaker(self.view)
            _into(self.speakers, lambda: self._show_speakers(scores))

    def _show_speakers(self, scores: pd.DataFrame) -> None:
        if scores.empty:
            print("No matches; choose another filter, or clear the search.")
            return
        figure = figures.wra_by_speaker(scores, "", self.data.speaker_order)
        plt.close(figure)
        display(figure)
        intervals = [f"{percent(low)} - {percent(high)}" for low, high in zip(scores.low, scores.high, strict=True)]
        table = scores.rename(columns={"decoder": "system"})
        table = table.assign(**{"WRA %": percent(scores.wra), "95 %": intervals})
        display(table[["speaker", "level", "system", "n", "WRA %", "95 %"]].set_index(["speaker", "system"]))

    # notes and exports

    def _save_note(self) -> None:
        if self.chosen and self.data.notes_file is None:
            raise UserError("no file for notes: set ExplorerData(notes=...)")
        path = self.data.note(self.chosen, self.note.value) if self.chosen else None
        self._loaded = self.note.value
        self.status.value = f"saved in {html.escape(short_path(path))}" if path else "No utterance is chosen."

    def _export_picture(self) -> None:
        if not self.chosen:
            raise UserError("no utterance is chosen: nothing to export")
        figure = utterance_figure.utterance_figure(self.data, self.chosen)
        self._report(figures.save(figure, self.out, f"closeup_{_file_name(self.chosen)}"), " and .pdf")

    def _export_ten(self) -> None:
        figure = utterance_figure.failures_figure(self.data, self.view)
        self._report(figures.save(figure, self.out, f"failures_{_file_name(self.after.value)}"), " and .pdf")

    def _export_list(self) -> None:
        path = self.out / f"list_{_file_name(self.after.value)}_{self.show.value.replace(' ', '_')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = self.data.notes()
        table = self.view.assign(note=[notes.get(name, "") for name in self.view.index])
        with atomic_write(path) as hidden:
            table.to_csv(hidden, index_label="utt_id")
        self._report(path)

    def _report(self, path: Path, more: str = "") -> None:
        self.status.value = f"written: {html.escape(short_path(path))}{more}"

    def _guarded(self, act: Callable) -> None:
        """Run a callback; an error is shown in the status line."""
        try:
            act()
        except UserError as error:
            self.status.value = f"<b>{html.escape(str(error))}</b>"
        except Exception as error:  # a widget's callback would swallow it
            self.status.value = f"<b>failed: {html.escape(f'{type(error).__name__}: {error}')}</b>"

    @contextmanager
    def _muted(self) -> Iterator[None]:
        """Change widgets without running their callbacks."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before


def _fit(text: str, width: int) -> str:
    """Cut or pad a text to a width in monospace columns, with spaces that do not collapse."""
    sizes = [2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text]
    if sum(sizes) > width:
        kept = int((np.cumsum(sizes) <= width - 1).sum())
        text, sizes = text[:kept] + "…", [*sizes[:kept], 1]
    return text.replace(" ", "\u00a0") + "\u00a0" * (width - sum(sizes))


def _wav(utt) -> tuple[bytes | None, str]:
    """A recording as WAV, or the reason why there is none."""
    try:
        signal = Signal.of(utt)
    except UserError:
        return None, f"the recording is missing: {utt.wav}"
    if not signal.has_sound:
        return None, SILENT
    with io.BytesIO() as file:
        soundfile.write(file, signal.values, audio.RATE_HZ, format="WAV", subtype="PCM_16")
        return file.getvalue(), ""


def _into(output, act: Callable) -> None:
    output.clear_output(wait=True)
    with output:
        act()


def _file_name(text: str) -> str:
    return "".join(char if char.isalnum() or char in "-_+" else "_" for char in text)
