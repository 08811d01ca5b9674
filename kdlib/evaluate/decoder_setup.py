"""Decoders of a recipe's systems: closed lexicon, language model, and beam search settings chosen on dev speech.

A system's closed lexicon is calibrated on the fold's training speech. A fold's language model is estimated on the texts
of its training speech alone; the one for scores outside any fold, on the training blocks of all speakers. Beam search
is tuned on the fold's dev speaker; without one, the recipe's settings are used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kdlib.corpus import audio
from kdlib.corpus.utterances import Utterance
from kdlib.decode import beam, calibration
from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.beam import BeamSearch
from kdlib.decode.calibration import Calibrator
from kdlib.decode.decoders import BEAM, DecoderSet
from kdlib.decode.lexicon import Lexicon, Words
from kdlib.evaluate.calibrate import Speech, calibrate
from kdlib.evaluate.transcribe import Forward
from kdlib.io import atomic_write
from kdlib.models.hybrid import Hybrid
from kdlib.runtime import set_threads
from kdlib.settings.evaluation import BeamSearchSettings, Calibration
from kdlib.tokens import Tokens

NOT_CALIBRATED = Calibration(form="none")
TUNING = "beam_tuning.csv"  # next to a system's scores: WER and WRA of each beam search setting on dev speech


@dataclass(frozen=True)
class DecoderSetup:
    """What the decoders of a fold's systems share: closed lexicon, language model, settings."""

    tokens: Tokens
    lexicon: Words  # each word with its spellings
    language_model: Path | None
    search: BeamSearchSettings
    calibration: Calibration = NOT_CALIBRATED

    def decoders(
        self, model: Hybrid | None = None, heads: Sequence[str] = ("ctc",), more: Sequence[str] = ()
    ) -> DecoderSet:
        """Build the decoders of a system: `heads` are its trained heads, `model` has the attention decoder."""
        settings, lexicon = self.search, Lexicon(self.lexicon, self.tokens) if self.is_of_words else None
        ctc = "ctc" in heads
        attention = None
        if "decoder" in heads:
            weight = settings.ctc_weight if ctc else 0.0
            attention = AttentionDecoding(
                model, self.tokens, lexicon, size=settings.attention_beam_size, ctc_weight=weight
            )
        return DecoderSet(
            self.tokens, lexicon, beam=self.beam_search() if ctc else None, attention=attention, ctc=ctc, more=more
        )

    @property
    def is_of_words(self) -> bool:
        """True if the lexicon is of words: among whole sentences, those of the test speech too, nothing chooses."""
        return sum(" " in word for word in self.lexicon) <= len(self.lexicon) / 2

    def beam_search(self) -> BeamSearch | None:
        """Beam search with the recipe's settings; None without a language model."""
        if self.language_model is None:
            return None
        return beam.recipe_search(self.search, self.tokens, self.lexicon, self.language_model)

    def without_beam(self) -> "DecoderSetup":
        """The same setup without beam search, which is too slow for every combination of teachers."""
        return replace(self, language_model=None)

    def fitted(
        self, decoders: DecoderSet, forward: Forward, speech: Speech, folder: Path, batch_size: int
    ) -> DecoderSet:
        """Calibrate the closed lexicon on training speech, and tune beam search on dev speech."""
        found = calibrate(decoders, forward, speech, self.calibration)
        return self.tuned(self._calibrated(decoders, found, folder), forward, speech.dev, folder, batch_size)

    def fitted_as(
        self, chosen: DecoderSet, decoders: DecoderSet, forward: Forward, speech: Speech, folder: Path
    ) -> DecoderSet:
        """The decoders of a like model: calibrated on its own outputs, with the settings chosen for the other one."""
        found = calibrate(decoders, forward, speech, self.calibration, chosen=chosen.calibrators)
        return self._calibrated(chosen, found, folder)

    def _calibrated(self, decoders: DecoderSet, found: Mapping[str, Calibrator], folder: Path) -> DecoderSet:
        with atomic_write(folder / calibration.FILE) as partial:
            calibration.save(partial, found)
        return decoders.calibrated(found)

    def tuned(
        self, decoders: DecoderSet, forward: Forward, dev: Sequence[Utterance], folder: Path, batch_size: int
    ) -> DecoderSet:
        """Set beam search to the setting of the lowest dev WER; the scores of all settings are written to `folder`."""
        if decoders.beam is None or not dev:
            return decoders
        set_threads()
        subset = list(dev)[:: -(-len(dev) // self.search.max_utterances)]
        rows, references = [], []
        for batch in audio.batches(subset, batch_size):
            rows += decoders.beam.search_input(forward(batch).ctc)
            references += [utt.text for utt in batch]
        table = beam.tune(decoders.beam, rows, references, self.search)
        with atomic_write(folder / TUNING) as partial:
            table.to_csv(partial, index=False)
        return decoders.with_beam(decoders.beam.at(beam.best_settings(table)))

    def record(self, decoders: DecoderSet, chosen_on: str = "") -> dict:
        """Decoder settings for scores.json; `chosen_on` is the dev speaker, or empty."""
        settings = {}
        for column, one in decoders.calibrators.items():
            fitted = {"form": one.form, "utterances": one.utterances, "speakers": len(one.speakers)}
            settings[column] = fitted | {
                "strength": one.strength,
                "temperature": one.temperature,
                "chosen_on": chosen_on,
            }
        if decoders.beam:
            more = {"units": self.search.units, "order": self.search.order, "chosen_on": chosen_on}
            settings[BEAM] = asdict(decoders.beam.setting) | more
        if decoders.attention:
            settings["attention"] = {"size": decoders.attention.size, "ctc_weight": decoders.attention.ctc_weight}
        return settings
