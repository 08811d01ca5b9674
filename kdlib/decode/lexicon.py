"""Closed-lexicon decoding: the exact CTC probability of every word, and the best word.

P(word | frames) sums over all alignments (Graves et al. 2006); the posterior over words is a softmax of the log-scores.
This is the plain version: one batched CTC loss an utterance.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdlib.models import Outputs
from kdlib.tokens import Tokens, normalise

if TYPE_CHECKING:
    import torch


class Lexicon:
    """Words and their token ids. A word that the tokenizer cannot write is refused."""

    def __init__(self, words: Sequence[str], tokens: Tokens) -> None:
        import torch

        self.words = sorted({normalise(word) for word in words})
        self.blank = tokens.blank
        ids = [torch.tensor(tokens.encode(word)) for word in self.words]
        self.sizes = torch.tensor([len(one) for one in ids])
        self.ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)

    def scores(self, outputs: Outputs) -> "torch.Tensor":
        """[B, W]: the log-probability of every word; -inf where it needs more frames than there are."""
        import torch

        logprobs = outputs.ctc_logits.log_softmax(-1)
        rows = []
        for row, length in zip(logprobs, outputs.lengths.tolist(), strict=True):
            frames = row[:length, None].expand(-1, len(self.words), -1)
            lengths = torch.full((len(self.words),), length)
            rows.append(
                -torch.nn.functional.ctc_loss(frames, self.ids, lengths, self.sizes, blank=self.blank, reduction="none")
            )
        return torch.stack(rows)

    def best(self, outputs: Outputs) -> list[str]:
        """The most probable word of every utterance; empty where no word fits into the frames."""
        scores, found = self.scores(outputs).max(-1)
        pairs = zip(scores.isfinite().tolist(), found.tolist(), strict=True)
        return [self.words[index] if possible else "" for possible, index in pairs]
