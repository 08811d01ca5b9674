"""Audio files -> checked samples at the rate that the models hear -> padded batches.

Files of any rate and channel count are mixed down and resampled on reading, and the report says so once a corpus.
Files that cannot be used are named in the report and left out; they never end a run half-way.
"""

import csv
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.errors import UserError
from kdlib.stage import writing

if TYPE_CHECKING:
    import torch

RATE_HZ = 16_000
SHORTEST_S = 0.1  # below it no model has a frame to write a word in
SILENT = 1e-4  # peak below which a file holds nothing
CLIPPED = 0.5  # share of samples at full scale above which a file holds nothing but clipping


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that was left out, and why."""

    utt_id: str
    speaker: str
    wav: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a look at every file found."""

    checked: int
    problems: list[Problem]
    converted: dict[str, int]  # "44100 Hz, 2 channels" -> files

    def __str__(self) -> str:
        lines = [f"{self.checked:,} audio files checked, {len(self.problems)} left out"]
        lines += [
            f"  {count:,} files of {what} are read as {RATE_HZ} Hz mono" for what, count in self.converted.items()
        ]
        for reason, count in Counter(problem.reason for problem in self.problems).most_common():
            example = next(problem for problem in self.problems if problem.reason == reason)
            lines.append(f"  {count} x {reason}, for example {example.wav} (speaker {example.speaker})")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the files that were left out, one a line."""
        with writing(path) as hidden, hidden.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Problem.__slots__)
            writer.writerows([getattr(problem, name) for name in Problem.__slots__] for problem in self.problems)


def load(path: Path, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Samples of a file, mono, at `rate_hz`."""
    samples, found_hz = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    if found_hz == rate_hz:
        return mono
    import torch
    import torchaudio

    return torchaudio.functional.resample(torch.from_numpy(mono), found_hz, rate_hz).numpy()


def check(corpus: Corpus) -> tuple[Corpus, Report]:
    """Look at every file; return the corpus without those that cannot be used, and the report."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_examine, corpus))
    problems = [problem for problem, _ in found if problem]
    formats = Counter(kind for problem, kind in found if not problem and kind)
    bad = {problem.utt_id for problem in problems}
    if len(bad) == len(corpus):
        raise UserError(
            f"{corpus.source}: none of its {len(corpus)} audio files can be used; the first, "
            f"{problems[0].wav}: {problems[0].reason}"
        )
    return Corpus(tuple(utt for utt in corpus if utt.utt_id not in bad), corpus.source), Report(
        len(corpus), problems, dict(formats)
    )


def batches(utterances: Sequence[Utterance], size: int, *, seed: int | None = None) -> Iterator[list[Utterance]]:
    """Groups of similar length; shuffled group by group where a seed is given, longest first where not."""
    chosen = list(utterances)
    if seed is None:
        chosen.sort(key=lambda utt: (-utt.duration_s, utt.utt_id))
    else:
        rng = random.Random(seed)
        chosen.sort(key=lambda utt: (utt.duration_s * rng.uniform(0.8, 1.25), utt.utt_id))
    groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    if seed is not None:
        rng.shuffle(groups)
    yield from groups


def collate(utterances: Sequence[Utterance]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Read and pad: samples [B, N] and their numbers [B]."""
    import torch

    waves = [torch.from_numpy(load(utt.wav)) for utt in utterances]
    lengths = torch.tensor([len(wave) for wave in waves])
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths


def _examine(utt: Utterance) -> tuple[Problem | None, str]:
    try:
        with soundfile.SoundFile(utt.wav) as file:
            kind = (
                ""
                if (file.samplerate, file.channels) == (RATE_HZ, 1)
                else f"{file.samplerate} Hz, {file.channels} channel{'s' * (file.channels > 1)}"
            )
            samples, found_hz = file.read(dtype="float32"), file.samplerate
    except (soundfile.LibsndfileError, OSError, RuntimeError):
        reason = "the file is missing" if not utt.wav.is_file() else "the file cannot be read as audio"
        return Problem(utt.utt_id, utt.speaker, str(utt.wav), reason), ""
    reason = _fault(samples)
    if not reason and len(samples) < SHORTEST_S * found_hz:
        reason = f"shorter than {SHORTEST_S} s"
    return (Problem(utt.utt_id, utt.speaker, str(utt.wav), reason) if reason else None), kind


def _fault(samples: np.ndarray) -> str:
    if samples.size == 0:
        return "no samples in it"
    if not np.isfinite(samples).all():
        return "NaN or infinite samples"
    peak = float(np.abs(samples).max())
    if peak < SILENT:
        return "nothing but silence"
    if peak >= 0.999 and float((np.abs(samples) >= 0.999).mean()) > CLIPPED:
        return "clipped to nothing"
    return ""
