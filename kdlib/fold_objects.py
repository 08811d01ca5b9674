"""The objects of a fold, made of its artefacts: what the stages of the pipeline give to their builders.

Everything is made when it is first asked for, and once; `pipeline.Fold` adds the stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import labels, prepare, speaking_rate
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import Splits
from kdlib.io import resolve_path
from kdlib.layout import Layout
from kdlib.models.encoders import ENCODERS
from kdlib.params import Params
from kdlib.settings.corpus import CorpusSettings, SplitSettings
from kdlib.settings.pretrained import PretrainedSettings
from kdlib.source_code import lazy
from kdlib.stage import fingerprint
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    from kdlib.evaluate.decoder_setup import DecoderSetup
    from kdlib.settings.encoder import EncoderSizes

# Imported when they are used: torch and its companions take seconds.
decoder_setup = lazy("kdlib.evaluate.decoder_setup")
lm = lazy("kdlib.decode.lm")
nemo_files = lazy("kdlib.models.nemo_files")
pieces = lazy("kdlib.pretrained.pieces")

_checked: dict[Path, tuple[str, str]] = {}  # corpus folders that this process has checked -> identity and key


class FoldObjects:
    """One fold of a recipe, under one of its variants."""

    def __init__(self, params: Params, of_variant: Callable[[str], Params] | None = None) -> None:
        self.params, self.layout, self._of_variant = params, Layout(params), of_variant
        self.split_settings = params.part(SplitSettings)
        self.corpus_settings = params.part(CorpusSettings)
        self.pretrained_settings = params.part(PretrainedSettings)

    # the corpus

    @cached_property
    def corpus_folder(self) -> Path:
        """The corpus folder: as this process has already checked it, or made now."""
        folder, identity = self.layout.corpus, prepare.identity(self.corpus_settings)
        if _checked.get(folder) != (identity, fingerprint(folder)) or fingerprint(folder) == "none":
            self.prepared_corpus()
            _checked[folder] = identity, fingerprint(folder)
        return folder

    @cached_property
    def corpus(self) -> Corpus:
        """The checked corpus, without the transcripts that the recipe withholds."""
        return labels.hide_unknown(prepare.read(self.corpus_folder, self.corpus_settings), self.split_settings)

    @cached_property
    def lexicon(self) -> dict[str, list[str]]:
        """The closed vocabulary: each word with its spellings."""
        return prepare.read_lexicon(self.corpus_folder)

    @cached_property
    def splits(self) -> Splits:
        """Whom the fold is trained on and tested on."""
        return Splits(self.corpus, self.split_settings)

    def _tempo(self) -> dict[str, list[float]]:
        """The factors to the tempo of speakers as intelligible as the held-out one, by speaker of training speech."""
        if self.params.student.augment != "mask_and_matched_tempo":
            return {}
        speech = self.splits.train + self.splits.unlabelled
        return speaking_rate.matching_factors(self.corpus, speech, self.params.held_out)

    def frame_s(self, encoder: str) -> float:
        """Seconds of a frame of an encoder's output."""
        return ENCODERS[encoder].subsampling * self.corpus_settings.inputs.step_ms / 1000

    # the pretrained model, tokens, decoders

    def pretrained_model(self) -> Path:
        """The recipe's `.nemo` file: shipped, NVIDIA's, local, or trained on controls or on the fold's speakers."""
        if self.params.pretrained in ("controls", "from_corpus"):
            return self.pretraining() / nemo_files.TRAINED
        return nemo_files.find_model(self.pretrained_settings)

    def pretrained_record(self) -> dict | None:
        """The training speakers and words of the pretrained model; None for NVIDIA's, which have no record."""
        source, embedded = self.params.pretrained, self.params.corpus == "synthetic"
        return nemo_files.training_record(self.pretrained_model(), source, embedded)

    @cached_property
    def tokens(self) -> Tokens:
        """The tokens of teachers and students."""
        return Tokens.for_teachers(self.tokens_folder() / pieces.FILE, self.params.tokens.size)

    @property
    def _chosen_by(self) -> dict:
        """What chooses checkpoints, where it is not WRA, as stages record it."""
        measure = self.params.scoring.measure
        return {} if measure == "wra" else {"measure": measure}

    @property
    def _token_split(self) -> dict:
        """The speech that whole words are taken from, as stages record it."""
        if self.params.tokens.source != pieces.WORDS:
            return {}
        own = {"blocks": self.params.blocks.train, "labels": labels.record(self.split_settings)}
        return self.split_settings.identity | own

    def decoding_model(self, tokens: Tokens | None = None, *, all_speakers: bool = False) -> Path:
        """The folder of the language model that decoders use, with these tokens or the teachers'."""
        tokens = tokens or self.tokens
        of_pieces = self.params.search.units == "pieces" or tokens.unknown is not None  # where these are whole words
        return self.language_model(tokens if of_pieces else None, all_speakers=all_speakers)

    def decoder_setup(self, tokens: Tokens | None = None, *, all_speakers: bool = False) -> DecoderSetup:
        """What decoders need, for these tokens or the teachers'."""
        model, params = self.decoding_model(tokens, all_speakers=all_speakers) / lm.ARPA, self.params
        setup = decoder_setup.DecoderSetup(tokens or self.tokens, self.lexicon, model, params.search)
        return setup if all_speakers else dataclasses.replace(setup, calibration=params.calibration)


def weight_files(sizes: EncoderSizes) -> list[Path]:
    """The files of the pretrained weights that the sizes of an encoder name: one, or those of a folder."""
    path = resolve_path(sizes.checkpoint) if sizes.checkpoint else None
    if path is None or not path.is_dir():
        return [path] if path else []
    return [path / name for name in ("config.json", "model.safetensors", "pytorch_model.bin")]
