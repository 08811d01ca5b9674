"""What the terms of teachers read: outputs aligned to the student's, and hypotheses of whole utterances.

`targets/` implements these protocols with stored outputs, and with teachers that run in every step.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kdlib.corpus.inputs import Batch
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Emissions

Text = tuple[list[int], float]  # token ids, and their probability among the candidates


class TargetSource(Protocol):
    """One output of the teachers, combined, on exactly the frames or decoder steps of the student.

    `lengths` [B] are the student's, on the student's device; the results are as long as the longest, on that device.
    An output that cannot be aligned, such as that of another recording, is refused.
    """

    width: int  # of `hidden`

    def rows(self, batch: Batch) -> list[int]:
        """The rows of a batch that have a target."""
        ...

    def logits(self, batch: Batch, lengths: torch.Tensor, temperature: float = 1.0) -> Emissions:
        """The target at a temperature, [B, T, V]: its softmax is the teachers' distribution at that temperature."""
        ...

    def each(self, batch: Batch, lengths: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Every teacher that contributes: its name, its logits [B, T, V] and its weight per utterance [B]."""
        ...

    def hidden(self, batch: Batch, lengths: torch.Tensor) -> torch.Tensor:
        """The mean of the encodings, or decoder activations, of teachers of one base model, [B, T, D]."""
        ...


class HypothesisSource(Protocol):
    """What the teachers recognise, utterance by utterance."""

    lexicon: Lexicon

    def posterior(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """[B, W]: the mean posterior over the words of the lexicon; zeros where no word fits into the frames."""
        ...

    def texts(self, batch: Batch, count: int = 1, over: str = "lexicon") -> Sequence[list[Text]]:
        """The most probable texts of every utterance, best first."""
        ...
