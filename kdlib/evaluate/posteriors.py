"""CTC posteriors of every frame, stored compactly, for analysis without the model.

Per frame the most probable tokens are stored with their log-probabilities, and the sum of the remaining probability; on
reading, the rest is spread evenly. With 5,000 tokens that is 66 bytes per frame instead of 20,000. One file per system;
only the requested utterances are read.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np

from kdlib.errors import UserError
from kdlib.tokens import Tokens

TOP = 16  # tokens stored per frame
FLOOR = -60.0  # nats, for no remaining probability
FILE = "ctc.safetensors"


class PosteriorWriter:
    """Collector of log-probabilities by utterance, and writer of the file."""

    def __init__(self, tokens: Tokens, stride_ms: float) -> None:
        names = [tokens.pieces[index] if index < len(tokens.pieces) else "" for index in range(tokens.size)]
        self.about = {"stride_ms": stride_ms, "blank": tokens.blank, "pieces": names}
        self._rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, utt_id: str, logprobs: np.ndarray) -> None:
        """Add the log-probabilities [T, V] of an utterance."""
        logprobs = np.asarray(logprobs, dtype=np.float32)
        top = min(TOP, logprobs.shape[1])
        ids = np.argpartition(-logprobs, top - 1, axis=1)[:, :top]
        values = np.take_along_axis(logprobs, ids, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
        remaining = np.exp(logprobs)
        np.put_along_axis(remaining, ids, 0.0, 1)
        rest = np.log(np.maximum(remaining.sum(1, keepdims=True), np.exp(FLOOR)))
        self._rows[utt_id] = ids.astype(np.uint16), np.maximum(np.hstack([values, rest]), FLOOR).astype(np.float16)

    def write(self, folder: Path) -> Path:
        """Write all utterances to the file in a folder."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        ids, values = zip(*self._rows.values(), strict=True)
        save_file(
            {
                "ids": np.concatenate(ids),
                "logprobs": np.concatenate(values),
                "ends": np.cumsum([len(rows) for rows in ids]),
            },
            folder / FILE,
            {"about": json.dumps(self.about | {"utterances": list(self._rows)})},
        )
        return folder / FILE


class Posteriors:
    """File of posteriors, read by utterance."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="numpy")
            about = json.loads(self._file.metadata()["about"])
        except (SafetensorError, OSError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: no posteriors file of kdlib, or damaged ({error}); delete its folder and run the stage again"
            ) from None
        self.path, self.stride_ms, self.blank, self.pieces = path, about["stride_ms"], about["blank"], about["pieces"]
        self._index = {name: index for index, name in enumerate(about["utterances"])}

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.concatenate([[0], self._file.get_tensor("ends")])

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self._index

    def __iter__(self):
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, utt_id: str) -> np.ndarray:
        """Log-probabilities [T, V] of an utterance."""
        index = self._index[utt_id]
        part = slice(int(self._ends[index]), int(self._ends[index + 1]))
        ids = self._file.get_slice("ids")[part].astype(np.int64)
        values = self._file.get_slice("logprobs")[part].astype(np.float32)
        count = len(self.pieces) - ids.shape[1]
        rest = values[:, -1:] - np.log(count) if count else np.full((len(ids), 1), FLOOR, np.float32)
        logprobs = np.repeat(rest, len(self.pieces), axis=1)
        np.put_along_axis(logprobs, ids, values[:, :-1], 1)
        return logprobs


def entropy_bits(logprobs: np.ndarray) -> np.ndarray:
    """Entropy by frame, in bits."""
    return -(np.exp(logprobs) * np.maximum(logprobs, FLOOR)).sum(-1) / np.log(2)


def frame_kl(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """KL(teacher || student) by frame, in nats; if the numbers of frames differ, over the shorter one.

    From stored posteriors it is slightly lower than over all tokens, and clearly lower where the two are far apart.
    """
    frames = min(len(teacher), len(student))
    p, q = teacher[:frames], student[:frames]
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)
