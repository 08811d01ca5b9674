"""The objects of a fold's teachers: which there are, their outputs, and the targets that these are combined into."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import views
from kdlib.errors import UserError
from kdlib.fold_objects import FoldObjects, weight_files
from kdlib.io import resolve_path
from kdlib.models import read_record
from kdlib.models.encoders import ENCODERS
from kdlib.objectives import terms
from kdlib.settings.targets import DEV_FITTED, methods_for
from kdlib.source_code import lazy
from kdlib.teachers.teacher_sets import requested_teachers, shared_teachers

if TYPE_CHECKING:
    from kdlib.corpus.utterances import Utterance
    from kdlib.corpus.views import View
    from kdlib.logits.extract import Purpose
    from kdlib.logits.store import LogitStore
    from kdlib.settings.teacher import Training
    from kdlib.targets.aggregation import TeacherEnsemble, Weighting
    from kdlib.teachers.parent_scores import SetAside
    from kdlib.teachers.training import InitialModel, TeacherTraining

# Imported when they are used: torch and its companions take seconds.
adapt = lazy("kdlib.teachers.adapt")
aggregation = lazy("kdlib.targets.aggregation")
base_model = lazy("kdlib.teachers.base_model")
choice = lazy("kdlib.targets.choice")
fusion = lazy("kdlib.targets.fusion")
lexicon = lazy("kdlib.decode.lexicon")
parent_scores = lazy("kdlib.teachers.parent_scores")
similarity = lazy("kdlib.targets.similarity")
start = lazy("kdlib.pretrained.start")
store = lazy("kdlib.logits.store")
teacher_training = lazy("kdlib.teachers.training")


class TeacherObjects(FoldObjects):
    """One fold of a recipe, under one of its variants: with its teachers."""

    def teacher_names(self, speakers: Sequence[str] | str = ()) -> list[str]:
        """The requested teachers: by default the fold's; names; "all"; or a share: "1/2", "1/2 of all"."""
        if self.params.teacher.imported and self.params.teacher.of_speakers:
            return list(speakers) if speakers and not isinstance(speakers, str) else self.imported_names()
        return requested_teachers(self.splits, self.params.teacher, speakers)

    def base_model(self) -> Path | None:
        """The folder of the base model; None where each teacher starts from scratch or from the checkpoint."""
        settings = self.params.teacher
        if settings.parent == "none" or settings.imported:
            return None
        if settings.parent == "shipped" and not ENCODERS[settings.encoder].checkpoint:
            return base_model.shipped_base_model(settings, self.tokens)
        return self.trained_base_model()

    def parent(self) -> Path | None:
        """The model that teachers of speakers are adapted from: the base model, or the pretrained model itself."""
        if self.params.teacher.source != "speakers" or self.params.teacher.average_weights:
            return None
        return self.base_model() or next(iter(self._checkpoint()), None)

    def with_parents(self, names: Sequence[str]) -> dict[str, Path]:
        """The scores of teachers beside their parent's; none where they have no parent."""
        return {name: self.parent_scores(name) for name in names} if self.parent() else {}

    def _set_aside(self, speaker: str) -> SetAside:
        """What a teacher is compared with its parent on, and how much of it the parent knows."""
        params, base = self.params, self.base_model()
        trained_on = "speaker" if base and speaker in read_record(base)["train_speakers"] else ""
        if self._checkpoint() and speaker in (self.pretrained_record() or {"speakers": ()})["speakers"]:
            trained_on = "speech"  # pretraining sets nothing of its speakers aside
        dev = self.teacher_view(adapt.speaker_data(self.splits, params.teacher, speaker).dev)
        return parent_scores.SetAside(speaker, dev, trained_on, self.lexicon, params.search, params.scoring)

    def teacher(self, name: str) -> Path:
        """The folder of a teacher: of a speaker, a student (born again: Furlanello et al. 2018), or one for all."""
        settings = self.params.teacher
        if settings.average_weights:
            return self.averaged_teacher()
        if settings.source == "speakers":
            return self.speaker_teacher(name)
        if settings.source == "model":
            return self._only_teacher()
        if settings.imported:
            return self.imported_teacher(name) if settings.source == "stores" else self.converted_teacher(name)
        folder = self.layout.teacher(name)
        if not (folder / "model.json").is_file():
            variant, seed = name.split("/seed")
            raise UserError(
                f"teacher.students: there is no student {variant!r} of seed {seed} in {folder}; train it first: make "
                f"compare HELD_OUT={self.params.held_out} VARIANTS={variant} SEEDS={seed}"
            )
        return folder

    def _only_teacher(self) -> Path:
        """The folder of the one model that teaches: a saved one, or the base model."""
        name = self.params.teacher.model
        folder = resolve_path(name) if name else self.base_model()
        if folder is None or not (folder / "model.json").is_file():
            raise UserError(
                f"teacher.model: there is no saved model in {folder or 'parent: none'}; name the folder of a teacher, "
                "of a student or of a base model (model.json, model.safetensors, tokenizer.model)"
            )
        return folder

    def _new_teacher(self) -> InitialModel:
        """The model that the base model, or a teacher without one, starts from."""
        settings, first = (
            self.params.teacher,
            start.Start(sizes=self.params.teacher, inputs=self.corpus_settings.inputs),
        )
        if ENCODERS[settings.encoder].checkpoint:
            speakers = (self.pretrained_record() or {"speakers": ()})["speakers"]
            first = start.Start(pretrained=self.pretrained_model(), train_speakers=speakers)
        return base_model.new_teacher(settings, self.tokens, first, self.params.seed)

    def _teacher_training(self, what: str, schedule: Training) -> TeacherTraining:
        """How a teacher, or the base model, is trained; with the closed lexicon where the loss needs it."""
        settings = self.params.teacher
        words = lexicon.Lexicon(self.lexicon, self.tokens) if settings.hard_words.weight else None
        frame_s, measure = self.frame_s(settings.encoder), self.params.scoring.measure
        about = what, settings, schedule, self.split_settings, words
        return teacher_training.TeacherTraining(*about, frame_s, measure, self.params.device, self.teacher_view)

    @cached_property
    def teacher_view(self) -> View:
        """What gives utterances the recordings that teachers get."""
        return views.view_of(self.all_labels.corpus, self.params.teacher.input)

    @property
    def _teacher_input(self) -> dict:
        """The recordings that teachers get, as stages record them, where they are others than the students'."""
        name = self.params.teacher.input
        return {} if name == views.SAME else {"input": name}

    def _checkpoint(self) -> list[Path]:
        """The pretrained model, where the teachers have its encoder."""
        return [self.pretrained_model()] if ENCODERS[self.params.teacher.encoder].checkpoint else []

    def _teacher_start(self) -> list[Path]:
        """The files of weights that a teacher without a base model starts from."""
        return [*self._checkpoint(), *weight_files(self.params.teacher)]

    def outputs(self, name: str, purpose: Purpose) -> Path:
        """A teacher's outputs on training speech or, for analysis, on the test blocks."""
        if self.params.teacher.source == "stores":
            return self.imported_outputs(name, purpose)
        return self.extracted_outputs(name, purpose)

    def trained_speech(self, name: str) -> list[Utterance]:
        """The speech that a teacher was trained on; of one of other code, all that its speakers have for training."""
        settings = self.params.teacher
        if settings.source == "speakers" and settings.of_speakers:
            return adapt.speaker_data(self.splits, settings, name).train
        if settings.imported or settings.average_weights:
            speakers = read_record(self.teacher(name))["train_speakers"]
            return [utt for utt in self.splits.speech_of_all() if utt.speaker in speakers]
        return self.splits.train

    def store(self, name: str, purpose: Purpose, output: str = "ctc") -> LogitStore:
        """A teacher's stored outputs."""
        if output == "decoder" and not read_record(self.teacher(name))["heads"]["layers"]:
            raise UserError(
                f"teacher {name} has no decoder, only CTC outputs; write distill: {{heads: ctc}}, or name teachers "
                "with a decoder"
            )
        if output.startswith(terms.LAYER):
            if self.params.teacher.source == "stores":
                raise UserError(
                    f"teacher {name}: stored logits have no hidden layers; write distill: {{gamma: 0, layers: {{}}}}"
                )
            return store.LogitStore(self.layer_outputs(name, output))
        return store.LogitStore(self.outputs(name, purpose) / output)

    @property
    def teachers_of_speakers(self) -> bool:
        """True if teachers are named after their speakers: not where other code has trained one on several."""
        settings = self.params.teacher
        return settings.of_speakers and (not settings.imported or set(self.imported_names()) <= {*self.corpus.speakers})

    @property
    def methods(self) -> list[str]:
        """The methods that the fold's teachers allow; `same_level` only where another speaker has that level."""
        if self.own_recordings:
            return ["own"]
        allowed = methods_for(of_speakers=self.teachers_of_speakers)
        if not self.dev_outputs:
            allowed = [name for name in allowed if name not in DEV_FITTED]
        return [name for name in allowed if name != "same_level" or self.splits.same_level]

    def target_teachers(self, method: str = "") -> list[str]:
        """The teachers that the fold averages under a method: all, or those of the held-out speaker's level."""
        settings = self.params.teacher
        if not settings.of_speakers:
            return shared_teachers(settings)
        names = self.imported_names() if settings.imported else self.splits.teachers(settings.max_teachers)
        if method != "same_level":
            return names
        same = self.splits.teachers(settings.max_teachers, same_level=True)
        return [name for name in names if name in same] or names

    def targets(
        self, method: str = "", output: str = "ctc", purpose: Purpose = "training", half: int | None = None
    ) -> TeacherEnsemble:
        """The fold's teachers combined by a method, by default the recipe's.

        For `training`: targets on the training speakers only. For `analysis`: outputs on test blocks, no training
        target. What is estimated on dev speech can be restricted to one `half` of it.
        """
        method, settings = method or self.params.aggregation.method, self.params.aggregation
        choice.check_method(method, output, self.teachers_of_speakers, own_recordings=self.own_recordings)
        if self.own_recordings:
            settings = settings.model_copy(update={"missing": "all"})  # each utterance has one teacher
        names = self.target_teachers(method)
        evidence = choice.Evidence(
            accuracies=lambda: self._accuracies(names, half),
            outputs=lambda: {name: self.outputs(name, purpose) for name in names},
            features=lambda: similarity.read_features(self.speaker_features()),
            fusion=lambda: fusion.load_fusion(self.fusion(method), method, self._unweighted(names), half),
        )
        return self._combined(names, choice.weighting(method, names, settings, evidence), output, purpose)

    def _combined(self, names: Sequence[str], weights: Weighting, output: str, purpose: Purpose) -> TeacherEnsemble:
        choice.check_labels({name: read_record(self.teacher(name)) for name in names}, self.split_settings)
        stores = {name: self.store(name, purpose, output) for name in names}
        return choice.combine(stores, weights, self.tokens, self.split_settings, purpose)

    def _unweighted(self, names: Sequence[str], purpose: Purpose | None = None) -> TeacherEnsemble:
        """The teachers with equal weights, by default on the speech that fusions are trained on."""
        return self._combined(names, aggregation.Weighting(missing="all"), "ctc", purpose or self._fusion_purpose)

    @property
    def _fusion_purpose(self) -> Purpose:
        return "analysis" if self.params.fold.dev else "training"

    def _accuracies(self, names: Sequence[str], half: int | None = None) -> dict[str, float]:
        """Greedy CTC accuracy of teachers on the fold's dev speaker; without one, on their own dev blocks."""
        if self.params.fold.dev:
            part = {utt_id for utt_id, its_half in choice.halves(self.splits.dev).items() if half in (None, its_half)}
            return choice.dev_accuracies({name: self.teacher_scores(name) for name in names}, part)
        return choice.own_accuracies({name: read_record(self.teacher(name)) for name in names})
