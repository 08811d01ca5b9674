"""UA-Speech (Kim et al. 2008) as its authors give it out: the old release, or the one with three versions of the audio.

    audio/{original,noisereduce,normalized}/SPK/SPK_Bn_CODE_Mn.wav    or the older   audio/SPK, audio/control/SPK
    mlf/SPK/SPK_word.mlf, speaker_wordlist.xls (sheet Word_filename)

Seven microphones recorded each utterance: one of them stands for it, the others are for training only, when asked for.
The codes of uncommon words (UW1 to UW100) mean another word in each block; all others mean the same in every block.
"""

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from kdlib.corpus.manifest import EMPTY_BYTES, Corpus, Excluded, ImportResult, Utterance, most_common, size
from kdlib.errors import UserError
from kdlib.params import UASpeech
from kdlib.tokens import normalise

CODE = ("corpus/importers/uaspeech.py", "data/uaspeech_words.json", "data/speakers.csv")
KINDS = {"D": "digit", "L": "letter", "C": "computer", "CW": "common", "UW": "uncommon"}
BLOCKS = ("B1", "B2", "B3")
A_BLOCK, EVERYTHING = 255, 765  # utterances of a speaker
VERSIONS = {"original": ("original",), "noisereduce": ("noisereduce", "noisereduced"), "normalized": ("normalized",)}
NAME = re.compile(
    r"(?P<speaker>C?[FM]\d{2})_(?P<block>B[123])_(?P<code>D\d|L[A-Z]|C\d{1,2}|CW\d{1,3}|UW\d{1,3})_(?P<mic>M[2-8])\.wav",
    re.IGNORECASE,
)
SPEAKER = re.compile(r"C?[FM]\d{2}", re.IGNORECASE)

Label = Callable[[str, str, str], str | None]  # file's stem, block, code -> word


@functools.cache
def word_list() -> dict[str, str]:
    """The 455 codes of UA-Speech and their words; codes of uncommon words begin with their block."""
    return json.loads(files("kdlib").joinpath("data/uaspeech_words.json").read_text(encoding="utf-8"))


def kind(code: str) -> str:
    """Which kind of word a code stands for.

    >>> kind("D3"), kind("LQ"), kind("CW12"), kind("B1_UW7"), kind("UW7")
    ('digit', 'letter', 'common', 'uncommon', 'uncommon')
    """
    bare = code.split("_")[-1]
    return KINDS["L"] if bare[0] == "L" else KINDS[bare.rstrip("0123456789")]


def source_files(folder: Path, settings: UASpeech) -> list[Path]:
    """Every file that `read` looks at."""
    audio, _ = _audio(folder, settings)
    labels = [path for home in _homes(folder) for path in (*home.glob("mlf/*/*_word.mlf"), *_xls([home]))]
    return [Path(entry.path) for entry in _recordings(audio)] + sorted(labels)


def read(folder: Path, settings: UASpeech) -> ImportResult:
    """The utterances of all speakers that are there; what is left out is counted and said."""
    audio, release = _audio(folder, settings)
    label, labels = _labels(folder, settings)
    heard, problems, remarks = _heard(audio)
    empty = {Path(problem.wav).stem for problem in problems}
    notes = [f"UA-Speech, {release}; labels from {labels}", *remarks]
    utterances: list[Utterance] = []
    unused: Counter[str] = Counter()
    lost: dict[str, int] = {}  # utterance that cannot be used -> its recordings
    other: dict[str, tuple[str, str]] = {}  # code -> what the labels and what kdlib's list say
    for (speaker, block, code), by_mic in sorted(heard.items(), key=lambda item: _order(*item[0])):
        first = by_mic.get(settings.microphone) or next(iter(by_mic.values()))
        word = label(first.stem, block, code)
        if not word or settings.microphone not in by_mic:
            name = first.stem.rsplit("_", 1)[0]
            lost[name] = len(by_mic)
            if not word:
                problems.append(Excluded(first.stem, speaker, str(first), "no label for its code"))
            elif f"{name}_{settings.microphone}" not in empty:
                problems.append(Excluded(first.stem, speaker, str(first), "the test microphone did not record it"))
            continue
        if normalise(word) != normalise(listed := _by_code(word_list(), first.stem, block, code) or word):
            other[f"{block}_{code}"] = (word, listed)
        one = Utterance(first.stem, speaker, first, 0.0, word, block, word_type=kind(code))
        further = [path for mic, path in sorted(by_mic.items()) if path != first and _augments(mic, settings)]
        utterances += [one, *(replace(one, utt_id=path.stem, wav=path, copy_of=first.stem) for path in further)]
        unused.update(mic for mic, path in by_mic.items() if path != first and not _augments(mic, settings))
    if unused:
        notes.append(
            f"{unused.total():,} recordings by the microphones {', '.join(sorted(unused))} are other recordings of the "
            f"same utterances as {settings.microphone}'s, and are not used (uaspeech.augment adds them to training)"
        )
    if lost:
        notes.append(
            f"{sum(lost.values()):,} recordings are of {len(lost)} utterances that have no label, or that the test "
            "microphone did not record"
        )
    if other:
        code, (word, listed) = next(iter(other.items()))
        notes.append(
            f"{len(other)} codes stand for other words in {labels} than in kdlib's word list; first: {code} is "
            f"{word!r}, not {listed!r} (uaspeech: {{labels: list}} takes kdlib's)"
        )
    if not utterances:
        raise UserError(f"UA-Speech in {folder}: none of its recordings can be used{most_common(problems)}")
    notes += _incomplete(utterances)
    return ImportResult(Corpus(tuple(utterances), f"UA-Speech in {folder}"), problems, notes)


def _heard(audio: Path) -> tuple[dict[tuple[str, str, str], dict[str, Path]], list[Excluded], list[str]]:
    """(speaker, block, code) -> microphone -> file; empty files; what else lies there."""
    heard: dict[tuple[str, str, str], dict[str, Path]] = {}
    problems, macs, misnamed, twice = [], [], [], []
    for entry in _recordings(audio):
        found, path = NAME.fullmatch(entry.name), Path(entry.path)
        if entry.name.startswith("._"):
            macs.append(path)
        elif not found:
            misnamed.append(path)
        elif size(entry.path) <= EMPTY_BYTES:
            problems.append(Excluded(path.stem, found["speaker"].upper(), entry.path, "empty file"))
        else:
            by_mic = heard.setdefault((found["speaker"].upper(), found["block"].upper(), found["code"].upper()), {})
            if by_mic.setdefault(found["mic"].upper(), path) != path:
                twice.append(path)
    notes = [
        f"{len(paths):,} {what}, for example {paths[0].name}"
        for paths, what in (
            (macs, "'._*' files are no recordings"),
            (misnamed, "files have another name than SPK_Bn_CODE_Mn.wav"),
            (twice, "recordings lie in two places, of which the first counts"),
        )
        if paths
    ]
    if problems:
        notes.append(f"{len(problems)} empty files (over all microphones; the old release is known to hold 15)")
    return heard, problems, notes


def _augments(mic: str, settings: UASpeech) -> bool:
    return settings.augment == "all" or mic in settings.augment


def _audio(folder: Path, settings: UASpeech) -> tuple[Path, str]:
    """The folder that holds the speakers' folders, and which release it is of."""
    base = folder / "audio" if (folder / "audio").is_dir() else folder
    there = [name for name, spellings in VERSIONS.items() if any((base / one).is_dir() for one in spellings)]
    for spelling in VERSIONS[settings.version]:
        if (base / spelling).is_dir():
            return base / spelling, f"version {settings.version!r} of the audio"
    if there:
        raise UserError(
            f"{base}: there is no version {settings.version!r} of the audio, but {', '.join(there)}; "
            f"write uaspeech: {{version: {there[0]}}}"
        )
    if not base.is_dir() or not any(SPEAKER.fullmatch(name) for name in os.listdir(base)):
        what = f"found {', '.join(sorted(os.listdir(base))[:5]) or 'nothing'}" if base.is_dir() else "no such folder"
        raise UserError(
            f"data_folder: no UA-Speech in {base}: expected audio/original/F02/F02_B1_C10_M5.wav or, of the old "
            f"release, audio/F02/F02_B1_C10_M5.wav; {what}"
        )
    return base, "old release (one version of the audio)"


def _recordings(audio: Path) -> Iterator[os.DirEntry]:
    """All wav files below the speakers' folders, control speakers' among them; some lie a folder deeper."""
    for entry in sorted(os.scandir(audio), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name.lower() in ("control", "controls"):
            yield from _recordings(Path(entry.path))
        elif entry.is_dir() and SPEAKER.fullmatch(entry.name):
            yield from _wavs(entry.path)


def _wavs(folder: str) -> Iterator[os.DirEntry]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _wavs(entry.path)
        elif entry.name.lower().endswith(".wav"):
            yield entry


def _labels(folder: Path, settings: UASpeech) -> tuple[Label, str]:
    """What says which word a recording is of, and its name."""
    homes = _homes(folder)
    mlf: dict[str, str] = {}
    for path in sorted(path for home in homes for path in home.glob("mlf/*/*_word.mlf")):
        if not path.name.startswith("._"):
            mlf |= read_mlf(path)
    xls = next(iter(_xls(homes)), None)
    by_code: dict[str, Label] = {}
    if mlf and settings.labels in ("auto", "mlf"):
        by_code["mlf/"] = lambda stem, block, code: mlf.get(stem.upper())
    if xls and (settings.labels == "xls" or (settings.labels == "auto" and not mlf)):
        by_code[xls.name] = functools.partial(_by_code, read_xls(xls))
    if settings.labels in ("mlf", "xls") and not by_code:
        place = "mlf/SPK/SPK_word.mlf" if settings.labels == "mlf" else "speaker_wordlist.xls"
        raise UserError(f"{folder}: there is no {place}; put it there, or write uaspeech: {{labels: auto}}")
    if settings.labels in ("auto", "list") and not by_code:
        by_code["kdlib's own word list"] = functools.partial(_by_code, word_list())
    (source, label), *_ = by_code.items()
    return label, source


def _by_code(words: dict[str, str], stem: str, block: str, code: str) -> str | None:
    return words.get(f"{block}_{code}" if code.startswith("UW") else code)


def read_mlf(path: Path) -> dict[str, str]:
    """File stem -> word of an HTK master label file; times, scores and silences are passed over."""
    words: dict[str, list[str]] = {}
    current: list[str] = []
    for line in (path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "").splitlines():
        line = line.strip()
        if line.startswith('"'):
            current = words.setdefault(re.split(r"[\\/]", line.strip('"'))[-1].rsplit(".", 1)[0].upper(), [])
        elif line and line != "." and not line.startswith("#"):
            named = next((piece for piece in line.split() if not piece.lstrip("-").isdigit()), "")
            if named.lower() not in ("", "sil", "sp"):
                current.append(named)
    return {stem: " ".join(spoken) for stem, spoken in words.items() if spoken}


def read_xls(path: Path) -> dict[str, str]:
    """Code -> word of the sheet Word_filename."""
    import xlrd

    try:
        book = xlrd.open_workbook(path)
    except Exception as error:  # damaged files end in errors of many kinds inside xlrd
        raise UserError(
            f"{path}: cannot be read as .xls ({error}); save it as Excel 97-2003, or write uaspeech: {{labels: list}}"
        ) from None
    if "Word_filename" not in book.sheet_names():
        raise UserError(
            f"{path}: no sheet 'Word_filename', but {', '.join(book.sheet_names())}; write uaspeech: {{labels: list}}"
        )
    rows = list(book.sheet_by_name("Word_filename").get_rows())
    pairs = [(str(row[1].value).strip().upper(), str(row[0].value).strip()) for row in rows if len(row) > 1]
    return {code: word for code, word in pairs if word and NAME.fullmatch(f"F01_B1_{code.split('_')[-1]}_M5.wav")}


def _homes(folder: Path) -> list[Path]:
    """Where the labels may lie: beside audio/, whichever of the two was named."""
    return [folder] if (folder / "audio").is_dir() else [folder, folder.parent]


def _xls(homes: Sequence[Path]) -> list[Path]:
    places = [path for home in homes for place in (home, home / "doc") for path in sorted(place.glob("*wordlist.xls"))]
    return [path for path in places if not path.name.startswith("._")]


def _order(speaker: str, block: str, code: str) -> tuple:
    letters = code.rstrip("0123456789")
    return speaker, block, letters, int(code[len(letters) :] or 0)


def _incomplete(utterances: list[Utterance]) -> Iterator[str]:
    """Speakers who have other than 255 utterances in a block."""
    counts = Counter((utt.speaker, utt.block) for utt in utterances if not utt.copy_of)
    for speaker in sorted({utt.speaker for utt in utterances}):
        has = {block: counts[speaker, block] for block in BLOCKS}
        if set(has.values()) != {A_BLOCK}:
            by_block = ", ".join(f"{block} {times}" for block, times in has.items())
            yield f"{speaker} has {sum(has.values())} of {EVERYTHING} utterances ({by_block} of {A_BLOCK})"
