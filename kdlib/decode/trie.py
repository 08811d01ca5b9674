"""A prefix trie of token sequences, and CTC's forward probabilities of all of them in one pass over the frames.

Sequences with a common prefix share its computation: a node's two forward variables (Graves et al. 2006, eqs. 6-8) hold
the probability of the node's prefix, ending in its last token or in a blank. Probabilities are multiplied as float64,
which loses nothing above e^-600; smaller results are summed again in logarithms. A backward pass over the frames gives
the gradient of any function of these probabilities.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

WIDTH = 8  # utterances per group: what a processor multiplies at once
TINY = 1e-290  # smaller terms are dropped, before they become denormal and slow
LEAST = -600.0  # nats: above it, all dropped terms are less than 1e-20 of the sum


class Trie:
    """A trie of token sequences; `blank` is the id of CTC's blank, `columns` are the ids in use, blank first."""

    def __init__(self, sequences: Sequence[Sequence[int]], blank: int) -> None:
        self.blank, self.sequences = blank, [list(sequence) for sequence in sequences]
        self.columns = [blank, *sorted({token for sequence in self.sequences for token in sequence})]
        place = {token: index for index, token in enumerate(self.columns)}
        children: dict[tuple[int, int], int] = {}
        parents, tokens, ends = [0], [0], []
        for sequence in self.sequences:
            node = 0
            for token in sequence:
                if (node, token) not in children:
                    children[node, token] = len(parents)
                    parents.append(node)  # parents precede their children
                    tokens.append(place[token])
                node = children[node, token]
            ends.append(node)
        self.parents, self.tokens, self.ends = np.array(parents), np.array(tokens), np.array(ends)
        self.repeats = np.array([node > 0 and tokens[node] == tokens[up] for node, up in enumerate(parents)])
        self.min_frames = np.array([_min_frames(sequence) for sequence in self.sequences])
        self._indices = [np.array([place[token] for token in sequence]) for sequence in self.sequences]

    def scores(self, logprobs: np.ndarray, lengths: np.ndarray, threads: int = 1) -> np.ndarray:
        """[B, S]: the log-probability of every sequence, from log-probabilities [B, T, C] in the order of `columns`.

        It is -inf if a sequence needs more frames than there are.
        """
        order = np.argsort(lengths, kind="stable")  # groups of similar lengths
        groups = [order[first : first + WIDTH] for first in range(0, len(order), WIDTH)]
        scores = np.empty((len(lengths), len(self.sequences)))

        def score(group: np.ndarray) -> None:
            scores[group] = self._score_group(logprobs[group], lengths[group])

        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:  # numba releases the interpreter's lock
                list(pool.map(score, groups))
        else:
            for group in groups:
                score(group)
        return scores

    def with_gradient(
        self, logits: np.ndarray, lengths: np.ndarray, derivative: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """[B, T, C]: the gradient of a function of all scores, by logits in the order of `columns`.

        `derivative` takes scores [b, S] and the indices of the utterances [b], and returns its derivatives by these
        scores, which are log-sums over alignments of e to the sum of logits: normalised only if the logits are, and up
        to a constant per utterance. A sequence so improbable that it was dropped has the score -inf and no gradient.
        """
        gradient = np.zeros(logits.shape)
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(order), WIDTH):
            group = order[first : first + WIDTH]
            probs = self._probs(logits[group], lengths[group], relative=True)
            states, scales = _forward_states(probs, self.parents, self.tokens, self.repeats)
            with np.errstate(divide="ignore"):
                ends = np.log(states[-1][self.ends].sum(1)).T  # [WIDTH, S]
            slopes = np.zeros_like(ends)
            slopes[: len(group)] = derivative(ends[: len(group)], group)
            grad = _backward(probs, states, scales, self.parents, self.tokens, self.repeats, self.ends, slopes)
            for index, row in enumerate(group):
                gradient[row, : lengths[row]] = grad[: lengths[row], :, index]
        return gradient

    def _probs(self, logprobs: np.ndarray, lengths: np.ndarray, *, relative: bool = False) -> np.ndarray:
        """[T, C, WIDTH] probabilities; with `relative`, divided by the greatest of each frame."""
        probs = np.zeros((int(lengths.max()), len(self.columns), WIDTH))
        probs[:, 0] = 1.0  # blanks beyond an utterance's end change no sequence's probability
        for index, length in enumerate(lengths):
            chosen = logprobs[index, :length].astype(np.float64)  # in single precision e^-88 would be 0
            probs[:length, :, index] = np.exp(chosen - chosen.max(1, keepdims=True) if relative else chosen)
        return probs

    def _score_group(self, logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        probs = self._probs(logprobs, lengths)
        with np.errstate(divide="ignore"):
            scores = np.log(_forward(probs, self.parents, self.tokens, self.repeats, self.ends)[: len(lengths)])
        low = (scores < LEAST) & (self.min_frames[None] <= lengths[:, None])
        for row, column in zip(*np.nonzero(low), strict=True):
            frames = logprobs[row, : lengths[row]].astype(np.float64)
            scores[row, column] = _forward_log(frames, self._indices[column])
        return scores


def _min_frames(sequence: Sequence[int]) -> int:
    """Return the fewest frames of a sequence: one per token, and a blank between equal tokens."""
    return len(sequence) + sum(a == b for a, b in itertools.pairwise(sequence))


@numba.njit(cache=True, nogil=True)
def _forward(probs, parents, tokens, repeats, ends):
    """[WIDTH, S] probabilities of the sequences that end in nodes `ends`, from probabilities [T, C, WIDTH]."""
    nodes = len(parents)
    in_token, in_blank = np.zeros((nodes, WIDTH)), np.zeros((nodes, WIDTH))
    in_blank[0] = 1.0
    for t in range(len(probs)):
        for node in range(nodes - 1, 0, -1):  # children before parents, whose values are those of t - 1
            up, token = parents[node], tokens[node]
            skip = 0.0 if repeats[node] else 1.0  # equal tokens need a blank between them
            for b in range(WIDTH):
                before = in_token[node, b]
                blank_prob = probs[t, 0, b] * (in_blank[node, b] + before)
                token_prob = probs[t, token, b] * (before + in_blank[up, b] + skip * in_token[up, b])
                in_blank[node, b] = blank_prob if blank_prob > TINY else 0.0
                in_token[node, b] = token_prob if token_prob > TINY else 0.0
        for b in range(WIDTH):
            in_blank[0, b] *= probs[t, 0, b]
    probabilities = np.empty((WIDTH, len(ends)))
    for index, node in enumerate(ends):
        for b in range(WIDTH):
            probabilities[b, index] = in_token[node, b] + in_blank[node, b]
    return probabilities


@numba.njit(cache=True, nogil=True)
def _forward_log(logprobs, sequence):
    """The log-probability of one sequence of columns, from log-probabilities [T, C], summed in logarithms."""
    size = len(sequence)
    in_token, in_blank = np.full(size + 1, -np.inf), np.full(size + 1, -np.inf)
    in_blank[0] = 0.0
    for t in range(len(logprobs)):
        for place in range(size, 0, -1):
            token = sequence[place - 1]
            entered = in_blank[place - 1]
            if place > 1 and sequence[place - 2] != token:
                entered = np.logaddexp(entered, in_token[place - 1])
            before = in_token[place]
            in_blank[place] = logprobs[t, 0] + np.logaddexp(in_blank[place], before)
            in_token[place] = logprobs[t, token] + np.logaddexp(before, entered)
        in_blank[0] += logprobs[t, 0]
    return np.logaddexp(in_token[size], in_blank[size])


@numba.njit(cache=True, nogil=True)
def _forward_states(probs, parents, tokens, repeats):
    """States [T + 1, nodes, 2, WIDTH] (ending in the token, in a blank), each frame's divided by its largest; these."""
    frames, nodes = len(probs), len(parents)
    states, scales = np.zeros((frames + 1, nodes, 2, WIDTH)), np.ones((frames, WIDTH))
    states[0, 0, 1] = 1.0
    for t in range(frames):
        before, after = states[t], states[t + 1]
        largest = np.zeros(WIDTH)
        for b in range(WIDTH):
            after[0, 1, b] = before[0, 1, b] * probs[t, 0, b]
            largest[b] = after[0, 1, b]
        for node in range(1, nodes):
            up, token = parents[node], tokens[node]
            skip = 0.0 if repeats[node] else 1.0
            for b in range(WIDTH):
                blank_prob = probs[t, 0, b] * (before[node, 1, b] + before[node, 0, b])
                token_prob = probs[t, token, b] * (before[node, 0, b] + before[up, 1, b] + skip * before[up, 0, b])
                after[node, 1, b], after[node, 0, b] = blank_prob, token_prob
                largest[b] = max(largest[b], blank_prob, token_prob)
        for b in range(WIDTH):
            scales[t, b] = largest[b] if largest[b] > 0.0 else 1.0
        for node in range(nodes):
            for kind in range(2):
                for b in range(WIDTH):
                    value = after[node, kind, b] / scales[t, b]
                    after[node, kind, b] = value if value > TINY else 0.0
    return states, scales


@numba.njit(cache=True, nogil=True)
def _backward(probs, states, scales, parents, tokens, repeats, ends, slopes):
    """[T, C, WIDTH]: the gradient by log-probabilities, from the derivatives `slopes` [WIDTH, S] by the scores."""
    frames, nodes = len(probs), len(parents)
    grad = np.zeros(probs.shape)
    after = np.zeros((nodes, 2, WIDTH))  # derivatives by the states after a frame
    for index, node in enumerate(ends):
        for b in range(WIDTH):
            total = states[frames, node, 0, b] + states[frames, node, 1, b]
            if total > 0.0:
                after[node, 0, b] += slopes[b, index] / total
                after[node, 1, b] += slopes[b, index] / total
    for t in range(frames - 1, -1, -1):
        before = np.zeros((nodes, 2, WIDTH))
        for node in range(nodes - 1, -1, -1):
            up, token = parents[node], tokens[node]
            skip = 0.0 if repeats[node] else 1.0
            for b in range(WIDTH):
                blank_prob, token_prob = states[t + 1, node, 1, b], states[t + 1, node, 0, b]
                if blank_prob > 0.0:  # dropped terms have no gradient
                    grad[t, 0, b] += blank_prob * after[node, 1, b]
                    back = probs[t, 0, b] / scales[t, b] * after[node, 1, b]
                    before[node, 0, b] += back
                    before[node, 1, b] += back
                if token_prob > 0.0:
                    grad[t, token, b] += token_prob * after[node, 0, b]
                    back = probs[t, token, b] / scales[t, b] * after[node, 0, b]
                    before[node, 0, b] += back
                    before[up, 1, b] += back
                    before[up, 0, b] += skip * back
        after = before
    return grad
