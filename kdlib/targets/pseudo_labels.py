"""Pseudo-labels from teachers: a posterior over the words of the lexicon, and n-best texts with their probabilities.

Each teacher scores words over all alignments, and the teachers' posteriors are averaged: unlike a mean by frame, this
does not need teachers that agree on where in time a token stands. The posteriors are calibrated on the fold's training
speech (`word_calibration`): .9 means nine of ten. Texts beyond the lexicon (`greedy`, `beam`) come from
the mean by frame. Nothing here uses the reference of an utterance that it is a target for, unless that is labelled.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kdlib.corpus import audio
from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.decode.beam import BeamSearch
from kdlib.decode.calibration import CalibratedLexicon, Calibrator
from kdlib.decode.greedy import greedy
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Emissions
from kdlib.objectives.reference_losses import ctc_losses
from kdlib.objectives.targets import Text
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.tokens import BLANK, Tokens

KEPT = 512  # most probable words of a lexicon that are kept per utterance; the probability of the rest is negligible


class TeacherHypotheses:
    """Words and texts that an ensemble's teachers output (a `HypothesisSource`); results are cached per utterance."""

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        lexicon: Lexicon,
        tokens: Tokens,
        beam: BeamSearch | None = None,
        calibrators: Mapping[str, Calibrator] | None = None,
        pooled: Sequence[Utterance] = (),
    ) -> None:
        """`calibrators` are those of the teachers' words, by teacher, from `word_calibration`.

        `pooled` are the recordings whose posteriors are averaged by word: sound also where each teacher has outputs on
        other recordings, as an average by frame is not.
        """
        self.pooled: dict[str, list[Utterance]] = {}  # word -> its recordings
        for utt in pooled:
            self.pooled.setdefault(utt.text, []).append(utt)
        self._pooled: dict[tuple[str, float], np.ndarray] = {}
        self._of_teacher = {name: CalibratedLexicon(lexicon, one) for name, one in (calibrators or {}).items()}
        self.ensemble = copy.copy(ensemble)  # on the CPU, wherever the objective has its own
        self.lexicon, self.tokens, self.beam = lexicon, tokens, beam
        self._word_ids = [tokens.encode(word) for word in lexicon.words]
        # utterance -> places [N] in the lexicon, scores [K, N], weights [K]
        self._scores: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._texts: dict[tuple[str, str, int], list[Text]] = {}

    def posterior(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """[B, W]: the teachers' mean posterior over the lexicon; zeros where no word fits into the frames."""
        if not self.pooled:
            return self._of_recordings(batch, temperature)
        posteriors = torch.zeros(len(batch), len(self.lexicon.words))
        alone = [row for row, utt in enumerate(batch.utterances) if utt.text not in self.pooled]
        if alone:
            posteriors[alone] = self._of_recordings(batch.select(alone), temperature)
        for row, utt in enumerate(batch.utterances):
            if utt.text in self.pooled:
                posteriors[row] = torch.from_numpy(self._of_word(utt.text, temperature))
        return posteriors

    def _of_word(self, word: str, temperature: float) -> np.ndarray:
        """[W]: the mean posterior over the recordings of a word."""
        if (word, temperature) not in self._pooled:
            parts = audio.batches(self.pooled[word], 32)
            rows = torch.cat([self._of_recordings(Batch(part), temperature) for part in parts])
            self._pooled[word, temperature] = rows[rows.sum(1) > 0].mean(0).nan_to_num(0.0).numpy()
        return self._pooled[word, temperature]

    def _of_recordings(self, batch: Batch, temperature: float) -> torch.Tensor:
        """[B, W]: the teachers' mean posterior of each recording."""
        self._score(batch)
        posteriors = np.zeros((len(batch), len(self.lexicon.words)), np.float32)
        for row, utt_id in zip(posteriors, batch.utt_ids, strict=True):
            places, scores, weights = self._scores[utt_id]
            row[places] = _mean_posterior(scores, temperature, weights)
        return torch.from_numpy(posteriors)

    def texts(self, batch: Batch, count: int = 1, over: str = "lexicon") -> list[list[Text]]:
        """The most probable texts of every utterance, best first; an empty list if the teachers' output is empty.

        Probabilities are those of the posterior over the lexicon, or relative to the n-best list of beam search; the
        greedy text has its probability per token, from its CTC loss.
        """
        if over == "lexicon":
            return [self._words(row, count) for row in self.posterior(batch).numpy()]
        new = batch.select([row for row, name in enumerate(batch.utt_ids) if (name, over, count) not in self._texts])
        if len(new):
            emissions = self.ensemble.log_probs(new)
            found = self._greedy(emissions) if over == "greedy" else self.beam.nbest(emissions, count)
            self._texts |= {(utt_id, over, count): texts for utt_id, texts in zip(new.utt_ids, found, strict=True)}
        return [self._texts[utt_id, over, count] for utt_id in batch.utt_ids]

    def best(self, utterances: Sequence[Utterance], over: str = "lexicon") -> list[tuple[str, float]]:
        """The pseudo-label of each utterance and its probability; "" and 0 if the teachers' output is empty."""
        found = self.texts(Batch(utterances), 1, over)
        return [(self.tokens.decode(texts[0][0]), texts[0][1]) if texts else ("", 0.0) for texts in found]

    def _words(self, posterior: np.ndarray, count: int) -> list[Text]:
        best = np.argsort(-posterior, kind="stable")[:count]
        return [(self._word_ids[place], float(posterior[place])) for place in best if posterior[place] > 0]

    def _greedy(self, emissions: Emissions) -> list[list[Text]]:
        hypotheses = greedy(emissions, BLANK)
        losses = ctc_losses(emissions, hypotheses).tolist()
        return [[(ids, float(np.exp(-loss)))] if ids else [] for ids, loss in zip(hypotheses, losses, strict=True)]

    def _score(self, batch: Batch) -> None:
        """Score the lexicon for the utterances that are not cached."""
        new = batch.select([row for row, utt_id in enumerate(batch.utt_ids) if utt_id not in self._scores])
        if not len(new):
            return
        frames, parts = self.ensemble.frames(new), []
        for name, logits, weights in self.ensemble.each(new, frames):
            lexicon = self._of_teacher.get(name, self.lexicon)
            scores = lexicon.scores(Emissions(logits, frames)) / lexicon.temperature
            parts.append((scores.numpy(), weights.cpu().numpy()))
        all_scores, all_weights = (np.stack(arrays, 1) for arrays in zip(*parts, strict=True))  # [B, K, W], [B, K]
        for utt_id, scores, weights in zip(new.utt_ids, all_scores, all_weights, strict=True):
            mean = _mean_posterior(scores, 1.0, weights)
            places = np.sort(np.argsort(-mean, kind="stable")[:KEPT])
            present = weights > 0
            kept = scores[present][:, places].astype(np.float32)
            self._scores[utt_id] = places, kept, weights[present].astype(np.float32)


def _mean_posterior(scores: np.ndarray, temperature: float, weights: np.ndarray) -> np.ndarray:
    """[W]: the weighted mean over teachers of softmax(scores [K, W] / temperature)."""
    largest = scores.max(1, keepdims=True)
    powers = np.exp((scores - np.where(np.isfinite(largest), largest, 0.0)) / temperature)
    return weights @ (powers / np.maximum(powers.sum(1, keepdims=True), 1e-300))
