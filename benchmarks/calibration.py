"""What does calibration of the closed lexicon change, by form, by number of training utterances, and for new words?

The shipped pretrained model on the 15 dysarthric speakers of the embedded corpus (`params/demo.yaml`), each held out
once: a calibration is fitted on random utterances of the fold's training speakers in the blocks B1 and B3, its strength
is chosen on the dev speaker, and it is scored on the held-out speaker's block B2. Nothing is trained.

Figures are WRA in per cent, the mean over the speakers: of all, by published intelligibility, of words with and without
training speech. Then the speakers that are better and worse than plain, the p of their sign test, the smallest gain in
points, and the expected calibration error in per cent over all utterances, with the temperature that the dev speaker
chooses. "30 of 60 words" means: fitted on speech of one half of the words, used with the other half as its lexicon.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import report
import torch
from scipy.stats import binomtest

from kdlib.corpus import audio
from kdlib.corpus.embedded.synthetic import word_list
from kdlib.decode.calibration import CalibratedLexicon, Calibrator, choose_strength, places_of, posterior
from kdlib.decode.calibration_fit import Sample, fit
from kdlib.decode.lexicon import Lexicon
from kdlib.evaluate.reliability import error_by_chance, expected_calibration_error
from kdlib.evaluate.transcribe import recordings
from kdlib.models import Emissions
from kdlib.models.nemo_files import SHIPPED_MODEL, NeMoCTC
from kdlib.pipeline import Fold
from kdlib.runtime import set_threads
from kdlib.settings.evaluation import Calibration
from kdlib.tokens import Tokens, normalise

LEVELS = {"VERY_LOW": "very low", "LOW": "low", "MID": "mid", "HIGH": "high"}
TEST = "B2"
MOST = 1200  # training utterances


@dataclass(frozen=True)
class Speech:
    """Outputs of a model for all speech: each utterance's frames, word, speaker and block; of the folds who is who."""

    frames: list[torch.Tensor]
    words: np.ndarray
    speakers: np.ndarray
    blocks: np.ndarray
    levels: dict[str, str]
    dev: dict[str, str]
    away: dict[str, set[str]]  # of each fold, who is not trained on
    tokens: Tokens

    def emissions(self, rows: Sequence[int]) -> Emissions:
        """The outputs of some utterances."""
        frames = [self.frames[row] for row in rows]
        lengths = torch.tensor([len(each) for each in frames])
        return Emissions(torch.nn.utils.rnn.pad_sequence(frames, batch_first=True), lengths)

    def training(self, speaker: str, words: Sequence[str] | None = None, speakers: Sequence[str] | None = None):
        """The training utterances of the fold that holds out a speaker."""
        kept = (self.blocks != TEST) & ~np.isin(self.speakers, list(self.away[speaker]))
        kept &= True if words is None else np.isin(self.words, list(words))
        kept &= True if speakers is None else np.isin(self.speakers, list(speakers))
        return np.flatnonzero(kept)

    def test(self, speaker: str) -> np.ndarray:
        """A speaker's test utterances."""
        return np.flatnonzero((self.blocks == TEST) & (self.speakers == speaker))


def recorded() -> Speech:
    """The shipped model's outputs on the demo's corpus."""
    fold, system = Fold.load("params/demo.yaml", "M08"), NeMoCTC(SHIPPED_MODEL)
    corpus, forward, rows = fold.corpus, recordings(system), []
    kept = corpus.where(lambda utt: not corpus.is_control(utt.speaker) and not utt.copy_of)
    for batch in audio.batches(kept, 32):
        found = forward(batch).ctc
        for utt, logits, length in zip(batch, found.logits, found.lengths.tolist(), strict=True):
            rows.append((utt, logits[:length].float().log_softmax(-1).cpu()))
    utts, frames = zip(*rows, strict=True)
    folds = {name: Fold.load("params/demo.yaml", name).split_settings for name in corpus.dysarthric}
    return Speech(
        list(frames),
        *(np.array([getattr(utt, name) for utt in utts]) for name in ("text", "speaker", "block")),
        levels={name: corpus.level(name) for name in folds},
        dev={name: one.fold.dev for name, one in folds.items()},
        away={name: {*one.excluded_speakers, *one.fold.exclude} for name, one in folds.items()},
        tokens=system.tokens,
    )


def simulated() -> Speech:
    """Outputs of four speakers that say eight words twice in each block, drawn by chance: for the smoke run."""
    tokens, rng = NeMoCTC(SHIPPED_MODEL).tokens, np.random.default_rng(0)
    words, names = sorted(set(word_list().values()))[:8], ["A", "B", "C", "D"]
    rows = [(word, name, block) for name in names for block in ("B1", TEST, "B3") for word in words * 2]
    frames = []
    for word, _, _ in rows:
        logits = 2 * rng.standard_normal((30, tokens.size))
        logits[np.arange(len(tokens.encode(word))) * 2, tokens.encode(word)] += 6
        frames.append(torch.tensor(logits, dtype=torch.float32).log_softmax(-1))
    dev = dict(zip(names, [*names[1:], names[0]], strict=True))
    levels = dict(zip(names, LEVELS, strict=True))
    columns = (np.array(column) for column in zip(*rows, strict=True))
    return Speech(frames, *columns, levels, dev, {name: {name, dev[name]} for name in names}, tokens)


class Scored:
    """All speech, scored with a lexicon."""

    def __init__(self, speech: Speech, lexicon: Lexicon, of: np.ndarray | None = None) -> None:
        self.speech, self.lexicon = speech, lexicon
        count = len(speech.frames)
        if of is None:
            parts = [lexicon.scores(speech.emissions(range(row, min(row + 32, count)))) for row in range(0, count, 32)]
            of = torch.cat(parts).numpy()
        self.scores, self.places = of, places_of(map(normalise, speech.words), lexicon)

    def among(self, words: Sequence[str]) -> "Scored":
        """The same with some of the words."""
        places = [place for place, word in enumerate(self.lexicon.words) if word in set(words)]
        return Scored(self.speech, self.lexicon.among(places), self.scores[:, places])

    def sample(self, rows: np.ndarray) -> Sample:
        """What a calibration is fitted on."""
        speech = self.speech
        frames = torch.cat([speech.frames[row] for row in rows]).double().softmax(-1).mean(0).numpy()
        return Sample(self.scores[rows], list(speech.words[rows]), list(speech.speakers[rows]), frames)

    def calibrated(self, found: Calibrator, rows: np.ndarray) -> np.ndarray:
        """The scores of some utterances, calibrated."""
        if found.form == "label_prior":
            return CalibratedLexicon(self.lexicon, found).scores(self.speech.emissions(rows)).numpy()
        return found.scores(self.scores[rows], self.lexicon)


@dataclass(frozen=True)
class Way:
    """A way of calibrating, one row of the table."""

    lexicon: str
    form: str
    utterances: int = MOST
    settings: Calibration | None = None  # None: plain
    by_dev: bool = True  # the strength; else 1
    speakers: str = "all"  # all, or of other levels than the held-out speaker's


def measure(scored: Scored, fitted_with: Scored, way: Way) -> dict[str, list]:
    """By speaker: which test utterances are right, their confidence, and which words have training speech."""
    speech, found = scored.speech, {}
    for number, speaker in enumerate(speech.levels):
        others = None
        if way.speakers != "all":
            others = [name for name, level in speech.levels.items() if level != speech.levels[speaker]]
        words = set(fitted_with.lexicon.words)
        texts = speech.words[speech.training(speaker)]
        rows, dev = speech.test(speaker), speech.test(speech.dev[speaker])
        rows, dev = (part[scored.places[part] >= 0] for part in (rows, dev))
        scores, temperature = scored.scores[rows], 1.0
        if way.settings:
            pool = speech.training(speaker, words, others)
            drawn = np.random.default_rng(number).choice(pool, min(way.utterances, len(pool)), replace=False)
            sample, texts_of = fitted_with.sample(drawn), speech.words[speech.training(speaker, words)]
            one = fit(sample, fitted_with.lexicon, speech.tokens, way.settings, texts=texts_of)
            strengths = way.settings.strengths if way.by_dev else (1.0,)
            by_strength = {strength: scored.calibrated(one.at(strength), dev) for strength in strengths}
            best = choose_strength(by_strength, scored.places[dev])
            scores, temperature = scored.calibrated(one.at(best.strength), rows), best.temperature
        right = scores.argmax(1) == scored.places[rows]
        found[speaker] = right, posterior(scores, temperature).max(1), np.isin(speech.words[rows], texts)
    return found


def summary(way: Way, found: dict, plain: dict, levels: dict[str, str]) -> dict:
    """A row of the table."""
    mean = {name: 100 * right.mean() for name, (right, _, _) in found.items()}
    gain = np.array([mean[name] - 100 * plain[name][0].mean() for name in mean])
    better, worse = int((gain > 1e-9).sum()), int((gain < -1e-9).sum())
    right, confidence, _ = (np.concatenate(parts) for parts in zip(*found.values(), strict=True))

    def among(seen: bool) -> float | None:
        parts = [100 * right[of == seen].mean() for right, _, of in found.values() if (of == seen).any()]
        return float(np.mean(parts)) if parts else None

    row = {"lexicon": way.lexicon, "form": way.form, "utterances": way.utterances if way.settings else None}
    row |= {"all": float(np.mean(list(mean.values())))}
    row |= {
        title: float(np.mean([mean[name] for name in mean if levels[name] == level])) for level, title in LEVELS.items()
    }
    row |= {"trained words": among(True), "new words": among(False), "better": better, "worse": worse}
    if way.settings:
        p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
        row |= {"p": p, "least gain": gain.min()}
        row |= {"ECE": 100 * expected_calibration_error(confidence, right)}
    return row


def by_level(found: dict, levels: dict[str, str]) -> str:
    """The expected calibration error by level, and that of a perfectly calibrated system, for so few utterances."""
    parts = []
    for level, title in LEVELS.items():
        of = [found[name] for name in found if levels[name] == level]
        right, confidence, _ = (np.concatenate(each) for each in zip(*of, strict=True))
        error, chance = expected_calibration_error(confidence, right), error_by_chance(confidence)
        parts.append(f"{title} {100 * error:.1f} ({100 * chance:.1f})")
    return ", ".join(parts)


def ways(lexicon: str) -> list[Way]:
    """The rows of a lexicon."""
    forms = ("label_prior", "features", "per_word")
    found = [Way(lexicon, "plain"), *(Way(lexicon, form, settings=Calibration(form=form)) for form in forms)]
    if not lexicon.endswith("spoken"):
        return found
    found += [
        Way(lexicon, "per_word, strength 1", settings=Calibration(), by_dev=False),
        Way(lexicon, "per_word, uniform prior", settings=Calibration(prior="uniform")),
        Way(lexicon, "per_word, other levels", settings=Calibration(), speakers="other"),
    ]
    return found + [Way(lexicon, "per_word", count, Calibration()) for count in (20, 60, 200, 800)]


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    speech = simulated() if run.smoke else recorded()
    spoken = sorted({normalise(word) for word in speech.words})
    words = sorted({*spoken, *word_list().values()})[: 40 if run.smoke else None]
    everything = Scored(speech, Lexicon(words, speech.tokens))
    own, rows, notes = everything.among(spoken), [], []
    half = np.random.default_rng(0).permutation(spoken)[: len(spoken) // 2]
    new = own.among(sorted(set(spoken) - set(half)))
    of_lexicon = {
        f"{len(spoken)} spoken": (own, own),
        f"{len(everything.lexicon.words)} words": (everything, everything),
        f"{len(half)} of {len(spoken)} words": (new, own.among(half)),
    }
    for lexicon, (scored, fitted_with) in of_lexicon.items():
        first, *others = ways(lexicon)
        plain = measure(scored, fitted_with, first)
        rows.append(summary(first, plain, plain, speech.levels))
        for way in others:
            found = measure(scored, fitted_with, way)
            rows.append(summary(way, found, plain, speech.levels))
            if way.form.startswith("per_word") and way.lexicon.endswith("spoken") and way.utterances == MOST:
                error = by_level(found, speech.levels)
                notes.append(
                    f"Expected calibration error by level of `{way.form}`, in per cent, and in brackets what perfectly "
                    f"calibrated posteriors would have by chance: {error}."
                )
    run.save(rows, notes)


if __name__ == "__main__":
    main()
