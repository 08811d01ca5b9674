"""`Utterance` and `Corpus`: what was said by whom in which file, checked, in the formats that others use.

Reads and writes SpeechBrain CSV (columns by name, `$data_folder` replaced) and NeMo JSON lines. A corpus of one's own
needs `ID,duration,wav,spk_id,wrd`; the columns of `OPTIONAL` are used where they are there.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import UserError, nearest
from kdlib.stage import writing

COLUMNS = {"ID": "utt_id", "duration": "duration_s", "wav": "wav", "spk_id": "speaker", "wrd": "text"}
OPTIONAL = ("block", "repetition", "word_type", "sha256")
NEMO = {"audio_filepath": "wav", "duration": "duration_s", "text": "text"}
NEMO_SPEAKER = ("speaker", "spk_id", "speaker_id")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording of one word or sentence."""

    utt_id: str
    speaker: str
    wav: Path
    duration_s: float
    text: str
    block: str = ""
    repetition: str = ""
    word_type: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Corpus:
    """Checked utterances, in the manifest's order."""

    utterances: tuple[Utterance, ...]
    source: str = ""

    def __post_init__(self) -> None:
        for utt_id, times in Counter(utt.utt_id for utt in self.utterances).items():
            if times > 1:
                raise UserError(f"{self.source}: utterance id {utt_id!r} stands {times} times; ids must be unique")
        if not self.utterances:
            raise UserError(f"{self.source}: no utterances in it")

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)

    @property
    def speakers(self) -> list[str]:
        """All speakers, sorted."""
        return sorted({utt.speaker for utt in self})

    @property
    def lexicon(self) -> list[str]:
        """All distinct transcripts, sorted: the closed vocabulary of an isolated-word corpus."""
        return sorted({utt.text for utt in self})

    def where(self, keep: Callable[[Utterance], bool]) -> list[Utterance]:
        """The utterances that `keep` says yes to."""
        return [utt for utt in self if keep(utt)]


def read(path: Path, data_folder: Path | None = None) -> Corpus:
    """Read a manifest: SpeechBrain CSV, or NeMo JSON lines where the name ends in .json or .jsonl."""
    if not path.is_file():
        raise UserError(f"no manifest {path}: make the corpus first (notebook 00_corpus), or correct `manifest:`")
    reader = _read_nemo if path.suffix in (".json", ".jsonl") else _read_speechbrain
    try:
        return Corpus(tuple(reader(path, Path(data_folder or path.parent))), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def write_speechbrain(utterances: Iterable[Utterance], path: Path, data_folder: Path) -> None:
    """Write a SpeechBrain CSV; paths below `data_folder` start with `$data_folder`."""
    with writing(path) as hidden, hidden.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *OPTIONAL])
        for utt in utterances:
            row = [getattr(utt, name) for name in (*COLUMNS.values(), *OPTIONAL)]
            inside = utt.wav.is_relative_to(data_folder)
            row[1] = f"{utt.duration_s:.4f}"
            row[2] = f"$data_folder/{utt.wav.relative_to(data_folder).as_posix()}" if inside else str(utt.wav)
            writer.writerow(row)


def write_nemo(utterances: Iterable[Utterance], path: Path) -> None:
    """Write NeMo JSON lines with absolute paths, the speaker and what else is known of an utterance."""
    with writing(path) as hidden, hidden.open("w", encoding="utf-8") as file:
        for utt in utterances:
            record = {
                "audio_filepath": str(utt.wav.resolve()),
                "duration": utt.duration_s,
                "text": utt.text,
                "utt_id": utt.utt_id,
                "speaker": utt.speaker,
            }
            record |= {name: getattr(utt, name) for name in OPTIONAL if getattr(utt, name)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _read_speechbrain(path: Path, data_folder: Path) -> Iterator[Utterance]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        there = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = there
        for name in COLUMNS:
            if name not in there:
                raise UserError(
                    f"{path}: column {name!r} is missing{nearest(name, there)}; "
                    f"a SpeechBrain CSV has {','.join(COLUMNS)}"
                )
        for number, row in enumerate(reader, start=2):
            fields = {ours: (row[theirs] or "").strip() for theirs, ours in COLUMNS.items()}
            yield _utterance(fields | _optional(row), data_folder, f"{path}, line {number}")


def _read_nemo(path: Path, data_folder: Path) -> Iterator[Utterance]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}); NeMo manifests hold one JSON object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: found {type(row).__name__}; NeMo manifests hold one JSON object a line")
        fields = {ours: str(row.get(theirs) or "") for theirs, ours in NEMO.items()}
        fields["speaker"] = next((str(row[name]) for name in NEMO_SPEAKER if row.get(name)), "")
        fields["utt_id"] = str(row.get("utt_id") or "") or Path(fields["wav"]).stem
        yield _utterance(fields | _optional(row), data_folder, where)


def _optional(row: dict) -> dict:
    return {name: str(row[name]).strip() for name in OPTIONAL if row.get(name) not in (None, "")}


def _utterance(fields: dict, data_folder: Path, where: str) -> Utterance:
    for name, value in fields.items():
        if value in ("", None):
            raise UserError(f"{where}: {name} is empty")
    try:
        duration_s = float(fields["duration_s"])
    except ValueError:
        raise UserError(f"{where}: duration {fields['duration_s']!r} is not a number of seconds") from None
    if not 0 < duration_s < 3600:
        raise UserError(f"{where}: a duration of {duration_s:g} s is impossible; expected more than 0, below 3600")
    wav = Path(str(fields["wav"]).replace("$data_folder", str(data_folder)).replace("{data_root}", str(data_folder)))
    return Utterance(**fields | {"duration_s": duration_s, "wav": wav if wav.is_absolute() else data_folder / wav})
