"""The widgets of the failure explorer and their layout; their behaviour is in `explorer`."""

from kdlib.show.explorer_data import ExplorerData

STYLE = """<style>
.kd-list select, .kd-head button {font-family: monospace !important; font-size: 12px !important;}
.kd-head button {padding: 0 !important; margin: 0 !important; text-align: left; border: none; background: none;
  line-height: 20px !important; font-weight: bold; color: var(--jp-ui-font-color1);}
.kd-list select {overflow-x: auto; padding-left: 2px;}
.kd-head {padding-left: 6px;}
.kd-top td, .kd-top th {padding: 0 10px 0 0 !important; font-size: 12px; line-height: 15px; text-align: left;}
.kd-line {color: var(--jp-ui-font-color2);}
</style>"""


class ExplorerWidgets:
    """All widgets; `page` contains them."""

    def __init__(self, data: ExplorerData) -> None:
        import ipywidgets as w

        names = list(data.systems)

        def choice(label: str, options: list, value: str | None = None, wide: str = "140px"):
            style = {"description_width": "initial"}
            return w.Dropdown(
                options=options,
                value=options[0][1] if value is None else value,
                description=label,
                layout=w.Layout(width=wide),
                style=style,
            )

        self.before = choice("from", [(name, name) for name in names], data.before, "170px")
        self.after = choice("to", [(name, name) for name in names], data.after, "165px")
        if len(names) == 1:
            self.before.layout.display = self.after.layout.display = "none"
        self.decoder = choice("decoder", [(name, name) for name in data.decoders])
        self.show = choice("show", [("everything", "all")], wide="330px")
        self.where = {
            column: choice(label, _values(data, column), wide=wide)
            for column, label, wide in (
                ("speaker", "speaker", "135px"),
                ("level", "level", "150px"),
                ("word_type", "type", "160px"),
                ("seen", "seen word", "130px"),
            )
        }
        self.text = w.Text(
            placeholder="search ids, words, hypotheses, notes", continuous_update=False, layout=w.Layout(width="225px")
        )
        self.head = w.HBox(layout=w.Layout(overflow="hidden"))
        self.head.add_class("kd-head")
        self.list = w.Select(options=[], rows=12, layout=w.Layout(width="100%", height="215px"))
        self.list.add_class("kd-list")
        self.previous, self.next = (
            w.Button(description=sign, tooltip=tip, layout=w.Layout(width="36px"))
            for sign, tip in (("◀", "previous rows"), ("▶", "next rows"))
        )
        self.count, self.status = w.HTML(), w.HTML()
        self.players = [_player(w) for _ in range(4)]
        players = w.HBox(self.players, layout=w.Layout(flex_flow="row wrap"))
        self.picture = w.Image(format="png", layout=w.Layout(max_width="100%", align_self="flex-start"))
        framed = w.Box([self.picture], layout=w.Layout(overflow="hidden"))
        framed.add_class("kd-picture")
        self.time = w.FloatSlider(
            min=0, max=1, step=0.04, description="time (s)", continuous_update=False, layout=w.Layout(width="70%")
        )
        self.top_tokens = w.HTML()
        self.note = w.Textarea(placeholder="a note on this utterance", layout=w.Layout(width="60%", height="52px"))
        self.save_note = w.Button(description="save note", icon="check")
        self.exports = [
            w.Button(description=text, tooltip=tip, icon="download", layout=w.Layout(width="130px"))
            for text, tip in (
                ("picture", "this utterance as PDF and PNG"),
                ("ten of these", "the most informative failures of the list as PDF and PNG"),
                ("list", "the rows of the list as CSV"),
            )
        ]
        self.confusions, self.speakers = w.Output(), w.Output()
        rows = [self.head, self.list, w.HBox([self.previous, self.next, self.count]), players, framed]
        rows += [w.HBox([self.time]), self.top_tokens, w.HBox([self.note, self.save_note])]
        utterances = w.VBox([*rows, w.HBox([w.HTML("export:"), *self.exports])])
        pages = {"Utterances": utterances, "Confusions": self.confusions, "Speakers": self.speakers}
        self.tabs = w.Tab(list(pages.values()), titles=list(pages))
        wrap = w.Layout(flex_flow="row wrap")
        self.page = w.VBox(
            [
                w.HTML(STYLE),
                w.HBox([self.show, self.before, self.after, self.decoder], layout=wrap),
                w.HBox([*self.where.values(), self.text], layout=wrap),
                self.tabs,
                self.status,
            ]
        )
        self.page.add_class("kd-explorer")

    @property
    def filters(self) -> list:
        """The widgets that select the rows of the list."""
        return [self.show, self.before, self.after, self.decoder, *self.where.values(), self.text]


def _player(w):
    """An audio player below its label."""
    audio = w.Audio(format="wav", autoplay=False, loop=False, layout=w.Layout(width="192px", height="36px"))
    return w.VBox([w.HTML(), audio], layout=w.Layout(width="198px"))


def _values(data: ExplorerData, column: str) -> list[tuple[str, str]]:
    return [("all", ""), *((value, value) for value in sorted(set(data.metadata[column])) if value)]
