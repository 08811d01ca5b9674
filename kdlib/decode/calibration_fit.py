"""Estimation of a `Calibrator` from training speech: scores of every word, the references, the tokens' mean posterior.

The posterior of the sample's words is modelled as exp(s / scale + features . weights + own bias) * prior, normalised
over the lexicon, the prior being the words' frequencies in the sample with half a count added. Its likelihood is that
of multinomial logistic regression; where its gradient is zero, the mean posterior of every word equals its frequency.
The weights and own biases have Gaussian priors, so that few utterances change little, and a word of few utterances has
the bias that its features predict. The scale is fitted too: a sum over frames counts correlated evidence many times.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize

from kdlib.decode.calibration import Calibrator, Weight, places_of, word_features, word_prior
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.models import Emissions
from kdlib.settings.evaluation import Calibration
from kdlib.tokens import Tokens, normalise

LEAST = -1e4  # score of a word that does not fit into the frames
FLOOR = 1e-6  # of a token's mean posterior
BLOCK = 1 << 16  # scores per block: what a processor's cache holds
SCALES = (1e-2, 1e3)  # fitted
ROUNDS = 300


@dataclass(frozen=True)
class Sample:
    """Scored training speech."""

    scores: np.ndarray  # [U, W] plain, -inf where a word does not fit into the frames
    references: Sequence[str]
    speakers: Sequence[str]  # of every utterance
    token_posterior: np.ndarray  # [V], mean over all frames


class Collector:
    """Collect a sample from batches of scores."""

    def __init__(self, tokens: Tokens) -> None:
        self._size, self._scores = tokens.size, []
        self._references: list[str] = []
        self._speakers: list[str] = []
        self._posterior, self._frames = 0.0, 0

    def add(
        self,
        scores: torch.Tensor,
        references: Iterable[str],
        speakers: Iterable[str],
        emissions: Emissions | None = None,
    ) -> None:
        """Add a batch: the plain scores [B, W] of every word, and the CTC outputs if their head is trained."""
        self._scores.append(scores.cpu().numpy())
        self._references += map(normalise, references)
        self._speakers += speakers
        if emissions is not None:
            inside = torch.arange(emissions.logits.shape[1])[None] < emissions.lengths.cpu()[:, None]
            posteriors = emissions.logits.detach().cpu()[inside].double().softmax(-1)
            self._posterior, self._frames = self._posterior + posteriors.sum(0).numpy(), self._frames + len(posteriors)

    def sample(self) -> Sample:
        """Everything that was added."""
        if not self._references:
            raise UserError("calibration: expected training utterances, found none")
        posterior = self._posterior / self._frames if self._frames else np.full(self._size, 1 / self._size)
        return Sample(np.concatenate(self._scores), self._references, self._speakers, posterior)


def fit(
    sample: Sample,
    lexicon: Lexicon,
    tokens: Tokens,
    settings: Calibration,
    *,
    texts: Iterable[str] | None = None,
    scale: float | None = None,
) -> Calibrator:
    """Fit a calibrator; `scale` fixes the scale of the scores.

    `texts` are those of all training speech, for the prior; without them it is the sample's.
    """
    places = places_of(sample.references, lexicon)
    usable = np.flatnonzero(places >= 0)
    usable = usable[np.isfinite(sample.scores[usable, places[usable]])]
    if not len(usable):
        raise UserError(
            f"calibration: none of the {len(places)} training utterances has a word of the lexicon that fits into its "
            "frames; name a lexicon with the words of the training speech"
        )
    log_prior = np.log(np.maximum(sample.token_posterior, FLOOR))
    spoken = [lexicon.words[place] for place in places[usable]]
    of_prior = spoken if texts is None or settings.prior == "sample" else map(normalise, texts)
    about = {
        "form": settings.form,
        "tokens": tokens.fingerprint,
        "speakers": tuple(sorted(set(sample.speakers))),
        "utterances": len(usable),
        "log_prior": tuple(log_prior.tolist()),
        "words": tuple(lexicon.words),
    }
    if settings.form == "label_prior":
        return Calibrator(**about, own={}, weights={})
    frequencies = word_prior(lexicon.words, _count(spoken))
    features = word_features(lexicon, log_prior)
    means = {name: float(frequencies @ values) for name, values in features.items()}
    sds = {name: float(np.sqrt(frequencies @ (values - means[name]) ** 2)) or 1.0 for name, values in features.items()}
    columns = np.stack([(values - means[name]) / sds[name] for name, values in features.items()], 1)
    problem = _Problem(sample.scores, usable, places[usable], columns, frequencies, settings, scale)
    fitted, weights, own = problem.solve()
    named = zip(lexicon.words, (fitted * own).tolist(), strict=True)
    return Calibrator(
        **about,
        own=dict(named) if settings.form == "per_word" else {},
        weights={
            name: Weight(fitted * weight, means[name], sds[name])
            for name, weight in zip(features, weights.tolist(), strict=True)
        },
        prior=settings.prior,
        counts={} if settings.prior == "uniform" else _count(of_prior),
        new_words=settings.new_words,
        scale=fitted,
        temperature=fitted,
    )


def _count(words: Iterable[str]) -> dict[str, int]:
    names, counts = np.unique(list(words), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


class _Problem:
    """The negative log posterior of log(1 / scale), the weights [K] and the own biases [W], and its minimum."""

    def __init__(
        self,
        scores: np.ndarray,
        rows: np.ndarray,
        places: np.ndarray,
        features: np.ndarray,
        frequencies: np.ndarray,
        settings: Calibration,
        scale: float | None,
    ) -> None:
        self.scores, self.rows, self.features, self.scale = scores, rows, features, scale
        self.log_frequencies, self.target = np.log(frequencies), len(rows) * frequencies
        words, own = len(frequencies), settings.form == "per_word"
        self.count = features.shape[1]
        self.precision = np.concatenate(
            [[1.0], np.full(self.count, settings.feature_sd**-2.0), np.full(words * own, settings.word_sd**-2.0)]
        )
        curvature = np.concatenate([np.full(1 + self.count, float(len(rows))), self.target[: words * own]])
        self.unit = 1 / np.sqrt(curvature + self.precision)  # in which all parameters have a similar curvature
        reference = np.maximum(scores[rows, places], LEAST)
        self.of_reference = float((reference - scores.max(1)[rows]).sum())

    def solve(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the scale, the weights of the features [K], and the words' own biases [W]; 0 where there are none."""
        start = np.zeros(len(self.unit))
        limits = -np.log(SCALES[::-1]) / self.unit[0]
        found = minimize(
            self._loss,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[tuple(limits), *[(None, None)] * (len(start) - 1)],
            options={"maxiter": ROUNDS, "ftol": 1e-10, "gtol": 1e-3, "maxcor": 20},
        )
        values = found.x * self.unit
        own = values[1 + self.count :]
        scale = float(np.exp(-values[0])) if self.scale is None else self.scale
        return scale, values[1 : 1 + self.count], own if len(own) else np.zeros(len(self.target))

    def _loss(self, scaled: np.ndarray) -> tuple[float, np.ndarray]:
        values = scaled * self.unit
        weights, own = values[1 : 1 + self.count], values[1 + self.count :]
        factor = float(np.exp(values[0])) if self.scale is None else 1 / self.scale
        bias = self.features @ weights + (own if len(own) else 0.0)
        total, mass, moment = self._expectations(factor, bias + self.log_frequencies)
        excess = mass - self.target
        loss = total - factor * self.of_reference - self.target @ bias + self.precision @ values**2 / 2
        of_scale = factor * (moment - self.of_reference) if self.scale is None else 0.0
        slope = np.concatenate([[of_scale], excess @ self.features, excess[: len(own)]]) + self.precision * values
        return float(loss), slope * self.unit

    def _expectations(self, factor: float, bias: np.ndarray) -> tuple[float, np.ndarray, float]:
        """The sum of log-normalisers, the sum of posteriors [W], and the sum of expected scores, in blocks."""
        total, mass, moment = 0.0, np.zeros(len(bias)), 0.0
        size = max(1, BLOCK // len(bias))
        for first in range(0, len(self.rows), size):
            scores = self.scores[self.rows[first : first + size]].astype(np.float64)
            scores -= scores.max(1, keepdims=True)
            np.maximum(scores, LEAST, out=scores)
            powers = factor * scores
            powers += bias
            highest = powers.max(1, keepdims=True)
            powers -= highest
            np.exp(powers, out=powers)
            sums = powers.sum(1)
            total += float((np.log(sums) + highest[:, 0]).sum())
            mass += (1 / sums) @ powers
            moment += float((np.einsum("uw,uw->u", powers, scores) / sums).sum())
        return total, mass, moment
