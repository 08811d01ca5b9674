"""What several systems made of the same utterances, side by side: the tables behind the failure explorer.

Everything comes from what the stages have saved: hypotheses, posteriors and the corpus. No model is loaded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rapidfuzz.distance import Levenshtein

from kdlib.corpus import prepare, speakers
from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.errors import UserError, nearest
from kdlib.evaluate import posteriors, predictions
from kdlib.evaluate.posteriors import Posteriors
from kdlib.evaluate.score import fold_words, interval
from kdlib.io import atomic_write
from kdlib.params import Params
from kdlib.tokens import normalise

ABOUT = ["speaker", "level", "word_type", "seen", "reference"]
FILTERS = {  # what may be shown -> how it is called; {before}, {after} are the two systems that are compared
    "all": "everything",
    "fixed": "{after} fixed: {before} was wrong",
    "broke": "{after} broke: {before} was right",
    "wrong": "{after} wrong",
    "all wrong": "all systems wrong",
    "teachers": "teachers right, {after} wrong",
    "differ": "systems differ",
    "noted": "with a note",
}


@dataclass(frozen=True)
class SystemResults:
    """What one system wrote, by every decoder, and what it said of every frame, where that was kept."""

    name: str
    place: Path
    decoders: tuple[str, ...]
    rows: pd.DataFrame  # by utt_id
    posteriors: Posteriors | None

    def answers(self, decoder: str) -> pd.Series:
        """What it wrote by a decoder, or by its first where it has not that one."""
        return self.rows[decoder if decoder in self.decoders else self.decoders[0]]


class ExplorerData:
    """Systems side by side: which utterance is right by whom, and everything there is to see and hear of it."""

    def __init__(
        self,
        systems: Mapping[str, Path],
        corpus: Corpus | None = None,
        *,
        teachers: Path | None = None,
        taught_by: Sequence[str] = (),
        before: str = "",
        after: str = "",
        notes: Path | None = None,
        fold_homophones: bool = False,
    ) -> None:
        """`systems` are folders of scores or files of answers; `teachers` is that of the teachers together.

        `before` and `after` are compared, by default the first system and the last; `taught_by` are the speakers of the
        teachers; `notes` is a CSV to keep notes in; with `fold_homophones` TO is right for TWO.
        """
        if not systems:
            raise UserError("the failure explorer needs at least one system: a folder of scores, or a file of answers")
        self.systems = {name: _load_results(name, Path(place)) for name, place in systems.items()}
        self.teachers = _load_results("teachers", teachers) if teachers else None
        names = list(self.systems)
        for name in (before, after):
            if name and name not in names:
                raise UserError(f"the failure explorer has no system {name!r}{nearest(name, names)}")
        self.before, self.after = before or names[0], after or names[-1]
        self.corpus, self.taught_by, self.notes_file = corpus, tuple(taught_by), notes
        self._spell = fold_words if fold_homophones else None
        self._utterances = {utt.utt_id: utt for utt in corpus} if corpus else {}
        self._order = {name: place for place, name in enumerate(corpus.by_intelligibility)} if corpus else {}
        self.known = self._joined()
        self.decoders = tuple(dict.fromkeys(one for system in self.systems.values() for one in system.decoders))
        self.decoder = self.decoders[0]

    @property
    def everybody(self) -> dict[str, SystemResults]:
        """The systems, and the teachers together."""
        return self.systems | ({"teachers": self.teachers} if self.teachers else {})

    def table(self, decoder: str = "") -> pd.DataFrame:
        """One row an utterance: what is known of it, what each system wrote; NaN where it did not hear it."""
        found = self.known.copy()
        for name, system in self.everybody.items():
            found[name] = system.answers(decoder or self.decoder).reindex(found.index)
        return found

    def row(self, utt_id: str, decoder: str = "") -> dict[str, str]:
        """One row of the table."""
        said = {name: one.answers(decoder or self.decoder) for name, one in self.everybody.items()}
        return self.known.loc[utt_id].to_dict() | {name: one.get(utt_id, math.nan) for name, one in said.items()}

    def marks(self, row: Mapping) -> dict[str, bool]:
        """Whether each system's answer in one row is right."""
        spell = self._spell or str
        return {
            name: isinstance(row[name], str) and spell(row[name]) == spell(row["reference"]) for name in self.everybody
        }

    def right(self, table: pd.DataFrame, name: str) -> pd.Series:
        """Whether a system's answers in some rows are right."""
        if self._spell is None:
            return table[name] == table.reference
        return table[name].map(self._spell, na_action="ignore") == table.reference.map(self._spell)

    def view(
        self,
        show: str = "all",
        *,
        decoder: str = "",
        before: str = "",
        after: str = "",
        text: str = "",
        by: str = "",
        falling: bool = False,
        **where: str,
    ) -> pd.DataFrame:
        """The rows of the table that are asked for, sorted by a column.

        `where` are values of columns (speaker="M08"), `text` is looked for in ids, references, answers and notes.
        """
        if show not in FILTERS:
            raise UserError(f"the failure explorer cannot show {show!r}{nearest(show, FILTERS)}")
        table = self.table(decoder)
        for column, value in where.items():
            if value:
                table = table[table[column] == value]
        table = table[self._chosen(table, show, before or self.before, after or self.after)]
        if text:
            table = table[self._found(table, normalise(text))]
        if by:
            key = None if by in table else table.index.to_series()
            order = (table[by].fillna("") if key is None else key).sort_values(ascending=not falling, kind="stable")
            table = table.loc[order.index]
        return table

    def _chosen(self, table: pd.DataFrame, show: str, before: str, after: str) -> pd.Series:
        right = {name: self.right(table, name) for name in self.everybody}
        heard = {name: table[name].notna() for name in self.everybody}
        both = heard[before] & heard[after]
        no = pd.Series(False, table.index)
        return {
            "all": lambda: ~no,
            "fixed": lambda: both & ~right[before] & right[after],
            "broke": lambda: both & right[before] & ~right[after],
            "wrong": lambda: heard[after] & ~right[after],
            "all wrong": lambda: ~pd.DataFrame({name: right[name] for name in self.systems}).any(axis=1),
            "teachers": lambda: right["teachers"] & heard[after] & ~right[after] if self.teachers else no,
            "differ": lambda: table[list(self.systems)].nunique(axis=1) > 1,
            "noted": lambda: table.index.to_series().isin(set(self.notes())),
        }[show]()

    def _found(self, table: pd.DataFrame, text: str) -> pd.Series:
        notes = self.notes()
        columns = [table.index.to_series(), table.reference, *(table[name].fillna("") for name in self.everybody)]
        columns.append(table.index.to_series().map(lambda name: notes.get(name, "")))
        found = pd.Series(False, table.index)
        for column in columns:
            found |= column.str.upper().str.contains(text, regex=False)
        return found

    def telling(self, count: int = 10, table: pd.DataFrame | None = None) -> pd.DataFrame:
        """The failures that tell most: broken although teachers knew; broken; missed although teachers knew; the rest.

        Of equal ones those whose answer is farthest from its reference; each reference once before any comes twice.
        """
        table = self.table() if table is None else table
        wrong = table[self._chosen(table, "wrong", self.before, self.after)]
        if wrong.empty:
            return wrong
        broke = self._chosen(wrong, "broke", self.before, self.after)
        missed = self._chosen(wrong, "teachers", self.before, self.after)
        far = [Levenshtein.normalized_distance(a, b) for a, b in zip(wrong.reference, wrong[self.after], strict=True)]
        rank = pd.DataFrame({"kind": -2 * broke.astype(int) - missed.astype(int), "far": far}, wrong.index)
        rank["again"] = (
            wrong.loc[rank.sort_values(["kind", "far"], ascending=[True, False]).index].groupby("reference").cumcount()
        )
        return wrong.loc[rank.sort_values(["again", "kind", "far"], ascending=[True, True, False]).index[:count]]

    def confusions(self, table: pd.DataFrame, name: str = "", most: int = 15) -> pd.DataFrame:
        """How often which reference (row) was written as which other text (column): the commonest ones."""
        name = name or self.after
        wrong = table[table[name].notna() & ~self.right(table, name)]
        pairs = pd.DataFrame({"reference": wrong.reference, "answer": wrong[name].replace("", "(nothing)")})
        pairs = pairs[pairs.reference.isin(pairs.reference.value_counts().index[:most])]
        pairs = pairs[pairs.answer.isin(pairs.answer.value_counts().index[:most])]
        counts = pd.crosstab(pairs.reference, pairs.answer)
        rows, columns = (counts.sum(axis=axis).sort_values(ascending=False, kind="stable").index for axis in (1, 0))
        return counts.loc[rows, columns]

    def by_speaker(self, table: pd.DataFrame) -> pd.DataFrame:
        """WRA with its interval of every speaker and system, as the figures have it: a system is called decoder."""
        rows = []
        for speaker in sorted(table.speaker.unique(), key=lambda name: (self._order.get(name, len(self._order)), name)):
            part = table[table.speaker == speaker]
            for name in self.everybody:
                heard = part[part[name].notna()]
                if len(heard):
                    right = self.right(heard, name).to_numpy(float)
                    low, high = interval(right)
                    rows.append(
                        {"speaker": speaker, "level": part.level.iloc[0] or "?", "decoder": name, "n": len(heard)}
                        | {"wra": right.mean(), "low": low, "high": high}
                    )
        return pd.DataFrame(rows, columns=["speaker", "level", "decoder", "n", "wra", "low", "high"])

    def utterance(self, utt_id: str) -> Utterance | None:
        """The recording of an id, if the corpus has it."""
        return self._utterances.get(utt_id)

    def frames(self, utt_id: str) -> dict[str, tuple[Posteriors, "pd.DataFrame"]]:
        """What each system, and the teachers together, said of every frame of an utterance."""
        return {
            name: (system.posteriors, system.posteriors[utt_id])
            for name, system in self.everybody.items()
            if system.posteriors and utt_id in system.posteriors
        }

    def divergence(self, utt_id: str) -> dict[str, tuple[float, "pd.Series"]]:
        """By system: the milliseconds of a frame, and KL(teachers || system) by frame, if both have the same tokens."""
        said = self.frames(utt_id)
        if "teachers" not in said:
            return {}
        kept, theirs = said.pop("teachers")
        return {
            name: (kept.stride_ms, posteriors.frame_kl(theirs, ours))
            for name, (own, ours) in said.items()
            if own.pieces == kept.pieces and own.blank == kept.blank and own.stride_ms == kept.stride_ms
        }

    def alike(self, utt_id: str) -> dict[str, Utterance]:
        """The same word by others: a control speaker, the speaker of a teacher, and the same speaker once more."""
        utt = self.utterance(utt_id)
        if utt is None or self.corpus is None:
            return {}
        others = [one for one in self.corpus if one.text == utt.text and one.utt_id != utt_id and not one.copy_of]
        sex, place = self.corpus.person(utt.speaker).sex, self._order

        def near(one: Utterance) -> tuple:
            return (
                self.corpus.person(one.speaker).sex != sex,
                abs(place[one.speaker] - place[utt.speaker]),
                one.speaker,
                one.utt_id,
            )

        wanted = {
            "control": lambda one: self.corpus.is_control(one.speaker),
            "teacher's speaker": lambda one: one.speaker in self.taught_by and one.speaker != utt.speaker,
            "same speaker, once more": lambda one: one.speaker == utt.speaker,
        }
        found = {}
        for label, right in wanted.items():
            if some := [one for one in others if right(one)]:
                one = min(some, key=near)
                name = f"{label} {one.speaker}" if one.speaker != utt.speaker else label
                found[name] = one
        return found

    def notes(self) -> dict[str, str]:
        """The notes that were written, by utterance."""
        if self.notes_file is None or not self.notes_file.is_file():
            return {}
        try:
            table = pd.read_csv(self.notes_file, dtype=str, keep_default_na=False)
            return dict(zip(table.utt_id, table.note, strict=True))
        except (ValueError, AttributeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.notes_file}: not a CSV with the columns utt_id and note ({error}); mend it, or move it away"
            ) from None

    def note(self, utt_id: str, text: str) -> Path | None:
        """Write a note beside the others; an empty one is taken away."""
        if self.notes_file is None:
            return None
        notes = self.notes() | {utt_id: text.strip()}
        rows = [(name, note) for name, note in sorted(notes.items()) if note]
        self.notes_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.notes_file) as hidden:
            pd.DataFrame(rows, columns=["utt_id", "note"]).to_csv(hidden, index=False)
        return self.notes_file

    def _joined(self) -> pd.DataFrame:
        """What is known of every utterance that any of the systems heard."""
        parts = [system.rows[ABOUT] for system in self.systems.values()]
        whole = pd.concat(parts)
        told = whole.groupby(level=0).reference.nunique()
        if (told > 1).any():
            first = told.index[told > 1][0]
            texts = " and ".join(map(repr, sorted(whole.loc[first, "reference"].unique())))
            raise UserError(f"{first} has the references {texts} in systems that are to be compared; mend one of them")
        table = whole.replace("", pd.NA).groupby(level=0, sort=False).first().fillna("")
        if self.corpus:
            spoken = table.index.to_series().map(lambda name: getattr(self._utterances.get(name), "speaker", ""))
            table["speaker"] = table.speaker.where(table.speaker != "", spoken)
            speaker_level = {name: self.corpus.level(name) for name in set(table.speaker)}
            table["level"] = table.level.where(table.level != "", table.speaker.map(speaker_level))
        return table


def fold_data(
    params: Params, systems: Mapping[str, Path], *, teachers: Path | None = None, before: str = "", after: str = ""
) -> ExplorerData:
    """Systems of a fold with its corpus, notes, and the speakers of its teachers."""
    corpus = prepare.load(params)
    taught_by = () if params.teacher.backbone == "students" else speakers.fold_teachers(params, corpus)
    notes = params.fold_folder / "notes.csv"
    return ExplorerData(
        systems,
        corpus,
        teachers=teachers,
        taught_by=taught_by,
        before=before,
        after=after,
        notes=notes,
        fold_homophones=params.scoring.fold_homophones,
    )


def _load_results(name: str, place: Path) -> SystemResults:
    """What was saved of a system: a folder of scores of ours, or a file of answers."""
    table = place / "hypotheses.csv" if place.is_dir() else place
    if table.suffix == ".csv" and table.is_file():
        rows = pd.read_csv(table, dtype=str, keep_default_na=False)
        ours = {"utt_id", "speaker", "reference"} <= set(rows.columns)
        decoders = tuple(name for name in predictions.decoders(table) if name not in ABOUT) if ours else ()
        if not decoders or not set(decoders) <= set(rows.columns):
            raise UserError(f"{table}: not a hypotheses.csv of kdlib; expected {predictions.FORMATS}")
        if (twice := rows.utt_id[rows.utt_id.duplicated()]).any():
            raise UserError(f"{table}: {twice.iloc[0]!r} stands twice in it; ids must be unique")
        rows = rows.set_index("utt_id")
    else:
        rows = predictions.read(place).rename(columns={"hypothesis": "greedy"}).set_index("utt_id")
        decoders = ("greedy",)
    for column in ["reference", *decoders]:
        rows[column] = rows[column].map(normalise)
    rows = rows.reindex(columns=[*ABOUT, *decoders], fill_value="")
    kept = place / "posteriors" / posteriors.FILE
    heard = "greedy" in decoders and kept.is_file()  # of an untrained head nothing is shown
    return SystemResults(name, place, decoders, rows, Posteriors(kept) if heard else None)
