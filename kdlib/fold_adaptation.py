"""The objects of a fold whose student is adapted to a speaker's speech without transcripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib import runtime
from kdlib.corpus.speakers import adaptation_speech
from kdlib.fold_imports import ImportedTeachers
from kdlib.models import read_record
from kdlib.settings.adaptation import DEV_MODEL
from kdlib.source_code import lazy
from kdlib.tokens import normalise

if TYPE_CHECKING:
    from kdlib.corpus.utterances import Utterance
    from kdlib.distill.adaptation import AdaptationSetup
    from kdlib.models.hybrid import TrainedModel
    from kdlib.pretrained.start import Start

# Imported when they are used: torch and its companions take seconds.
adaptation = lazy("kdlib.distill.adaptation")
hybrid = lazy("kdlib.models.hybrid")
lexicon = lazy("kdlib.decode.lexicon")
packages = lazy("kdlib.teachers.recognisers")
setup = lazy("kdlib.distill.setup")
start = lazy("kdlib.pretrained.start")


class AdaptationObjects(ImportedTeachers):
    """One fold of a recipe, under one of its variants: with what adapts a student."""

    def adaptation_setup(self, seed: int) -> AdaptationSetup:
        """All that a student is adapted to a speaker with."""
        params, how, closed = self.params, self.params.adapt, lexicon.Lexicon(self.lexicon, self.tokens)
        folder = self.of(how.start).student(seed)
        setup.check_resumed(folder, read_record(folder), params.student, self.tokens, self.split_settings)
        adaptation.check(how, params.distill, params.student)
        members, labelled = how.members(seed), self.student_data().train
        dev = params.fold.dev
        return adaptation.AdaptationSetup(
            name=params.variant,
            seed=seed,
            how=how,
            settings=params.student,
            distill=params.distill,
            fold=self.split_settings,
            tokens=self.tokens,
            lexicon=closed,
            start=folder,
            recognisers=lambda: [
                *(adaptation.recogniser(self.of(name).scores(one), closed) for name, one in members),
                *(packages.PhonemeTeacher(closed.words, labelled) for _ in how.packaged),
            ],
            labelled=labelled,
            dev=self.splits.dev,
            speech=adaptation.speech_of(self.all_labels.corpus, params.held_out, how, self.split_settings),
            dev_speech=adaptation.speech_of(self.all_labels.corpus, dev, how, self.split_settings) if dev else None,
            train_speakers=read_record(folder)["train_speakers"],
            measure=params.scoring.measure,
            device=runtime.torch_device(params.device),
        )

    def _adaptation_start(self, seed: int) -> Start:
        """The weights of the student that is adapted."""
        folder = self.of(self.params.adapt.start).student(seed)
        known, trained = read_record(folder)["train_speakers"], "model.safetensors"
        return start.Start(resumed=folder, file=trained, train_speakers=known, head_is_trained=True)

    def _adapted_words(self) -> Callable[[Utterance], bool] | None:
        """Whether the adaptation speech of an utterance's speaker holds its text; None for a student without."""
        params = self.params
        if not params.adapt:
            return None
        if params.adapt.speech == "test":
            return lambda utt: True
        corpus, speakers = self.all_labels.corpus, [name for name in (params.held_out, params.fold.dev) if name]
        words = {
            (name, normalise(utt.text))
            for name in speakers
            for utt in adaptation_speech(corpus, name, self.split_settings, test=False)
        }
        return lambda utt: (utt.speaker, normalise(utt.text)) in words

    def _dev_model(self, seed: int) -> TrainedModel | None:
        """The model for dev speech of a student that was adapted."""
        if not (seed and self.params.adapt and self.params.fold.dev):
            return None
        return hybrid.TrainedModel(self.layout.student(seed) / DEV_MODEL, self.params.device)

    def _adaptation_inputs(self, seed: int) -> list[Path]:
        """The scores of the student that is adapted, and of those that give targets."""
        how = self.params.adapt
        pairs = dict.fromkeys([(how.start, seed), *how.members(seed)])
        return [self.of(name).scores(one) for name, one in pairs]
