"""What a CTC head said of every frame, kept compactly, to be looked at without the model.

Of each frame the likeliest tokens are kept with their log-probabilities, and what is left of the probability together;
read again, the rest is spread evenly. With 5,000 tokens that is 66 bytes a frame instead of 20,000. One file a system,
of which nothing is read but the utterance that is asked for.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np

from kdlib.errors import UserError
from kdlib.tokens import Tokens

TOP = 16  # tokens kept of a frame
FLOOR = -60.0  # nats, of what has no probability left
FILE = "ctc.safetensors"
CODE = ("evaluate/posteriors.py",)


class PosteriorWriter:
    """Collects log-probabilities by utterance, and writes the file."""

    def __init__(self, tokens: Tokens, stride_ms: float) -> None:
        names = [tokens.pieces[index] if index < len(tokens.pieces) else "" for index in range(tokens.size)]
        self.about = {"stride_ms": stride_ms, "blank": tokens.blank, "pieces": names}
        self._rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, utt_id: str, logprobs: np.ndarray) -> None:
        """Keep the frames [T, V] of an utterance."""
        logprobs = np.asarray(logprobs, dtype=np.float32)
        kept = min(TOP, logprobs.shape[1])
        ids = np.argpartition(-logprobs, kept - 1, axis=1)[:, :kept]
        values = np.take_along_axis(logprobs, ids, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
        others = np.exp(logprobs)
        np.put_along_axis(others, ids, 0.0, 1)
        rest = np.log(np.maximum(others.sum(1, keepdims=True), np.exp(FLOOR)))
        self._rows[utt_id] = ids.astype(np.uint16), np.maximum(np.hstack([values, rest]), FLOOR).astype(np.float16)

    def write(self, folder: Path) -> Path:
        """Write what was collected into a folder."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        ids, values = zip(*self._rows.values(), strict=True)
        save_file(
            {
                "ids": np.concatenate(ids),
                "logprobs": np.concatenate(values),
                "ends": np.cumsum([len(one) for one in ids]),
            },
            folder / FILE,
            {"about": json.dumps(self.about | {"utterances": list(self._rows)})},
        )
        return folder / FILE


class Posteriors:
    """A file of posteriors, read by utterance."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="numpy")
            about = json.loads(self._file.metadata()["about"])
        except (SafetensorError, OSError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: no posteriors of kdlib, or damaged ({error}); delete its folder and make the stage again"
            ) from None
        self.path, self.stride_ms, self.blank, self.pieces = path, about["stride_ms"], about["blank"], about["pieces"]
        self._place = {name: index for index, name in enumerate(about["utterances"])}

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.concatenate([[0], self._file.get_tensor("ends")])

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self._place

    def __iter__(self):
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, utt_id: str) -> np.ndarray:
        """Log-probabilities [T, V] of an utterance."""
        place = self._place[utt_id]
        part = slice(int(self._ends[place]), int(self._ends[place + 1]))
        ids = self._file.get_slice("ids")[part].astype(np.int64)
        values = self._file.get_slice("logprobs")[part].astype(np.float32)
        others = len(self.pieces) - ids.shape[1]
        rest = values[:, -1:] - np.log(others) if others else np.full((len(ids), 1), FLOOR, np.float32)
        whole = np.repeat(rest, len(self.pieces), axis=1)
        np.put_along_axis(whole, ids, values[:, :-1], 1)
        return whole


def entropy_bits(logprobs: np.ndarray) -> np.ndarray:
    """Doubt by frame."""
    return -(np.exp(logprobs) * np.maximum(logprobs, FLOOR)).sum(-1) / np.log(2)


def frame_kl(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """KL(teacher || student) by frame, in nats; of two numbers of frames that differ at the end, over the shorter.

    Of posteriors that were kept it is a little less than of all tokens, and clearly less where the two are far apart.
    """
    frames = min(len(teacher), len(student))
    p, q = teacher[:frames], student[:frames]
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)
