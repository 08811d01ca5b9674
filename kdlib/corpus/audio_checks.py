"""Check once which recordings can be used, and report every fault with advice."""

import contextlib
import csv
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from kdlib.console import progress
from kdlib.corpus.audio import MARGIN_S, QUIET_DB, RATE_HZ, loud_part, read_samples
from kdlib.corpus.manifest import Corpus, Excluded
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.io import atomic_write, sha256
from kdlib.settings.corpus import AudioChecks
from kdlib.source_code import fingerprint

SILENT = 1e-4  # peak below which a file is silence
CLIPPED = 0.5  # share of samples at full scale above which a file is nothing but clipping
OFTEN_CLIPPED = 0.01  # share above which a recording counts as clipped in the report, and is used all the same
MIN_RATE_HZ = 4_000
UNREADABLE = "no permission to read the file"
CHECKED_FILES = "checked_files.csv"
_PART = 256  # files per part; results are saved after each part
NO_TRANSCRIPT = "nothing: there is no transcript"
ADVICE = {
    "empty file": "copy it again, if the original is not empty",
    "the test microphone did not record it": "nothing, unless uaspeech.microphone should be another",
    "no label for its code": "check that the label files are complete, or write uaspeech: {labels: list}",
    "the prompt has no recording": "nothing, unless recordings are missing",
    "the recording has no prompt": NO_TRANSCRIPT,
    "the prompt is empty": NO_TRANSCRIPT,
    "the prompt is an instruction": NO_TRANSCRIPT,
    "the prompt is a picture": NO_TRANSCRIPT,
    "the prompt contains xxx": NO_TRANSCRIPT,
    "the transcript has no letters": "transcribe the recording, or remove the line",
    UNREADABLE: "check the permissions of the file and its folders, or the disk",
    "a sample rate below 4,000 Hz": "check its header: speech needs at least 8,000 Hz",
    "samples far beyond full scale": "divide float samples by their full scale (32768 for 16 bits)",
    "another recording of an utterance that was left out": "see why that utterance was left out",
    "its path is not UTF-8": "rename the file or its folder",
    "the file is missing": "add the file, or correct data_folder or the manifest",
    "its checksum is not the manifest's": "restore the file, or correct the column sha256",
    "no file, but a folder, a pipe or a device": "correct the path in the manifest",
    "the file cannot be read as audio": "copy it again: it is damaged, or not an audio file",
    "the file ends before the part that the manifest names": "correct offset and duration in the manifest",
    "no samples in it": "record or copy it again",
    "NaN or infinite samples": "write it again: the program that wrote it divided by zero",
    "nothing but silence": "listen to it: a channel may be empty, or two channels may cancel each other",
    "clipped to nothing": "record it again, or copy it at a lower level",
    "too short to hold speech": "copy it again: it was cut off, or audio.min_duration_s is too high",
    "far too short for its transcript": "compare them: one belongs to another utterance, or the file was cut off",
}


@dataclass(frozen=True)
class AudioReport:
    """Result of checking every file: counts, faults with advice, and notes."""

    checked: int
    problems: list[Excluded]
    converted: dict[str, int] = field(default_factory=dict)  # "44100 Hz, 2 channels" -> files
    notes: list[str] = field(default_factory=list)
    advice: Mapping[str, str] = field(default_factory=lambda: ADVICE)  # by reason

    def __str__(self) -> str:
        share = f" ({100 * len(self.problems) / self.checked:.1f} %; each is named in left_out.csv)"
        lines = [
            f"{self.checked:,} recordings checked, {len(self.problems):,} left out{share * bool(self.problems)}",
            *(f"  {count:,} files of {what} are read as {RATE_HZ} Hz mono" for what, count in self.converted.items()),
        ]
        for reason, count in Counter(problem.reason for problem in self.problems).most_common():
            same = [problem for problem in self.problems if problem.reason == reason]
            names = ", ".join(f"{name} {times}" for name, times in sorted(Counter(p.speaker for p in same).items()))
            lines += [f"left out, {count:,} x {reason}", f"    speakers: {names or '?'}", f"    first: {same[0].wav}"]
            lines += [f"    what to do: {self.advice.get(reason)}"] * (reason in self.advice)
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def write(self, path: Path) -> None:
        """Write the excluded files, one per line."""
        with (
            atomic_write(path) as hidden,
            hidden.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Excluded.__slots__)
            writer.writerows([getattr(problem, name) for name in Excluded.__slots__] for problem in self.problems)


class FileInfo(NamedTuple):
    """Check result of one recording."""

    reason: str  # why it cannot be used, or empty
    kind: str  # "8000 Hz, 2 channels"
    duration_s: float
    speech_s: tuple[float, float]  # start and end that silence trimming would leave
    clipped: float = 0.0  # share of samples at full scale


def check_recordings(
    corpus: Corpus, settings: AudioChecks | None = None, folder: Path | None = None
) -> tuple[Corpus, AudioReport]:
    """Check every file; return the corpus without the unusable ones, and the report.

    Durations become the measured ones. `folder` keeps the results for the next check.
    """
    settings = settings or AudioChecks()
    kept, problems, formats, declared, clipped = [], [], Counter(), [], Counter()
    for utt, info in zip(corpus, _check_files(corpus, folder), strict=True):
        start_s, end_s = info.speech_s if settings.trim_silence else (0.0, info.duration_s)
        letters = sum(map(str.isalnum, utt.text))
        reason = info.reason
        if not reason and end_s - start_s < settings.min_duration_s:
            reason = "too short to hold speech"
        elif not reason and letters > settings.max_letters_per_s * (end_s - start_s):
            reason = "far too short for its transcript"
        if reason:
            problems.append(Excluded(utt.utt_id, utt.speaker, str(utt.wav), reason))
            continue
        formats[info.kind] += 1
        clipped[utt.speaker] += info.clipped > OFTEN_CLIPPED
        if utt.duration_s and abs(utt.duration_s - info.duration_s) > max(0.1, 0.05 * info.duration_s):
            declared.append(utt)
        offset_s = None if utt.offset_s is None and not settings.trim_silence else (utt.offset_s or 0.0) + start_s
        kept.append(utt.replace(duration_s=round(end_s - start_s, 4), offset_s=offset_s))
    if not kept:
        raise UserError(
            f"{corpus.source}: none of its {len(corpus)} audio files can be used; the first, "
            f"{problems[0].wav}: {problems[0].reason}"
        )
    formats.pop(f"{RATE_HZ} Hz, 1 channel", None)
    notes = [
        f"durations in the manifest that differ from those of the files, which are used: {len(declared):,}, first "
        f"{utt.utt_id} ({utt.duration_s:g} s declared)"
        for utt in declared[:1]
    ]
    notes += _clipping_notes(clipped, Counter(utt.speaker for utt in kept))
    return replace(corpus, utterances=kept), AudioReport(len(corpus), problems, dict(formats), notes)


def file_stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size in bytes and date of change of files; -1 for those that are missing or unreadable."""
    stamps = []
    for path in map(str, paths):
        try:
            status = os.stat(path)
            readable = os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)
            stamps.append((path, status.st_size if readable else -1, status.st_mtime_ns))
        except (OSError, ValueError):
            stamps.append((path, -1, -1))
    return stamps


def _clipping_notes(clipped: Counter[str], usable: Counter[str]) -> list[str]:
    """The usable recordings of each speaker that are clipped, most first."""
    named = [f"{name} {times} of {usable[name]}" for name, times in clipped.most_common() if times]
    if not named:
        return []
    what = f"recordings with more than {100 * OFTEN_CLIPPED:g} % of their samples at full scale (clipped)"
    return [f"{what}, which are used all the same: {', '.join(named)}; copy them again if the originals are not"]


def _check_files(corpus: Corpus, folder: Path | None) -> Iterator[FileInfo]:
    """Check every recording, in order: by the saved result of an earlier check, or by opening the file."""
    files = {path: (size, changed) for path, size, changed in file_stamps({utt.wav: 0 for utt in corpus})}
    keys = [(str(utt.wav), *files[str(utt.wav)], _part_of_file(utt)) for utt in corpus]
    results = _read_results(folder) if folder else {}
    todo = [(key, utt) for key, utt in zip(keys, corpus, strict=True) if key not in results]
    if todo:
        bar = progress(len(todo), "checking audio", "file")
        with _result_writer(folder) as save, bar, ThreadPoolExecutor(8) as pool:
            for start in range(0, len(todo), _PART):
                part = todo[start : start + _PART]
                for (key, _), info in zip(part, pool.map(_inspect, (utt for _, utt in part)), strict=True):
                    results[key] = info
                    if info.reason != UNREADABLE:  # permissions may be right at the next check
                        save(key, info)
                bar.update(len(part))
    yield from (results[key] for key in keys)


def _part_of_file(utt: Utterance) -> str:
    """What a result depends on besides the file: the part of it, and the checksum that it should have."""
    part = "" if utt.offset_s is None else f"{utt.offset_s:.4f}+{utt.duration_s:.4f}"
    return f"{part} {utt.sha256}".strip()


def _inspect(utt: Utterance) -> FileInfo:
    """Open a recording and check its samples."""
    nothing = (0.0, 0.0)
    if not os.path.isfile(utt.wav):  # a pipe would never end
        return FileInfo(_unreadable(str(utt.wav)), "", 0.0, nothing)
    try:
        with soundfile.SoundFile(utt.wav) as file:
            kind = f"{file.samplerate} Hz, {file.channels} channel{'s' * (file.channels > 1)}"
            samples, rate_hz = read_samples(file, utt), file.samplerate
            if rate_hz < MIN_RATE_HZ:
                return FileInfo("a sample rate below 4,000 Hz", kind, 0.0, nothing)
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError):
        return FileInfo(_unreadable(str(utt.wav)), "", 0.0, nothing)
    duration_s = len(samples) / rate_hz
    if utt.offset_s is not None and duration_s < 0.95 * utt.duration_s:
        return FileInfo("the file ends before the part that the manifest names", kind, duration_s, nothing)
    if utt.sha256 and not sha256(utt.wav).startswith(utt.sha256.lower()):
        return FileInfo("its checksum is not the manifest's", kind, duration_s, nothing)
    if reason := _fault(samples):
        return FileInfo(reason, kind, duration_s, nothing)
    start_s, end_s = loud_part(samples, rate_hz, QUIET_DB)
    speech_s = max(0.0, start_s - MARGIN_S), min(duration_s, end_s + MARGIN_S)
    return FileInfo("", kind, duration_s, speech_s, _share_at_full_scale(samples))


def _unreadable(path: str) -> str:
    """Why a file cannot be opened: missing, no audio, or no permission."""
    if not os.path.isfile(path):
        try:
            os.stat(path)
        except PermissionError:
            return UNREADABLE
        except (OSError, ValueError):
            return "the file is missing"
        return "no file, but a folder, a pipe or a device"
    try:
        with open(path, "rb"):
            return "the file cannot be read as audio"
    except OSError:
        return UNREADABLE


def _fault(samples: np.ndarray) -> str:
    if samples.size == 0:
        return "no samples in it"
    peak = float(max(samples.max(), -samples.min()))  # NaN if one sample is NaN
    if not math.isfinite(peak):
        return "NaN or infinite samples"
    if peak < SILENT:
        return "nothing but silence"
    if peak > 2:
        return "samples far beyond full scale"
    if _share_at_full_scale(samples) > CLIPPED:
        return "clipped to nothing"
    return ""


def _share_at_full_scale(samples: np.ndarray) -> float:
    return float((np.abs(samples) >= 0.999).mean())


def _version_line() -> str:
    return f"examined by {fingerprint(['corpus/audio.py', 'corpus/audio_checks.py'])}"


def _is_current(path: Path) -> bool:
    """True if this version of the code wrote the file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline().strip() == _version_line().encode()


def _read_results(folder: Path) -> dict[tuple, FileInfo]:
    """Read the results of an earlier check by the same version of the code."""
    path = folder / CHECKED_FILES
    if not _is_current(path):
        return {}
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {
            (row[0], int(row[1]), int(row[2]), row[3]): FileInfo(
                row[4], row[5], float(row[6]), (float(row[7]), float(row[8])), float(row[9])
            )
            for row in csv.reader(file)
            if len(row) == 11  # the last field marks a complete row
        }


@contextlib.contextmanager
def _result_writer(folder: Path | None) -> Iterator[Callable[[tuple, FileInfo], None]]:
    """Yield a function that saves the result for a file."""
    if folder is None:
        yield lambda key, info: None
        return
    path = folder / CHECKED_FILES
    new = not _is_current(path)
    with path.open("w" if new else "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"{_version_line()}\n" if new else "\n")  # ends the line that a killed run may have left
        writer = csv.writer(file, lineterminator="\n")
        yield lambda key, info: writer.writerow([*key, *info[:3], *info.speech_s, info.clipped, "."])
