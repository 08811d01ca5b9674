"""Closed-lexicon decoding: the exact CTC probability of every word, the n-best words, and their posterior.

P(word | frames) sums over all alignments (Graves et al. 2006) and over all spellings of the word, which are mutually
exclusive as different token sequences; the posterior is P(word | frames) over the sum of all words'.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdlib.decode.trie import Trie
from kdlib.errors import UserError
from kdlib.models import Emissions
from kdlib.tokens import Tokens, normalise

Words = Iterable[str] | Mapping[str, Iterable[str]]  # or each word with all its spellings


@dataclass(frozen=True)
class RankedWord:
    """A word of the lexicon as an utterance's hypothesis."""

    word: str
    logprob: float  # of the word given the frames
    posterior: float  # among the words of the lexicon


class Lexicon:
    """Words and their token ids; a word that the tokenizer cannot encode is rejected."""

    temperature = 1.0  # of posteriors

    def __init__(self, words: Words, tokens: Tokens) -> None:
        encoded: dict[str, set[tuple[int, ...]]] = {}
        for word, spellings in words.items() if isinstance(words, Mapping) else ((word, [word]) for word in words):
            encoded.setdefault(normalise(word), set()).update(tuple(tokens.encode(text)) for text in spellings)
        if not encoded:
            raise UserError("lexicon: expected at least one word, found none")
        if empty := [word for word, ids in encoded.items() if not ids or () in ids]:
            raise UserError(f"lexicon: {empty[0]!r} has no spelling, or one without tokens")
        self.words = sorted(encoded)
        self.sequences = [ids for word in self.words for ids in sorted(encoded[word])]  # of all spellings
        self._first = np.cumsum([0, *(len(encoded[word]) for word in self.words)])[:-1]  # of each word's spellings
        self._trie = Trie(self.sequences, tokens.blank)

    @functools.cached_property
    def least_frames(self) -> list[int]:
        """The frames that each word needs: one per token, and a blank between equal ones."""
        needed = [len(ids) + sum(a == b for a, b in itertools.pairwise(ids)) for ids in self.sequences]
        return np.minimum.reduceat(needed, self._first).tolist()

    @property
    def spellings(self) -> list[list[tuple[int, ...]]]:
        """The token sequences of each word."""
        return [self.sequences[a:b] for a, b in itertools.pairwise([*self._first, len(self.sequences)])]

    def among(self, places: Sequence[int]) -> "Lexicon":
        """Return a lexicon of some of the words, given by their ascending indices in `words`."""
        subset, spellings = copy.copy(self), self.spellings
        chosen = [spellings[place] for place in places]
        subset.words = [self.words[place] for place in places]
        subset.sequences = [ids for sequences in chosen for ids in sequences]
        subset._first = np.cumsum([0, *map(len, chosen)])[:-1]
        subset._trie = Trie(subset.sequences, self._trie.blank)
        vars(subset).pop("least_frames", None)
        return subset

    def scores(self, emissions: Emissions) -> torch.Tensor:
        """[B, W]: the log-probability of every word; -inf if it needs more frames than there are."""
        logits = emissions.logits.detach()
        chosen = (logits[..., self._trie.columns] - logits.logsumexp(-1, keepdim=True)).float().cpu().numpy()
        scores = self._trie.scores(chosen, emissions.lengths.cpu().numpy(), torch.get_num_threads())
        return self.by_word(torch.from_numpy(scores))

    def prepared(self, emissions: Emissions) -> Emissions:
        """The CTC outputs that words are scored with; a calibration may change them."""
        return emissions

    def calibrate(self, plain: torch.Tensor, emissions: Emissions) -> torch.Tensor:
        """[B, W]: plain scores, calibrated where there is a calibration (`calibration.CalibratedLexicon`)."""
        return plain

    def by_word(self, scores: torch.Tensor) -> torch.Tensor:
        """[B, W]: log-probabilities of the words, from those of all `sequences` [B, S]."""
        if len(self.sequences) == len(self.words):
            return scores
        return torch.from_numpy(np.logaddexp.reduceat(scores.cpu().numpy(), self._first, axis=1)).to(scores)

    def with_gradient(
        self, emissions: Emissions, derivative: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> tuple[list[int], torch.Tensor]:
        """Return the C token ids in use, and the gradient by their logits [B, T, C] of a function of the words' scores.

        `derivative` takes scores [b, W], each utterance's up to a constant, and the indices of the utterances [b], and
        returns the function's derivatives by the scores. The constant is the sum of the frames' log-normalisers: a
        function independent of it, such as one of the posterior, has no gradient by other tokens' logits.
        """
        logits = self.prepared(emissions).logits.detach()[..., self._trie.columns].double().cpu().numpy()

        def by_sequence(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
            if len(self.sequences) == len(self.words):
                return derivative(scores, rows)
            words = np.logaddexp.reduceat(scores, self._first, axis=1)
            repeats = np.diff([*self._first, len(self.sequences)])
            with np.errstate(invalid="ignore"):
                shares = np.nan_to_num(np.exp(scores - np.repeat(words, repeats, 1)))
            return np.repeat(derivative(words, rows), repeats, 1) * shares

        grad = self._trie.with_gradient(logits, emissions.lengths.cpu().numpy(), by_sequence)
        return self._trie.columns, torch.from_numpy(grad)

    def posterior(self, emissions: Emissions) -> torch.Tensor:
        """[B, W]: the probability of every word among those of the lexicon; zeros if no word fits into the frames."""
        return (self.scores(emissions) / self.temperature).softmax(-1).nan_to_num(0.0)

    def nbest(self, emissions: Emissions, count: int = 5) -> list[list[RankedWord]]:
        """Return every utterance's most probable words, best first; none if no word fits into the frames."""
        return self.rank(self.scores(emissions), count)

    def rank(self, scores: torch.Tensor, count: int = 5) -> list[list[RankedWord]]:
        """The same from scores [B, W]."""
        best, places = scores.topk(min(count, len(self.words)), -1)
        posteriors = (best / self.temperature - (scores / self.temperature).logsumexp(-1, keepdim=True)).exp()
        return [
            [
                RankedWord(self.words[place], logprob, posterior)
                for logprob, place, posterior in zip(*row, strict=True)
                if logprob > -np.inf
            ]
            for row in zip(best.tolist(), places.tolist(), posteriors.tolist(), strict=True)
        ]

    def best(self, emissions: Emissions) -> list[str]:
        """Return every utterance's most probable word; an empty text if no word fits into the frames."""
        return self.best_of(self.scores(emissions))

    def best_of(self, scores: torch.Tensor) -> list[str]:
        """The same from scores [B, W]."""
        best, places = scores.max(-1)
        fits = best.isfinite().tolist()
        return [self.words[place] if fit else "" for fit, place in zip(fits, places.tolist(), strict=True)]
