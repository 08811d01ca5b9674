"""Calibration of closed-lexicon scores: which words a model favours is measured on training speech, and undone.

An unsure CTC model prefers short words and blanks: ONE, THE and GO become I. A calibrated system has the posterior

    P(word | frames) ~ exp((s + strength * b) / temperature),    s = log P(frames' CTC outputs say the word),

with one bias b per word. `calibration_fit` estimates it by maximum likelihood, whose solution is the one where every
word's mean posterior equals its frequency in the sample, and takes the decoder's prior of the words instead of the
sample's. A word without training speech has the bias that its features predict. The form `label_prior` has no biases of
words: it subtracts the log prior of every token from the frames' log-probabilities (Huang et al. 2024, arXiv
2406.02560, there in training).

The biases are centred: their mean over the words, weighted by the prior, is 0. Running text gains or loses nothing on
average, so in sentences they are no insertion bonus.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.io import read_json, short_path, write_json
from kdlib.models import Emissions
from kdlib.tokens import Tokens

SCHEMA = 1
FILE = "calibration.json"  # next to the scores of a system: a calibrator for each of its closed-lexicon decoders
TEMPERATURES = (0.05, 200.0)  # searched
# Of a word, one of its token sequences, and the log prior of every token: what predicts the bias of any word.
FEATURES = {
    "tokens": lambda word, ids, log_prior: len(ids),
    "letters": lambda word, ids, log_prior: len(word.replace(" ", "")),
    "log_prior": lambda word, ids, log_prior: log_prior[list(ids)].sum(),
}


@dataclass(frozen=True)
class Weight:
    """A feature's part in the biases, in nats of scores per standard deviation."""

    weight: float
    mean: float  # over the sample
    sd: float


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """The biases of a system's words or tokens, and whose speech they were fitted on.

    With strength 0 scores are unchanged, to the last bit.
    """

    form: str  # of settings.evaluation.Calibration
    tokens: str  # fingerprint of the system's tokens
    speakers: tuple[str, ...]  # whose speech it was fitted on: none of them may be held out
    utterances: int  # of the sample
    log_prior: tuple[float, ...]  # of every token: of its mean posterior over the sample's frames
    words: tuple[str, ...]  # of the lexicon that it was fitted with
    own: dict[str, float]  # the words' own biases, beyond what the features predict; none in other forms than per_word
    weights: dict[str, Weight]  # by feature; none in the form label_prior
    prior: str = "uniform"
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # of words, behind the prior
    new_words: float | None = None
    scale: float = 1.0  # nats of scores per nat of log posterior, as fitted
    strength: float = 1.0
    temperature: float = 1.0

    def at(self, strength: float, temperature: float | None = None) -> "Calibrator":
        """The same biases with another strength and, if given, temperature."""
        return dataclasses.replace(self, strength=strength, temperature=temperature or self.temperature)

    def summary(self) -> dict:
        """What a report says of it."""
        names = ("form", "utterances", "strength", "temperature")
        return {name: getattr(self, name) for name in names} | {"speakers": len(self.speakers)}

    def bias(self, lexicon: Lexicon, *, with_prior: bool = True) -> np.ndarray:
        """[W]: the bias of every word of any lexicon, at strength 1; their mean, weighted by the prior, is 0.

        Without the prior of the words it is for searches whose language model knows it.
        """
        if not self.weights:
            return np.zeros(len(lexicon.words))
        counts = self.counts if self.prior != "uniform" else {}
        prior = word_prior(lexicon.words, counts, self.new_words)
        features = word_features(lexicon, np.array(self.log_prior))
        of_features = sum(
            part.weight * (features[name] - part.mean) / part.sd for name, part in self.weights.items() if part.weight
        )
        own = np.array([self.own.get(word, 0.0) for word in lexicon.words])
        bias = of_features + own + (self.scale * np.log(prior) if with_prior else 0.0)
        return bias - prior @ bias

    def emissions(self, emissions: Emissions) -> Emissions:
        """The CTC outputs without the prior of the tokens; unchanged in all forms but `label_prior`."""
        if self.form != "label_prior" or not self.strength:
            return emissions
        log_prior = torch.tensor(self.log_prior, dtype=emissions.logits.dtype, device=emissions.logits.device)
        return Emissions(emissions.logits - self.strength * log_prior, emissions.lengths)

    def scores(self, plain: np.ndarray, lexicon: Lexicon) -> np.ndarray:
        """[U, W]: the calibrated scores, from plain ones; -inf stays. `label_prior` needs the scores of `emissions`."""
        return plain + self.strength * self.bias(lexicon) if self.strength else plain

    def check(self, tokens: Tokens, excluded: Mapping[str, str], what: str = "calibration") -> None:
        """Refuse other tokens, and a fold that excludes a speaker of the sample; `excluded` gives the reasons."""
        if self.tokens != tokens.fingerprint:
            raise UserError(
                f"{what}: fitted with the tokens {self.tokens}, but this system has {tokens.fingerprint}; fit it on "
                "the system's own scores"
            )
        if leaked := sorted(set(self.speakers) & set(excluded)):
            raise UserError(
                f"{what}: fitted on speech of {leaked[0]}, who {excluded[leaked[0]]} in this fold; fit it on the "
                "fold's training speakers"
            )


def save(path: Path, calibrators: Mapping[str, Calibrator]) -> None:
    """Write the calibrators of a system, by decoder or teacher, as JSON."""
    content = {name: dataclasses.asdict(one) for name, one in calibrators.items()}
    write_json(path, {"schema": SCHEMA, "calibrators": content})


def load(path: Path) -> dict[str, Calibrator]:
    """Read the calibrators of a system, by decoder or teacher."""
    try:
        content = read_json(path)
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        return {name: _calibrator(one) for name, one in content["calibrators"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{short_path(path)} is no calibration of this version ({error}); fit it again") from None


def of_scores(folder: Path) -> dict[str, Calibrator]:
    """The calibrators of a system that was scored in a folder; none if it has none."""
    return load(folder / FILE) if (folder / FILE).is_file() else {}


def _calibrator(content: dict) -> Calibrator:
    weights = {name: Weight(**part) for name, part in content["weights"].items()}
    lists = {name: tuple(content[name]) for name in ("speakers", "log_prior", "words")}
    return Calibrator(**content | lists | {"weights": weights})


class CalibratedLexicon(Lexicon):
    """A lexicon whose scores, posteriors and n-best words are calibrated, wherever a lexicon decodes.

    `with_gradient`, for losses, is that of scores without biases.
    """

    def __init__(self, lexicon: Lexicon, calibrator: Calibrator) -> None:
        vars(self).update(vars(lexicon))
        self.calibrator, self.temperature = calibrator, calibrator.temperature
        self.bias = torch.from_numpy(calibrator.strength * calibrator.bias(lexicon))

    def scores(self, emissions: Emissions) -> torch.Tensor:
        """[B, W]: the calibrated score of every word."""
        return self.add_bias(super().scores(self.prepared(emissions)))

    def prepared(self, emissions: Emissions) -> Emissions:
        """The CTC outputs without the prior of the tokens, where that is the calibration."""
        return self.calibrator.emissions(emissions)

    def calibrate(self, plain: torch.Tensor, emissions: Emissions) -> torch.Tensor:
        """[B, W]: the calibrated scores, from the plain ones where these suffice."""
        return self.scores(emissions) if self.calibrator.form == "label_prior" else self.add_bias(plain)

    def add_bias(self, scores: torch.Tensor) -> torch.Tensor:
        """Add the bias of every word to scores [B, W] of any decoder."""
        return scores + self.bias.to(scores) if self.calibrator.strength else scores

    def among(self, places: Sequence[int]) -> "CalibratedLexicon":
        """Return a lexicon of some of the words, with their biases."""
        subset = super().among(places)
        subset.bias = self.bias[list(places)]
        return subset


def word_features(lexicon: Lexicon, log_prior: np.ndarray) -> dict[str, np.ndarray]:
    """By feature [W]: its value for every word, the mean over its spellings."""
    sizes = np.array([len(spellings) for spellings in lexicon.spellings])
    words = np.repeat(lexicon.words, sizes).tolist()
    first = np.cumsum(sizes) - sizes
    features = {}
    for name, feature in FEATURES.items():
        values = [float(feature(word, ids, log_prior)) for word, ids in zip(words, lexicon.sequences, strict=True)]
        features[name] = np.add.reduceat(values, first) / sizes
    return features


def word_prior(words: Sequence[str], counts: Mapping[str, int], new_words: float | None = None) -> np.ndarray:
    """[W]: the prior of words, by their counts with half a count added; uniform without counts.

    With `new_words` the words without a count share this part of the prior, or the share of the words that were counted
    once if that is more (Good 1953), but none is more probable than in the uniform prior.

    >>> word_prior(["A", "B", "C"], {"A": 7, "B": 1}).round(3).tolist()
    [0.789, 0.158, 0.053]
    >>> word_prior(["A", "B", "C"], {"A": 7, "B": 2}, 0.2).round(3).tolist()
    [0.6, 0.2, 0.2]
    """
    found = np.array([counts.get(word, 0) for word in words], float)
    prior = (found + 0.5) / (found + 0.5).sum()
    new = found == 0
    if new_words is None or not new.any() or new.all():
        return prior
    once = sum(count == 1 for count in counts.values()) / sum(counts.values())
    share = min(max(new_words, once), new.mean())
    return np.where(new, share / new.sum(), (1 - share) * prior / prior[~new].sum())


def towards_prior(posteriors: np.ndarray, prior: np.ndarray, strength: float, rounds: int = 50) -> np.ndarray:
    """Posteriors [N, W] whose mean is moved towards a prior [W]: all the way with a strength of 1.

    >>> rows = np.array([[0.8, 0.2], [0.7, 0.3]])
    >>> towards_prior(rows, np.array([0.5, 0.5]), 1.0).mean(0).round(3).tolist()
    [0.5, 0.5]
    """
    goal = (1 - strength) * posteriors.mean(0) + strength * prior
    moved = posteriors.copy()
    for _ in range(rounds):
        moved *= goal / np.maximum(moved.mean(0), 1e-12)
        moved /= np.maximum(moved.sum(1, keepdims=True), 1e-12)
    return moved


def posterior(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[U, W]: the probability of every word among all; zeros if no word fits into the frames."""
    with np.errstate(invalid="ignore"):
        powers = np.exp((scores - scores.max(1, keepdims=True)) / temperature)
    return np.nan_to_num(powers / powers.sum(1, keepdims=True))


@dataclass(frozen=True)
class Choice:
    """What the dev speech chose."""

    strength: float
    temperature: float
    why: str


def choose_strength(dev_scores: Mapping[float, np.ndarray], references: Sequence[int]) -> Choice:
    """Choose strength and temperature on dev speech, from its scores [U, W] by strength, and the places of its words.

    The strength is that of the most words right, then of the greatest likelihood, then the nearest to 1. The
    temperature is that of the greatest likelihood.
    """
    places = np.asarray(references)
    found = {}
    for strength, scores in dev_scores.items():
        temperature, likelihood = best_temperature(scores, places)
        found[strength] = (float((scores.argmax(1) == places).mean()), round(likelihood, 9), temperature)
    best = max(found, key=lambda strength: (*found[strength][:2], -abs(strength - 1)))
    right, _, temperature = found[best]
    plain = f", {100 * found[0.0][0]:.1f} % uncalibrated" if 0.0 in found else ""
    tried = ", ".join(f"{strength:g}" for strength in found)
    why = f"of {len(places)} dev words {100 * right:.1f} % are right{plain}; strengths tried: {tried}"
    return Choice(best, temperature, why)


def best_temperature(scores: np.ndarray, places: Sequence[int]) -> tuple[float, float]:
    """The temperature of the greatest mean log posterior of the reference words, and this mean.

    Utterances whose reference does not fit into the frames do not count.
    """
    places = np.asarray(places)
    kept = np.isfinite(scores[np.arange(len(places)), places])
    if not kept.any():
        return 1.0, -np.inf
    scores, places = scores[kept], places[kept]
    below = scores - scores.max(1, keepdims=True)
    of_reference = below[np.arange(len(places)), places].mean()

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.log(np.exp(below / temperature).sum(1)).mean() - of_reference / temperature)

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x)), -float(found.fun)


def places_of(texts: Iterable[str], lexicon: Lexicon) -> np.ndarray:
    """The index of every text in the lexicon's words; -1 where it is not one of them."""
    index = {word: place for place, word in enumerate(lexicon.words)}
    return np.array([index.get(text, -1) for text in texts], dtype=int)
