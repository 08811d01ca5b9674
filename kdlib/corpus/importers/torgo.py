"""TORGO (Rudzicz et al. 2012) as distributed by its authors, words and sentences.

    [F|FC|M|MC/]SPK/Session*/{prompts/NNNN.txt, wav_headMic/NNNN.wav, wav_arrayMic/NNNN.wav}

F01 is a woman, FC01 one of the control group. Two microphones recorded each prompt: one of them is the utterance, the
other is optional, for training only. Prompts that are no transcript are left out, counted by reason.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kdlib.corpus.manifest import EMPTY_BYTES, Corpus, Excluded, ImportResult, most_common, size
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.settings.corpus import Torgo

SPEAKER = re.compile(r"[FM]C?\d{2}", re.IGNORECASE)


def source_files(folder: Path, settings: Torgo) -> list[Path]:
    """List every file that `read` depends on."""
    return [
        session / part / name
        for session in _sessions(folder)
        for part, ending in (("prompts", ".txt"), *((mic, ".wav") for mic in settings.microphones))
        for name in _names(session / part, ending).values()
    ]


def read(folder: Path, settings: Torgo) -> ImportResult:
    """Read the utterances of all speakers, and report the excluded recordings."""
    utterances: list[Utterance] = []
    problems: list[Excluded] = []
    used: Counter[str] = Counter()
    recoded: list[Path] = []
    for session in _sessions(folder):
        speaker = session.parent.name.upper()
        prompts = _names(session / "prompts", ".txt")
        recorded = {mic: _names(session / mic, ".wav") for mic in settings.microphones}
        for number in sorted(set(prompts).union(*recorded.values())):
            utt_id = f"{speaker}_{session.name}_{number}"
            wavs = {mic: session / mic / names[number] for mic, names in recorded.items() if number in names}
            text = _text(session / "prompts" / prompts[number], recoded) if number in prompts else None
            full = {mic: wav for mic, wav in wavs.items() if size(wav) > EMPTY_BYTES}
            if reason := _reason(text, bool(wavs), bool(full)):
                path = next(iter(wavs.values()), session / "prompts" / f"{number}.txt")
                problems.append(Excluded(utt_id, speaker, str(path), reason))
                continue
            for copy, (mic, wav) in enumerate(list(full.items())[: None if settings.augment else 1]):
                used[mic] += 1
                ids = {"utt_id": f"{utt_id}_{mic}", "copy_of": utt_id} if copy else {"utt_id": utt_id}
                utterances.append(Utterance(**ids, speaker=speaker, wav=wav, duration_s=0.0, text=text or ""))
    if not utterances:
        raise UserError(
            f"TORGO in {folder}: no prompt has a text and a recording{most_common(problems)}; expected "
            "F01/Session1/prompts/0001.txt and F01/Session1/wav_headMic/0001.wav"
        )
    notes = [f"{len(recoded)} prompts are not UTF-8, read as Windows-1252; first {recoded[0]}"] if recoded else []
    notes = [*notes, "TORGO; " + ", ".join(f"{times:,} recordings by {mic}" for mic, times in used.items())]
    return ImportResult(Corpus(utterances, f"TORGO in {folder}"), problems, notes)


def _sessions(folder: Path) -> Iterator[Path]:
    """List the sessions of all speakers, whose folders are here or in F, FC, M, MC."""
    if not folder.is_dir():
        raise UserError(f"data_folder: there is no folder {folder}; correct it in the recipe")
    groups = [folder, *(folder / group for group in ("F", "FC", "M", "MC") if (folder / group).is_dir())]
    speakers = sorted(
        (path for group in groups for path in group.iterdir() if SPEAKER.fullmatch(path.name) and path.is_dir()),
        key=lambda path: path.name,
    )
    if not speakers:
        found = ", ".join(sorted(os.listdir(folder))[:5]) or "nothing"
        raise UserError(
            f"data_folder: no TORGO in {folder}: expected speakers' folders such as F01/Session1, found {found}"
        )
    for speaker in speakers:
        yield from sorted(path for path in speaker.iterdir() if path.name.lower().startswith("session"))


def _names(folder: Path, ending: str) -> dict[str, str]:
    """Map numbers to file names in a folder that may be missing."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {name.rsplit(".", 1)[0]: name for name in names if name.lower().endswith(ending)}


def _text(path: Path, recoded: list[Path]) -> str | None:
    """Read the text of a prompt; None if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        return " ".join(content.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        recoded.append(path)
        return " ".join(content.decode("cp1252", errors="replace").split())


def _reason(text: str | None, recorded: bool, full: bool) -> str:
    """Return why a prompt cannot be used, or an empty string."""
    if not recorded:
        return "the prompt has no recording"
    if not full:
        return "empty file"
    if text is None:
        return "the recording has no prompt"
    if not text:
        return "the prompt is empty"
    if "[" in text or "]" in text:
        return "the prompt is an instruction"
    if "input/images" in text.lower():
        return "the prompt is a picture"
    if "xxx" in text.lower():
        return "the prompt contains xxx"
    return ""
