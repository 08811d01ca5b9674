"""The embedded corpus: UA-Speech's speakers, sexes, intelligibilities and words, spoken by espeak-ng.

`plan` says who utters what; `speak` has it spoken by a fresh process a speaker (`python -m kdlib.corpus.embedded.synthetic`), so
that the bytes do not depend on the order or on the number of processes. The corpus tests the machinery, not clinical
benefit.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np

from kdlib.console import progress
from kdlib.corpus.embedded import grammar
from kdlib.corpus.importers import uaspeech
from kdlib.corpus.importers.uaspeech import BLOCKS, KINDS, kind, word_list
from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import published_speakers
from kdlib.errors import UserError, nearest
from kdlib.io import atomic_write
from kdlib.params import Params
from kdlib.settings import Synthetic

CODE = (
    "corpus/embedded/synthetic.py",
    "corpus/embedded/grammar.py",
    "corpus/embedded/dysarthria.py",
    "corpus/embedded/espeak.py",
    "data/word_duration_ratios.csv",
)
CODE += uaspeech.CODE


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One word or sentence to be said by a speaker."""

    speaker: str
    block: str
    code: str
    word: str
    repetition: int

    @property
    def utt_id(self) -> str:
        """As in UA-Speech, with the repetition in the microphone's place."""
        return f"{self.speaker}_{self.block}_{self.code.replace('_', '')}_R{self.repetition}"


def published_durations() -> dict[str, tuple[float, float]]:
    """Median of a speaker's word durations relative to controls on UA-Speech, and the deviation of its log."""
    text = files("kdlib").joinpath("data/word_duration_ratios.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["speaker"]: (float(row["word_ratio_median"]), float(row["sd_log_ratio"])) for row in rows}


def make_prompts(settings: Synthetic) -> dict[str, list[Prompt]]:
    """Who says what: every speaker the chosen words and sentences by block, every control the list and those words."""
    chosen = list(_chosen(settings))
    known = [name for name, speaker in published_speakers().items() if not speaker.control]
    speakers = known if settings.speakers == "all" else list(settings.speakers)
    for name in speakers:
        if name not in known:
            raise UserError(f"synthetic.speakers: unknown speaker {name!r}{nearest(name, known)}")
    prompts = {
        name: [
            Prompt(name, block, code, word, repetition)
            for repetition in range(1, settings.repetitions + 1)
            for block, code, word in chosen
        ]
        for name in speakers
    }
    for name, block in itertools.product(speakers, BLOCKS if settings.sentences else ()):
        drawn = random.Random(f"{settings.seed} {name} {block}").sample(grammar.sentences()[block], settings.sentences)
        prompts[name] += [Prompt(name, block, f"S{index}", text, 1) for index, text in enumerate(drawn, start=1)]
    everything = {word: code for code, word in reversed(word_list().items())}  # the first code of a word
    extra = list(everything.items())
    if settings.control_words != "all":
        extra = [extra[index * len(extra) // settings.control_words] for index in range(settings.control_words)]
    own = {word: everything[word] for _, _, word in chosen}
    for name in _controls(settings):
        prompts[name] = [Prompt(name, "C", code, word, 1) for word, code in (dict(extra) | own).items()]
        prompts[name] += [Prompt(name, "C", code, word, 2) for word, code in own.items()]
    return prompts


def generate(params: Params, folder: Path) -> Corpus:
    """Have everything of the plan spoken into `folder`/audio; what a killed run made is kept."""
    prompts = make_prompts(params.synthetic)
    (folder / "audio").mkdir(exist_ok=True)
    with progress(sum(map(len, prompts.values())), "corpus", "utt") as bar:
        for name in _speak(prompts, params, folder):
            bar.update(len(prompts[name]))
    rows = [row for name in prompts for row in _rows(folder, name)]
    return Corpus(
        tuple(Utterance(**row | {"wav": folder / row["wav"], "duration_s": float(row["duration_s"])}) for row in rows),
        "the embedded corpus",
    )


def _speak(prompts: dict[str, list[Prompt]], params: Params, folder: Path) -> Iterator[str]:
    """Speak each speaker's prompts, yielding the name of each that is ready."""
    ready = [name for name in prompts if (folder / f"{name}.csv").is_file()]
    yield from ready
    jobs = [
        {
            "speaker": name,
            "gain": params.synthetic.severity_gain,
            "seed": params.synthetic.seed,
            "folder": str(folder),
            "sample_rate": params.synthetic.sample_rate,
            "prompts": [dataclasses.asdict(prompt) for prompt in todo],
        }
        for name, todo in prompts.items()
        if name not in ready
    ]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kdlib.corpus.embedded.synthetic"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stderr=errors, **pipes) as run,
    ):
        run.stdin.write(json.dumps(jobs))
        run.stdin.close()
        yield from map(str.strip, run.stdout)
        if run.wait():
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
            raise UserError(f"corpus: the voices failed: {last[0]}")


def _controls(settings: Synthetic) -> list[str]:
    """The controls who speak: so many, or those that are named."""
    known = [name for name, speaker in published_speakers().items() if speaker.control]
    if isinstance(settings.controls, int):
        return known[-settings.controls :]
    for name in settings.controls:
        if name not in known:
            raise UserError(f"synthetic.controls: unknown control {name!r}{nearest(name, known)}")
    return [name for name in known if name in settings.controls]


def _rows(folder: Path, name: str) -> Iterator[dict]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _chosen(settings: Synthetic) -> Iterator[tuple[str, str, str]]:
    """(block, code, word), evenly spread over the list: common words in every block, uncommon ones in one each."""
    words, counts = word_list(), settings.words
    for block in BLOCKS:
        for prefix, count in (
            ("D", counts.digits),
            ("L", counts.letters),
            ("C", counts.computer),
            ("CW", counts.common),
        ):
            codes = [code for code in words if kind(code) == KINDS[prefix]]
            yield from ((block, code, words[code]) for code in _spread(codes, count))
        codes = [code for code in words if code.startswith(f"{block}_")]
        yield from (
            (block, code.removeprefix(f"{block}_"), words[code]) for code in _spread(codes, counts.uncommon_per_block)
        )


def _spread(codes: list[str], count: int) -> list[str]:
    return [codes[index * len(codes) // count] for index in range(count)]


def _voice(name: str, rng: np.random.Generator) -> tuple[list[str], int]:
    """Voice lines and pitch: sex gives the range, the generator the person."""
    female = published_speakers()[name].sex == "F"
    low = rng.uniform(135, 175) if female else rng.uniform(70, 105)
    tract = rng.uniform(1.08, 1.20) if female else rng.uniform(0.92, 1.05)
    lines = [f"pitch {low:.0f} {low * 1.45:.0f}", "flutter 0", "roughness 0"]
    for formant in range(1, 6):
        lines.append(
            f"formant {formant} {100 * tract * rng.uniform(0.97, 1.03):.0f} {rng.uniform(85, 115):.0f} "
            f"{rng.uniform(90, 115):.0f}"
        )
    lines.append(f"consonants {rng.uniform(80, 115):.0f} {rng.uniform(85, 110):.0f}")
    return lines, int(rng.integers(125, 150)) if published_speakers()[
        name
    ].control else 137  # else published durations say how slow


def _speak_all(job: dict) -> None:
    """What a voice's own process does: speak every prompt in order, write the files, then the list of them."""
    import soundfile
    from scipy import signal

    from kdlib.corpus.embedded import dysarthria
    from kdlib.corpus.embedded.espeak import RATE_HZ, Engine

    name, rate, folder = job["speaker"], job["sample_rate"], Path(job["folder"])
    rng = np.random.default_rng([job["seed"], zlib.crc32(name.encode())])
    lines, rate_wpm = _voice(name, rng)
    durations = published_durations()
    traits = dysarthria.draw_traits(
        published_speakers()[name].intelligibility_pct, job["gain"], rng, durations.get(name)
    )
    spread = round(50 * (1 - 0.7 * traits.monotony * traits.severity))
    engine = Engine(lines, rate_wpm=rate_wpm, pitch=50, pitch_range=spread)
    (folder / "audio" / name).mkdir(exist_ok=True)
    up, down = rate // math.gcd(rate, RATE_HZ), RATE_HZ // math.gcd(rate, RATE_HZ)
    lowpass = signal.firwin(20 * max(up, down) + 1, 1 / max(up, down), window=("kaiser", 5.0))
    table_ = io.StringIO()
    columns = ["utt_id", "speaker", "wav", "duration_s", "text", "block", "repetition", "word_type", "sha256"]
    writer = csv.DictWriter(table_, columns, lineterminator="\n")
    writer.writeheader()
    for prompt in (Prompt(**fields) for fields in job["prompts"]):
        rng = np.random.default_rng([job["seed"], zlib.crc32(prompt.utt_id.encode())])
        phonemes = engine.phonemes(prompt.word.lower())
        _, healthy = engine.say(phonemes)
        voice = dysarthria.distort(*engine.say(dysarthria.misarticulate(phonemes, traits, rng)), healthy, traits, rng)
        audio = signal.resample_poly(dysarthria.record(voice, rng), up, down, window=lowpass)
        wav, content = Path("audio") / name / f"{prompt.utt_id}.wav", io.BytesIO()
        soundfile.write(content, audio, rate, format="WAV", subtype="PCM_16")
        (folder / wav).write_bytes(content.getvalue())
        writer.writerow(
            {
                "utt_id": prompt.utt_id,
                "speaker": name,
                "wav": wav,
                "duration_s": f"{len(audio) / rate:.4f}",
                "text": prompt.word,
                "block": prompt.block,
                "repetition": prompt.repetition,
                "word_type": "sentence" if " " in prompt.word else kind(prompt.code),
                "sha256": hashlib.sha256(content.getvalue()).hexdigest()[:16],
            }
        )
    with atomic_write(folder / f"{name}.csv") as hidden:
        hidden.write_text(table_.getvalue(), encoding="utf-8")


def _speak_side_by_side(jobs: list[dict], cores: int) -> Iterator[str]:
    """A fresh process a speaker, `cores` at a time; all of them end when the one that asked for them does."""
    fork, asker = multiprocessing.get_context("fork"), os.getppid()
    running: dict[int, tuple[multiprocessing.Process, str]] = {}
    while jobs or running:
        while jobs and len(running) < cores:
            job = jobs.pop(0)
            process = fork.Process(target=_voice_process, args=(job,), daemon=True)
            process.start()
            running[process.sentinel] = process, job["speaker"]
        for sentinel in multiprocessing.connection.wait(list(running), timeout=1):
            process, name = running.pop(sentinel)
            process.join()
            if process.exitcode:
                sys.exit(1 if process.exitcode > 0 else f"the voice of {name} was ended by signal {-process.exitcode}")
            yield name
        if os.getppid() != asker:
            sys.exit("nobody waits for these voices any more")


def _voice_process(job: dict) -> None:
    try:
        _speak_all(job)
    except Exception as error:
        sys.exit(f"the voice of {job['speaker']}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    import scipy.signal  # noqa: F401 (2 s: imported once, before the voices' processes fork)

    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(2)
    for done in _speak_side_by_side(json.load(sys.stdin), len(affinity)):
        print(done, flush=True)
