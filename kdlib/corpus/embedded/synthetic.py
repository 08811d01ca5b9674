"""The embedded corpus: UA-Speech's speakers, sexes, intelligibilities and words, synthesised by espeak-ng.

`make_prompts` lists the prompts of each speaker; `generate` synthesises them in a fresh process per speaker
(`python -m kdlib.corpus.embedded.synthetic`), so that the bytes do not depend on the order or on the number of
processes. The corpus tests the machinery, not clinical benefit.
"""

import copy
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
from kdlib.corpus.importers.uaspeech import BLOCKS, KINDS, kind, word_list
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import published_speakers
from kdlib.corpus.utterances import Utterance
from kdlib.corpus.views import CLEAN
from kdlib.errors import UserError, nearest
from kdlib.io import atomic_write
from kdlib.settings.corpus import Synthetic


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One word or sentence to synthesise for a speaker."""

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
    """Median of a speaker's word durations relative to controls on UA-Speech, and the standard deviation of its log."""
    text = files("kdlib").joinpath("data/word_duration_ratios.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["speaker"]: (float(row["word_ratio_median"]), float(row["sd_log_ratio"])) for row in rows}


def make_prompts(settings: Synthetic) -> dict[str, list[Prompt]]:
    """Prompts of each speaker: the chosen words and sentences by block; for controls the word list and those words."""
    chosen = list(_choose_words(settings))
    dysarthric = [name for name, speaker in published_speakers().items() if not speaker.control]
    speakers = dysarthric if settings.speakers == "all" else list(settings.speakers)
    for name in speakers:
        if name not in dysarthric:
            raise UserError(f"synthetic.speakers: unknown speaker {name!r}{nearest(name, dysarthric)}")
    times = dict.fromkeys(BLOCKS, settings.repetitions) | settings.repetitions_in
    said = [
        (block, code, word, number)
        for number in range(1, max(times.values()) + 1)
        for block, code, word in chosen
        if number <= times[block]
    ]
    prompts = {name: [Prompt(name, *one) for one in said] for name in speakers}
    for name, block in itertools.product(speakers, BLOCKS if settings.sentences else ()):
        drawn = random.Random(f"{settings.seed} {name} {block}").sample(grammar.sentences()[block], settings.sentences)
        prompts[name] += [Prompt(name, block, f"S{index}", text, 1) for index, text in enumerate(drawn, start=1)]
    codes = {word: code for code, word in reversed(word_list().items())}  # the first code of a word
    extra = list(codes.items())
    if settings.control_words != "all":
        extra = _spread(extra, settings.control_words)
    own = {word: codes[word] for _, _, word in chosen}
    for name in _controls(settings):
        prompts[name] = [Prompt(name, "C", code, word, 1) for word, code in (dict(extra) | own).items()]
        prompts[name] += [Prompt(name, "C", code, word, 2) for word, code in own.items()]
    return prompts


def generate(settings: Synthetic, folder: Path) -> Corpus:
    """Synthesise all prompts into `folder`/audio; speakers that a killed run completed are kept."""
    prompts = make_prompts(settings)
    (folder / "audio").mkdir(exist_ok=True)
    with progress(sum(map(len, prompts.values())), "corpus", "utt") as bar:
        for name in _synthesise(prompts, settings, folder):
            bar.update(len(prompts[name]))
    rows = [row for name in prompts for row in _read_rows(folder, name)]
    return Corpus(
        tuple(Utterance(**row | {"wav": folder / row["wav"], "duration_s": float(row["duration_s"])}) for row in rows),
        "the embedded corpus",
    )


def _synthesise(prompts: dict[str, list[Prompt]], settings: Synthetic, folder: Path) -> Iterator[str]:
    """Synthesise each speaker's prompts, yielding the name of each completed speaker."""
    ready = [name for name in prompts if (folder / f"{name}.csv").is_file()]
    yield from ready
    jobs = [
        {
            "speaker": name,
            "gain": settings.severity_gain,
            "seed": settings.seed,
            "folder": str(folder),
            "sample_rate": settings.sample_rate,
            "clean": settings.clean,
            "prompts": [dataclasses.asdict(prompt) for prompt in speaker_prompts],
        }
        for name, speaker_prompts in prompts.items()
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
            raise UserError(f"corpus: the speech synthesis failed: {last[0]}")


def _controls(settings: Synthetic) -> list[str]:
    """Choose the control speakers: by number, or by name."""
    controls = [name for name, speaker in published_speakers().items() if speaker.control]
    if isinstance(settings.controls, int):
        return controls[-settings.controls :]
    for name in settings.controls:
        if name not in controls:
            raise UserError(f"synthetic.controls: unknown control {name!r}{nearest(name, controls)}")
    return [name for name in controls if name in settings.controls]


def _read_rows(folder: Path, name: str) -> Iterator[dict]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _choose_words(settings: Synthetic) -> Iterator[tuple[str, str, str]]:
    """(block, code, word), evenly spread over the list: common words in all blocks, uncommon ones in one block each."""
    words, sizes = word_list(), settings.words
    counts = {"D": sizes.digits, "L": sizes.letters, "C": sizes.computer, "CW": sizes.common}
    for block in BLOCKS:
        for prefix, count in counts.items():
            codes = [code for code in words if kind(code) == KINDS[prefix]]
            yield from ((block, code, words[code]) for code in _spread(codes, count))
        codes = _spread([code for code in words if code.startswith(f"{block}_")], sizes.uncommon_per_block)
        yield from ((block, code.removeprefix(f"{block}_"), words[code]) for code in codes)


def _spread(items: list, count: int) -> list:
    return [items[index * len(items) // count] for index in range(count)]


def _voice(name: str, rng: np.random.Generator) -> tuple[list[str], int]:
    """Draw a speaker's voice file and speaking rate: sex gives the range of pitch, the generator the individual."""
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
    # Only controls differ in rate: dysarthric speakers are slowed down by their published durations.
    return lines, int(rng.integers(125, 150)) if published_speakers()[name].control else 137


def _run_job(job: dict) -> None:
    """Synthesise one speaker in a separate process: every prompt in order, the audio files, then their list."""
    import soundfile
    from scipy import signal

    from kdlib.corpus.embedded import dysarthria
    from kdlib.corpus.embedded.espeak import RATE_HZ, Engine

    name, rate, folder = job["speaker"], job["sample_rate"], Path(job["folder"])
    rng = np.random.default_rng([job["seed"], zlib.crc32(name.encode())])
    lines, rate_wpm = _voice(name, rng)
    intelligibility_pct, duration = published_speakers()[name].intelligibility_pct, published_durations().get(name)
    traits = dysarthria.draw_traits(intelligibility_pct, job["gain"], rng, duration)
    pitch_range = round(50 * (1 - 0.7 * traits.monotony * traits.severity))
    (folder / "audio" / name).mkdir(exist_ok=True)
    if job["clean"]:
        (folder / CLEAN / name).mkdir(parents=True, exist_ok=True)
    up, down = rate // math.gcd(rate, RATE_HZ), RATE_HZ // math.gcd(rate, RATE_HZ)
    lowpass = signal.firwin(20 * max(up, down) + 1, 1 / max(up, down), window=("kaiser", 5.0))
    table = io.StringIO()
    columns = ["utt_id", "speaker", "wav", "duration_s", "text", "block", "repetition", "word_type", "sha256"]
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    with Engine(lines, rate_wpm=rate_wpm, pitch=50, pitch_range=pitch_range) as engine:
        for prompt in (Prompt(**fields) for fields in job["prompts"]):
            rng = np.random.default_rng([job["seed"], zlib.crc32(prompt.utt_id.encode())])
            phonemes = engine.phonemes(prompt.word.lower())
            _, healthy = engine.synthesise(phonemes)
            spoken = engine.synthesise(dysarthria.misarticulate(phonemes, traits, rng))
            same, voice = copy.deepcopy(rng), dysarthria.distort(*spoken, healthy, traits, rng)
            if job["clean"]:
                slowed = dysarthria.record_clean(dysarthria.slow_down(*spoken, healthy, traits, same))
                slowed = signal.resample_poly(slowed, up, down, window=lowpass)
                soundfile.write(folder / CLEAN / name / f"{prompt.utt_id}.wav", slowed, rate, subtype="PCM_16")
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
        hidden.write_text(table.getvalue(), encoding="utf-8")


def _run_jobs(jobs: list[dict], cores: int) -> Iterator[str]:
    """Run a fresh process per speaker, `cores` at a time; all of them end when the parent of this process does."""
    fork, parent = multiprocessing.get_context("fork"), os.getppid()
    running: dict[int, tuple[multiprocessing.Process, str]] = {}
    while jobs or running:
        while jobs and len(running) < cores:
            job = jobs.pop(0)
            process = fork.Process(target=_job_process, args=(job,), daemon=True)
            process.start()
            running[process.sentinel] = process, job["speaker"]
        for sentinel in multiprocessing.connection.wait(list(running), timeout=1):
            process, name = running.pop(sentinel)
            process.join()
            if process.exitcode:
                sys.exit(1 if process.exitcode > 0 else f"speaker {name} was ended by signal {-process.exitcode}")
            yield name
        if os.getppid() != parent:
            sys.exit("the process that started the synthesis has ended")


def _job_process(job: dict) -> None:
    try:
        _run_job(job)
    except Exception as error:
        sys.exit(f"speaker {job['speaker']}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    import scipy.signal  # noqa: F401 (2 s: imported once, before the speakers' processes fork)

    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(2)
    for name in _run_jobs(json.load(sys.stdin), len(affinity)):
        print(name, flush=True)
