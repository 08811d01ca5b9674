"""Outputs of several systems on the same utterances, side by side: the tables behind the failure explorer.

All data is read from what the stages saved: hypotheses, posteriors and the corpus. No model is loaded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.utterances import Utterance
from kdlib.decode.decoders import CLOSED
from kdlib.errors import UserError, nearest
from kdlib.evaluate import posteriors, predictions
from kdlib.evaluate.normalisers import NORMALISERS
from kdlib.evaluate.posteriors import Posteriors
from kdlib.evaluate.score import interval
from kdlib.io import atomic_write
from kdlib.pipeline import Fold
from kdlib.show import calibration
from kdlib.tokens import normalise

ABOUT = ["speaker", "level", "word_type", "seen", "reference"]
FILTERS = {  # filter -> label; {before} and {after} are the two systems that are compared
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
    """The hypotheses of one system by every decoder, and its frame posteriors where they were saved."""

    name: str
    path: Path
    decoders: tuple[str, ...]
    rows: pd.DataFrame  # by utt_id
    posteriors: Posteriors | None
    confidence: pd.Series  # by utt_id, of the closed lexicon's word; empty where none was saved

    def hypotheses(self, decoder: str) -> pd.Series:
        """The hypotheses of a decoder, or of the first decoder where the system lacks that one."""
        return self.rows[decoder if decoder in self.decoders else self.decoders[0]]


class ExplorerData:
    """Systems side by side: hypotheses, correctness, posteriors and recordings of every utterance."""

    def __init__(
        self,
        systems: Mapping[str, Path],
        corpus: Corpus | None = None,
        *,
        teachers: Path | None = None,
        teacher_speakers: Sequence[str] = (),
        before: str = "",
        after: str = "",
        notes: Path | None = None,
        normaliser: str = "none",
    ) -> None:
        """`systems` are folders of scores or files of hypotheses; `teachers` is that of the combined teachers.

        `before` and `after` are compared, by default the first system and the last; `teacher_speakers` are the speakers
        of the teachers; `notes` is the CSV file for notes; with `normaliser` homophones TO is correct for TWO.
        """
        if not systems:
            raise UserError(
                "the failure explorer needs at least one system: a folder of scores, or a file of hypotheses"
            )
        self.systems = {name: _load_results(name, Path(path)) for name, path in systems.items()}
        self.teachers = _load_results("teachers", teachers) if teachers else None
        names = list(self.systems)
        for name in (before, after):
            if name and name not in names:
                raise UserError(f"the failure explorer has no system {name!r}{nearest(name, names)}")
        self.before, self.after = before or names[0], after or names[-1]
        self.corpus, self.teacher_speakers, self.notes_file = corpus, tuple(teacher_speakers), notes
        self._fold = None if normaliser == "none" else NORMALISERS[normaliser]
        self._utterances = {utt.utt_id: utt for utt in corpus} if corpus else {}
        self._order = {name: place for place, name in enumerate(corpus.by_intelligibility)} if corpus else {}
        self.speaker_order = corpus.speaker_order if corpus else "by name"
        self.metadata = self._join_metadata()
        self.decoders = tuple(dict.fromkeys(name for system in self.systems.values() for name in system.decoders))
        self.decoder = self.decoders[0]

    @property
    def all_systems(self) -> dict[str, SystemResults]:
        """The systems, and the combined teachers."""
        return self.systems | ({"teachers": self.teachers} if self.teachers else {})

    def table(self, decoder: str = "") -> pd.DataFrame:
        """One row per utterance: metadata, and the hypothesis of each system; NaN where a system has none."""
        table = self.metadata.copy()
        for name, system in self.all_systems.items():
            table[name] = system.hypotheses(decoder or self.decoder).reindex(table.index)
        return table

    def row(self, utt_id: str, decoder: str = "") -> dict[str, str]:
        """One row of the table."""
        columns = {name: system.hypotheses(decoder or self.decoder) for name, system in self.all_systems.items()}
        return self.metadata.loc[utt_id].to_dict() | {n: texts.get(utt_id, math.nan) for n, texts in columns.items()}

    def marks(self, row: Mapping) -> dict[str, bool]:
        """Return for each system whether its hypothesis in one row is correct."""
        fold = self._fold or str
        return {
            name: isinstance(row[name], str) and fold(row[name]) == fold(row["reference"]) for name in self.all_systems
        }

    def correct(self, table: pd.DataFrame, name: str) -> pd.Series:
        """Return for each row whether a system's hypothesis is correct."""
        if self._fold is None:
            return table[name] == table.reference
        return table[name].map(self._fold, na_action="ignore") == table.reference.map(self._fold)

    def view(
        self,
        show: str = "all",
        *,
        decoder: str = "",
        before: str = "",
        after: str = "",
        text: str = "",
        by: str = "",
        descending: bool = False,
        **where: str,
    ) -> pd.DataFrame:
        """The rows of the table that match a filter, sorted by a column.

        `where` are values of columns (speaker="M08"), `text` is searched in ids, references, hypotheses and notes.
        """
        if show not in FILTERS:
            raise UserError(f"the failure explorer cannot show {show!r}{nearest(show, FILTERS)}")
        table = self.table(decoder)
        for column, value in where.items():
            if value:
                table = table[table[column] == value]
        table = table[self._matches_filter(table, show, before or self.before, after or self.after)]
        if text:
            table = table[self._contains_text(table, normalise(text))]
        if by:
            key = None if by in table else table.index.to_series()
            order = (table[by].fillna("") if key is None else key).sort_values(ascending=not descending, kind="stable")
            table = table.loc[order.index]
        return table

    def _matches_filter(self, table: pd.DataFrame, show: str, before: str, after: str) -> pd.Series:
        correct = {name: self.correct(table, name) for name in self.all_systems}
        decoded = {name: table[name].notna() for name in self.all_systems}
        both = decoded[before] & decoded[after]
        no = pd.Series(False, table.index)
        return {
            "all": lambda: ~no,
            "fixed": lambda: both & ~correct[before] & correct[after],
            "broke": lambda: both & correct[before] & ~correct[after],
            "wrong": lambda: decoded[after] & ~correct[after],
            "all wrong": lambda: ~pd.DataFrame({name: correct[name] for name in self.systems}).any(axis=1),
            "teachers": lambda: correct["teachers"] & decoded[after] & ~correct[after] if self.teachers else no,
            "differ": lambda: table[list(self.systems)].nunique(axis=1) > 1,
            "noted": lambda: table.index.to_series().isin(set(self.notes())),
        }[show]()

    def _contains_text(self, table: pd.DataFrame, text: str) -> pd.Series:
        notes = self.notes()
        columns = [table.index.to_series(), table.reference, *(table[name].fillna("") for name in self.all_systems)]
        columns.append(table.index.to_series().map(lambda name: notes.get(name, "")))
        found = pd.Series(False, table.index)
        for column in columns:
            found |= column.str.upper().str.contains(text, regex=False)
        return found

    def top_failures(self, count: int = 10, table: pd.DataFrame | None = None) -> pd.DataFrame:
        """The most informative failures: broken with the teachers correct; broken; wrong with them correct; others.

        Within a kind the hypothesis farthest from its reference comes first; no reference repeats before all have come.
        """
        table = self.table() if table is None else table
        wrong = table[self._matches_filter(table, "wrong", self.before, self.after)]
        if wrong.empty:
            return wrong
        broke = self._matches_filter(wrong, "broke", self.before, self.after)
        missed = self._matches_filter(wrong, "teachers", self.before, self.after)
        far = [Levenshtein.normalized_distance(a, b) for a, b in zip(wrong.reference, wrong[self.after], strict=True)]
        rank = pd.DataFrame({"kind": -2 * broke.astype(int) - missed.astype(int), "far": far}, wrong.index)
        ranked = rank.sort_values(["kind", "far"], ascending=[True, False]).index
        rank["repeat"] = wrong.loc[ranked].groupby("reference").cumcount()
        return wrong.loc[rank.sort_values(["repeat", "kind", "far"], ascending=[True, True, False]).index[:count]]

    def confusions(self, table: pd.DataFrame, name: str = "", most: int = 15) -> pd.DataFrame:
        """Counts of references (rows) by wrong hypotheses (columns), the most frequent ones."""
        name = name or self.after
        wrong = table[table[name].notna() & ~self.correct(table, name)]
        pairs = pd.DataFrame({"reference": wrong.reference, "hypothesis": wrong[name].replace("", "(empty)")})
        pairs = pairs[pairs.reference.isin(pairs.reference.value_counts().index[:most])]
        pairs = pairs[pairs.hypothesis.isin(pairs.hypothesis.value_counts().index[:most])]
        counts = pd.crosstab(pairs.reference, pairs.hypothesis)
        rows, columns = (counts.sum(axis=axis).sort_values(ascending=False, kind="stable").index for axis in (1, 0))
        return counts.loc[rows, columns]

    def by_speaker(self, table: pd.DataFrame) -> pd.DataFrame:
        """WRA with its interval per speaker and system, for `figures.wra_by_speaker` (the system as decoder)."""
        rows = []
        for speaker in sorted(table.speaker.unique(), key=lambda name: (self._order.get(name, len(self._order)), name)):
            part = table[table.speaker == speaker]
            for name in self.all_systems:
                decoded = part[part[name].notna()]
                if len(decoded):
                    correct = self.correct(decoded, name).to_numpy(float)
                    low, high = interval(correct)
                    rows.append(
                        {"speaker": speaker, "level": part.level.iloc[0] or "?", "decoder": name, "n": len(decoded)}
                        | {"wra": correct.mean(), "low": low, "high": high}
                    )
        return pd.DataFrame(rows, columns=["speaker", "level", "decoder", "n", "wra", "low", "high"])

    def utterance(self, utt_id: str) -> Utterance | None:
        """The utterance of an id, if the corpus has it."""
        return self._utterances.get(utt_id)

    def frames(self, utt_id: str) -> dict[str, tuple[Posteriors, np.ndarray]]:
        """The frame log-probabilities of an utterance by system, and those of the combined teachers."""
        return {
            name: (system.posteriors, system.posteriors[utt_id])
            for name, system in self.all_systems.items()
            if system.posteriors and utt_id in system.posteriors
        }

    def confidence(self, utt_id: str) -> dict[str, tuple[str, float, str]]:
        """By system: the closed lexicon's word, its confidence, and what that means on the system's dev speech."""
        found = {}
        for name, system in self.all_systems.items():
            if utt_id in system.confidence:
                value = system.confidence[utt_id]
                found[name] = system.rows.loc[utt_id, CLOSED], value, calibration.meaning_of(value, system.path)
        return found

    def divergence(self, utt_id: str) -> dict[str, tuple[float, np.ndarray]]:
        """By system: the frame shift in ms, and KL(teachers || system) by frame, where both have the same tokens."""
        frames = self.frames(utt_id)
        if "teachers" not in frames:
            return {}
        kept, target = frames.pop("teachers")
        return {
            name: (kept.stride_ms, posteriors.frame_kl(target, logprobs))
            for name, (own, logprobs) in frames.items()
            if own.pieces == kept.pieces and own.blank == kept.blank and own.stride_ms == kept.stride_ms
        }

    def same_word(self, utt_id: str) -> dict[str, Utterance]:
        """Other recordings of the same word: by a control, by the speaker of a teacher, and by the same speaker."""
        utt = self.utterance(utt_id)
        if utt is None or self.corpus is None:
            return {}
        others = [
            row
            for row in self._utterances.values()
            if row.text == utt.text and row.utt_id != utt_id and not row.copy_of
        ]
        sex, order = self.corpus.person(utt.speaker).sex, self._order

        def distance(row: Utterance) -> tuple:
            unlike = self.corpus.person(row.speaker).sex != sex
            return unlike, abs(order[row.speaker] - order[utt.speaker]), row.speaker, row.utt_id

        groups = {
            "control": [row for row in others if self.corpus.is_control(row.speaker)],
            "teacher's speaker": [r for r in others if r.speaker in self.teacher_speakers and r.speaker != utt.speaker],
            "same speaker, repetition": [row for row in others if row.speaker == utt.speaker],
        }
        found = [(label, min(rows, key=distance)) for label, rows in groups.items() if rows]
        return {f"{label} {row.speaker}" if row.speaker != utt.speaker else label: row for label, row in found}

    def notes(self) -> dict[str, str]:
        """The saved notes by utterance."""
        if self.notes_file is None or not self.notes_file.is_file():
            return {}
        try:
            table = pd.read_csv(self.notes_file, dtype=str, keep_default_na=False)
            return dict(zip(table.utt_id, table.note, strict=True))
        except (ValueError, AttributeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.notes_file}: not a CSV with the columns utt_id and note ({error}); correct it, or move it away"
            ) from None

    def note(self, utt_id: str, text: str) -> Path | None:
        """Save a note on an utterance; an empty text removes it."""
        if self.notes_file is None:
            return None
        notes = self.notes() | {utt_id: text.strip()}
        rows = [(name, note) for name, note in sorted(notes.items()) if note]
        self.notes_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.notes_file) as hidden:
            pd.DataFrame(rows, columns=["utt_id", "note"]).to_csv(hidden, index=False)
        return self.notes_file

    def _join_metadata(self) -> pd.DataFrame:
        """The metadata of every utterance of any system."""
        whole = pd.concat([system.rows[ABOUT] for system in self.systems.values()])
        references = whole.groupby(level=0).reference.nunique()
        if (references > 1).any():
            first = references.index[references > 1][0]
            texts = " and ".join(map(repr, sorted(whole.loc[first, "reference"].unique())))
            raise UserError(f"{first} has the references {texts} in the compared systems; correct one of them")
        table = whole.replace("", pd.NA).groupby(level=0, sort=False).first().fillna("")
        if self.corpus:
            known = table.index.to_series().map(lambda name: getattr(self._utterances.get(name), "speaker", ""))
            table["speaker"] = table.speaker.where(table.speaker != "", known)
            speaker_level = {name: self.corpus.level(name) for name in set(table.speaker)}
            table["level"] = table.level.where(table.level != "", table.speaker.map(speaker_level))
        return table


def fold_data(
    fold: Fold, systems: Mapping[str, Path], *, teachers: Path | None = None, before: str = "", after: str = ""
) -> ExplorerData:
    """Systems of a fold with its corpus, its notes and its teachers' speakers."""
    params = fold.params
    teacher_speakers = fold.target_teachers() if params.teacher.of_speakers else ()
    return ExplorerData(
        systems,
        fold.corpus,
        teachers=teachers,
        teacher_speakers=teacher_speakers,
        before=before,
        after=after,
        notes=fold.layout.notes,
        normaliser=params.scoring.normaliser,
    )


def _load_results(name: str, path: Path) -> SystemResults:
    """Read the saved results of a system: a folder of scores of kdlib, or a file of hypotheses."""
    table = path / "hypotheses.csv" if path.is_dir() else path
    if table.suffix == ".csv" and table.is_file():
        rows = pd.read_csv(table, dtype=str, keep_default_na=False)
        ours = {"utt_id", "speaker", "reference"} <= set(rows.columns)
        decoders = tuple(name for name in predictions.decoders(table) if name not in ABOUT) if ours else ()
        if not decoders or not set(decoders) <= set(rows.columns):
            raise UserError(f"{table}: not a hypotheses.csv of kdlib; expected {predictions.FORMATS}")
        if (duplicates := rows.utt_id[rows.utt_id.duplicated()]).any():
            raise UserError(f"{table}: duplicate id {duplicates.iloc[0]!r}; ids must be unique")
        rows = rows.set_index("utt_id")
    else:
        rows = predictions.read(path).rename(columns={"hypothesis": "greedy"}).set_index("utt_id")
        decoders = ("greedy",)
    for column in ["reference", *decoders]:
        rows[column] = rows[column].map(normalise)
    confidence = pd.Series(dtype=float)
    if CLOSED in decoders and "lexicon_posterior" in rows:
        confidence = rows.lexicon_posterior.astype(float)
    rows = rows.reindex(columns=[*ABOUT, *decoders], fill_value="")
    saved = path / "posteriors" / posteriors.FILE
    usable = "greedy" in decoders and saved.is_file()  # posteriors of an untrained head are not shown
    return SystemResults(name, path, decoders, rows, Posteriors(saved) if usable else None, confidence)
