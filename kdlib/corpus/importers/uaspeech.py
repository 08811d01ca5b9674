"""UA-Speech (Kim et al. 2008) as distributed by its authors: the old release, or the one with three audio versions.

    audio/{original,noisereduce,normalized}/SPK/SPK_Bn_CODE_Mn.wav    or the older   audio/SPK, audio/control/SPK
    mlf/SPK/SPK_word.mlf, speaker_wordlist.xls (sheet Word_filename)

Seven microphones recorded each utterance: one of them is the utterance, the others are optional, for training only
(`microphone: all`, as in the original study, makes each recording an utterance).
The codes of uncommon words (UW1 to UW100) denote another word in each block; all others the same in every block.
"""

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from kdlib.corpus.manifest import EMPTY_BYTES, Corpus, Excluded, ImportResult, most_common, size
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.settings.corpus import UASpeech
from kdlib.tokens import normalise

KINDS = {"D": "digit", "L": "letter", "C": "computer", "CW": "common", "UW": "uncommon"}
BLOCKS = ("B1", "B2", "B3")
PER_BLOCK, PER_SPEAKER = 255, 765  # utterances
VERSIONS = {"original": ("original",), "noisereduce": ("noisereduce", "noisereduced"), "normalized": ("normalized",)}
NAME = re.compile(
    r"(?P<speaker>C?[FM]\d{2})_(?P<block>B[123])_(?P<code>D\d|L[A-Z]|C\d{1,2}|CW\d{1,3}|UW\d{1,3})_(?P<mic>M[2-8])\.wav",
    re.IGNORECASE,
)
SPEAKER = re.compile(r"C?[FM]\d{2}", re.IGNORECASE)

Label = Callable[[str, str, str], str | None]  # file's stem, block, code -> word


@functools.cache
def word_list() -> dict[str, str]:
    """Load the 455 codes of UA-Speech and their words; codes of uncommon words begin with their block."""
    return json.loads(files("kdlib").joinpath("data/uaspeech_words.json").read_text(encoding="utf-8"))


def kind(code: str) -> str:
    """Return the kind of word that a code denotes.

    >>> kind("D3"), kind("LQ"), kind("CW12"), kind("B1_UW7"), kind("UW7")
    ('digit', 'letter', 'common', 'uncommon', 'uncommon')
    """
    bare = code.split("_")[-1]
    return KINDS["L"] if bare[0] == "L" else KINDS[bare.rstrip("0123456789")]


def source_files(folder: Path, settings: UASpeech) -> list[Path]:
    """List every file that `read` depends on."""
    audio, _ = _audio_folder(folder, settings)
    labels = [path for place in _label_folders(folder) for path in (*place.glob("mlf/*/*_word.mlf"), *_xls([place]))]
    return [Path(entry.path) for entry in _recordings(audio)] + sorted(labels)


def read(folder: Path, settings: UASpeech) -> ImportResult:
    """Read the utterances of all speakers, and report the excluded recordings."""
    audio, release = _audio_folder(folder, settings)
    label, source = _labels(folder, settings)
    recordings, problems, file_notes = _group_recordings(audio)
    empty = {Path(problem.wav).stem for problem in problems}
    notes = [f"UA-Speech, {release}; labels from {source}", *file_notes]
    utterances: list[Utterance] = []
    unused: Counter[str] = Counter()
    lost: dict[str, int] = {}  # utterance that cannot be used -> number of its recordings
    different: dict[str, tuple[str, str]] = {}  # code -> its word in the labels and in kdlib's list
    for (speaker, block, code), by_mic in sorted(recordings.items(), key=lambda item: _order(*item[0])):
        every = settings.microphone == "all"
        first = by_mic.get(settings.microphone) or next(iter(by_mic.values()))
        word = label(first.stem, block, code)
        if not word or not (every or settings.microphone in by_mic):
            name = first.stem.rsplit("_", 1)[0]
            lost[name] = len(by_mic)
            if not word:
                problems.append(Excluded(first.stem, speaker, str(first), "no label for its code"))
            elif f"{name}_{settings.microphone}" not in empty:
                problems.append(Excluded(first.stem, speaker, str(first), "the test microphone did not record it"))
            continue
        if normalise(word) != normalise(listed := _word(word_list(), first.stem, block, code) or word):
            different[f"{block}_{code}"] = (word, listed)
        utt = Utterance(first.stem, speaker, first, 0.0, word, block, word_type=kind(code))
        if every:
            name = first.stem.rsplit("_", 1)[0]
            each = [path for _, path in sorted(by_mic.items())]
            utterances += [utt.replace(utt_id=path.stem, wav=path, recording_of=name) for path in each]
            continue
        copies = [path for mic, path in sorted(by_mic.items()) if path != first and _augments(mic, settings)]
        utterances += [utt, *(utt.replace(utt_id=path.stem, wav=path, copy_of=first.stem) for path in copies)]
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
    if different:
        code, (word, listed) = next(iter(different.items()))
        notes.append(
            f"{len(different)} codes denote other words in {source} than in kdlib's word list; first: {code} is "
            f"{word!r}, not {listed!r} (uaspeech: {{labels: list}} uses kdlib's)"
        )
    if not utterances:
        raise UserError(f"UA-Speech in {folder}: none of its recordings can be used{most_common(problems)}")
    notes += _incomplete(utterances)
    return ImportResult(Corpus(utterances, f"UA-Speech in {folder}"), problems, notes)


def _group_recordings(audio: Path) -> tuple[dict[tuple[str, str, str], dict[str, Path]], list[Excluded], list[str]]:
    """(speaker, block, code) -> microphone -> file; empty files; notes on other files."""
    recordings: dict[tuple[str, str, str], dict[str, Path]] = {}
    problems, hidden, misnamed, twice = [], [], [], []
    for entry in _recordings(audio):
        match, path = NAME.fullmatch(entry.name), Path(entry.path)
        if entry.name.startswith("._"):
            hidden.append(path)
        elif not match:
            misnamed.append(path)
        elif size(entry.path) <= EMPTY_BYTES:
            problems.append(Excluded(path.stem, match["speaker"].upper(), entry.path, "empty file"))
        else:
            key = match["speaker"].upper(), match["block"].upper(), match["code"].upper()
            if recordings.setdefault(key, {}).setdefault(match["mic"].upper(), path) != path:
                twice.append(path)
    notes = [
        f"{len(paths):,} {what}, for example {paths[0].name}"
        for paths, what in (
            (hidden, "'._*' files are no recordings"),
            (misnamed, "files have another name than SPK_Bn_CODE_Mn.wav"),
            (twice, "recordings are in two places, of which the first counts"),
        )
        if paths
    ]
    if problems:
        notes.append(f"{len(problems)} empty files (over all microphones; the old release is known to have 15)")
    return recordings, problems, notes


def _augments(mic: str, settings: UASpeech) -> bool:
    return settings.augment == "all" or mic in settings.augment


def _audio_folder(folder: Path, settings: UASpeech) -> tuple[Path, str]:
    """Find the folder that contains the speakers' folders, and its release."""
    base = folder / "audio" if (folder / "audio").is_dir() else folder
    versions = [version for version, names in VERSIONS.items() if any((base / name).is_dir() for name in names)]
    for name in VERSIONS[settings.version]:
        if (base / name).is_dir():
            return base / name, f"version {settings.version!r} of the audio"
    if versions:
        raise UserError(
            f"{base}: there is no version {settings.version!r} of the audio, but {', '.join(versions)}; "
            f"write uaspeech: {{version: {versions[0]}}}"
        )
    if not base.is_dir() or not any(SPEAKER.fullmatch(name) for name in os.listdir(base)):
        found = f"found {', '.join(sorted(os.listdir(base))[:5]) or 'nothing'}" if base.is_dir() else "no such folder"
        raise UserError(
            f"data_folder: no UA-Speech in {base}: expected audio/original/F02/F02_B1_C10_M5.wav or, in the old "
            f"release, audio/F02/F02_B1_C10_M5.wav; {found}"
        )
    return base, "old release (one version of the audio)"


def _recordings(audio: Path) -> Iterator[os.DirEntry]:
    """List all wav files below the speakers' folders, including the controls'; some are one folder deeper."""
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
    """Choose the source of the word labels; return the labelling function and the source's name."""
    places = _label_folders(folder)
    mlf: dict[str, str] = {}
    for path in sorted(path for place in places for path in place.glob("mlf/*/*_word.mlf")):
        if not path.name.startswith("._"):
            mlf |= read_mlf(path)
    xls = next(iter(_xls(places)), None)
    if mlf and settings.labels in ("auto", "mlf"):
        return lambda stem, block, code: mlf.get(stem.upper()), "mlf/"
    if xls and settings.labels in ("auto", "xls"):
        return functools.partial(_word, read_xls(xls)), xls.name
    if settings.labels in ("mlf", "xls"):
        missing = "mlf/SPK/SPK_word.mlf" if settings.labels == "mlf" else "speaker_wordlist.xls"
        raise UserError(f"{folder}: there is no {missing}; add it, or write uaspeech: {{labels: auto}}")
    return functools.partial(_word, word_list()), "kdlib's own word list"


def _word(words: dict[str, str], stem: str, block: str, code: str) -> str | None:
    return words.get(f"{block}_{code}" if code.startswith("UW") else code)


def read_mlf(path: Path) -> dict[str, str]:
    """Read file stem -> word from an HTK master label file; times, scores and silences are skipped."""
    words: dict[str, list[str]] = {}
    current: list[str] = []
    for line in (path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "").splitlines():
        line = line.strip()
        if line.startswith('"'):
            current = words.setdefault(re.split(r"[\\/]", line.strip('"'))[-1].rsplit(".", 1)[0].upper(), [])
        elif line and line != "." and not line.startswith("#"):
            label = next((field for field in line.split() if not field.lstrip("-").isdigit()), "")
            if label.lower() not in ("", "sil", "sp"):
                current.append(label)
    return {stem: " ".join(labels) for stem, labels in words.items() if labels}


def read_xls(path: Path) -> dict[str, str]:
    """Read code -> word from the sheet Word_filename."""
    import xlrd

    try:
        book = xlrd.open_workbook(path)
    except Exception as error:  # damaged files raise many kinds of errors in xlrd
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


def _label_folders(folder: Path) -> list[Path]:
    """Folders that may contain the labels: next to audio/, whichever of the two `folder` is."""
    return [folder] if (folder / "audio").is_dir() else [folder, folder.parent]


def _xls(folders: Sequence[Path]) -> list[Path]:
    paths = [path for base in folders for place in (base, base / "doc") for path in sorted(place.glob("*wordlist.xls"))]
    return [path for path in paths if not path.name.startswith("._")]


def _order(speaker: str, block: str, code: str) -> tuple:
    letters = code.rstrip("0123456789")
    return speaker, block, letters, int(code[len(letters) :] or 0)


def _incomplete(utterances: list[Utterance]) -> Iterator[str]:
    """Note the speakers that do not have 255 utterances in each block."""
    own = {(utt.speaker, utt.block, utt.utt_id.rsplit("_", 1)[0]) for utt in utterances if not utt.copy_of}
    counts = Counter((speaker, block) for speaker, block, _ in own)  # by whichever microphone
    for speaker in sorted({utt.speaker for utt in utterances}):
        sizes = {block: counts[speaker, block] for block in BLOCKS}
        if set(sizes.values()) != {PER_BLOCK}:
            by_block = ", ".join(f"{block} {times}" for block, times in sizes.items())
            yield f"{speaker} has {sum(sizes.values())} of {PER_SPEAKER} utterances ({by_block} of {PER_BLOCK})"
