"""Feature sequences: an utterance's input is an array [frames, width] of any modality, read without running any code.

An array lies in a file of its own (`.npy`, `.npz`, `.pt`), or with others in one file, under the utterance's id
(`.npz`, `.pt`, `.h5`). Or it is made of a recording: log-mel bands, several frames stacked.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.corpus import audio
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError

HDF5 = (".h5", ".hdf5")
KINDS = (".npy", ".npz", ".pt", *HDF5)
MELS = "mels"  # of a recording: mels64x8x4, bands, frames stacked, frames from one vector to the next


def is_file(path: Path) -> bool:
    """True if a file holds features, by its name."""
    return path.suffix.lower() in KINDS


def load(utt: Utterance) -> np.ndarray:
    """An utterance's features [frames, width], float32: of its file, or of its recording."""
    if utt.features:
        bands, stack, hop = map(int, utt.features.removeprefix(MELS).split("x"))
        return stacked(_mels_of(utt, bands), stack, hop)
    try:
        return np.ascontiguousarray(read(utt), dtype=np.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{utt.utt_id}: {utt.wav} was readable before, but is not any more ({error}); run 00_corpus again"
        ) from None


def stacked_mels(samples: np.ndarray, bands: int, stack: int, hop: int) -> np.ndarray:
    """Log-mel bands of frames of 10 ms, `stack` of them side by side, every `hop` frames: [frames, bands x stack]."""
    return stacked(log_mels(samples, bands), stack, hop)


def log_mels(samples: np.ndarray, bands: int) -> np.ndarray:
    """Log-mel bands of frames of 10 ms: [frames, bands]."""
    import torch

    return _mel_filters(bands)(torch.from_numpy(samples)).add(1e-6).log().T.numpy()


def stacked(mels: np.ndarray, stack: int, hop: int) -> np.ndarray:
    """`stack` frames side by side, every `hop` frames: [frames, stack x bands]."""
    frames = -(-len(mels) // hop)
    padded = np.pad(mels, ((0, stack + frames * hop - len(mels)), (0, 0)), constant_values=np.float32(np.log(1e-6)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, stack, axis=0)[::hop][:frames]
    return windows.transpose(0, 2, 1).reshape(frames, -1).copy()


def read(utt: Utterance) -> np.ndarray:
    """The array of an utterance; KeyError says why a file does not have it."""
    kind = utt.wav.suffix.lower()
    if kind == ".npy":
        return np.load(utt.wav, allow_pickle=False)
    if kind in HDF5:
        return _of_hdf5(utt)
    content = _of_torch(utt.wav) if kind == ".pt" else np.load(utt.wav, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return content
    names = list(content)
    if utt.utt_id in names:
        return np.asarray(content[utt.utt_id])
    if len(names) != 1:
        many = "several arrays in the file, none of this id"
        raise KeyError(many if names else "no array of this id in the file")
    return np.asarray(content[names[0]])


def _of_torch(path: Path) -> Any:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its unpickler has exceptions of its own
        raise ValueError(str(error)) from None
    if isinstance(content, torch.Tensor):
        return content.float().numpy()
    if not isinstance(content, dict):
        raise ValueError(f"expected a tensor, or tensors by id, found {type(content).__name__}")
    return {str(name): value.float().numpy() for name, value in content.items() if isinstance(value, torch.Tensor)}


def _of_hdf5(utt: Utterance) -> np.ndarray:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{utt.wav}: HDF5 needs h5py: pip install h5py") from None
    with h5py.File(utt.wav) as file:
        if utt.utt_id not in file:
            raise KeyError("no array of this id in the file")
        return file[utt.utt_id][()]


@functools.lru_cache(maxsize=4096)  # 0.4 GB of sentences of four seconds; the analysis takes longer than a small BiLSTM
def _mels_of(utt: Utterance, bands: int) -> np.ndarray:
    return log_mels(audio.load(utt), bands)


@functools.cache
def _mel_filters(bands: int):
    import torchaudio

    options = {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": bands}
    return torchaudio.transforms.MelSpectrogram(audio.RATE_HZ, **options)
