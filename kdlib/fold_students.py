"""The objects of a fold's students: what they start from, their targets, and what their stages depend on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib import runtime
from kdlib.corpus import labels
from kdlib.errors import UserError
from kdlib.fold_adaptation import AdaptationObjects
from kdlib.fold_objects import weight_files
from kdlib.io import read_json, repository_root, resolve_path
from kdlib.models import read_record
from kdlib.models.encoders import ENCODERS
from kdlib.objectives import terms
from kdlib.settings.encoder import EncoderSizes
from kdlib.settings.targets import DEV_FITTED
from kdlib.source_code import lazy

if TYPE_CHECKING:
    from kdlib.decode.lexicon import Lexicon
    from kdlib.distill.preflight import Plan, Teachers
    from kdlib.distill.setup import StudentData, StudentSetup
    from kdlib.distill.student_scores import StudentScoring
    from kdlib.distill.students import Watch
    from kdlib.evaluate.fold_scores import FoldScoring
    from kdlib.models.hybrid import Hybrid
    from kdlib.pretrained.start import Start
    from kdlib.targets.aggregation import TeacherEnsemble
    from kdlib.targets.pseudo_labels import TeacherHypotheses

# Imported when they are used: torch and its companions take seconds.
adaptation = lazy("kdlib.distill.adaptation")
aggregation = lazy("kdlib.targets.aggregation")
beam = lazy("kdlib.decode.beam")
calibration = lazy("kdlib.decode.calibration")
faults = lazy("kdlib.distill.faults")
fold_scores = lazy("kdlib.evaluate.fold_scores")
hybrid = lazy("kdlib.models.hybrid")
lexicon = lazy("kdlib.decode.lexicon")
live = lazy("kdlib.targets.live")
lm = lazy("kdlib.decode.lm")
nemo_files = lazy("kdlib.models.nemo_files")
parent_scores = lazy("kdlib.teachers.parent_scores")
preflight = lazy("kdlib.distill.preflight")
pseudo_labels = lazy("kdlib.targets.pseudo_labels")
setup = lazy("kdlib.distill.setup")
start = lazy("kdlib.pretrained.start")
student_scores = lazy("kdlib.distill.student_scores")
students = lazy("kdlib.distill.students")
difficulty = lazy("kdlib.targets.difficulty")
target_report = lazy("kdlib.targets.target_report")


class StudentObjects(AdaptationObjects):
    """One fold of a recipe, under one of its variants: with its students."""

    def student_setup(self, seed: int) -> StudentSetup:
        """All that a student is trained with."""
        params, first, model = self.params, self._start(seed), self.initial_student(seed)
        targets, hypotheses = self._sources()
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
            hypotheses=hypotheses,
            lexicon=self._words_of_loss(),
            device=runtime.torch_device(params.device),
            difficulty=self._difficulty(),
            tempo=self._tempo(),
            measure=params.scoring.measure,
            judge=self._judge(),
        )

    def initial_student(self, seed: int) -> Hybrid:
        """The student before training."""
        params = self.params
        return setup.initial_student(params.student, self.tokens, self._start(seed), seed, params.faults)

    def train_student(self, partial: Path, seed: int, watch: Watch | None = None, *, alone: bool = False) -> dict:
        """Train a student; on several devices in a process of its own (`alone`), which Lightning starts for each."""
        if self.params.adapt:
            return adaptation.adapt_student(partial, self.adaptation_setup(seed), watch)
        if self.params.student.devices == 1 or alone:
            return students.train_student(partial, self.student_setup(seed), watch)
        (partial / "params.json").write_text(self.params.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "kdlib", "train-process", str(partial), str(seed)]
        if status := subprocess.run(command, cwd=repository_root(), check=False).returncode:
            raise UserError(
                f"student {self.params.variant}, seed {seed}: training on several devices ended with {status}"
            )
        (partial / "params.json").unlink()
        return {"passes": read_record(partial)["passes"]}

    def student_data(self) -> StudentData:
        """The student's training speech, and the dev speech that chooses its checkpoint."""
        distill, share = self.params.distill, self.params.teacher.dev_share
        unlabelled = terms.uses_teachers(distill) or terms.needs(distill, "unlabelled")
        how = {"unlabelled": unlabelled, "dev_share": share, "frame_s": self.frame_s(self.params.student.encoder)}
        return setup.select_data(self.splits, self.tokens, self.params.faults, **how)

    def _difficulty(self) -> dict[str, float]:
        """The difficulty of the training speech, for a curriculum."""
        curriculum, method = self.params.student.curriculum, self.params.aggregation.method
        if not curriculum:
            return {}

        def outputs() -> list[Path]:
            return [self.outputs(name, "training") for name in self.target_teachers(method)]

        speech = self.splits.train + self.splits.unlabelled
        return difficulty.of_speech(curriculum.by, speech, self.tokens, self.targets, outputs)

    @property
    def _asks_teachers(self) -> bool:
        """True if a student depends on its teachers' outputs: by its loss, or by its curriculum."""
        curriculum = self.params.student.curriculum
        return terms.uses_teachers(self.params.distill) or bool(curriculum and curriculum.by != "length")

    def _student_targets(self, output: str) -> TeacherEnsemble:
        """The targets of training speech, with the recipe's faults."""
        return faults.apply_faults(self.params.faults, self.targets(output=output), self.splits.train, self.params.seed)

    def _sources(self) -> tuple[dict[str, TeacherEnsemble], TeacherHypotheses | None]:
        """The targets by output, of stores or of teachers that run in every step, and the teachers' hypotheses."""
        stored = {output: self._student_targets(output) for output in terms.outputs(self.params.distill)}
        hypotheses = self._hypotheses(stored)
        if not (stored and self.params.distill.live_teachers):
            return stored, hypotheses
        if self.params.faults.named or self._teacher_input:
            raise UserError("distill.live_teachers: faults, and teacher.input, need stored outputs; write false")
        names = next(iter(stored.values())).stores
        layers = tuple(sorted(set(self.params.distill.layers.values())))
        models = {name: live.LiveModel(hybrid.load(self.teacher(name))[0], layers) for name in names}
        return {output: live.live_ensemble(one, models) for output, one in stored.items()}, hypotheses

    def _hypotheses(self, targets: dict[str, TeacherEnsemble]) -> TeacherHypotheses | None:
        distill = self.params.distill
        if not terms.needs(distill, "texts"):
            return None
        setup.check_lexicon(distill, self.lexicon, bool(self.params.labels))
        search, params = None, self.params
        calibrators = calibration.load(self.word_calibration() / calibration.FILE) if self._needs_words else {}
        for name, one in calibrators.items():
            one.check(self.tokens, self.split_settings.excluded_speakers, f"calibration of {name}")
        if self._needs_beam:
            search = beam.recipe_search(params.search, self.tokens, self.lexicon, self.decoding_model() / lm.ARPA)
        words, pooled = lexicon.Lexicon(self.lexicon, self.tokens), distill.words.pooled
        recordings = targets["ctc"].covered(self.splits.train) if pooled else ()
        return pseudo_labels.TeacherHypotheses(targets["ctc"], words, self.tokens, search, calibrators, recordings)

    @property
    def _needs_beam(self) -> bool:
        """True if the teachers' texts come from beam search."""
        distill = self.params.distill
        return terms.uses_teachers(distill) and terms.text_source(distill)[0] == "beam"

    @property
    def _needs_words(self) -> bool:
        """True if the teachers' words of the closed lexicon are targets, and these are calibrated."""
        distill = self.params.distill
        words = distill.words.weight or terms.text_source(distill)[0] == "lexicon"
        used = terms.uses_teachers(distill) and terms.needs(distill, "texts") and words
        return bool(used) and self.params.calibration.form != "none"

    def _words_of_loss(self) -> Lexicon | None:
        """The closed lexicon, where the loss, or the choice of checkpoints, is among its words."""
        chooses = self.params.student.choose_by == "words"
        setup.check_lexicon(self.params.distill, self.lexicon, bool(self.params.labels), chooses=chooses)
        needed = terms.needs(self.params.distill, "lexicon") or chooses
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
        if self.params.adapt:
            return self._adaptation_start(seed)
        if folder := self.resumed_from(seed):
            record = read_record(folder)
            setup.check_resumed(folder, record, settings, self.tokens, self.split_settings)
            return start.Start(resumed=folder, train_speakers=record["train_speakers"], head_is_trained=True)
        if settings.start == "scratch":
            return start.Start(sizes=settings.sizes or self.params.teacher, inputs=self.corpus_settings.inputs)
        source = self._pretrained_student()
        if not ENCODERS[settings.encoder].checkpoint:
            speakers = read_record(source)["train_speakers"]
            return start.Start(pretrained=source, train_speakers=speakers, head_is_trained=True)
        speakers = (self.pretrained_record() or {"speakers": ()})["speakers"]
        same = nemo_files.read_tokenizer(source) == self.tokens.model
        return start.Start(pretrained=source, train_speakers=speakers, head_is_trained=same)

    def start(self, seed: int = 1) -> Path | None:
        """The scores of what a student starts from; None where its head is random."""
        if self.params.adapt:
            return self.of(self.params.adapt.start).scores(seed)
        first = self._start(seed)
        if not first.head_is_trained:
            return None
        is_pretrained = first.pretrained and ENCODERS[self.params.student.encoder].checkpoint
        return self.baseline() if is_pretrained else self.start_scores(seed)

    def _start_record(self, seed: int) -> dict:
        """Which heads of a student are trained before its training."""
        heads = read_record(folder)["heads_trained"] if (folder := self.resumed_from(seed)) else ["ctc"]
        return {"heads_trained": heads, "variant": f"start of {self.params.variant}", "seed": seed}

    def resumed_from(self, seed: int) -> Path | None:
        """The folder of the student whose training this one continues; None without `student.resume`."""
        name, variants = self.params.student.resume, self.params.variants
        if not name:
            return None
        folder = self.layout.student(seed, name) if self.params.resumes_variant else resolve_path(name)
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
        params, output = self.params, terms.outputs(self.params.distill)[0]
        names = self.target_teachers(params.aggregation.method)
        return preflight.Teachers(
            stores={name: self.store(name, "training", output) for name in names},
            folders={name: self.teacher(name) for name in names if params.teacher.source != "stores"},
            setup=lambda: self.but(distill={"live_teachers": False}).student_setup(seed),  # it checks the stores
            gains=parent_scores.read_gains(self._teachers_and_parents()),
            on_dev=(lambda: self.targets(purpose="analysis")) if self.splits.dev and not self.own_recordings else None,
            control_on_dev=self._control_on_dev(seed),
            measure=params.scoring.measure,
            view=self.teacher_view,
        )

    def _control_scores(self, seed: int) -> list[Path]:
        """The scores of the control on dev speech, if it was trained."""
        path = self.layout.student_scores(seed, self.params.distill.control) / "dev" / "scores.json"
        return [path] if path.is_file() and self.params.distill.control != self.params.variant else []

    def _control_on_dev(self, seed: int) -> float | None:
        """WRA, or 1 - WER, of the control on dev speech, greedily."""
        for path in self._control_scores(seed):
            if result := read_json(path)["decoders"].get("greedy"):
                return 1 - result["wer"] if self.params.scoring.measure == "wer" else result["wra"]
        return None

    def _teachers_and_parents(self) -> dict[str, Path]:
        """The scores of the averaged teachers beside their parent's."""
        taught = terms.uses_teachers(self.params.distill)
        return self.with_parents(self.target_teachers(self.params.aggregation.method)) if taught else {}

    def _text_of(self):
        return faults.text_decoder(self.params.faults, self.tokens, self.lexicon)

    def _tokenizer_files(self) -> list[Path]:
        """The tokenizer that evaluation decodes with, where that is a fault."""
        return faults.tokenizer_files(self.params.faults) if self.params.faults.decode_tokenizer else []

    def _scoring(self) -> FoldScoring:
        return fold_scores.FoldScoring(self.splits, self.decoder_setup(), self.params.scoring)

    def _student_scoring(self, seed: int = 0) -> StudentScoring:
        """What a student is scored with; one that was adapted has another model for dev speech."""
        decoding, params = self.decoder_setup(), self.params
        about = self.splits, decoding, params.scoring, params.faults, self._text_of()
        return student_scores.StudentScoring(*about, self._adapted_words(), self._dev_model(seed))

    # what `auto` selects

    def best_method(self) -> tuple[str, str]:
        """The method that `auto` selects, and why."""
        methods, dev, measure = self.methods, self.splits.dev, self.params.scoring.measure
        if self.own_recordings:
            return "own", "auto: own, since the teachers have outputs on their own speaker's recordings alone"
        folder = self.target_report() if dev else Path()
        return target_report.best_method(folder, methods, dev, self.params.distill.heads, measure)

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

    def _student_inputs(self, seed: int) -> list[Path]:
        """The files and folders that a student depends on."""
        params, settings = self.params, self.params.student
        inputs = [self.corpus_folder, self.tokens_folder()]
        if params.adapt:
            inputs += self._adaptation_inputs(seed)
        elif folder := self.resumed_from(seed):
            inputs += [folder / setup.LATEST]
        elif settings.start == "pretrained":
            source = self._pretrained_student()
            inputs += [source if source.is_file() else source / "model.safetensors"]
        else:
            inputs += weight_files(settings.sizes or params.teacher)
        if not self._asks_teachers:
            return inputs
        method = params.aggregation.method
        names = self.target_teachers(method)
        inputs += [self.outputs(name, "training") for name in names]
        layers = [output for output in terms.outputs(params.distill) if output.startswith(terms.LAYER)]
        inputs += [self.layer_outputs(name, output) for name in names for output in layers]
        if params.faults.choose_by == "kl":
            inputs += [self.outputs(name, "analysis") for name in names]
        if method == "weighted_similarity":
            inputs += [self.speaker_features()]
        inputs += [self.decoding_model()] if self._needs_beam else []
        inputs += [self.word_calibration()] if self._needs_words else []
        if method in DEV_FITTED and params.fold.dev:
            inputs += [self.teacher_scores(name) for name in names]
        return inputs

    def _student_settings(self) -> dict:
        """The settings that a student depends on; those of teachers only where the loss uses them."""
        params = self.params
        excluded = set() if params.student.keep_checkpoints > 1 else {"keep_checkpoints"}
        settings = self.split_settings.identity | {
            "student": params.student.model_dump(mode="json", exclude=excluded),
            "distill": terms.record(params.distill),
            "blocks": params.blocks.model_dump(mode="json"),
        }
        if params.labels:
            settings["labels"] = labels.record(self.split_settings)
        if self._asks_teachers:
            settings["aggregation"] = params.aggregation.model_dump(mode="json")
        settings |= self._chosen_by
        if params.adapt:
            settings["adapt"] = params.adapt.model_dump(mode="json")
        if params.faults.named:
            settings["faults"] = params.faults.model_dump(exclude_defaults=True)
        if self._needs_beam:
            settings["search"] = params.search.model_dump(mode="json")
        if not ENCODERS[params.student.encoder].checkpoint or params.student.start == "scratch":
            sizes = params.student.sizes or params.teacher
            settings["sizes"] = {name: getattr(sizes, name) for name in EncoderSizes.model_fields}
        if params.fold.dev is None:
            settings |= {"dev_share": params.teacher.dev_share, "split": params.seed}
        return settings
