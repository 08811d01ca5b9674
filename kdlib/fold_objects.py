"""The objects of a fold, made of its artefacts: what the stages of the pipeline give to their builders.

Everything is made when it is first asked for, and once; `pipeline.Fold` adds the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import labels, prepare
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
from kdlib.settings.teacher import EncoderSizes
from kdlib.source_code import lazy
from kdlib.stage import fingerprint
from kdlib.teachers.teacher_sets import requested_teachers, shared_teachers
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    from kdlib.decode.lexicon import Lexicon
    from kdlib.distill.preflight import Plan, Teachers
    from kdlib.distill.setup import StudentData, StudentSetup
    from kdlib.distill.student_scores import StudentScoring
    from kdlib.evaluate.decoder_setup import DecoderSetup
    from kdlib.logits.extract import Purpose
    from kdlib.logits.store import LogitStore
    from kdlib.pretrained.start import Start
    from kdlib.targets.aggregation import TeacherEnsemble, Weighting
    from kdlib.targets.pseudo_labels import TeacherHypotheses
    from kdlib.targets.target_report import TargetScoring
    from kdlib.teachers.training import InitialModel

# Imported when they are used: torch and its companions take seconds.
aggregation = lazy("kdlib.targets.aggregation")
beam = lazy("kdlib.decode.beam")
base_model = lazy("kdlib.teachers.base_model")
choice = lazy("kdlib.targets.choice")
decoder_setup = lazy("kdlib.evaluate.decoder_setup")
faults = lazy("kdlib.distill.faults")
fusion = lazy("kdlib.targets.fusion")
lexicon = lazy("kdlib.decode.lexicon")
lm = lazy("kdlib.decode.lm")
nemo_files = lazy("kdlib.models.nemo_files")
pieces = lazy("kdlib.pretrained.pieces")
preflight = lazy("kdlib.distill.preflight")
pseudo_labels = lazy("kdlib.targets.pseudo_labels")
setup = lazy("kdlib.distill.setup")
similarity = lazy("kdlib.targets.similarity")
start = lazy("kdlib.pretrained.start")
store = lazy("kdlib.logits.store")
student_scores = lazy("kdlib.distill.student_scores")
target_report = lazy("kdlib.targets.target_report")

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

    def decoding_model(self, tokens: Tokens | None = None, *, all_speakers: bool = False) -> Path:
        """The folder of the language model that decoders use, with these tokens or the teachers'."""
        units = (tokens or self.tokens) if self.params.search.units == "pieces" else None
        return self.language_model(units, all_speakers=all_speakers)

    def decoder_setup(self, tokens: Tokens | None = None, *, all_speakers: bool = False) -> DecoderSetup:
        """What decoders need, for these tokens or the teachers'."""
        model = self.decoding_model(tokens, all_speakers=all_speakers) / lm.ARPA
        return decoder_setup.DecoderSetup(tokens or self.tokens, self.lexicon, model, self.params.search)

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
        settings, first = self.params.teacher, start.Start(sizes=self.params.teacher)
        if ENCODERS[settings.encoder].checkpoint:
            speakers = (self.pretrained_record() or {"speakers": ()})["speakers"]
            first = start.Start(pretrained=self.pretrained_model(), train_speakers=speakers)
        return base_model.new_teacher(settings, self.tokens, first, self.params.seed)

    def _teacher_lexicon(self) -> Lexicon | None:
        """The closed lexicon, where the teachers' loss chooses among its words."""
        return lexicon.Lexicon(self.lexicon, self.tokens) if self.params.teacher.hard_words.weight else None

    def _checkpoint(self) -> list[Path]:
        """The pretrained model, where the teachers have its encoder."""
        return [self.pretrained_model()] if ENCODERS[self.params.teacher.encoder].checkpoint else []

    def store(self, name: str, purpose: Purpose, output: str = "ctc") -> LogitStore:
        """A teacher's stored outputs."""
        if output == "decoder" and not read_record(self.teacher(name))["heads"]["layers"]:
            raise UserError(
                f"teacher {name} has no decoder, only CTC outputs; write distill: {{heads: ctc}}, or name teachers "
                "with a decoder"
            )
        return store.LogitStore(self.outputs(name, purpose) / output)

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

    def _unweighted(self, names: Sequence[str]) -> TeacherEnsemble:
        """The teachers on the speech that fusions are trained on."""
        return self._combined(names, aggregation.Weighting(missing="all"), "ctc", self._fusion_purpose)

    @property
    def _fusion_purpose(self) -> Purpose:
        return "analysis" if self.params.fold.dev else "training"

    def _accuracies(self, names: Sequence[str], half: int | None = None) -> dict[str, float]:
        """Greedy CTC accuracy of teachers on the fold's dev speaker; without one, on their own dev blocks."""
        if dev := self.params.fold.dev:
            return choice.dev_accuracies({name: self.teacher_scores(name) for name in names}, dev, half)
        return choice.own_accuracies({name: read_record(self.teacher(name)) for name in names})

    # students

    def student_setup(self, seed: int) -> StudentSetup:
        """All that a student is trained with."""
        params, first = self.params, self._start(seed)
        model = setup.initial_student(params.student, self.tokens, first, seed, params.faults)
        targets = {output: self._student_targets(output) for output in terms.outputs(params.distill)}
        return setup.StudentSetup(
            name=params.variant,
            seed=seed,
            settings=params.student,
            distill=params.distill,
            fold=self.split_settings,
            tokens=self.tokens,
            data=self.student_data(),
            start=first,
            model=model,
            targets=targets,
            hypotheses=self._hypotheses(targets),
            lexicon=self._words_of_loss(),
            judge=self._judge(),
        )

    def student_data(self) -> StudentData:
        """The student's training speech, and the dev speech that chooses its checkpoint."""
        taught, share = terms.uses_teachers(self.params.distill), self.params.teacher.dev_share
        return setup.select_data(self.splits, self.tokens, self.params.faults, uses_teachers=taught, dev_share=share)

    def teacher_hypotheses(self) -> TeacherHypotheses | None:
        """The teachers' hypotheses that the student is trained on, if it is."""
        return self._hypotheses(
            {output: self._student_targets(output) for output in terms.outputs(self.params.distill)}
        )

    def _student_targets(self, output: str) -> TeacherEnsemble:
        """The targets of training speech, with the recipe's faults."""
        return faults.apply_faults(self.params.faults, self.targets(output=output), self.splits.train, self.params.seed)

    def _hypotheses(self, targets: dict[str, TeacherEnsemble]) -> TeacherHypotheses | None:
        distill = self.params.distill
        if not terms.needs(distill, "texts"):
            return None
        search, params = None, self.params
        if params.needs_beam:
            search = beam.recipe_search(params.search, self.tokens, self.lexicon, self.decoding_model() / lm.ARPA)
        return pseudo_labels.TeacherHypotheses(
            targets["ctc"], lexicon.Lexicon(self.lexicon, self.tokens), self.tokens, search
        )

    def _words_of_loss(self) -> Lexicon | None:
        """The closed lexicon, where the loss chooses among its words."""
        setup.check_lexicon(self.params.distill, self.lexicon, bool(self.params.labels))
        needed = terms.needs(self.params.distill, "lexicon")
        return lexicon.Lexicon(self.lexicon, self.tokens) if needed else None

    def _judge(self) -> TeacherEnsemble | None:
        """The teachers' outputs on dev speech, where the best checkpoint is the one closest to them (a fault)."""
        if self.params.faults.choose_by == "wra" or not terms.uses_teachers(self.params.distill):
            return None
        if self.params.distill.heads == "decoder":
            raise UserError(
                "faults.choose_by: kl compares CTC outputs: teachers' decoder outputs on dev speech are not stored; "
                "write distill: {heads: ctc}"
            )
        return faults.apply_faults(self.params.faults, self.targets(purpose="analysis"), None, self.params.seed)

    def _start(self, seed: int) -> Start:
        """What the student's weights are before training."""
        settings = self.params.student
        if folder := self.resumed_from(seed):
            record = read_record(folder)
            setup.check_resumed(folder, record, settings, self.tokens, self.split_settings)
            return start.Start(resumed=folder, train_speakers=record["train_speakers"], head_is_trained=True)
        if settings.start == "scratch":
            return start.Start(sizes=settings.sizes or self.params.teacher)
        source = self._pretrained_student()
        if not ENCODERS[settings.encoder].checkpoint:
            speakers = read_record(source)["train_speakers"]
            return start.Start(pretrained=source, train_speakers=speakers, head_is_trained=True)
        speakers = (self.pretrained_record() or {"speakers": ()})["speakers"]
        same = nemo_files.read_tokenizer(source) == self.tokens.model
        return start.Start(pretrained=source, train_speakers=speakers, head_is_trained=same)

    def resumed_from(self, seed: int) -> Path | None:
        """The folder of the student whose training this one continues; None without `student.resume`."""
        name, variants = self.params.student.resume, self.params.variants
        if not name:
            return None
        is_variant = all(part in variants for part in name.split("+"))
        folder = self.layout.student(seed, name) if is_variant else resolve_path(name)
        if not (folder / setup.LATEST).is_file():
            raise UserError(
                f"student.resume: there is no student in {folder} (no {setup.LATEST}); train it first, or name a "
                f"variant of this recipe ({', '.join(variants)}) or the folder of a student"
            )
        return folder

    def _pretrained_student(self) -> Path:
        """What a student starts from: the pretrained model, or the base model of teachers with its encoder."""
        name = self.params.student.encoder
        if ENCODERS[name].checkpoint:
            return self.pretrained_model()
        folder = self.but(teacher={"encoder": name, "source": "speakers"}).base_model()
        if folder is None:
            raise UserError(
                f"student: one with the encoder {name!r} starts from the teachers' base model, but teacher.parent is "
                "'none'; write student: {start: scratch}, or teacher: {parent: controls}"
            )
        return folder

    def _preflight_plan(self) -> Plan:
        params, used = self.params, self.resolved.params.distill
        return preflight.Plan(
            self.splits,
            self.tokens,
            self.student_data(),
            requested=params.distill,
            used=used,
            faults=params.faults,
            text_of=self._text_of(),
            switched=params.crosses_encoders,
        )

    def _preflight_teachers(self, seed: int) -> Teachers | None:
        if not terms.uses_teachers(self.params.distill):
            return None
        names, output = self.target_teachers(self.params.aggregation.method), terms.outputs(self.params.distill)[0]
        return preflight.Teachers(
            stores={name: self.store(name, "training", output) for name in names},
            folders={name: self.teacher(name) for name in names},
            setup=lambda: self.student_setup(seed),
        )

    def _text_of(self):
        return faults.text_decoder(self.params.faults, self.tokens, self.lexicon)

    def _tokenizer_files(self) -> list[Path]:
        """The tokenizer that evaluation decodes with, where that is a fault."""
        return faults.tokenizer_files(self.params.faults) if self.params.faults.decode_tokenizer else []

    def _target_scoring(self) -> TargetScoring:
        return target_report.TargetScoring(self.splits, self.decoder_setup(), self.params.scoring)

    def _student_scoring(self) -> StudentScoring:
        decoding, params = self.decoder_setup(), self.params
        return student_scores.StudentScoring(self.splits, decoding, params.scoring, params.faults, self._text_of())

    # the settings and files that stages depend on

    def _labels(self) -> dict:
        """Which utterances are labelled, where some are not."""
        settings = self.split_settings
        if not settings.labels:
            return {}
        return {"labels": labels.record(settings) | {"use_unlabelled_held_out": settings.use_unlabelled_held_out}}

    def _target_settings(self) -> dict:
        return self.params.scoring_identity | {
            "aggregation": self.params.aggregation.model_dump(exclude={"method"}),
            "labels": labels.record(self.split_settings),
            "fold": self.params.fold.model_dump(mode="json"),
        }

    def _student_settings(self) -> dict:
        """The settings that a student depends on; those of teachers only where the loss uses them."""
        params, uses_teachers = self.params, terms.uses_teachers(self.params.distill)
        excluded = {"accelerator"} if params.student.keep_checkpoints > 1 else {"accelerator", "keep_checkpoints"}
        settings = self.split_settings.identity | {
            "student": params.student.model_dump(mode="json", exclude=excluded),
            "distill": terms.record(params.distill),
            "blocks": params.blocks.model_dump(mode="json"),
        }
        if params.labels:
            settings["labels"] = labels.record(self.split_settings)
        if uses_teachers:
            settings["aggregation"] = params.aggregation.model_dump(mode="json")
        if params.faults.named:
            settings["faults"] = params.faults.model_dump(exclude_defaults=True)
        if params.needs_beam:
            settings["search"] = params.search.model_dump(mode="json")
        if not ENCODERS[params.student.encoder].checkpoint or params.student.start == "scratch":
            sizes = params.student.sizes or params.teacher
            settings["sizes"] = {name: getattr(sizes, name) for name in EncoderSizes.model_fields}
        if params.fold.dev is None:
            settings |= {"dev_share": params.teacher.dev_share, "split": params.seed}
        return settings
