"""`Speaker` and `Corpus`, and the manifests of SpeechBrain and NeMo that they are read from.

Reads SpeechBrain CSV (columns by name, `$data_folder` replaced) and NeMo JSON lines; writes SpeechBrain CSV. A user's
own corpus needs `ID,duration,wav,spk_id,wrd`; the columns of `OPTIONAL` are used where present.
"""

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.errors import UserError, nearest
from kdlib.io import atomic_write

COLUMNS = {"ID": "utt_id", "duration": "duration_s", "wav": "wav", "spk_id": "speaker", "wrd": "text"}
OPTIONAL = (
    "block",
    "repetition",
    "word_type",
    "sha256",
    "offset_s",
    "copy_of",
    "recording_of",
)  # `features` for `wav`, too
NEMO = {"audio_filepath": "wav", "duration": "duration_s", "text": "text"}
USER_NAMES = {"utt_id": "ID", "wav": "wav (audio_filepath)", "speaker": "spk_id (speaker)", "text": "wrd (text)"}
USER_NAMES |= {"duration_s": "duration"}  # our fields by their names in manifests
NEMO_SPEAKER = ("speaker", "spk_id", "speaker_id")

CONTROL = "CONTROL"
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
LEVELS = ("VERY_LOW", "LOW", "MID", "HIGH", CONTROL)  # of intelligibility
# Names that a speaker cannot have: our folders, and reserved file names.
RESERVED = {"corpus", "zero_shot", "pretrained", "figures", "logs", "teachers", "logits", "parents", "tokens"}
RESERVED |= {"compare", "speaker_features", "lm", "ablations", "benchmarks", "con", "nul", "aux", "prn"}


@dataclass(frozen=True, slots=True)
class Speaker:
    """Metadata of a speaker, all optional."""

    speaker: str
    sex: str = ""  # M or F
    intelligibility_pct: float | None = None
    level: str = ""  # one of LEVELS: the published one, or the recipe's
    seed_level: str = ""  # the original study's

    @property
    def control(self) -> bool:
        """True if this is a speaker without dysarthria."""
        return self.level == CONTROL


@dataclass(frozen=True)
class Corpus:
    """Checked utterances, in the manifest's order, and the metadata of their speakers."""

    utterances: Utterances  # or any iterable of them
    source: str = ""
    people: Mapping[str, Speaker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "utterances", Utterances.of(self.utterances))  # frozen
        if twice := self.utterances.repeated_ids():
            more = f" (and {len(twice) - 1} more ids)" if len(twice) > 1 else ""
            raise UserError(f"{self.source}: utterance id {twice[0]!r} occurs twice{more}; ids must be unique")
        if not self.utterances:
            raise UserError(f"{self.source}: no utterances in it")

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)

    @cached_property
    def speakers(self) -> list[str]:
        """All speakers, sorted."""
        return sorted({utt.speaker for utt in self})

    @property
    def dysarthric(self) -> list[str]:
        """The speakers that are not controls, sorted: those that can be held out."""
        return [name for name in self.speakers if not self.is_control(name)]

    @cached_property
    def lexicon(self) -> list[str]:
        """All distinct transcripts, sorted: the closed vocabulary of an isolated-word corpus."""
        return sorted({utt.text for utt in self if utt.text})

    def where(self, condition: Callable[[Utterance], object]) -> Utterances:
        """The utterances that satisfy `condition`."""
        return self.utterances.where(condition)

    def person(self, speaker: str) -> Speaker:
        """The metadata of a speaker."""
        return self.people.get(speaker, Speaker(speaker))

    def level(self, speaker: str, labels: str = "published") -> str:
        """A speaker's intelligibility level: published (or the recipe's), or the seed study's; empty if unknown."""
        return self.person(speaker).seed_level if labels == "seed" else self.person(speaker).level

    @property
    def by_intelligibility(self) -> list[str]:
        """The speakers, least intelligible first: by per cent, else by level, then by name; controls last."""

        def rank(name: str) -> tuple[bool, float, str]:
            share = self.intelligibility(name)
            return self.is_control(name), 101.0 if share is None else share, name

        return sorted(self.speakers, key=rank)

    def intelligibility(self, speaker: str) -> float | None:
        """A speaker's intelligibility in per cent, or the highest of the level; None if unknown."""
        person = self.person(speaker)
        if person.intelligibility_pct is None:
            return 100 * (LEVELS.index(person.level) + 1) / len(LEVELS) if person.level else None
        return person.intelligibility_pct

    @property
    def speaker_order(self) -> str:
        """What `by_intelligibility` orders the dysarthric speakers by, in words for the axis of a figure."""
        people = map(self.person, self.dysarthric)
        known = [bool(person.level) or person.intelligibility_pct is not None for person in people]
        if not any(known):
            return "by name"
        return "by intelligibility, least first" + ("" if all(known) else "; unknown: last, by name")

    def is_control(self, speaker: str) -> bool:
        """True if a speaker is marked as a control."""
        return self.person(speaker).control


@dataclass(frozen=True, slots=True)
class Excluded:
    """An excluded recording and the reason."""

    utt_id: str
    speaker: str
    wav: str
    reason: str


LONGEST_NAME = 100  # bytes of a speaker's name, which is the name of a folder
LOOK_ALIKES = str.maketrans("авекмнорстухіјѕ" + "αβεζηικμνορτυχ", "abekmhopctyxijs" + "abezhikmnoptyx")  # to Latin
EMPTY_BYTES = 44  # a wav header and nothing after it


def size(path: str | Path) -> int:
    """Size of a file in bytes; 0 for a missing or unreadable one."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def most_common(problems: list[Excluded]) -> str:
    """The most frequent reason, for the error message that no recording is left."""
    reasons = Counter(problem.reason for problem in problems).most_common(1)
    return f": {reasons[0][1]} x {reasons[0][0]}, first {problems[0].wav}" if reasons else ""


class ImportResult(NamedTuple):
    """Result of an importer: a corpus, the excluded recordings, and notes for the report."""

    corpus: Corpus
    problems: list[Excluded]
    notes: list[str]


def read(path: Path, data_folder: Path | None = None) -> Corpus:
    """Read a manifest: SpeechBrain CSV, or NeMo JSON lines if the name ends in .json or .jsonl.

    The error message counts all lines that cannot be used, and names the first ones.
    """
    if not path.is_file():
        raise UserError(f"no manifest {path}: make the corpus first (notebook 00_corpus), or correct `manifest:`")
    reader = _read_nemo if path.suffix in (".json", ".jsonl") else _read_speechbrain
    faults: list[str] = []
    folder = os.path.abspath(data_folder or path.parent)

    def usable() -> Iterator[Utterance]:
        for number, fields in reader(path):
            try:
                yield _utterance(fields, folder)
            except ValueError as error:
                faults.append(f"line {number}: {error}")

    try:
        utterances = Utterances.of(usable())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV ({error}); is a quotation mark never closed?") from None
    if faults:
        more = f" (and {len(faults) - 3} more lines)" if len(faults) > 3 else ""
        raise UserError(f"{path}, {'; '.join(faults[:3])}{more}")
    if any(not utt.utt_id for utt in utterances):
        utterances = Utterances.of(_add_ids(utterances, Path(folder)))
    return Corpus(utterances, str(path))


def check_names(corpus: Corpus) -> None:
    """Refuse speaker names that cannot name folders and fold files, and two names that differ in case only."""
    names: dict[str, str] = {}
    for name in corpus.speakers:
        if not re.fullmatch(r"\w[\w.-]*", name) or name.casefold() in RESERVED:
            raise UserError(
                f"{corpus.source}: the speaker name {name!r} cannot name a folder of results; expected letters, "
                "digits, '_', '-' and '.', a letter or a digit first, and none of kdlib's own folders; rename it"
            )
        if len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f"{corpus.source}: the speaker name {name[:20]!r}... has {len(name.encode())} bytes, too many for a "
                f"folder's name; expected at most {LONGEST_NAME}: rename it"
            )
        if similar := names.get(_seen(name)):
            how = "in case only" if similar.casefold() == name.casefold() else "in letters that look alike"
            raise UserError(
                f"{corpus.source}: speakers {similar!r} and {name!r} differ {how}; if they are one person, "
                "leave-one-speaker-out would train on the held-out speaker: give them one name, or two distinct ones"
            )
        names[_seen(name)] = name


def _seen(name: str) -> str:
    """A name as one sees it: without case, and with Latin letters for the Greek and Cyrillic ones that look alike."""
    return unicodedata.normalize("NFKC", name).casefold().translate(LOOK_ALIKES)


def write_speechbrain(utterances: Iterable[Utterance], path: Path, data_folder: Path) -> None:
    """Write a SpeechBrain CSV; paths below `data_folder` start with `$data_folder`."""
    inside = f"{data_folder}{os.sep}"
    with atomic_write(path) as hidden, hidden.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *OPTIONAL])
        for utt in utterances:
            wav = f"$data_folder/{utt.path.removeprefix(inside)}" if utt.path.startswith(inside) else utt.path
            first = [utt.utt_id, f"{utt.duration_s:.4f}", wav, utt.speaker, utt.text]
            writer.writerow(first + [getattr(utt, name) for name in OPTIONAL])


def _read_speechbrain(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)  # as SpeechBrain reads it
        header = [name.strip() for name in reader.fieldnames or []]
        header = ["wav" if name == "features" and "wav" not in header else name for name in header]
        reader.fieldnames = header
        if not header:
            raise UserError(f"{path}: the file is empty; a SpeechBrain CSV has {','.join(COLUMNS)}")
        if twice := next((name for place, name in enumerate(header) if name and name in header[:place]), ""):
            raise UserError(f"{path}: the column {twice!r} occurs twice; remove one, for only the last would be read")
        for name in COLUMNS:
            if name not in header:
                mark = next((mark for mark in ";\t" if len(header) == 1 and mark in header[0]), "")
                hint = f"; its columns are separated by {mark!r}, expected ','" if mark else nearest(name, header)
                raise UserError(f"{path}: column {name!r} is missing{hint}; a SpeechBrain CSV has {','.join(COLUMNS)}")
        for row in reader:
            fields = {field: (row[column] or "").strip() for column, field in COLUMNS.items()}
            if None in row:  # fields beyond the header
                fields["extra"] = f"{len(header) + len(row[None])} fields, but {len(header)} in the header"
            yield reader.line_num, fields | _optional(row)


def _read_nemo(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); expected a JSON object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: found {type(row).__name__}; expected a JSON object per line")
        for key in (*NEMO, *NEMO_SPEAKER):
            if isinstance(row.get(key), dict | list | bool):
                found = type(row[key]).__name__
                raise UserError(f"{path}, line {number}: {key} is a {found}, expected text or a number")
        fields = {field: str("" if row.get(key) is None else row[key]).strip() for key, field in NEMO.items()}
        fields["speaker"] = next((str(row[name]) for name in NEMO_SPEAKER if row.get(name) is not None), "").strip()
        if row.get("utt_id"):
            fields["utt_id"] = str(row["utt_id"])
        if row.get("offset") is not None:
            fields["offset_s"] = str(row["offset"])
        yield number, _optional(row) | fields


def _optional(row: dict) -> dict:
    return {name: str(row[name]).strip() for name in OPTIONAL if row.get(name) not in (None, "")}


def _utterance(fields: dict, data_folder: str) -> Utterance:
    if "extra" in fields:
        raise ValueError(f"{fields['extra']}; put a text that contains a comma in quotation marks")
    for name, value in fields.items():
        column = USER_NAMES.get(name, name)
        if not value:
            raise ValueError(f"{column} is empty")
        if CONTROL_CHARACTERS.search(value):
            raise ValueError(f"{column} has a line break or a control character; is a quotation mark never closed?")
    times = {}
    for name, what in (("duration_s", "duration"), ("offset_s", "offset")):
        if name in fields:
            try:
                times[name] = float(fields[name])
            except ValueError:
                raise ValueError(f"{what} {fields[name]!r} is not a number of seconds") from None
    if not 0 < times["duration_s"] < 3600:
        raise ValueError(f"a duration of {times['duration_s']:g} s is impossible; expected more than 0, below 3600")
    if not times.get("offset_s", 0) >= 0:
        raise ValueError(f"an offset of {times['offset_s']:g} s is impossible; expected 0 or more")
    path = fields["wav"].replace("$data_folder", data_folder).replace("{data_root}", data_folder)
    wav = os.path.normpath(os.path.join(data_folder, path))
    if not os.path.isabs(fields["wav"]) and not wav.startswith(data_folder.rstrip(os.sep) + os.sep):
        raise ValueError(
            f"the path {fields['wav']!r} leaves the data folder {data_folder}; correct it or data_folder, "
            "or write an absolute path"
        )
    return Utterance(**{"utt_id": ""} | fields | times | {"wav": wav})


def _add_ids(utterances: Utterances, data_folder: Path) -> Iterator[Utterance]:
    """Add missing ids: the file's name, with its folders and offset where names are not unique."""
    stems = Counter(utt.wav.stem for utt in utterances if not utt.utt_id)
    for utt in utterances:
        if utt.utt_id:
            yield utt
        elif stems[utt.wav.stem] == 1:
            yield utt.replace(utt_id=utt.wav.stem)
        else:
            inside = utt.wav.relative_to(data_folder) if utt.wav.is_relative_to(data_folder) else utt.wav
            folders = [part for part in inside.with_suffix("").parts if part != inside.anchor]
            part = "" if utt.offset_s is None else f"_{utt.offset_s:.3f}"
            yield utt.replace(utt_id="_".join(folders) + part)
