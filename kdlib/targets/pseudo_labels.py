"""What the teachers take an utterance for: a posterior over the words of the lexicon, and texts with their shares.

Words are scored by each teacher for itself, over all alignments, and the teachers' posteriors are averaged: they need
not agree on where in time a token stands, as a mean by frame asks of them. Texts beyond the lexicon (`greedy`, `beam`)
come from the mean by frame. Nothing here reads a reference.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdlib.corpus.manifest import Utterance
from kdlib.decode.greedy import greedy
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Outputs
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.tokens import BLANK, Tokens

if TYPE_CHECKING:
    import torch

    from kdlib.decode.beam import BeamSearch

PSEUDO_LABEL_CODE = (
    "targets/pseudo_labels.py",
    "decode/lexicon.py",
    "decode/trie.py",
    "decode/greedy.py",
    "decode/beam.py",
)
KEPT = 512  # words of a lexicon that are remembered an utterance: the likeliest; the others' share is nothing
Text = tuple[list[int], float]  # token ids, and their share among what was found


def without_autocast(method: Callable) -> Callable:
    """Do without autocast: what teachers say is as exact as it was stored."""

    @functools.wraps(method)
    def done(self: "TeacherHypotheses", *given, **named):
        import torch

        with torch.autocast(torch.device(self.ensemble.device).type, enabled=False):
            return method(self, *given, **named)

    return done


class TeacherHypotheses:
    """The words and texts of an ensemble's teachers; what was found of an utterance is remembered."""

    def __init__(
        self, ensemble: TeacherEnsemble, lexicon: Lexicon, tokens: Tokens, beam: "BeamSearch | None" = None
    ) -> None:
        self.ensemble, self.lexicon, self.tokens, self.beam = ensemble, lexicon, tokens, beam
        self._spelt = [tokens.encode(word) for word in lexicon.words]
        self._scores: dict[
            str, tuple[np.ndarray, np.ndarray, np.ndarray]
        ] = {}  # places [N], scores [K, N], weights [K]
        self._texts: dict[tuple[str, str, int], list[Text]] = {}

    def posterior(self, utt_ids: Sequence[str], speakers: Sequence[str], temperature: float = 1.0) -> "torch.Tensor":
        """[B, W]: the teachers' mean posterior over the lexicon; zeros where no word fits into the frames."""
        import torch

        self._score(utt_ids, speakers)
        found = np.zeros((len(utt_ids), len(self.lexicon.words)), np.float32)
        for row, utt_id in enumerate(utt_ids):
            places, scores, weights = self._scores[utt_id]
            found[row, places] = _shares(scores, temperature, weights)
        return torch.from_numpy(found)

    @without_autocast
    def texts(
        self, utt_ids: Sequence[str], speakers: Sequence[str], count: int = 1, over: str = "lexicon"
    ) -> list[list[Text]]:
        """The likeliest texts of every utterance, best first; none where the teachers say nothing.

        Their shares are of the posterior over the lexicon, or of what beam search has found; the one greedy text has
        the probability of a token, by its CTC loss.
        """
        if over == "lexicon":
            return [self._words(row, count) for row in self.posterior(utt_ids, speakers).numpy()]
        new = [place for place, one in enumerate(utt_ids) if (one, over, count) not in self._texts]
        if new:
            asked = [utt_ids[place] for place in new]
            logits, frames = self.ensemble.log_probs(asked, [speakers[place] for place in new])
            outputs = Outputs(logits, frames, logits)
            found = self._greedy(outputs) if over == "greedy" else self.beam.nbest(outputs, count)
            self._texts |= {(one, over, count): texts for one, texts in zip(asked, found, strict=True)}
        return [self._texts[one, over, count] for one in utt_ids]

    def best(self, utterances: Sequence[Utterance], over: str = "lexicon") -> list[tuple[str, float]]:
        """What each utterance is taken for, with its share; nothing, with none, where the teachers say nothing."""
        found = self.texts([utt.utt_id for utt in utterances], [utt.speaker for utt in utterances], 1, over)
        return [(self.tokens.decode(texts[0][0]), texts[0][1]) if texts else ("", 0.0) for texts in found]

    def _words(self, posterior: np.ndarray, count: int) -> list[Text]:
        best = np.argsort(-posterior, kind="stable")[:count]
        return [(self._spelt[place], float(posterior[place])) for place in best if posterior[place] > 0]

    def _greedy(self, outputs: Outputs) -> list[list[Text]]:
        from kdlib.objectives.reference_losses import ctc_losses

        said = greedy(outputs, BLANK)
        losses = ctc_losses(outputs, said)
        return [[(ids, float(np.exp(-loss)))] if ids else [] for ids, loss in zip(said, losses.tolist(), strict=True)]

    @without_autocast
    def _score(self, utt_ids: Sequence[str], speakers: Sequence[str]) -> None:
        new = [place for place, one in enumerate(utt_ids) if one not in self._scores]
        if not new:
            return
        asked = [utt_ids[place] for place in new], [speakers[place] for place in new]
        frames = self.ensemble.frames(asked[0])
        parts = []
        for logits, weights in self.ensemble.each(*asked, frames):
            scores = self.lexicon.scores(Outputs(logits, _tensor(frames), logits)).numpy()
            parts.append((scores, weights.cpu().numpy()))
        scores, weights = (np.stack(some, 1) for some in zip(*parts, strict=True))  # [B, K, W], [B, K]
        mean = np.stack([_shares(one, 1.0, weight) for one, weight in zip(scores, weights, strict=True)])
        for row, utt_id in enumerate(asked[0]):
            places = np.sort(np.argsort(-mean[row], kind="stable")[:KEPT])
            speak = weights[row] > 0
            kept = scores[row][speak][:, places].astype(np.float32)
            self._scores[utt_id] = places, kept, weights[row][speak].astype(np.float32)


def _shares(scores: np.ndarray, temperature: float, weights: np.ndarray) -> np.ndarray:
    """[W]: the weighted mean over teachers of softmax(scores [K, W] / temperature)."""
    largest = scores.max(1, keepdims=True)
    powers = np.exp((scores - np.where(np.isfinite(largest), largest, 0.0)) / temperature)
    return weights @ (powers / np.maximum(powers.sum(1, keepdims=True), 1e-300))


def _tensor(values: Sequence[int]) -> "torch.Tensor":
    import torch

    return torch.tensor(values)
