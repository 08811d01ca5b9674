"""Calibrate a system's closed-lexicon decoders on a fold's training speech; the strength is chosen on dev speech.

Held-out speech is not used, transcribed or not.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from kdlib.console import progress, report
from kdlib.corpus import audio
from kdlib.corpus.speakers import Splits
from kdlib.corpus.utterances import Utterance
from kdlib.decode.calibration import CalibratedLexicon, Calibrator, choose_strength, places_of
from kdlib.decode.calibration_fit import Collector, fit
from kdlib.decode.decoders import CLOSED, DecoderSet
from kdlib.decode.lexicon import Lexicon
from kdlib.evaluate.transcribe import Forward
from kdlib.models import Emissions
from kdlib.settings.evaluation import Calibration
from kdlib.tokens import normalise

LEAST = 10  # training utterances; with fewer the closed lexicon stays plain
SLOW = 200  # of the sample are scored by an attention decoder, which takes a pass per word
BATCH = 32


@dataclass(frozen=True)
class Speech:
    """What a calibration is estimated on, and chosen on."""

    train: Sequence[Utterance]
    dev: Sequence[Utterance] = ()
    texts: Sequence[str] = ()  # of all training speech, for the prior of the words; by default of `train`
    seed: int = 1

    @classmethod
    def of(cls, splits: Splits, usable: Collection[str] | None = None) -> "Speech":
        """The speech of a fold; of its training speech only what is `usable`, given by ids."""
        own = [utt for utt in splits.train if not utt.copy_of]
        train = own if usable is None else [utt for utt in own if utt.utt_id in usable]
        return cls(train, splits.dev, [utt.text for utt in own], splits.settings.seed)


def calibrate(
    decoders: DecoderSet,
    forward: Forward,
    speech: Speech,
    settings: Calibration,
    dev_forward: Forward | None = None,
    what: str = "",
    chosen: Mapping[str, Calibrator] | None = None,
) -> dict[str, Calibrator]:
    """The calibrators of a system's decoders; none where too little of the training speech is in the closed lexicon.

    `dev_forward` gives the outputs on dev speech, where these come from elsewhere. With the `chosen` calibrators of
    another model, strength and temperature are theirs, and dev speech is not used.
    """
    if settings.form == "none" or decoders.plain is None:
        return {}
    known = set(decoders.plain.words)
    usable = [utt for utt in speech.train if normalise(utt.text) in known]
    if len(usable) < LEAST:
        report(
            f"closed lexicon{what}: not calibrated: {len(usable)} of {len(speech.train):,} training utterances are "
            f"words of it, {LEAST} are needed"
        )
        return {}
    drawn = random.Random(speech.seed).sample(usable, min(settings.utterances, len(usable)))
    dev = [] if chosen else [utt for utt in speech.dev if normalise(utt.text) in known]
    columns = decoders.word_columns if settings.form != "label_prior" else [CLOSED] * decoders.ctc
    collectors = {column: Collector(decoders.tokens) for column in columns}
    dev_batches: list[tuple[list[Utterance], Emissions, dict[str, torch.Tensor]]] = []
    with progress(len(drawn) + len(dev), f"calibration{what}", "utt") as bar:
        for part, slow in ((drawn[:SLOW], True), (drawn[SLOW:], False)):
            for batch in audio.batches(part, BATCH):
                outputs = forward(batch)
                scores = decoders.word_scores(outputs, slow=slow)
                texts, speakers = [utt.text for utt in batch], [utt.speaker for utt in batch]
                for column in set(columns) & set(scores):
                    collectors[column].add(scores[column], texts, speakers, outputs.ctc if decoders.ctc else None)
                bar.update(len(batch))
        for batch in audio.batches(dev, BATCH):
            outputs = (dev_forward or forward)(batch)
            dev_batches.append((batch, outputs.ctc, decoders.word_scores(outputs)))
            bar.update(len(batch))
    texts, found = speech.texts or None, {}
    for column in columns:
        found[column] = fit(collectors[column].sample(), decoders.plain, decoders.tokens, settings, texts=texts)
        if chosen and column in chosen:
            found[column] = found[column].at(chosen[column].strength, chosen[column].temperature)
        elif dev:
            found[column] = _at_best(found[column], column, dev_batches, decoders.plain, settings)
    return found


def _at_best(
    calibrator: Calibrator, column: str, batches: Sequence, lexicon: Lexicon, settings: Calibration
) -> Calibrator:
    """A calibrator with the strength and temperature that dev speech chooses."""
    places = places_of((normalise(utt.text) for batch, _, _ in batches for utt in batch), lexicon)
    by_strength = {}
    for strength in settings.strengths:
        calibrated = CalibratedLexicon(lexicon, calibrator.at(strength))
        of_ctc = calibrator.form == "label_prior"
        rows = [
            calibrated.calibrate(scores[column], emissions) if of_ctc else calibrated.add_bias(scores[column])
            for _, emissions, scores in batches
        ]
        by_strength[strength] = torch.cat(rows).numpy()
    best = choose_strength(by_strength, places)
    report(f"closed lexicon ({column}): strength {best.strength:g}, temperature {best.temperature:.3g}: {best.why}")
    return calibrator.at(best.strength, best.temperature)
