"""The widgets of the failure explorer, and where they stand; what they do: explorer."""

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
    """All there is to see and touch; `page` is the whole."""

    def __init__(self, found: ExplorerData) -> None:
        import ipywidgets as w

        names = list(found.systems)

        def choice(label: str, options: list, value: str | None = None, wide: str = "140px"):
            style = {"description_width": "initial"}
            return w.Dropdown(
                options=options,
                value=options[0][1] if value is None else value,
                description=label,
                layout=w.Layout(width=wide),
                style=style,
            )

        self.before = choice("from", [(one, one) for one in names], found.before, "170px")
        self.after = choice("to", [(one, one) for one in names], found.after, "165px")
        if len(names) == 1:
            self.before.layout.display = self.after.layout.display = "none"
        self.decoder = choice("decoder", [(one, one) for one in found.decoders])
        self.show = choice("show", [("everything", "all")], wide="330px")
        self.where = {
            column: choice(label, _values(found, column), wide=wide)
            for column, label, wide in (
                ("speaker", "speaker", "135px"),
                ("level", "level", "150px"),
                ("word_type", "type", "160px"),
                ("seen", "seen word", "130px"),
            )
        }
        self.text = w.Text(
            placeholder="search ids, words, answers, notes", continuous_update=False, layout=w.Layout(width="225px")
        )
        self.head = w.HBox(layout=w.Layout(overflow="hidden"))
        self.head.add_class("kd-head")
        self.list = w.Select(options=[], rows=12, layout=w.Layout(width="100%", height="215px"))
        self.list.add_class("kd-list")
        self.earlier, self.later = (
            w.Button(description=sign, tooltip=tip, layout=w.Layout(width="36px"))
            for sign, tip in (("◀", "the rows before"), ("▶", "the next rows"))
        )
        self.count, self.line = w.HTML(), w.HTML()
        self.players = [_player(w) for _ in range(4)]
        sounds = w.HBox(self.players, layout=w.Layout(flex_flow="row wrap"))
        self.picture = w.Image(format="png", layout=w.Layout(max_width="100%", align_self="flex-start"))
        framed = w.Box([self.picture], layout=w.Layout(overflow="hidden"))
        framed.add_class("kd-picture")
        self.at = w.FloatSlider(
            min=0, max=1, step=0.04, description="time (s)", continuous_update=False, layout=w.Layout(width="70%")
        )
        self.top = w.HTML()
        self.note = w.Textarea(placeholder="a note on this utterance", layout=w.Layout(width="60%", height="52px"))
        self.keep = w.Button(description="keep the note", icon="check")
        self.exports = [
            w.Button(description=text, tooltip=tip, icon="download", layout=w.Layout(width="130px"))
            for text, tip in (
                ("picture", "this utterance as PDF and PNG"),
                ("ten of these", "the most telling failures of the list as PDF and PNG"),
                ("list", "what the list shows, as CSV"),
            )
        ]
        self.confused, self.people = w.Output(), w.Output()
        one = [sounds, framed, w.HBox([self.at]), self.top, w.HBox([self.note, self.keep])]
        utterances = w.VBox(
            [
                self.head,
                self.list,
                w.HBox([self.earlier, self.later, self.count]),
                *one,
                w.HBox([w.HTML("export:"), *self.exports]),
            ]
        )
        self.tabs = w.Tab([utterances, self.confused, self.people], titles=["Utterances", "Confusions", "Speakers"])
        wrap = w.Layout(flex_flow="row wrap")
        self.page = w.VBox(
            [
                w.HTML(STYLE),
                w.HBox([self.show, self.before, self.after, self.decoder], layout=wrap),
                w.HBox([*self.where.values(), self.text], layout=wrap),
                self.tabs,
                self.line,
            ]
        )
        self.page.add_class("kd-explorer")

    @property
    def asked(self) -> list:
        """What asks for other rows."""
        return [self.show, self.before, self.after, self.decoder, *self.where.values(), self.text]


def _player(w):
    """A recording, below what it is."""
    sound = w.Audio(format="wav", autoplay=False, loop=False, layout=w.Layout(width="192px", height="36px"))
    return w.VBox([w.HTML(), sound], layout=w.Layout(width="198px"))


def _values(found: ExplorerData, column: str) -> list[tuple[str, str]]:
    return [("all", ""), *((one, one) for one in sorted(set(found.known[column])) if one)]
