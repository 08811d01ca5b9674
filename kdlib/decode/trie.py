"""A prefix trie of token sequences, and CTC's forward probabilities of all of them in one pass over the frames.

Sequences that begin alike share the work: a node's two forward variables (Graves et al. 2006, eqs. 6-8) hold the
probability of having written the node's prefix, ending in its last token or in a blank. Probabilities are multiplied as
float64, which loses nothing above e^-600; whatever comes out below is summed again in logarithms. The same pass back
through the frames gives the gradient of anything that is computed of these probabilities.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

WIDTH = 8  # utterances side by side: what a processor multiplies at once
TINY = 1e-290  # smaller terms are dropped, before they become denormal and slow
LEAST = -600.0  # nats: above, the dropped terms together are less than 1e-20 of the sum


class Trie:
    """Token sequences; `blank` is the id that separates, `columns` the ids that occur, blank first."""

    def __init__(self, sequences: Sequence[Sequence[int]], blank: int) -> None:
        self.blank, self.sequences = blank, [list(one) for one in sequences]
        self.columns = [blank, *sorted({token for one in self.sequences for token in one})]
        place = {token: index for index, token in enumerate(self.columns)}
        children: dict[tuple[int, int], int] = {}
        parents, tokens, ends = [0], [0], []
        for sequence in self.sequences:
            node = 0
            for token in sequence:
                if (node, token) not in children:
                    children[node, token] = len(parents)
                    parents.append(node)  # a parent always stands before its children
                    tokens.append(place[token])
                node = children[node, token]
            ends.append(node)
        self.parents, self.tokens, self.ends = np.array(parents), np.array(tokens), np.array(ends)
        self.repeats = np.array([node > 0 and tokens[node] == tokens[up] for node, up in enumerate(parents)])
        self.needs = np.array([_frames(one) for one in self.sequences])
        self._spelt = [np.array([place[token] for token in one]) for one in self.sequences]

    def scores(self, logprobs: np.ndarray, lengths: np.ndarray, threads: int = 1) -> np.ndarray:
        """[B, S]: the log-probability of every sequence, of log-probabilities [B, T, C] in the order of `columns`.

        It is -inf where a sequence needs more frames than there are.
        """
        order = np.argsort(lengths, kind="stable")  # alike lengths side by side
        groups = [order[first : first + WIDTH] for first in range(0, len(order), WIDTH)]
        found = np.empty((len(lengths), len(self.sequences)))

        def one(group: np.ndarray) -> None:
            found[group] = self._group(logprobs[group], lengths[group])

        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:  # numba lets go of the interpreter's lock
                list(pool.map(one, groups))
        else:
            for group in groups:
                one(group)
        return found

    def with_gradient(
        self, logits: np.ndarray, lengths: np.ndarray, of: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """[B, T, C]: the gradient of a function of all scores, by logits in the order of `columns`.

        `of` is given scores [b, S] and which utterances they are [b], and returns its derivatives by these scores. They
        are sums over alignments of e to the sum of logits: normalised only where the logits are, and up to a constant
        an utterance. A sequence so improbable that it was dropped has the score -inf, and no gradient.
        """
        found = np.zeros(logits.shape)
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(order), WIDTH):
            group = order[first : first + WIDTH]
            probs = self._probs(logits[group], lengths[group], relative=True)
            states, scales = _forward_kept(probs, self.parents, self.tokens, self.repeats)
            with np.errstate(divide="ignore"):
                ends = np.log(states[-1][self.ends].sum(1)).T  # [WIDTH, S]
            slopes = np.zeros_like(ends)
            slopes[: len(group)] = of(ends[: len(group)], group)
            grad = _backward(probs, states, scales, self.parents, self.tokens, self.repeats, self.ends, slopes)
            for index, row in enumerate(group):
                found[row, : lengths[row]] = grad[: lengths[row], :, index]
        return found

    def _probs(self, logprobs: np.ndarray, lengths: np.ndarray, *, relative: bool = False) -> np.ndarray:
        """[T, C, WIDTH] probabilities; `relative` to the greatest of each frame."""
        probs = np.zeros((int(lengths.max()), len(self.columns), WIDTH))
        probs[:, 0] = 1.0  # behind an utterance's end all is blank, which changes no sequence's probability
        for index, length in enumerate(lengths):
            chosen = logprobs[index, :length]
            probs[:length, :, index] = np.exp(chosen - chosen.max(1, keepdims=True) if relative else chosen)
        return probs

    def _group(self, logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        probs = self._probs(logprobs, lengths)
        with np.errstate(divide="ignore"):
            found = np.log(_forward(probs, self.parents, self.tokens, self.repeats, self.ends)[: len(lengths)])
        low = (found < LEAST) & (self.needs[None] <= lengths[:, None])
        for index, which in zip(*np.nonzero(low), strict=True):
            found[index, which] = _forward_log(logprobs[index, : lengths[index]].astype(np.float64), self._spelt[which])
        return found


def _frames(sequence: Sequence[int]) -> int:
    """The fewest frames that can write a sequence: one a token, and a blank between equal ones."""
    return len(sequence) + sum(a == b for a, b in itertools.pairwise(sequence))


@numba.njit(cache=True, nogil=True)
def _forward(probs, parents, tokens, repeats, ends):
    """[WIDTH, S] probabilities of the sequences that end in nodes `ends`, of probabilities [T, C, WIDTH]."""
    nodes = len(parents)
    written, blank = np.zeros((nodes, WIDTH)), np.zeros((nodes, WIDTH))
    blank[0] = 1.0
    for t in range(len(probs)):
        for node in range(nodes - 1, 0, -1):  # children before parents, whose values are still those of t - 1
            up, token = parents[node], tokens[node]
            again = 0.0 if repeats[node] else 1.0  # between equal tokens there is a blank
            for b in range(WIDTH):
                before = written[node, b]
                silent = probs[t, 0, b] * (blank[node, b] + before)
                said = probs[t, token, b] * (before + blank[up, b] + again * written[up, b])
                blank[node, b] = silent if silent > TINY else 0.0
                written[node, b] = said if said > TINY else 0.0
        for b in range(WIDTH):
            blank[0, b] *= probs[t, 0, b]
    found = np.empty((WIDTH, len(ends)))
    for index, node in enumerate(ends):
        for b in range(WIDTH):
            found[b, index] = written[node, b] + blank[node, b]
    return found


@numba.njit(cache=True, nogil=True)
def _forward_log(logprobs, sequence):
    """The log-probability of one sequence (columns), of log-probabilities [T, C]: the sums in logarithms."""
    size = len(sequence)
    written, blank = np.full(size + 1, -np.inf), np.full(size + 1, -np.inf)
    blank[0] = 0.0
    for t in range(len(logprobs)):
        for place in range(size, 0, -1):
            token = sequence[place - 1]
            entered = blank[place - 1]
            if place > 1 and sequence[place - 2] != token:
                entered = np.logaddexp(entered, written[place - 1])
            before = written[place]
            blank[place] = logprobs[t, 0] + np.logaddexp(blank[place], before)
            written[place] = logprobs[t, token] + np.logaddexp(before, entered)
        blank[0] += logprobs[t, 0]
    return np.logaddexp(written[size], blank[size])


@numba.njit(cache=True, nogil=True)
def _forward_kept(probs, parents, tokens, repeats):
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
            again = 0.0 if repeats[node] else 1.0
            for b in range(WIDTH):
                silent = probs[t, 0, b] * (before[node, 1, b] + before[node, 0, b])
                said = probs[t, token, b] * (before[node, 0, b] + before[up, 1, b] + again * before[up, 0, b])
                after[node, 1, b], after[node, 0, b] = silent, said
                largest[b] = max(largest[b], silent, said)
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
    """[T, C, WIDTH]: the gradient by logarithms of probabilities, `slopes` [WIDTH, S] being those of the scores."""
    frames, nodes = len(probs), len(parents)
    grad = np.zeros(probs.shape)
    after = np.zeros((nodes, 2, WIDTH))  # of what is minimised, by the states behind a frame
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
            again = 0.0 if repeats[node] else 1.0
            for b in range(WIDTH):
                silent, said = states[t + 1, node, 1, b], states[t + 1, node, 0, b]
                if silent > 0.0:  # what was dropped depends on nothing
                    grad[t, 0, b] += silent * after[node, 1, b]
                    back = probs[t, 0, b] / scales[t, b] * after[node, 1, b]
                    before[node, 0, b] += back
                    before[node, 1, b] += back
                if said > 0.0:
                    grad[t, token, b] += said * after[node, 0, b]
                    back = probs[t, token, b] / scales[t, b] * after[node, 0, b]
                    before[node, 0, b] += back
                    before[up, 1, b] += back
                    before[up, 0, b] += again * back
        after = before
    return grad
