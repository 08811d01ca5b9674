"""The objects of a fold, made of its artefacts: what the stages of the pipeline give to their builders.

Everything is made when it is first asked for, and once; `pipeline.Fold` adds the stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import labels, prepare, speaking_rate, views
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import Splits
from kdlib.errors import UserError
from kdlib.io import resolve_path
from kdlib.layout import Layout
from kdlib.models import read_record
from kdlib.models.encoders import ENCODERS
from kdlib.objectives import terms
from kdlib.params import Params
from kdlib.settings.corpus import CorpusSettings, SplitSettings
from kdlib.settings.pretrained import PretrainedSettings
from kdlib.settings.targets import methods_for
from kdlib.source_code import lazy
from kdlib.stage import fingerprint
from kdlib.teachers.teacher_sets import requested_teachers, shared_teachers
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    from kdlib.corpus.views import View
    from kdlib.evaluate.decoder_setup import DecoderSetup
    from kdlib.logits.extract import Purpose
    from kdlib.logits.store import LogitStore
    from kdlib.settings.encoder import EncoderSizes
    from kdlib.settings.teacher import Training
    from kdlib.targets.aggregation import TeacherEnsemble, Weighting
    from kdlib.teachers.parent_scores import SetAside
    from kdlib.teachers.training import InitialModel, TeacherTraining

# Imported when they are used: torch and its companions take seconds.
adapt = lazy("kdlib.teachers.adapt")
aggregation = lazy("kdlib.targets.aggregation")
base_model = lazy("kdlib.teachers.base_model")
choice = lazy("kdlib.targets.choice")
decoder_setup = lazy("kdlib.evaluate.decoder_setup")
fusion = lazy("kdlib.targets.fusion")
lexicon = lazy("kdlib.decode.lexicon")
lm = lazy("kdlib.decode.lm")
nemo_files = lazy("kdlib.models.nemo_files")
parent_scores = lazy("kdlib.teachers.parent_scores")
pieces = lazy("kdlib.pretrained.pieces")
similarity = lazy("kdlib.targets.similarity")
start = lazy("kdlib.pretrained.start")
store = lazy("kdlib.logits.store")
teacher_training = lazy("kdlib.teachers.training")

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
        """The factors to the tempo of the held-out speaker's level, by speaker of the training speech."""
        if self.params.student.augment != "mask_and_matched_tempo":
            return {}
        level = self.corpus.level(self.params.held_out)
        return speaking_rate.matching_factors(self.corpus, [*self.splits.train, *self.splits.unlabelled], level)

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

    # teachers, their outputs, and the targets

    def teacher_names(self, speakers: Sequence[str] | str = ()) -> list[str]:
        """The requested teachers: by default the fold's; names; "all"; or a share: "1/2", "1/2 of all"."""
        return requested_teachers(self.splits, self.params.teacher, speakers)

    def base_model(self) -> Path | None:
        """The folder of the base model; None where each teacher starts from scratch or from the checkpoint."""
        settings = self.params.teacher
        if settings.parent == "none":
            return None
        if settings.parent == "shipped" and not ENCODERS[settings.encoder].checkpoint:
            return base_model.shipped_base_model(settings, self.tokens)
        return self.trained_base_model()

    def parent(self) -> Path | None:
        """The model that teachers of speakers are adapted from: the base model, or the pretrained model itself."""
        if self.params.teacher.source != "speakers":
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
        if settings.source == "speakers":
            return self.speaker_teacher(name)
        if settings.source == "model":
            return self._only_teacher()
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

    def store(self, name: str, purpose: Purpose, output: str = "ctc") -> LogitStore:
        """A teacher's stored outputs."""
        if output == "decoder" and not read_record(self.teacher(name))["heads"]["layers"]:
            raise UserError(
                f"teacher {name} has no decoder, only CTC outputs; write distill: {{heads: ctc}}, or name teachers "
                "with a decoder"
            )
        if output.startswith(terms.LAYER):
            return store.LogitStore(self.layer_outputs(name, output))
        return store.LogitStore(self.outputs(name, purpose) / output)

    @property
    def methods(self) -> list[str]:
        """The methods that the fold's teachers allow; `same_level` only where another speaker has that level."""
        allowed = methods_for(self.params.teacher.source)
        return [name for name in allowed if name != "same_level" or self.splits.same_level]

    def target_teachers(self, method: str = "") -> list[str]:
        """The teachers that the fold averages under a method: all, or those of the held-out speaker's level."""
        settings = self.params.teacher
        if settings.source != "speakers":
            return shared_teachers(settings)
        names = self.splits.teachers(settings.max_teachers)
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
        choice.check_method(method, output, self.params.teacher)
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


def weight_files(sizes: EncoderSizes) -> list[Path]:
    """The files of the pretrained weights that the sizes of an encoder name: one, or those of a folder."""
    path = resolve_path(sizes.checkpoint) if sizes.checkpoint else None
    if path is None or not path.is_dir():
        return [path] if path else []
    return [path / name for name in ("config.json", "model.safetensors", "pytorch_model.bin")]
