"""A prefix trie of token sequences, and CTC's forward probabilities of all of them in one pass over the frames.

Sequences that begin alike share the work: a node's two forward variables (Graves et al. 2006, eqs. 6-8) hold the
probability of having written the node's prefix, ending in its last token or in a blank. Probabilities are multiplied as
float64, which loses nothing above e^-600; whatever comes out below is summed again in logarithms.
"""

import itertools
from collections.abc import Sequence
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

    def _group(self, logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        frames = int(lengths.max())
        probs = np.zeros((frames, len(self.columns), WIDTH))
        probs[:, 0] = 1.0  # behind an utterance's end all is blank, which changes no sequence's probability
        for index, length in enumerate(lengths):
            probs[:length, :, index] = np.exp(logprobs[index, :length])
        with np.errstate(divide="ignore"):
            found = np.log(_forward(probs, self.parents, self.tokens, self.repeats, self.ends)[: len(lengths)])
        low = (found < LEAST) & (self.needs[None] <= lengths[:, None])
        for index, which in zip(*np.nonzero(low), strict=True):
            found[index, which] = _slowly(logprobs[index, : lengths[index]].astype(np.float64), self._spelt[which])
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
def _slowly(logprobs, sequence):
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
