"""The pipeline of a fold: every stage as one short method, in the order of the data.

    fold = Fold.load("params/demo.yaml", "M08", "ctc_kd")
    fold.baseline(), fold.teacher("F04"), fold.student(seed=1), fold.scores(seed=1)

A stage names its folder (`layout`), what it depends on, and its builder; a builder gets objects and its own settings,
and asks for nothing. What is up to date is not made again, what is missing is made first. The code that a stage
depends on is computed from its builder (`source_code`).
"""

import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from kdlib import source_code
from kdlib.console import print_once
from kdlib.corpus import labels, prepare
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import Splits
from kdlib.decode.lexicon import Lexicon
from kdlib.diagnose import collapse_study
from kdlib.diagnose.collapse_study import Case, StudentResults
from kdlib.distill import ensembles, faults, logit_student, preflight, setup, students
from kdlib.distill.checks import PASS, Check
from kdlib.distill.logit_student import TeacherOutputs
from kdlib.distill.preflight import Plan, Teachers
from kdlib.distill.setup import LATEST, Start, StudentData, StudentSetup
from kdlib.distill.student_scores import StudentScoring, score_student
from kdlib.distill.students import Watch
from kdlib.errors import UserError
from kdlib.evaluate import baseline
from kdlib.evaluate.decoder_setup import ARPA, DecoderSetup, build_language_model
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation
from kdlib.io import read_json, repository_root, resolve_path
from kdlib.layout import Layout
from kdlib.logits.extract import Extraction, Purpose, extract
from kdlib.logits.store import LogitStore
from kdlib.logits.teacher_scores import score_teacher
from kdlib.models import read_record
from kdlib.models.hybrid import TrainedModel
from kdlib.models.nemo_files import find_model, read_tokenizer
from kdlib.params import Params, load
from kdlib.pretrained import model as pretrained
from kdlib.pretrained import pieces
from kdlib.settings.corpus import CorpusSettings, SplitSettings
from kdlib.settings.pretrained import PretrainedSettings
from kdlib.stage import Stage, fingerprint, produce
from kdlib.targets import choice, fusion, similarity, target_report
from kdlib.targets.aggregation import TeacherEnsemble, Weighting
from kdlib.targets.choice import DEV_FITTED, CrossFitted, Evidence
from kdlib.targets.pseudo_labels import TeacherHypotheses
from kdlib.targets.target_report import TargetScoring
from kdlib.teachers import adapt, base_model
from kdlib.teachers.teacher_sets import requested_teachers, student_teachers
from kdlib.teachers.training import InitialModel
from kdlib.tokens import Tokens
from kdlib.training.sampling import set_aside

_checked: dict[Path, tuple[str, str]] = {}  # corpus folders that this process has checked -> identity and key


def stage(method: Callable[..., Stage]) -> Callable[..., Path]:
    """Make what a method describes unless it is up to date, and return its folder."""

    @functools.wraps(method)
    def made(fold: "Fold", *args, **kwargs) -> Path:
        return produce(method(fold, *args, **kwargs), code_of(method.__name__))

    return made


@functools.cache
def code_of(name: str) -> frozenset[str]:
    """The source files that a stage depends on."""
    return frozenset(source_code.closure(source_code.builder_modules("pipeline.py", "Fold", name)))


class Fold:
    """One fold of a recipe, under one of its variants."""

    def __init__(self, params: Params, of_variant: Callable[[str], Params] | None = None) -> None:
        self.params, self.layout, self._of_variant = params, Layout(params), of_variant
        self.split_settings = params.part(SplitSettings)
        self.corpus_settings = params.part(CorpusSettings)
        self.pretrained_settings = params.part(PretrainedSettings)

    @classmethod
    def load(
        cls,
        recipe: str | Path,
        held_out: str,
        variant: str = "",
        *,
        fold: dict | None = None,
        overrides: dict | None = None,
    ) -> "Fold":
        """Load a recipe's fold; an empty `fold` reads its fold file, `overrides` replace values of the recipe."""
        of_variant = functools.partial(load, recipe, held_out, fold, overrides)
        return cls(of_variant(variant), of_variant)

    def of(self, variant: str) -> "Fold":
        """The same fold under another variant."""
        return Fold(self._of_variant(variant), self._of_variant)

    def but(self, **sections) -> "Fold":
        """The same fold with other values of the recipe."""
        return Fold(self.params.but(**sections), self._of_variant)

    @cached_property
    def control(self) -> "Fold":
        """The same student without teachers."""
        return self.of(self.params.distill.control)

    @cached_property
    def all_labels(self) -> "Fold":
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
            pretrained.train(partial, data, characters, settings, seed)

        return Stage(
            self.layout.pretrained,
            f"pretraining for {self.params.held_out}" if own else "pretraining",
            build=build,
            settings=settings.model_dump(mode="json") | (fold | {"labels": self.params.labels} if own else {}),
            inputs=[self.corpus_folder],
            seed=seed,
        )

    def pretrained_model(self) -> Path:
        """The recipe's `.nemo` file: shipped, NVIDIA's, local, or trained on controls or on the fold's speakers."""
        if self.params.pretrained in ("controls", "from_corpus"):
            return self.pretraining() / pretrained.FILE
        return find_model(self.pretrained_settings)

    def pretrained_record(self) -> dict | None:
        """The training speakers and words of the pretrained model; None for NVIDIA's, which have no record."""
        source, embedded = self.params.pretrained, self.params.corpus == "synthetic"
        return pretrained.training_record(self.pretrained_model(), source, embedded)

    @stage
    def tokens_folder(self) -> Stage:
        """The one sentencepiece model of teachers and students."""
        settings, own = self.params.tokens, pieces.own_model(self.params.tokens)
        model = self.pretrained_model() if settings.source == "pretrained" else None

        def build(partial: Path) -> None:
            texts = self.all_labels.corpus.lexicon  # its word list; transcripts are not used
            pieces.build(partial, settings, self.lexicon, texts, model)

        return Stage(
            self.layout.tokens,
            "tokens",
            build=build,
            settings=settings.model_dump(mode="json"),
            inputs=[self.corpus_folder, *(path for path in (own, model) if path)],
        )

    @cached_property
    def tokens(self) -> Tokens:
        """The tokens of teachers and students."""
        return Tokens.for_teachers(self.tokens_folder() / pieces.FILE, self.params.tokens.size)

    @stage
    def language_model(self, tokens: Tokens | None = None, *, all_speakers: bool = False) -> Stage:
        """The language model of the fold's training texts, or of all speakers'; of pieces, by `tokens`."""
        settings, fold = self.params.search, self.all_labels if all_speakers else self
        own = self.split_settings.identity | {"labels": labels.record(self.split_settings)}

        def build(partial: Path) -> None:
            texts = fold.splits.speech_of_all() if all_speakers else fold.splits.train
            build_language_model(partial, texts, settings, tokens)

        name = f"pieces-{tokens.fingerprint}" if tokens else "words"
        return Stage(
            self.layout.language_model(name, all_speakers=all_speakers),
            "language model",
            build=build,
            settings={"order": settings.order, "units": settings.units, "blocks": self.params.blocks.train}
            | ({} if all_speakers else own),
            inputs=[self.corpus_folder],
        )

    def decoder_setup(self, tokens: Tokens | None = None, *, all_speakers: bool = False) -> DecoderSetup:
        """What decoders need, for the teachers' tokens or for others."""
        tokens = tokens or self.tokens
        model = self.language_model(tokens if self.params.search.units == "pieces" else None, all_speakers=all_speakers)
        return DecoderSetup(tokens, self.lexicon, model / ARPA, self.params.search)

    @stage
    def baseline(self) -> Stage:
        """The pretrained model on the held-out speaker."""
        fold, scoring = (
            self.all_labels,
            self.params.scoring,
        )  # one pretrained on the fold's speakers had all transcripts
        model = self.pretrained_model()
        decoding = fold.decoder_setup(Tokens.for_nemo(read_tokenizer(model)))

        def build(partial: Path) -> None:
            own = self.params.pretrained == "from_corpus"
            words = frozenset(self.pretrained_record()["words"]) if own else fold.splits.train_words
            baseline.score_held_out(partial, model, fold.splits, words, decoding, scoring)

        return Stage(
            self.layout.baseline,
            "baseline",
            build=build,
            settings=self._scoring_settings()
            | self.split_settings.identity
            | {"blocks": self.params.blocks.model_dump(mode="json")},
            inputs=[self.corpus_folder, model, decoding.language_model.parent],
        )

    @stage
    def zero_shot(self) -> Stage:
        """The pretrained model on the test blocks of all speakers unseen in its training, controls separately."""
        fold, scoring, own = self.all_labels, self.params.scoring, self.params.pretrained == "from_corpus"
        model = self.pretrained_model()
        decoding = fold.decoder_setup(Tokens.for_nemo(read_tokenizer(model)), all_speakers=not own)

        def build(partial: Path) -> None:
            baseline.score_others(partial, model, fold.splits, self.pretrained_record(), decoding, scoring)

        return Stage(
            self.layout.zero_shot,
            "zero-shot scores",
            build=build,
            settings=self._scoring_settings() | {"blocks": self.params.blocks.model_dump(mode="json")},
            inputs=[self.corpus_folder, model, decoding.language_model.parent],
        )

    # 02: teachers

    def teacher_names(self, speakers: Sequence[str] | str = ()) -> list[str]:
        """The requested teachers: by default the fold's; names; "all"; or a share: "1/2", "1/2 of all"."""
        return requested_teachers(self.splits, self.params.teacher, speakers)

    def base_model(self) -> Path | None:
        """The folder of the base model; None where each teacher starts from scratch or from the checkpoint."""
        settings = self.params.teacher
        if settings.parent == "none":
            return None
        if settings.parent == "shipped" and settings.backbone == "sb":
            return base_model.shipped_base_model(settings, self.tokens)
        return self.trained_base_model()

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
            base_model.train_base_model(partial, self._new_teacher(), data, settings, fold)

        unused = {"adapt", "dev_share", "max_teachers", "students", "student_seeds"}
        speech = (
            fold.identity | {"blocks": fold.blocks.train, "dev_share": settings.dev_share} | self._labels()
            if own
            else self.params.pretraining.model_dump(include={"test_controls", "unseen_words"})
            | (fold.identity if self.params.base_model_per_fold else {})
        )
        return Stage(
            self.layout.base_model,
            f"base model of the teachers ({settings.family})",
            build=build,
            settings=settings.model_dump(mode="json", exclude=unused) | speech,
            inputs=[self.corpus_folder, self.tokens_folder(), *self._nemo_encoder()],
            seed=fold.seed,
        )

    def teacher(self, name: str) -> Path:
        """The folder of a teacher: of a speaker, or one of the fold's students (born again: Furlanello et al. 2018)."""
        if self.params.teacher.backbone != "students":
            return self.speaker_teacher(name)
        folder = self.layout.teacher(name)
        if not (folder / "model.json").is_file():
            variant, seed = name.split("/seed")
            raise UserError(
                f"teacher.students: there is no student {variant!r} of seed {seed} in {folder}; train it first: make "
                f"compare HELD_OUT={self.params.held_out} VARIANTS={variant} SEEDS={seed}"
            )
        return folder

    @stage
    def speaker_teacher(self, speaker: str) -> Stage:
        """A speaker's teacher, adapted from the base model."""
        settings, base = self.params.teacher, self.base_model()

        def build(partial: Path) -> None:
            start = base_model.saved_model(base) if base else self._new_teacher()
            adapt.train_speaker_teacher(partial, speaker, self.splits, settings, start)

        unused = {"base_training", "max_teachers", "students", "student_seeds"}
        return Stage(
            self.layout.teacher(speaker),
            f"teacher {speaker}",
            build=build,
            settings=settings.model_dump(mode="json", exclude=unused)
            | {"blocks": self.params.blocks.train, "of": speaker}
            | self._labels(),
            inputs=[
                self.corpus_folder,
                self.tokens_folder(),
                *([base / "model.json", base / "model.safetensors"] if base else []),
                *self._nemo_encoder(),
            ],
            seed=self.params.seed,
        )

    def _new_teacher(self) -> InitialModel:
        """The model that the base model, or a teacher without one, starts from."""
        settings, seed = self.params.teacher, self.params.seed
        if settings.backbone == "sb":
            return base_model.initial_model(settings, self.tokens, seed, None)
        speakers = (self.pretrained_record() or {"speakers": ()})["speakers"]
        return base_model.initial_model(settings, self.tokens, seed, self.pretrained_model(), speakers)

    def _nemo_encoder(self) -> list[Path]:
        """The pretrained model, where the teachers have its encoder."""
        return [self.pretrained_model()] if self.params.teacher.backbone == "nemo" else []

    # 03: their outputs, and the targets

    @stage
    def outputs(self, name: str, purpose: Purpose) -> Stage:
        """A teacher's outputs on training speech or, for analysis, on the test blocks: shared where teachers are."""
        encoding, blocks, shared = (
            self.params.aggregation.encoding,
            self.params.blocks,
            not self.params.teachers_per_fold,
        )
        teacher = self.teacher(name)

        def build(partial: Path) -> None:
            utterances = [*self.splits.train, *self.splits.unlabelled]
            if shared or purpose == "analysis":
                utterances = self.splits.speech_of_all(test=purpose == "analysis")
            job = Extraction(name, purpose, encoding)
            extract(partial, TrainedModel(teacher), utterances, self.lexicon, job)

        settings = {"encoding": encoding, "purpose": purpose}
        settings |= {"blocks": blocks.train if purpose == "training" else blocks.test}
        return Stage(
            self.layout.outputs(name, purpose),
            f"outputs of {name} for {purpose}",
            build=build,
            settings=settings | ({} if shared else self.split_settings.identity | self._labels()),
            inputs=[self.corpus_folder, teacher],
        )

    def store(self, name: str, purpose: Purpose, output: str = "ctc") -> LogitStore:
        """A teacher's stored outputs."""
        if output == "decoder" and not read_record(self.teacher(name))["heads"]["layers"]:
            raise UserError(
                f"teacher {name} has no decoder, only CTC outputs; write distill: {{heads: ctc}}, or name teachers "
                "with a decoder"
            )
        return LogitStore(self.outputs(name, purpose) / output)

    @stage
    def teacher_scores(self, name: str) -> Stage:
        """A teacher's scores on the test blocks of all speakers, without its training utterances."""
        outputs, settings, shared = (
            self.outputs(name, "analysis"),
            self.params.teacher,
            not self.params.teachers_per_fold,
        )
        decoding = self.decoder_setup(all_speakers=shared)

        def build(partial: Path) -> None:
            of_students = settings.backbone == "students"
            train = self.splits.train if of_students else adapt.speaker_data(self.splits, settings, name).train
            ids, words = {utt.utt_id for utt in train}, {utt.text for utt in train}
            test = [utt for utt in self.splits.speech_of_all(test=True) if utt.utt_id not in ids]
            has_decoder = read_record(self.teacher(name))["heads"]["layers"] > 0
            decoders = decoding.decoders(more=("attention",) if has_decoder else ())
            level, seen = self.corpus.level, lambda utt: utt.text in words
            evaluation = Evaluation(decoders, f"scores of {name}", self.params.scoring, level, seen)
            about = About(f"teacher {name}", "", f"teachers/{settings.family}/{name}", decoding.record(decoders))
            score_teacher(partial, outputs, test, evaluation, about)

        return Stage(
            self.layout.teacher_scores(name),
            f"scores of {name}",
            build=build,
            settings=self._scoring_settings() | {"blocks": self.params.blocks.train},
            inputs=[self.corpus_folder, outputs, decoding.language_model.parent],
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

    def target_teachers(self, method: str = "") -> list[str]:
        """The teachers that the fold averages under a method: all, or those of the held-out speaker's level."""
        settings = self.params.teacher
        if settings.backbone == "students":
            return student_teachers(settings)
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
        evidence = Evidence(
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
        return self._combined(names, Weighting(missing="all"), "ctc", self._fusion_purpose)

    @property
    def _fusion_purpose(self) -> Purpose:
        return "analysis" if self.params.fold.dev else "training"

    def _accuracies(self, names: Sequence[str], half: int | None = None) -> dict[str, float]:
        """Greedy CTC accuracy of teachers on the fold's dev speaker; without one, on their own dev blocks."""
        if dev := self.params.fold.dev:
            return choice.dev_accuracies({name: self.teacher_scores(name) for name in names}, dev, half)
        return choice.own_accuracies({name: read_record(self.teacher(name)) for name in names})

    @stage
    def fusion(self, kind: str) -> Stage:
        """A fusion trained on the dev speaker's test blocks; without dev speaker, on set-aside training speech."""
        names, steps, seed = self.target_teachers(kind), self.params.aggregation.fusion_steps, self.params.seed

        def build(partial: Path) -> None:
            dev = self.splits.dev or set_aside(self.splits.train, self.params.teacher.dev_share, seed).dev
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
    def target_report(self) -> Stage:
        """Every method's targets, decoded and scored on training and on dev speech."""
        names, methods = self.target_teachers(), choice.methods(self.params.teacher)
        how = TargetScoring(self.splits, self.decoder_setup(), self.params.scoring)

        def target(method: str, speech: str) -> TeacherEnsemble | CrossFitted:
            purpose = "analysis" if speech == "dev" else "training"
            if speech == "dev" and method in DEV_FITTED:
                return CrossFitted([self.targets(method, purpose=purpose, half=1 - half) for half in (0, 1)])
            return self.targets(method, purpose=purpose)

        def build(partial: Path) -> None:
            target_report.build_report(partial, methods, target, how)

        return Stage(
            self.layout.target_report,
            "target report",
            build=build,
            settings=self._target_settings(),
            inputs=[
                self.corpus_folder,
                *(self.outputs(name, purpose) for name in names for purpose in ("training", "analysis")),
                *([self.speaker_features()] if "weighted_similarity" in methods else []),
            ],
            seed=self.params.seed,
        )

    def best_method(self) -> tuple[str, str]:
        """The method that `auto` selects on the dev speaker, and why."""
        methods, dev = choice.methods(self.params.teacher), self.params.fold.dev
        folder = self.target_report() if dev else Path()
        return target_report.best_method(folder, methods, dev, self.params.distill.heads, self.params.scoring.measure)

    def combined_teachers(self) -> Path | None:
        """Scores of the combined teachers on the held-out speaker's speech; None without such teachers."""
        if not self.params.distill.uses_teachers or self.params.teacher.backbone == "students":
            return None
        method = self.params.aggregation.method
        method = self.best_method()[0] if method == "auto" else method
        return self.combined_teacher_scores("logprob_mean" if method == "weighted_loss" else method)

    @stage
    def combined_teacher_scores(self, method: str) -> Stage:
        """The combined teachers on the held-out speaker's test speech: for inspection, not a target."""
        how = TargetScoring(self.splits, self.decoder_setup(), self.params.scoring)

        def build(partial: Path) -> None:
            ensemble = self.targets(method, purpose="analysis")
            target_report.score_target(partial, method, ensemble, self.splits.test, how, posteriors=True)

        return Stage(
            self.layout.combined_teachers(method),
            f"combined teachers ({method}) on the held-out speaker's speech",
            build=build,
            settings=self._target_settings(),
            inputs=[
                self.corpus_folder,
                *(self.outputs(name, "analysis") for name in self.target_teachers(method)),
                *([self.speaker_features()] if method == "weighted_similarity" else []),
            ],
            seed=self.params.seed,
        )

    @stage
    def logit_student(self) -> Stage:
        """Seed 003's student of logits alone, trained and scored; it needs every teacher."""
        fold = self.but(aggregation={"missing": "strict"})
        decoding, purposes = self.decoder_setup(), ("training", "analysis")

        def build(partial: Path) -> None:
            outputs = TeacherOutputs(*(fold.targets("logprob_mean", purpose=purpose) for purpose in purposes))
            settings, scoring = self.params.logit_student, self.params.scoring
            logit_student.train_and_score(partial, outputs, self.splits, settings, decoding, scoring)

        return Stage(
            self.layout.logit_student,
            "logit student",
            build=build,
            settings=self.params.logit_student.model_dump()
            | self._scoring_settings()
            | self.split_settings.identity
            | {"labels": labels.record(self.split_settings)},
            inputs=[
                self.corpus_folder,
                decoding.language_model.parent,
                *(self.outputs(name, purpose) for name in self.target_teachers() for purpose in purposes),
            ],
            seed=self.params.seed,
        )

    # 04: students

    @cached_property
    def resolved(self) -> "Fold":
        """The fold as carried out: with the method that `auto` selects, and the heads that are trained.

        Seed 000's rule replaces decoder distillation across encoders by CTC distillation.
        """
        params = self.params
        if params.distill.uses_teachers and params.aggregation.method == "auto":
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
            inputs=used._student_inputs(seed),
        )

    def preflight(self, seed: int = 1) -> list[Check]:
        """The results of the preflight checks."""
        return [Check(**row) for row in read_json(self.preflight_checks(seed) / "checks.json")]

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

    def train_student(self, partial: Path, seed: int, watch: Watch | None = None, *, alone: bool = False) -> None:
        """Train a student; on several devices in a process of its own (`alone`), which Lightning starts for each."""
        if self.params.student.devices == 1 or alone:
            return students.train_student(partial, self.student_setup(seed), watch)
        (partial / "params.json").write_text(self.params.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "kdlib", "train-process", str(partial), str(seed)]
        if status := subprocess.run(command, cwd=repository_root(), check=False).returncode:
            raise UserError(
                f"student {self.params.variant}, seed {seed}: training on several devices ended with {status}"
            )
        (partial / "params.json").unlink()
        return None

    def student_setup(self, seed: int) -> StudentSetup:
        """All that a student is trained with."""
        params, start = self.params, self._start(seed)
        model = setup.initial_student(params.student, self.tokens, start, seed, params.faults)
        targets = {output: self._student_targets(output) for output in params.distill.outputs}
        return StudentSetup(
            name=params.variant,
            seed=seed,
            settings=params.student,
            distill=params.distill,
            fold=self.split_settings,
            tokens=self.tokens,
            data=self.student_data(),
            start=start,
            model=model,
            targets=targets,
            hypotheses=self._hypotheses(targets),
            judge=self._judge(),
        )

    def student_data(self) -> StudentData:
        """The student's training speech, and the dev speech that chooses its checkpoint."""
        params = self.params
        uses_teachers, share = params.distill.uses_teachers, params.teacher.dev_share
        return setup.select_data(self.splits, self.tokens, params.faults, uses_teachers=uses_teachers, dev_share=share)

    def teacher_hypotheses(self) -> TeacherHypotheses | None:
        """The teachers' hypotheses that the student is trained on, if it is."""
        return self._hypotheses({output: self._student_targets(output) for output in self.params.distill.outputs})

    def _student_targets(self, output: str) -> TeacherEnsemble:
        """The targets of training speech, with the recipe's faults."""
        return faults.apply_faults(self.params.faults, self.targets(output=output), self.splits.train, self.params.seed)

    def _hypotheses(self, targets: dict[str, TeacherEnsemble]) -> TeacherHypotheses | None:
        distill = self.params.distill
        if not (distill.uses_teachers and distill.uses_hypotheses):
            return None
        setup.check_lexicon(distill, self.lexicon, bool(self.params.labels))
        beam = self.decoder_setup().beam_search() if self.params.needs_beam else None
        return TeacherHypotheses(targets["ctc"], Lexicon(self.lexicon, self.tokens), self.tokens, beam)

    def _judge(self) -> TeacherEnsemble | None:
        """The teachers' outputs on dev speech, where the best checkpoint is the one closest to them (a fault)."""
        if self.params.faults.choose_by == "wra" or not self.params.distill.uses_teachers:
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
            return Start(resumed=folder, train_speakers=record["train_speakers"], head_is_trained=True)
        if settings.backbone == "nemo":
            path, record = self.pretrained_model(), self.pretrained_record() or {"speakers": ()}
            same = read_tokenizer(path) == self.tokens.model
            return Start(nemo=path, train_speakers=record["speakers"], head_is_trained=same)
        if settings.start == "pretrained":
            folder = self._sb_base_model()
            speakers = read_record(folder)["train_speakers"]
            return Start(base=folder, train_speakers=speakers, head_is_trained=True)
        return Start(shape=setup.conformer_shape(settings.conformer or self.params.teacher))

    def resumed_from(self, seed: int) -> Path | None:
        """The folder of the student whose training this one continues; None without `student.resume`."""
        name, variants = self.params.student.resume, self.params.variants
        if not name:
            return None
        is_variant = all(part in variants for part in name.split("+"))
        folder = self.layout.student(seed, name) if is_variant else resolve_path(name)
        if not (folder / LATEST).is_file():
            raise UserError(
                f"student.resume: there is no student in {folder} (no {LATEST}); train it first, or name a variant of "
                f"this recipe ({', '.join(variants)}) or the folder of a student"
            )
        return folder

    def _sb_base_model(self) -> Path:
        """The base model of the SpeechBrain teachers, from which a SpeechBrain student starts."""
        folder = self.but(teacher={"backbone": "sb"}).base_model()
        if folder is None:
            raise UserError(
                "student: a SpeechBrain student starts from the teachers' base model, but teacher.parent is 'none'; "
                "write student: {start: scratch}, or teacher: {parent: controls}"
            )
        return folder

    def _preflight_plan(self) -> Plan:
        params, used = self.params, self.resolved.params.distill
        return Plan(
            splits=self.splits,
            tokens=self.tokens,
            data=self.student_data(),
            requested=params.distill,
            used=used,
            faults=params.faults,
            text_of=self._text_of(),
            switched=params.crosses_encoders,
        )

    def _preflight_teachers(self, seed: int) -> Teachers | None:
        if not self.params.distill.uses_teachers:
            return None
        names, output = self.target_teachers(self.params.aggregation.method), self.params.distill.outputs[0]
        return Teachers(
            stores={name: self.store(name, "training", output) for name in names},
            folders={name: self.teacher(name) for name in names},
            setup=lambda: self.student_setup(seed),
        )

    def _text_of(self):
        """The function that decodes token ids to text, where the recipe's decoding is a fault."""
        return faults.text_decoder(self.params.faults, self.tokens, self.lexicon)

    @stage
    def scores(self, seed: int = 1) -> Stage:
        """A student's scores on the held-out speaker; on the dev speaker in `dev/`."""
        folder, name = self.student(seed), self.params.variant
        how = self._student_scoring()

        def build(partial: Path) -> None:
            title, checkpoint = f"{name or 'student'}, seed {seed}", f"students/{name}/seed{seed}"
            score_student(partial, TrainedModel(folder), title, checkpoint, how)

        return Stage(
            self.layout.student_scores(seed),
            f"scores of {name}, seed {seed}",
            build=build,
            settings=self._scoring_settings(),
            inputs=[self.corpus_folder, folder, *faults.tokenizer_files(self.params.faults)],
        )

    @stage
    def ensemble(self, name: str) -> Stage:
        """The scores of an ensemble of the fold's students."""
        settings = ensembles.ensemble_settings(self.params.ensembles, name)
        members = ensembles.find_members(
            lambda variant, seed: self.layout.student(seed, variant), self.params.held_out, settings
        )
        fold = self.but(**ensembles.members_labels(name, members))
        how = fold._student_scoring()
        return Stage(
            self.layout.ensemble(name),
            f"ensemble {name}",
            build=lambda partial: ensembles.score_ensemble(partial, name, members, settings, how),
            settings=self._scoring_settings()
            | {"labels": fold.params.labels, "group": settings.model_dump(mode="json")},
            inputs=[self.corpus_folder, *dict.fromkeys(folder for folder, _ in members)],
        )

    def _student_scoring(self) -> StudentScoring:
        params = self.params
        return StudentScoring(self.splits, self.decoder_setup(), params.scoring, params.faults, self._text_of())

    def systems(self, seed: int = 1) -> dict[str, Path]:
        """The scores of the pretrained model, of the control and of the student."""
        folds = {fold.params.variant: fold for fold in (self.control, self)}
        return {"pretrained": self.baseline()} | {name: fold.scores(seed) for name, fold in folds.items()}

    # 05: what is wrong

    def examination(self, seed: int = 1) -> Case:
        """Examine a student's hypotheses on the held-out speaker's test speech, with the record of its training."""
        scores, used = self.scores(seed), self.resolved
        results = StudentResults(
            variant=self.params.variant,
            seed=seed,
            cause=collapse_study.causes_of(used.params.faults, used.params.distill),
            scores=scores,
            decoder=collapse_study.examined_decoder(used.params.faults, used.params.distill),
            tokens=self.tokens,
            vocabulary=list(self.lexicon),
            training=[utt.text for utt in self.student_data().train if utt.text],
            teachers=used.combined_teachers(),
            checks=tuple(check.name for check in self.preflight(seed) if check.verdict != PASS),
        )
        return collapse_study.examine_student(results)

    # what stages depend on

    def _labels(self) -> dict:
        """Which utterances are labelled, where some are not."""
        settings = self.split_settings
        if not settings.labels:
            return {}
        return {"labels": labels.record(settings) | {"use_unlabelled_held_out": settings.use_unlabelled_held_out}}

    def _scoring_settings(self) -> dict:
        params = self.params
        settings = {"scoring": params.scoring.model_dump(), "search": params.search.model_dump(mode="json")}
        return settings | ({"faults": params.faults.model_dump(exclude_defaults=True)} if params.faults.named else {})

    def _target_settings(self) -> dict:
        return self._scoring_settings() | {
            "aggregation": self.params.aggregation.model_dump(exclude={"method"}),
            "labels": labels.record(self.split_settings),
            "fold": self.params.fold.model_dump(mode="json"),
        }

    def _student_settings(self) -> dict:
        """The settings that a student depends on; those of teachers only where the loss uses them."""
        params, uses_teachers = self.params, self.params.distill.uses_teachers
        excluded = {"accelerator"} if params.student.keep_checkpoints > 1 else {"accelerator", "keep_checkpoints"}
        hard = {"beta", "heads", "ctc_weight", "label_smoothing", "ctc_smoothing", "intermediate"}
        settings = self.split_settings.identity | {
            "student": params.student.model_dump(mode="json", exclude=excluded),
            "distill": params.distill.model_dump(
                mode="json", include=None if uses_teachers else hard, exclude={"allow", "control", "allow_decoder_kd"}
            ),
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
        if params.student.backbone == "sb":
            settings["shape"] = vars(setup.conformer_shape(params.student.conformer or params.teacher))
        if params.fold.dev is None:
            settings |= {"dev_share": params.teacher.dev_share, "split": params.seed}
        return settings

    def _student_inputs(self, seed: int) -> list[Path]:
        """The files and folders that a student depends on."""
        params, settings = self.params, self.params.student
        inputs = [self.corpus_folder, self.tokens_folder()]
        if folder := self.resumed_from(seed):
            inputs += [folder / LATEST]
        elif settings.backbone == "nemo":
            inputs += [self.pretrained_model()]
        elif settings.start == "pretrained":
            inputs += [self._sb_base_model() / "model.safetensors"]
        if not params.distill.uses_teachers:
            return inputs
        method = params.aggregation.method
        names = self.target_teachers(method)
        inputs += [self.outputs(name, "training") for name in names]
        if params.faults.choose_by == "kl":
            inputs += [self.outputs(name, "analysis") for name in names]
        if method == "weighted_similarity":
            inputs += [self.speaker_features()]
        if params.needs_beam:
            inputs += [self.language_model(self.tokens if params.search.units == "pieces" else None) / ARPA]
        if method in DEV_FITTED and params.fold.dev:
            inputs += [self.teacher_scores(name) for name in names]
        return inputs
