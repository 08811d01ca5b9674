"""Acoustic similarity of speakers: weights for teachers by the speaker of the utterance.

A speaker's features are the mean and the deviation of log-mel bands over a sample of the speaker's training recordings,
each normalised in loudness. Two speakers are similar if their features lie in one direction from the mean of the fold's
teachers (cosine). Neither transcripts nor models are used.
"""

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdlib.corpus import audio, features
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import in_blocks
from kdlib.corpus.utterances import Utterance
from kdlib.runtime import set_threads

SAMPLE = 24  # recordings per speaker
BANDS = 40
SHARPNESS = 4.0  # a teacher of the same speaker weighs e^4 times one of similarity 0
FILE = "speaker_features.csv"


def build_features(partial: Path, corpus: Corpus, blocks: tuple[str, ...], seed: int) -> None:
    """Write one row per speaker: mean and deviation of every band."""
    set_threads()
    rows, spoken = {}, corpus.utterances.by_speaker()
    for name in corpus.dysarthric:
        train = spoken[name].where(lambda utt: in_blocks(utt, blocks))
        sample = random.Random(f"{seed} {name}").sample(train, min(SAMPLE, len(train)))
        if sample:
            mels = np.concatenate([_bands(utt) for utt in sample], 1)
            rows[name] = np.concatenate([mels.mean(1), mels.std(1)])
    pd.DataFrame.from_dict(rows, orient="index").rename_axis("speaker").to_csv(partial / FILE)


def read_features(folder: Path) -> pd.DataFrame:
    """Read the features, by speaker."""
    table = pd.read_csv(folder / FILE, dtype={"speaker": str}, keep_default_na=False)
    return table.set_index("speaker").astype(float)


def speaker_similarity(table: pd.DataFrame, teachers: Sequence[str]) -> pd.DataFrame:
    """Cosines between the features of speakers (rows) and teachers (columns), -1 to 1, about the teachers' mean."""
    centred = table - table.loc[list(teachers)].mean()
    unit = centred.div(np.maximum(np.linalg.norm(centred.to_numpy(), axis=1), 1e-9), axis=0)
    return (unit @ unit.loc[list(teachers)].T).rename_axis(columns="teacher")


def similarity_weights(table: pd.DataFrame, teachers: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    """Speaker -> teacher -> weight."""
    cosines = speaker_similarity(table, teachers)
    return {who: {name: float(np.exp(SHARPNESS * cos)) for name, cos in row.items()} for who, row in cosines.iterrows()}


def _bands(utt: Utterance) -> np.ndarray:
    """Bands [F, T] of an utterance: log-mel bands of a recording, or its features where there is no sound."""
    return features.load(utt).T if features.is_file(utt.wav) else _log_mels(audio.load(utt))


def _log_mels(samples: np.ndarray) -> np.ndarray:
    """Log-mel bands [BANDS, T] of the louder half of a recording's frames, less their mean."""
    mels = _filters()(torch.from_numpy(samples)).clamp_min(1e-10).log().numpy()
    loudness = mels.mean(0)
    louder = mels[:, loudness >= np.median(loudness)]
    return louder - louder.mean()


@functools.cache
def _filters():
    from torchaudio.transforms import MelSpectrogram

    return MelSpectrogram(audio.RATE_HZ, n_fft=512, win_length=400, hop_length=160, n_mels=BANDS)
