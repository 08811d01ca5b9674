"""Audio files -> checked samples at the models' sample rate -> padded batches.

Files of any rate and channel count are mixed down and resampled on reading, which the report notes once per corpus.
Files that cannot be used are named in the report and left out; they never stop a run half-way. The result for a file
is kept with its size and date, so that a second check, or one after a kill, opens only files that are new.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import soundfile

from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.errors import UserError

RATE_HZ = 16_000
SHARPNESS = 32  # of resampling, in zero crossings: the default of 6 mirrors the upper end of the old band into the new
QUIET_DB, MARGIN_S = 40, 0.1  # silence trimming: level below the loudest frame, margin around the speech


def load(utt: Utterance, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Samples of a recording, mono, at `rate_hz`."""
    try:
        with soundfile.SoundFile(utt.wav) as file:
            samples, file_hz = read_samples(file, utt), file.samplerate
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(
            f"{utt.utt_id}: {utt.wav} was readable before, but is not any more ({error}); run 00_corpus again"
        ) from None
    if file_hz == rate_hz:
        return samples
    import torch

    return _resampler(file_hz, rate_hz)(torch.from_numpy(samples)).numpy()


@dataclass(frozen=True, eq=False)
class Batches(Sequence[list[Utterance]]):
    """Batches of utterances, put together when they are asked for: an epoch holds the numbers of their rows alone."""

    utterances: Sequence[Utterance]
    rows: list[np.ndarray]  # of each batch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Batches(self.utterances, self.rows[place])
        return [self.utterances[row] for row in self.rows[place]]


def batches(utterances: Sequence[Utterance], size: int, *, seed: int | None = None) -> Batches:
    """Batches of similar length: shuffled batch by batch with a seed, longest first without one."""
    if seed is None:
        keys = [(-utt.duration_s, utt.utt_id) for utt in utterances]
        order = sorted(range(len(keys)), key=keys.__getitem__)
    else:
        rng = random.Random(seed)
        lengths = (duration_s * rng.uniform(0.9, 1.1) for duration_s in Utterances.of(utterances).durations)
        order = np.argsort(np.fromiter(lengths, float, len(utterances)))
    rows = [np.asarray(order[start : start + size], np.intp) for start in range(0, len(order), size)]
    if seed is not None:
        rng.shuffle(rows)
    return Batches(utterances, rows)


def read_samples(file: soundfile.SoundFile, utt: Utterance) -> np.ndarray:
    """Read the samples of an utterance's part of a file, mixed down."""
    frames = -1
    if utt.offset_s is not None:
        file.seek(min(round(utt.offset_s * file.samplerate), file.frames))
        frames = round(utt.duration_s * file.samplerate)
    samples = file.read(frames, dtype="float32")
    return samples if samples.ndim == 1 else samples.mean(axis=1)


@functools.lru_cache(maxsize=8)
def _resampler(from_hz: int, to_hz: int):
    import torchaudio

    ratio = Fraction(to_hz, from_hz).limit_denominator(1000)  # the exact ratio of 44,101 Hz needs a filter of gigabytes
    return torchaudio.transforms.Resample(ratio.denominator, ratio.numerator, lowpass_filter_width=SHARPNESS)


def loud_part(samples: np.ndarray, rate_hz: int, below_db: float) -> tuple[float, float]:
    """Seconds from the first to the last frame of 20 ms that is within `below_db` of the loudest."""
    size = rate_hz // 50
    frames = np.resize(samples, (max(1, len(samples) // size), size))
    loud = 10 * np.log10(np.einsum("ij,ij->i", frames, frames) / size + 1e-10)
    above = np.flatnonzero(loud > loud.max() - below_db)
    return above[0] / 50, (above[-1] + 1) / 50
