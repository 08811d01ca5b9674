"""Corpora for tests: a small corpus in a user's format, and folders with the layouts of UA-Speech and TORGO.

`python tests/corpora.py own FOLDER` makes the first, to try the README's commands with; `uaspeech` and `torgo` make
the others.
"""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile

SPEAKERS = ("07", "Alma", "Boris", "Chidi", "NO", "Žofie")  # unquoted, YAML reads 07 and NO as 7 and false
WORDS = (
    "can't",
    "café",
    "x-ray",
    "water",
    "yellow",
    "seven",
    "mother",
    "kitchen",
    "doctor",
    "please",
    "window",
    "music",
)

VOICE = """
import json, sys, zlib
import numpy as np, soundfile
from pathlib import Path
from scipy import signal
from kdlib.corpus.embedded.espeak import RATE_HZ, Engine

job = json.load(sys.stdin)
rng = np.random.default_rng(zlib.crc32(job["speaker"].encode()))
low = rng.uniform(75, 170)
tract = 0.92 + 0.25 * (low - 75) / 95
lines = [f"pitch {low:.0f} {1.4 * low:.0f}", "flutter 0", "roughness 0"]
lines += [f"formant {n} {100 * tract * rng.uniform(0.97, 1.03):.0f} 100 100" for n in range(1, 6)]
engine = Engine(lines, rate_wpm=int(rng.integers(110, 150)), pitch=50, pitch_range=40)
for path, word in job["files"]:
    voice, _ = engine.synthesise(engine.phonemes(word))
    stretch = rng.uniform(0.9, 1.15)
    voice = signal.resample(voice, int(len(voice) * 8000 / RATE_HZ * stretch))
    voice = np.pad(voice, (1200, 1200)) * rng.uniform(0.5, 1.0)
    soundfile.write(path, np.stack([voice, 0.8 * voice], 1) + rng.normal(0, 2e-3, (len(voice), 2)), 8000)
"""


def own(folder: Path, speakers=SPEAKERS, words=WORDS, repetitions: int = 4, spoken: bool = True) -> Path:
    """Make isolated words of speakers without metadata: 8 kHz stereo FLAC, no levels, no controls. Returns the CSV.

    Without `spoken`, the recordings are noise.
    """
    rng = np.random.default_rng(0)
    rows = []
    for speaker in speakers:
        (folder / "wav" / speaker).mkdir(parents=True, exist_ok=True)
        files = [
            (folder / "wav" / speaker / f"{speaker}_{number:02}_{repetition}.flac", word)
            for repetition in range(1, repetitions + 1)
            for number, word in enumerate(words)
        ]
        if spoken:
            job = {"speaker": speaker, "files": [(str(path), word) for path, word in files]}
            subprocess.run([sys.executable, "-c", VOICE], input=json.dumps(job), text=True, check=True)
        else:
            for path, _ in files:
                soundfile.write(path, rng.normal(0, 0.1, (6000, 2)), 8000)
        rows += [(path, speaker, word) for path, word in files]
    with (folder / "corpus.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", "wav", "spk_id", "wrd"])
        for path, speaker, word in rows:
            duration = f"{soundfile.info(path).duration:.3f}"
            writer.writerow([path.stem, duration, f"$data_folder/{path.relative_to(folder)}", speaker, word])
    return folder / "corpus.csv"


STRANGERS = ("Abigail", "Bernard", "Charlie", "Dorothy", "Everett", "Florian", "Gabriel", "Heather", "Isadora")
STRANGERS += ("Jessica", "Kathryn", "Leonard")


def disguised(corpus, folder: Path, words: int = 20, repetitions: int = 6, clipped: str = "Charlie") -> Path:
    """Make a stranger's corpus of the embedded one's recordings: other names, 8 kHz, no levels, no controls, few words.

    The recordings of one speaker are clipped. Returns the CSV.
    """
    import torch
    import torchaudio

    resample = torchaudio.transforms.Resample(16_000, 8_000)
    speakers = dict(zip(corpus.dysarthric, STRANGERS, strict=False))
    spoken = Counter(utt.text for utt in corpus if utt.speaker in speakers)
    often = [word for word, times in spoken.items() if times >= repetitions * len(speakers)]
    chosen, rows, count = sorted(often)[:words], [], {}
    for utt in corpus:
        if utt.speaker not in speakers or utt.text not in chosen:
            continue
        name, number = speakers[utt.speaker], count.get((utt.speaker, utt.text), 0)
        if number == repetitions:
            continue
        count[utt.speaker, utt.text] = number + 1
        samples, rate = soundfile.read(utt.wav, dtype="float32")
        assert rate == 16_000
        samples = resample(torch.from_numpy(samples)).numpy()
        if name == clipped:
            loud = np.quantile(np.abs(samples), 0.97)
            samples = np.clip(samples / loud, -1, 1) * 0.999
        path = folder / "wav" / name / f"{name}_{chosen.index(utt.text):02}_{number + 1}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, 8_000)
        rows.append(
            [path.stem, f"{len(samples) / 8_000:.3f}", f"$data_folder/{path.relative_to(folder)}", name, utt.text]
        )
    with (folder / "corpus.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["ID", "duration", "wav", "spk_id", "wrd"], *rows])
    return folder / "corpus.csv"


def utterances(*names, speakers=None, texts=None) -> list:
    """Utterances without recordings, all of the speaker S and without transcripts unless these are given."""
    from kdlib.corpus.utterances import Utterance

    known = zip(names, speakers or ["S"] * len(names), texts or [""] * len(names), strict=True)
    return [Utterance(name, speaker, Path(f"{name}.wav"), 1.0, text) for name, speaker, text in known]


def write_nemo(utterances, path: Path) -> None:
    """Write NeMo JSON lines with absolute paths, the speaker and the optional fields of an utterance."""
    from kdlib.corpus import manifest

    with path.open("w", encoding="utf-8") as file:
        for utt in utterances:
            record = {
                "audio_filepath": str(utt.wav.resolve()),
                "duration": utt.duration_s,
                "text": utt.text,
                "utt_id": utt.utt_id,
                "speaker": utt.speaker,
            }
            record |= {name: getattr(utt, name) for name in manifest.OPTIONAL if getattr(utt, name)}
            if utt.offset_s is not None:
                record["offset"] = record["offset_s"] = utt.offset_s
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


MICROPHONES = [f"M{number}" for number in range(2, 9)]
BLOCKS = ("B1", "B2", "B3")


def codes() -> list[str]:
    """The 255 codes of a block, uncommon words without their block."""
    letters = [f"L{chr(65 + number)}" for number in range(26)]
    counted = [("C", 1, 19), ("CW", 1, 100), ("UW", 1, 100), ("D", 0, 9)]
    return letters + [f"{kind}{number}" for kind, low, high in counted for number in range(low, high + 1)]


def clip(seconds: float = 0.6, rate: int = 16_000) -> bytes:
    """A short wav file's bytes: noise that passes every check."""
    import io

    content = io.BytesIO()
    samples = np.random.default_rng(0).normal(0, 0.1, int(rate * seconds))
    soundfile.write(content, samples, rate, format="WAV", subtype="PCM_16")
    return content.getvalue()


def uaspeech(folder: Path, speakers=("F02", "CF02"), *, old=False, labels="mlf", microphones=MICROPHONES) -> Path:
    """UA-Speech's layout with the real number of files per speaker: 7 microphones x 765 utterances."""
    content = clip()
    for speaker in speakers:
        group = ("control",) if old and speaker.startswith("C") else () if old else ("original",)
        speaker_folder = folder.joinpath("audio", *group, speaker)
        speaker_folder.mkdir(parents=True)
        for block in BLOCKS:
            for code in codes():
                for mic in microphones:
                    (speaker_folder / f"{speaker}_{block}_{code}_{mic}.wav").write_bytes(content)
        if labels == "mlf":
            write_mlf(folder / "mlf" / speaker / f"{speaker}_word.mlf", speaker, microphones)
    if labels == "xls":
        write_xls(folder / "speaker_wordlist.xls")
    return folder


def word(block: str, code: str) -> str:
    from kdlib.corpus.importers.uaspeech import word_list

    return word_list()[f"{block}_{code}" if code.startswith("UW") else code]


def write_mlf(path: Path, speaker: str, microphones=MICROPHONES) -> None:
    path.parent.mkdir(parents=True)
    lines = ["#!MLF!#"]
    for block in BLOCKS:
        for code in codes():
            for mic in microphones:
                lines += [f'"*/{speaker}_{block}_{code}_{mic}.lab"', word(block, code), "."]
    path.write_text("\n".join(lines) + "\n")


def write_xls(path: Path) -> None:
    import xlwt

    from kdlib.corpus.importers.uaspeech import word_list

    book = xlwt.Workbook()
    book.add_sheet("Speaker").write(0, 0, "Speaker")
    sheet = book.add_sheet("Word_filename")
    for row, pair in enumerate([("WORD", "FILE NAME"), *((word, code) for code, word in word_list().items())]):
        for column, value in enumerate(pair):
            sheet.write(row, column, value)
    book.save(str(path))


PROMPTS = {  # text of TORGO's prompts, and the reason to leave them out
    "0001": ("yes", ""),
    "0002": ("The quick brown fox jumps over the lazy dog.", ""),
    "0003": ("[say Ah-P-Eee repeatedly]", "the prompt is an instruction"),
    "0004": ("input/images/jan_1.jpg", "the prompt is a picture"),
    "0005": ("xxx", "the prompt contains xxx"),
    "0006": ("", "the prompt is empty"),
    "0007": (None, "the recording has no prompt"),
    "0008": ("no", "the prompt has no recording"),
    "0009": ("select", "empty file"),
    "0010": ("tear [as in tear up that paper]", "the prompt is an instruction"),
    "0011": ("don't", ""),  # by the array microphone only
}


def torgo(folder: Path, speakers=("F/F01", "FC/FC01", "M01"), sessions=("Session1", "Session2_3"), more=0) -> Path:
    """TORGO's layout: every kind of prompt in each session, and `more` ordinary ones."""
    prompts = PROMPTS | {f"{number:04}": (f"word {number}", "") for number in range(100, 100 + more)}
    content = clip(2.0)
    for speaker in speakers:
        for session in sessions:
            place = folder / speaker / session
            for part in ("prompts", "wav_headMic", "wav_arrayMic"):
                (place / part).mkdir(parents=True)
            (place / "prompts" / "._0001.txt").write_bytes(b"\0\5")
            for number, (text, reason) in prompts.items():
                if text is not None:
                    (place / "prompts" / f"{number}.txt").write_text(f"{text}\n")
                if reason != "the prompt has no recording":
                    for mic in ("wav_headMic", "wav_arrayMic"):
                        if number != "0011" or mic == "wav_arrayMic":
                            (place / mic / f"{number}.wav").write_bytes(b"" if reason == "empty file" else content)
    return folder


if __name__ == "__main__":
    make, place = {"own": own, "uaspeech": uaspeech, "torgo": torgo}[sys.argv[1]], Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    print(make(place))
