"""espeak-ng in a separate process: phonemes in, samples and phone boundaries out.

The library is called through ctypes (espeakng-loader installs it, GPL-3) and keeps hidden state between calls: the
same sequence of calls in a fresh process gives the same samples, another order may not. Hence `synthetic` starts one
process per speaker and synthesises the words in a fixed order. Voices are files in a private folder of links to the
engine's data.
"""

import ctypes
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdlib.errors import UserError

RATE_HZ = 22_050
SYNCHRONOUS, PHONEME_EVENTS = 2, 1  # espeak_Initialize: output mode, options
UTF8, PHONEMES_IN = 1, 0x100 | 1  # flags of espeak_Synth
EVENT_END, EVENT_PHONEME = 0, 7
PARAMETER = {"rate": 1, "pitch": 3, "range": 4}


@dataclass(frozen=True, slots=True)
class Phone:
    """A synthesised phone: its mnemonic, and its start and end in samples."""

    name: str
    start: int
    end: int


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user", ctypes.c_void_p),
        ("id", _Id),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def _link(source: Path, target: Path, opened: Path) -> None:
    """Make a folder of links to what is in another one; `opened`, a folder in it, is a real folder of links."""
    target.mkdir()
    for entry in source.iterdir():
        if opened.parts and entry.name == opened.parts[0]:
            _link(entry, target / entry.name, Path(*opened.parts[1:]))
        else:
            (target / entry.name).symlink_to(entry)


class Engine:
    """One speaker's voice. Only one engine per process: the library is global."""

    def __init__(self, voice_lines: list[str], *, rate_wpm: int, pitch: int, pitch_range: int) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError("the embedded corpus needs espeak-ng: pip install 'kdlib[embedded]'") from None
        self._home = tempfile.TemporaryDirectory(prefix="kdlib-voice-")
        voices = Path("voices") / "!v"
        _link(Path(espeakng_loader.get_data_path()), Path(self._home.name) / "espeak-ng-data", voices)
        (Path(self._home.name) / "espeak-ng-data" / voices / "kdlib").write_text(
            "\n".join(["language variant", "name kdlib", *voice_lines]) + "\n"
        )
        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self._lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._lib.espeak_ListVoices.restype = ctypes.c_void_p
        if self._lib.espeak_Initialize(SYNCHRONOUS, 0, self._home.name.encode(), PHONEME_EVENTS) != RATE_HZ:
            raise RuntimeError("espeak-ng did not start at 22,050 Hz")
        self._callback = _CALLBACK(self._collect)  # kept: ctypes does not hold a reference
        self._lib.espeak_SetSynthCallback(self._callback)
        if self._lib.espeak_SetVoiceByName(b"en-us+kdlib") != 0:
            raise RuntimeError("espeak-ng did not accept the voice")
        for name, value in {"rate": rate_wpm, "pitch": pitch, "range": pitch_range}.items():
            self._lib.espeak_SetParameter(PARAMETER[name], value, 0)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._home.cleanup()  # a forked process ends without doing so

    def phonemes(self, text: str) -> list[str]:
        """The mnemonics of a text, one per phone, with stress marks."""
        pointer = ctypes.c_char_p(text.encode())
        mnemonics = self._lib.espeak_TextToPhonemes(ctypes.byref(pointer), UTF8, ord("|") << 8).decode()
        return [name for word in mnemonics.split() for name in word.split("|") if name]

    def synthesise(self, phonemes: list[str]) -> tuple[np.ndarray, list[Phone]]:
        """Synthesise mnemonics: samples in [-1, 1] at `RATE_HZ`, and the phones' boundaries."""
        self._chunks: list[np.ndarray] = []
        self._marks: list[tuple[str, int]] = []
        text = f"[[{'|'.join(phonemes)}]]".encode()
        self._lib.espeak_Synth(text, len(text) + 1, 0, 0, 0, PHONEMES_IN, None, None)
        samples = np.concatenate([*self._chunks, np.zeros(0, np.int16)]).astype(np.float32) / 32768
        ends = [start for _, start in self._marks[1:]] + [len(samples)]
        phones = [Phone(name, start, end) for (name, start), end in zip(self._marks, ends, strict=True) if end > start]
        return samples, phones

    def _collect(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        index = 0
        while events[index].type != EVENT_END:
            if events[index].type == EVENT_PHONEME:
                self._marks.append((events[index].id.string.decode("utf-8", "replace"), max(events[index].sample, 0)))
            index += 1
        return 0
