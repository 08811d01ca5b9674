"""The pipeline of a fold: every stage as one short method, in the order of the data.

    fold = Fold.load("params/demo.yaml", "M08", "ctc_kd")
    fold.baseline(), fold.teacher("F04"), fold.student(seed=1), fold.scores(seed=1)

A stage names its folder (`layout`), what it depends on, and its builder; a builder gets objects and its own settings,
and asks for nothing. What is up to date is not made again, what is missing is made first. The code that a stage
depends on is computed from its builder (`source_code`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.console import print_once, warn_in_log
from kdlib.corpus import labels, prepare
from kdlib.errors import UserError
from kdlib.fold_results import StudentResults
from kdlib.fold_stage import recorded, stage
from kdlib.io import read_json
from kdlib.models import read_record
from kdlib.objectives import terms
from kdlib.params import load
from kdlib.settings.targets import DEV_FITTED, FUSIONS, methods_for
from kdlib.settings.teacher import NO_TRAINING
from kdlib.source_code import lazy
from kdlib.stage import Stage, fingerprint
from kdlib.teachers.teacher_sets import share_of
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    from kdlib.distill.checks import Check
    from kdlib.distill.students import Watch
    from kdlib.logits.extract import Purpose
    from kdlib.targets.aggregation import TeacherEnsemble
    from kdlib.targets.choice import CrossFitted

# Builders are imported when they are used: torch and its companions take seconds, and most runs find all up to date.
adapt = lazy("kdlib.teachers.adapt")
averaging = lazy("kdlib.models.averaging")
base_model = lazy("kdlib.teachers.base_model")
baseline = lazy("kdlib.evaluate.baseline")
checks = lazy("kdlib.distill.checks")
choice = lazy("kdlib.targets.choice")
beam = lazy("kdlib.decode.beam")
ensembles = lazy("kdlib.distill.ensembles")
extract = lazy("kdlib.logits.extract")
fold_scores = lazy("kdlib.evaluate.fold_scores")
fusion = lazy("kdlib.targets.fusion")
hybrid = lazy("kdlib.models.hybrid")
logit_student = lazy("kdlib.distill.logit_student")
nemo_files = lazy("kdlib.models.nemo_files")
parent_scores = lazy("kdlib.teachers.parent_scores")
pieces = lazy("kdlib.pretrained.pieces")
preflight = lazy("kdlib.distill.preflight")
pretrained = lazy("kdlib.pretrained.model")
sampling = lazy("kdlib.training.sampling")
score = lazy("kdlib.evaluate.score")
similarity = lazy("kdlib.targets.similarity")
student_scores = lazy("kdlib.distill.student_scores")
students = lazy("kdlib.distill.students")
target_report = lazy("kdlib.targets.target_report")
teacher_scores = lazy("kdlib.logits.teacher_scores")
transcribe = lazy("kdlib.evaluate.transcribe")
word_calibration = lazy("kdlib.targets.word_calibration")


class Fold(StudentResults):
    """One fold of a recipe, under one of its variants."""

    @classmethod
    def load(
        cls,
        recipe: str | Path,
        held_out: str,
        variant: str = "",
        *,
        fold: dict | None = None,
        overrides: dict | None = None,
    ) -> Fold:
        """Load a recipe's fold; an empty `fold` reads its fold file, `overrides` replace values of the recipe."""
        of_variant = functools.partial(load, recipe, held_out, fold, overrides)
        return cls(of_variant(variant), of_variant)

    def of(self, variant: str) -> Fold:
        """The same fold under another variant."""
        return Fold(self._of_variant(variant), self._of_variant)

    def but(self, **sections) -> Fold:
        """The same fold with other values of the recipe."""
        return Fold(self.params.but(**sections), self._of_variant)

    @cached_property
    def control(self) -> Fold:
        """The same student without teachers."""
        return self.of(self.params.distill.control)

    @cached_property
    def all_labels(self) -> Fold:
        """The same fold with every transcript: for scoring, never for training."""
        return Fold(self.params.with_all_labels, self._of_variant)

    # 00: the corpus

    @stage
    def prepared_corpus(self) -> Stage:
        """The corpus folder, after a check of every file."""
        settings, lists = self.corpus_settings, prepare.source_lists(self.corpus_settings)
        files = {"files": prepare.files_fingerprint(settings), "lists": [fingerprint(path) for path in lists]}
        return Stage(
            self.layout.corpus,
            "corpus",
            build=lambda partial: prepare.build(partial, settings, self.layout.corpus),
            settings=settings.identity | files,
        )

    # 01: the pretrained model, tokens, decoders, the baseline

    @stage
    def pretraining(self) -> Stage:
        """A pretrained model of control speakers, or of the fold's training speakers."""
        settings, seed = self.params.pretraining, self.params.seed
        own = self.params.pretrained == "from_corpus"
        fold = {"fold": self.params.fold.model_dump(mode="json"), "blocks": self.params.blocks.model_dump(mode="json")}

        def build(partial: Path) -> None:
            full = self.all_labels.corpus  # transcripts of controls are not labels of a fold
            data = (
                pretrained.split_fold(self.splits, settings) if own else pretrained.split_controls(full, settings, seed)
            )
            spellings = [text for texts in self.lexicon.values() for text in texts]
            characters = "".join([*spellings, *(self.corpus if own else full).lexicon])  # every word must be encodable
            pretrained.train(partial, data, characters, settings, seed, self.params.device)

        return Stage(
            self.layout.pretrained,
            f"pretraining for {self.params.held_out}" if own else "pretraining",
            build=build,
            settings=settings.model_dump(mode="json") | (fold | {"labels": self.params.labels} if own else {}),
            inputs=[self.corpus_folder],
            seed=seed,
        )

    @stage
    def tokens_folder(self) -> Stage:
        """The one sentencepiece model of teachers and students."""
        settings, own = self.params.tokens, pieces.own_model(self.params.tokens)
        model = self.pretrained_model() if settings.source == "pretrained" else None

        def build(partial: Path) -> None:
            texts = self.all_labels.corpus.lexicon  # its word list; transcripts are not used
            if settings.source == pieces.WORDS:
                pieces.build_words(partial, [utt.text for utt in self.splits.train], texts)
            else:
                pieces.build(partial, settings, self.lexicon, texts, model)

        return Stage(
            self.layout.tokens,
            "tokens",
            build=build,
            settings=settings.model_dump(mode="json") | self._token_split,
            inputs=[self.corpus_folder, *(path for path in (own, model) if path)],
        )

    @stage
    def language_model(self, tokens: Tokens | None = None, *, all_speakers: bool = False) -> Stage:
        """The language model of the fold's training texts, or of all speakers'; of pieces, by `tokens`."""
        settings, fold = self.params.search, self.all_labels if all_speakers else self
        own = self.split_settings.identity | {"labels": labels.record(self.split_settings)}

        def build(partial: Path) -> None:
            utterances = fold.splits.speech_of_all() if all_speakers else fold.splits.train
            texts = [utt.text for utt in utterances if not utt.copy_of]
            beam.build_language_model(partial, texts, settings, tokens)

        name = f"pieces-{tokens.fingerprint}" if tokens else "words"
        return Stage(
            self.layout.language_model(name, all_speakers=all_speakers),
            "language model",
            build=build,
            settings={"order": settings.order, "units": settings.units, "blocks": self.params.blocks.train}
            | ({} if all_speakers else own),
            inputs=[self.corpus_folder],
        )

    def baseline(self) -> Path:
        """The scores of the pretrained model; without one, of the control, trained on the references alone."""
        if self.params.pretrained == "none":
            return self.control.scores(self.params.seeds[0])
        return self.pretrained_scores()

    @stage
    def pretrained_scores(self) -> Stage:
        """The pretrained model on the held-out speaker; on the dev speaker in `dev/`."""
        fold, scoring = self.all_labels, self.params.scoring  # a model of the fold's speakers had all transcripts
        model = self.pretrained_model()
        tokens = Tokens.for_nemo(nemo_files.read_tokenizer(model))

        def build(partial: Path) -> None:
            decoding = fold.decoder_setup(tokens)
            own = self.params.pretrained == "from_corpus"
            words = frozenset(self.pretrained_record()["words"]) if own else fold.splits.train_words
            system = nemo_files.NeMoCTC(model, self.params.device)
            how = fold_scores.FoldScoring(fold.splits, decoding, scoring)
            baseline.score_baseline(partial, system, words, how)

        return Stage(
            self.layout.baseline,
            "baseline",
            build=build,
            settings=self.params.scoring_identity
            | self.split_settings.identity
            | {"blocks": self.params.blocks.model_dump(mode="json")},
            inputs=[self.corpus_folder, model, fold.decoding_model(tokens)],
        )

    @stage
    def zero_shot(self) -> Stage:
        """The pretrained model on the test blocks of all speakers unseen in its training, controls separately."""
        fold, scoring, own = self.all_labels, self.params.scoring, self.params.pretrained == "from_corpus"
        model = self.pretrained_model()
        tokens = Tokens.for_nemo(nemo_files.read_tokenizer(model))

        def build(partial: Path) -> None:
            decoding = fold.decoder_setup(tokens, all_speakers=not own)
            system, record = nemo_files.NeMoCTC(model, self.params.device), self.pretrained_record()
            baseline.score_others(partial, system, fold.splits, record, decoding, scoring)

        return Stage(
            self.layout.zero_shot,
            "zero-shot scores",
            build=build,
            settings=self.params.scoring_identity | {"blocks": self.params.blocks.model_dump(mode="json")},
            inputs=[self.corpus_folder, model, fold.decoding_model(tokens, all_speakers=not own)],
        )

    def prepare(self, *, scores: bool = False, teachers: bool = False) -> None:
        """Make what several jobs need, each of it once, before they run side by side.

        With `scores` also those of all speakers, which folds share; with `teachers` what teachers need.
        """
        self.tokens_folder()
        if scores and self.params.pretrained not in ("from_corpus", "none"):
            self.zero_shot()
        if teachers:
            self.base_model()
            self.decoding_model(all_speakers=not self.params.teachers_per_fold)
            if "weighted_similarity" in methods_for(of_speakers=self.params.teacher.of_speakers):
                self.speaker_features()

    # 02: teachers

    @stage
    def trained_base_model(self) -> Stage:
        """The base model of the teachers, trained on controls or on the fold's training speech."""
        settings, fold = self.params.teacher, self.split_settings
        own = settings.parent == "from_corpus"

        def build(partial: Path) -> None:
            full = self.all_labels.corpus
            data = (
                base_model.fold_data(self.splits, settings)
                if own
                else base_model.control_data(full, self.params.pretraining, fold.seed)
            )
            how = self._teacher_training("base model of the teachers", settings.base_training)
            base_model.train_base_model(partial, self._new_teacher(), data, how)

        unused = {"adapt", "dev_share", *NO_TRAINING}
        speech = (
            fold.identity | {"blocks": fold.blocks.train, "dev_share": settings.dev_share} | self._labels()
            if own
            else self.params.pretraining.model_dump(include={"test_controls", "unseen_words"})
            | (fold.identity if self.params.base_model_per_fold else {})
        )
        return Stage(
            self.layout.base_model,
            f"base model of the teachers ({self.layout.family})",
            build=build,
            settings=settings.model_dump(mode="json", exclude=unused) | speech | self._chosen_by,
            inputs=[self.corpus_folder, self.tokens_folder(), *self._teacher_start()],
            seed=fold.seed,
        )

    @stage
    def speaker_teacher(self, speaker: str) -> Stage:
        """A speaker's teacher, adapted from the base model."""
        settings, base = self.params.teacher, self.base_model()

        def build(partial: Path) -> None:
            start = base_model.saved_model(base) if base else self._new_teacher()
            how = self._teacher_training(f"teacher {speaker}", settings.adapt)
            adapt.train_speaker_teacher(partial, speaker, self.splits, start, how)

        unused = {"base_training", *NO_TRAINING}
        return Stage(
            self.layout.teacher(speaker),
            f"teacher {speaker}",
            build=build,
            settings=settings.model_dump(mode="json", exclude=unused)
            | {"blocks": self.params.blocks.train, "of": speaker}
            | (self._labels() | self._chosen_by),
            inputs=[
                self.corpus_folder,
                self.tokens_folder(),
                *([base / "model.json", base / "model.safetensors"] if base else []),
                *self._teacher_start(),
            ],
            seed=self.params.seed,
        )

    @stage
    def parent_scores(self, speaker: str) -> Stage:
        """A speaker's teacher and its parent on the speech that was set aside from the teacher's training."""
        parent, teacher, device = self.parent(), self.teacher(speaker), self.params.device

        def build(partial: Path) -> None:
            of_parent = hybrid.TrainedModel if parent.is_dir() else nemo_files.NeMoCTC
            systems = {"parent": of_parent(parent, device), "teacher": hybrid.TrainedModel(teacher, device)}
            parent_scores.score_pair(partial, systems, self._set_aside(speaker))

        return Stage(
            self.layout.parent_scores(speaker),
            f"teacher {speaker} and its parent",
            build=build,
            settings=self.params.scoring.model_dump(),
            inputs=[self.corpus_folder, teacher, parent / "model.safetensors" if parent.is_dir() else parent],
        )

    # 03: their outputs, and the targets

    @stage
    def extracted_outputs(self, name: str, purpose: Purpose) -> Stage:
        """A teacher's outputs on training speech or, for analysis, on the test blocks: shared where teachers are."""
        encoding, blocks, shared = (
            self.params.aggregation.encoding,
            self.params.blocks,
            not self.params.teachers_per_fold,
        )
        teacher = self.teacher(name)

        def build(partial: Path) -> None:
            utterances = self.splits.train + self.splits.unlabelled
            if shared or purpose == "analysis":
                utterances = self.splits.speech_of_all(test=purpose == "analysis")
            job, model = extract.Extraction(name, purpose, encoding), hybrid.TrainedModel(teacher, self.params.device)
            extract.extract(partial, model, self.teacher_view(utterances), self.lexicon, job)

        settings = {"encoding": encoding, "purpose": purpose} | self._teacher_input
        settings |= {"blocks": blocks.train if purpose == "training" else blocks.test + blocks.dev}
        return Stage(
            self.layout.outputs(name, purpose),
            f"outputs of {name} for {purpose}",
            build=build,
            settings=settings | ({} if shared else self.split_settings.identity | self._labels()),
            inputs=[self.corpus_folder, teacher],
        )

    @stage
    def layer_outputs(self, name: str, output: str) -> Stage:
        """The outputs of one of a teacher's layers ("layer2") on training speech, where a loss needs them."""
        teacher, shared, blocks = self.teacher(name), not self.params.teachers_per_fold, self.params.blocks.train

        def build(partial: Path) -> None:
            speech = self.splits.speech_of_all() if shared else self.splits.train + self.splits.unlabelled
            job = extract.Extraction(name, "training", "dense16")
            model, layer = hybrid.TrainedModel(teacher, self.params.device), int(output.removeprefix(terms.LAYER))
            extract.extract_layer(partial, model, self.teacher_view(speech), layer, job)

        return Stage(
            self.layout.layer_outputs(name, output),
            f"{output} of {name}",
            build=build,
            settings={"blocks": blocks} | ({} if shared else self.split_settings.identity | self._labels()),
            inputs=[self.corpus_folder, teacher],
        )

    @stage
    def teacher_scores(self, name: str) -> Stage:
        """A teacher's scores on the test blocks of all speakers, without its training utterances."""
        outputs, shared = self.outputs(name, "analysis"), not self.params.teachers_per_fold

        def build(partial: Path) -> None:
            decoding = self.decoder_setup(all_speakers=shared)
            trained = self.trained_speech(name)
            ids, words = {utt.utt_id for utt in trained}, {utt.text for utt in trained}
            has = self.store(name, "analysis")  # of a teacher of other code perhaps not all
            test = [utt for utt in self.splits.speech_of_all(test=True) if utt.utt_id in has and utt.utt_id not in ids]
            has_decoder = self.params.teacher.source != "stores" and read_record(self.teacher(name))["heads"]["layers"]
            decoders = decoding.decoders(more=("attention",) if has_decoder else ())
            level, seen = self.corpus.level, lambda utt: utt.text in words
            evaluation = transcribe.Evaluation(decoders, f"scores of {name}", self.params.scoring, level, seen)
            about = score.About(
                f"teacher {name}", "", f"teachers/{self.layout.family}/{name}", settings=decoding.record(decoders)
            )
            teacher_scores.score_teacher(partial, outputs, test, evaluation, about)

        return Stage(
            self.layout.teacher_scores(name),
            f"scores of {name}",
            build=build,
            settings=self.params.scoring_identity | {"blocks": self.params.blocks.train},
            inputs=[self.corpus_folder, outputs, self.decoding_model(all_speakers=shared)],
            seed=self.params.seed,
        )

    @stage
    def speaker_features(self) -> Stage:
        """Acoustic features of every speaker, for their similarity."""
        blocks, seed = self.params.blocks.train, self.params.seed
        return Stage(
            self.layout.speaker_features,
            "speaker features",
            build=lambda partial: similarity.build_features(partial, self.corpus, blocks, seed),
            settings={"blocks": blocks},
            inputs=[self.corpus_folder],
            seed=seed,
        )

    @stage
    def fusion(self, kind: str) -> Stage:
        """A fusion trained on the dev speaker's test blocks; without dev speaker, on set-aside training speech."""
        names, steps, seed = self.target_teachers(kind), self.params.aggregation.fusion_steps, self.params.seed

        def build(partial: Path) -> None:
            dev = self.splits.dev or sampling.set_aside(self.splits.train, self.params.teacher.dev_share, seed).dev
            training = fusion.Training(seed, steps)
            fusion.train_fusions(partial, kind, self._unweighted(names), dev, self.tokens, training)

        return Stage(
            self.layout.fusion(kind),
            f"learned fusion ({kind})",
            build=build,
            settings=self.split_settings.identity | {"teachers": names, "steps": steps},
            inputs=[self.corpus_folder, *(self.outputs(name, self._fusion_purpose) for name in names)],
            seed=seed,
        )

    @stage
    def word_calibration(self) -> Stage:
        """The calibration of the words of every teacher, or of a fusion, for targets that are words."""
        method, purposes = self.params.aggregation.method, ("training", "analysis")
        names = self.target_teachers(method if method in FUSIONS else "")  # all: methods share it

        def build(partial: Path) -> None:
            fused = method in FUSIONS
            ensembles = [
                self.targets(method, purpose=purpose) if fused else self._unweighted(names, purpose)
                for purpose in purposes
            ]
            decoders = self.decoder_setup().without_beam().decoders()
            word_calibration.calibrate_words(partial, *ensembles, self.splits, decoders, self.params.calibration)

        return Stage(
            self.layout.word_calibration(method),
            "calibration of the teachers' words",
            build=build,
            settings={"calibration": self.params.calibration.model_dump(mode="json"), "teachers": names}
            | self.split_settings.identity
            | {"labels": labels.record(self.split_settings)},
            inputs=[self.corpus_folder, *(self.outputs(name, purpose) for name in names for purpose in purposes)],
            seed=self.params.seed,
        )

    @stage
    def target_report(self) -> Stage:
        """Every method's targets, decoded and scored on training and on dev speech."""
        names, methods = self.target_teachers(), self.methods

        def target(method: str, speech: str) -> TeacherEnsemble | CrossFitted:
            purpose = "analysis" if speech == "dev" else "training"
            if speech == "dev" and method in DEV_FITTED:
                fitted = [self.targets(method, purpose=purpose, half=1 - half) for half in (0, 1)]
                return choice.CrossFitted(fitted, choice.halves(self.splits.dev))
            return self.targets(method, purpose=purpose)

        def build(partial: Path) -> None:
            target_report.build_report(partial, methods, target, self._scoring())

        return Stage(
            self.layout.target_report,
            "target report",
            build=build,
            settings=self._target_settings(),
            inputs=[
                self.corpus_folder,
                self.decoding_model(),
                *(self.outputs(name, purpose) for name in names for purpose in ("training", "analysis")),
                *([self.speaker_features()] if "weighted_similarity" in methods else []),
            ],
            seed=self.params.seed,
        )

    @stage
    def combined_teacher_scores(self, method: str) -> Stage:
        """The combined teachers on the held-out speaker's test speech: for inspection, not a target."""

        def build(partial: Path) -> None:
            how, training = self._scoring(), self.targets(method, purpose="training")
            ensemble = self.targets(method, purpose="analysis")
            decoders = target_report.target_decoders(partial, training, ensemble, how)
            target_report.score_target(partial, method, ensemble, self.splits.test, decoders, how, posteriors=True)

        return Stage(
            self.layout.combined_teachers(method),
            f"combined teachers ({method}) on the held-out speaker's speech",
            build=build,
            settings=self._target_settings(),
            inputs=[
                self.corpus_folder,
                self.decoding_model(),
                *(self.outputs(name, one) for name in self.target_teachers(method) for one in ("training", "analysis")),
                *([self.speaker_features()] if method == "weighted_similarity" else []),
            ],
            seed=self.params.seed,
        )

    @stage
    def logit_student(self) -> Stage:
        """Seed 003's student of logits alone, trained and scored; it needs every teacher."""
        fold, settings = self.but(aggregation={"missing": "strict"}), self.params.logit_student
        names = {name: self.teacher(name) for name in self.target_teachers()}
        if settings.heads == "decoder" and self.params.teacher.source == "stores":
            raise UserError(
                "logit_student.heads: over decoders it needs the teachers' models: stored decoder outputs have read "
                "the reference; write logit_student: {heads: ctc}, or teacher: {source: checkpoints}"
            )
        purposes = ("training",) if settings.heads == "decoder" else ("training", "analysis")

        def build(partial: Path) -> None:
            means = [fold.targets("logprob_mean", settings.heads, purpose) for purpose in purposes]
            models = [hybrid.load(folder)[0] for folder in names.values()] if settings.heads == "decoder" else ()
            outputs = logit_student.TeacherOutputs(*means, models=models, view=self.teacher_view)
            logit_student.train_and_score(partial, outputs, settings, self._scoring())

        return Stage(
            self.layout.logit_student,
            "logit student",
            build=build,
            settings=settings.model_dump()
            | {"blocks": self.params.blocks.model_dump(mode="json")}
            | self._teacher_input
            | self.params.scoring_identity
            | self.split_settings.identity
            | {"labels": labels.record(self.split_settings)},
            inputs=[
                self.corpus_folder,
                self.decoding_model(),
                *(self.outputs(name, purpose) for name in names for purpose in purposes),
                *(names.values() if settings.heads == "decoder" else ()),
            ],
            seed=self.params.seed,
        )

    # 04: students

    @recorded
    def resolved(self) -> Fold:
        """The fold as carried out: with the method that `auto` selects, and the heads that are trained.

        Seed 000's rule replaces decoder distillation across encoders by CTC distillation.
        """
        params = self.params
        if terms.uses_teachers(params.distill) and params.aggregation.method == "auto":
            method, why = self.best_method()
            print_once(why)
            params = params.but(aggregation={"method": method})
        if params.crosses_encoders and not params.distill.allow_decoder_kd:
            params = params.but(distill={"heads": "ctc"})
        return self if params is self.params else Fold(params, self._of_variant)

    @stage
    def preflight_checks(self, seed: int = 1) -> Stage:
        """The checks that apply to a student, before it is trained."""
        used = self.resolved
        return Stage(
            self.layout.preflight(seed, resumes=bool(self.params.student.resume)),
            f"preflight of {self.params.variant or 'the student'}",
            build=lambda partial: preflight.run_checks(partial, self._preflight_plan(), used._preflight_teachers(seed)),
            settings=used._student_settings() | {"asked": self.params.distill.heads},
            inputs=[*used._student_inputs(seed), *used._teachers_and_parents().values(), *used._control_scores(seed)],
        )

    def preflight(self, seed: int = 1) -> list[Check]:
        """The results of the preflight checks."""
        results = [checks.Check(**row) for row in read_json(self.preflight_checks(seed) / "checks.json")]
        for check in results:
            if check.verdict != checks.PASS:
                warn_in_log(f"preflight of {self.params.variant or 'the student'}: {check.name}: {check.reason}")
        return results

    @stage
    def student(self, seed: int = 1, watch: Watch | None = None) -> Stage:
        """The student of a seed, trained; `watch` is called with its curves at every validation."""
        used, name = self.resolved, self.params.variant

        def check() -> None:
            preflight.require(self.preflight(seed), self.params.distill.allow, name or "the student")

        return Stage(
            self.layout.student(seed),
            f"student {name or 'unnamed'}, seed {seed}",
            build=lambda partial: used.train_student(partial, seed, watch),
            settings=used._student_settings(),
            inputs=used._student_inputs(seed),
            seed=seed,
            before=check,
        )

    @stage
    def scores(self, seed: int = 1) -> Stage:
        """A student's scores on the held-out speaker; on the dev speaker in `dev/`."""
        folder, name = self.student(seed), self.params.variant

        def build(partial: Path) -> None:
            how, system = self._student_scoring(seed), hybrid.TrainedModel(folder, self.params.device)
            title, checkpoint = f"{name or 'student'}, seed {seed}", f"students/{name}/seed{seed}"
            student_scores.score_student(partial, system, title, checkpoint, how)

        return Stage(
            self.layout.student_scores(seed),
            f"scores of {name}, seed {seed}",
            build=build,
            settings=self.params.student_scoring_identity,
            inputs=[self.corpus_folder, folder, self.decoding_model(), *self._tokenizer_files()],
        )

    @stage
    def start_scores(self, seed: int) -> Stage:
        """A student before training, where it is not the pretrained model itself: on held-out and dev speech."""
        name = f"start of {self.params.variant}, seed {seed}"

        def build(partial: Path) -> None:
            model, record = self.initial_student(seed), self._start_record(seed)
            system = hybrid.TrainedModel.of(model, self.tokens, record, self.params.device)
            student_scores.score_student(partial, system, name, "", self._student_scoring())

        return Stage(
            self.layout.start_scores(seed),
            f"scores of the {name}",
            build=build,
            settings=self._student_settings() | self.params.student_scoring_identity,
            inputs=[*self._student_inputs(seed), self.decoding_model()],
            seed=seed,
        )

    @stage
    def ensemble(self, name: str) -> Stage:
        """The scores of an ensemble of the fold's students."""
        settings = self.params.ensemble(name)
        members = ensembles.find_members(
            lambda variant, seed: self.layout.student(seed, variant), self.params.held_out, settings
        )
        fold = self.but(**ensembles.members_labels(name, members))

        def build(partial: Path) -> None:
            system = averaging.EnsembleSystem(members, settings.average, self.params.device)
            ensembles.score_ensemble(partial, name, system, fold._student_scoring())

        return Stage(
            self.layout.ensemble(name),
            f"ensemble {name}",
            build=build,
            settings=self.params.student_scoring_identity
            | {"labels": fold.params.labels, "group": settings.model_dump(mode="json")},
            inputs=[self.corpus_folder, fold.decoding_model(), *dict.fromkeys(folder for folder, _ in members)],
        )


def teachers_of(folds: Sequence[Fold], share: str = "1/1") -> list[tuple[Fold, str]]:
    """A share of the teachers that folds use, each with the fold that makes it: shared ones are made once."""
    pairs: dict[object, tuple[Fold, str]] = {}
    for fold in folds:
        for name in fold.teacher_names():
            pairs.setdefault(fold.layout.teacher(name), (fold, name))
    return share_of(list(pairs.values()), share)
