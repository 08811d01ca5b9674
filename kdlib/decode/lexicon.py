"""Closed-lexicon decoding: the exact CTC probability of every word, the best words, and a posterior over all of them.

P(word | frames) sums over all alignments (Graves et al. 2006) and over all of the word's spellings, which as different
token sequences exclude each other; the posterior is P(word | frames) over the sum of all words'.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdlib.errors import UserError
from kdlib.models import Outputs
from kdlib.tokens import Tokens, normalise

if TYPE_CHECKING:
    import torch

CODE = ("decode/lexicon.py", "decode/trie.py")
Words = Iterable[str] | Mapping[str, Iterable[str]]  # or each with all its spellings


@dataclass(frozen=True)
class RankedWord:
    """A word of the lexicon as an utterance's answer."""

    word: str
    logprob: float  # of the word given the frames
    posterior: float  # among the words of the lexicon


class Lexicon:
    """Words and their token ids. A word that the tokenizer cannot write is refused."""

    def __init__(self, words: Words, tokens: Tokens) -> None:
        from kdlib.decode.trie import Trie

        spelt: dict[str, set[tuple[int, ...]]] = {}
        for word, spellings in words.items() if isinstance(words, Mapping) else ((word, [word]) for word in words):
            spelt.setdefault(normalise(word), set()).update(tuple(tokens.encode(text)) for text in spellings)
        if not spelt:
            raise UserError("a closed lexicon needs a word: none was given")
        if silent := [word for word, ids in spelt.items() if not ids or () in ids]:
            raise UserError(f"lexicon: {silent[0]!r} has no spelling that can be written")
        self.words = sorted(spelt)
        self.sequences = [ids for word in self.words for ids in sorted(spelt[word])]  # of all spellings
        self._first = np.cumsum([0, *(len(spelt[word]) for word in self.words)])[:-1]  # of each word's spellings
        self._trie = Trie(self.sequences, tokens.blank)

    def among(self, places: Sequence[int]) -> "Lexicon":
        """A lexicon of some of the words, named by their places in `words`, which are to be in order."""
        from kdlib.decode.trie import Trie

        part = copy.copy(self)
        bounds = [*self._first, len(self.sequences)]
        chosen = [self.sequences[bounds[place] : bounds[place + 1]] for place in places]
        part.words = [self.words[place] for place in places]
        part.sequences = [ids for spelt in chosen for ids in spelt]
        part._first = np.cumsum([0, *map(len, chosen)])[:-1]
        part._trie = Trie(part.sequences, self._trie.blank)
        return part

    def scores(self, outputs: Outputs) -> "torch.Tensor":
        """[B, W]: the log-probability of every word; -inf where it needs more frames than there are."""
        import torch

        logits = outputs.ctc_logits.detach()
        chosen = (logits[..., self._trie.columns] - logits.logsumexp(-1, keepdim=True)).float().cpu().numpy()
        found = self._trie.scores(chosen, outputs.lengths.cpu().numpy(), torch.get_num_threads())
        return self.by_word(torch.from_numpy(found))

    def by_word(self, scores: "torch.Tensor") -> "torch.Tensor":
        """[B, W]: log-probabilities of words, of those of all `sequences` [B, S]."""
        import torch

        if len(self.sequences) == len(self.words):
            return scores
        return torch.from_numpy(np.logaddexp.reduceat(scores.cpu().numpy(), self._first, axis=1)).to(scores)

    def with_gradient(
        self, outputs: Outputs, of: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> "tuple[list[int], torch.Tensor]":
        """The tokens that occur, and by their logits [B, T, C] the gradient of a function of the words' scores.

        `of` is given scores [b, W], each utterance's up to a constant, and which utterances they are [b], and returns
        its derivatives by the scores. The constant is what the frames' normalisers come to: a function that does not
        depend on it, such as one of the posterior, has no gradient by other tokens' logits.
        """
        import torch

        logits = outputs.ctc_logits.detach()[..., self._trie.columns].double().cpu().numpy()

        def of_sequences(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
            if len(self.sequences) == len(self.words):
                return of(scores, rows)
            words = np.logaddexp.reduceat(scores, self._first, axis=1)
            times = np.diff([*self._first, len(self.sequences)])
            with np.errstate(invalid="ignore"):
                shares = np.nan_to_num(np.exp(scores - np.repeat(words, times, 1)))
            return np.repeat(of(words, rows), times, 1) * shares

        found = self._trie.with_gradient(logits, outputs.lengths.cpu().numpy(), of_sequences)
        return self._trie.columns, torch.from_numpy(found)

    def posterior(self, outputs: Outputs) -> "torch.Tensor":
        """[B, W]: the probability of every word among those of the lexicon; zeros where no word fits."""
        return self.scores(outputs).softmax(-1).nan_to_num(0.0)

    def nbest(self, outputs: Outputs, count: int = 5) -> list[list[RankedWord]]:
        """The most probable words of every utterance, best first; none where no word fits into the frames."""
        scores = self.scores(outputs)
        best, places = scores.topk(min(count, len(self.words)), -1)
        shares = (best - scores.logsumexp(-1, keepdim=True)).exp()
        return [
            [
                RankedWord(self.words[place], logprob, share)
                for logprob, place, share in zip(*row, strict=True)
                if logprob > -np.inf
            ]
            for row in zip(best.tolist(), places.tolist(), shares.tolist(), strict=True)
        ]

    def best(self, outputs: Outputs) -> list[str]:
        """The most probable word of every utterance; empty where no word fits into the frames."""
        return [ranked[0].word if ranked else "" for ranked in self.nbest(outputs, 1)]
