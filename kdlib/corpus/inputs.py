"""The one door from utterances to the inputs of models: samples, or feature vectors, padded to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kdlib.corpus import audio, features
from kdlib.corpus.utterances import Utterance

if TYPE_CHECKING:
    import numpy as np
    import torch

    from kdlib.tokens import Tokens


@dataclass(frozen=True)
class Batch:
    """Utterances, the token ids of their references, and the inputs of models: read when they are first needed."""

    utterances: Sequence[Utterance]
    ids: list[list[int]] = field(default_factory=list)  # one per utterance; empty without a transcript
    device: torch.device | str = "cpu"
    loaded: list[torch.Tensor] = field(default_factory=list)  # inputs and their lengths [B], once they are read
    tempo: float | tuple[float, ...] = 1.0  # augmentation: the encoder's features are stretched by it, or each row's
    mix: tuple[tuple[int, ...], float] | None = None  # and mixed with those of other rows, which have this share

    @classmethod
    def of(cls, utterances: Sequence[Utterance], tokens: Tokens | None = None) -> Batch:
        """A batch of utterances; with `tokens` it has the ids of their references."""
        return cls(utterances, [tokens.encode(utt.text) for utt in utterances] if tokens else [])

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def inputs(self) -> torch.Tensor:
        """[B, N] samples or [B, N, F] feature vectors, padded with zeros."""
        return self._load()[0]

    @property
    def lengths(self) -> torch.Tensor:
        """[B]: the lengths of the inputs without padding."""
        return self._load()[1]

    @property
    def utt_ids(self) -> list[str]:
        """The utterances' ids."""
        return [utt.utt_id for utt in self.utterances]

    def to(self, device: torch.device | str, **_: object) -> Batch:
        """The batch with its inputs on a device, once they are read."""
        import torch

        if torch.device(device) == torch.device(self.device):
            return self
        return replace(self, device=device, loaded=[part.to(device) for part in self.loaded])

    @property
    def speakers(self) -> list[str]:
        """The utterances' speakers."""
        return [utt.speaker for utt in self.utterances]

    def stretched(self, tempo: float | tuple[float, ...]) -> Batch:
        """The batch with the features of every encoder stretched by a factor, or by each row's."""
        return replace(self, tempo=tempo)

    def mixed(self, rows: Sequence[int], share: float) -> Batch:
        """The batch with the features of every encoder mixed with those of other rows, which have a share."""
        return replace(self, mix=(tuple(rows), share))

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the utterances, in this order, unmixed; the batch itself if these are all."""
        rows = list(rows)
        if rows == list(range(len(self))):
            return replace(self, mix=None) if self.mix else self
        loaded = []
        if self.loaded:
            lengths = self.lengths[rows]
            loaded = [self.inputs[rows][:, : int(lengths.max()) if rows else 0], lengths]
        ids = [self.ids[row] for row in rows] if self.ids else []
        tempo = tuple(self.tempo[row] for row in rows) if isinstance(self.tempo, tuple) else self.tempo
        utterances = [self.utterances[row] for row in rows]
        return replace(self, utterances=utterances, ids=ids, loaded=loaded, mix=None, tempo=tempo)

    def _load(self) -> list[torch.Tensor]:
        if not self.loaded:
            self.loaded.extend(part.to(self.device) for part in collate(self.utterances))
        return self.loaded


def collate(utterances: Sequence[Utterance]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read and pad utterances: samples [B, N] or feature vectors [B, N, F], and their lengths [B]."""
    import torch

    rows = [torch.from_numpy(load(utt)) for utt in utterances]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def load(utt: Utterance) -> np.ndarray:
    """An utterance's input: samples [N] or feature vectors [N, F]."""
    return features.load(utt) if utt.features or features.is_file(utt.wav) else audio.load(utt)
