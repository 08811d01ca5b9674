"""The stages of teachers that are not trained: those of other code, and the mean of the weights of others."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus.speakers import evenly_spaced
from kdlib.errors import UserError, nearest
from kdlib.fold_stage import stage
from kdlib.fold_teachers import TeacherObjects
from kdlib.source_code import lazy
from kdlib.stage import Stage
from kdlib.teachers.teacher_sets import AVERAGE

if TYPE_CHECKING:
    from kdlib.logits.adopt import FoundTeacher
    from kdlib.logits.extract import Purpose
    from kdlib.teachers.checkpoints import Checkpoint

# Imported when they are used: torch and its companions take seconds.
adopt = lazy("kdlib.logits.adopt")
averaging = lazy("kdlib.models.averaging")
checkpoints = lazy("kdlib.teachers.checkpoints")
extract = lazy("kdlib.logits.extract")


class ImportedTeachers(TeacherObjects):
    """One fold of a recipe, under one of its variants: with teachers of other code."""

    @cached_property
    def found_teachers(self) -> dict[str, FoundTeacher | Checkpoint]:
        """The teachers whose logits, or models, lie in the recipe's folder, by name."""
        where = adopt if self.params.teacher.source == "stores" else checkpoints
        return where.find_teachers(self.params.teacher, self.corpus)

    def found_teacher(self, name: str) -> FoundTeacher | Checkpoint:
        """One of them."""
        if name not in self.found_teachers:
            raise UserError(
                f"teacher.folder: there is no teacher {name!r} in it{nearest(name, list(self.found_teachers))}"
            )
        return self.found_teachers[name]

    def imported_names(self) -> list[str]:
        """The teachers of other code that were trained on neither the held-out nor the dev speaker."""
        away, allowed = set(self.split_settings.excluded_speakers), self.splits.teachers()
        left = [
            name
            for name, one in self.found_teachers.items()
            if not away & set(one.train_speakers) and (name in allowed or name not in self.corpus.speakers)
        ]
        if not left:
            raise UserError(
                f"teacher.folder: of its teachers ({', '.join(self.found_teachers)}) none is of the fold's training "
                f"speakers alone: {self.params.held_out} is held out"
            )
        known = [name for name in self.corpus.by_intelligibility if name in left]
        others = [name for name in left if name not in known]
        return evenly_spaced([*known, *others], self.params.teacher.max_teachers)

    @cached_property
    def own_recordings(self) -> bool:
        """True if teachers of other code have outputs on their own speakers' recordings alone."""
        if self.params.teacher.source != "stores":
            return False
        return adopt.own_recordings([self.found_teachers[name] for name in self.imported_names()], self.corpus)

    @property
    def dev_outputs(self) -> bool:
        """True if teachers have outputs on dev speech, or on training speech in its place: stores may have none."""
        if self.params.teacher.source != "stores" or not self.splits.dev:
            return True
        items = [self.found_teachers[name].outputs["ctc"].items for name in self.imported_names()]
        return any(all(utt.utt_id in one for one in items) for utt in self.splits.dev)

    @stage
    def imported_teacher(self, name: str) -> Stage:
        """What is known of a teacher of other code whose logits are there, but not its model."""
        teacher, tokens = self.found_teacher(name), self.tokens
        return Stage(
            self.layout.teacher(name),
            f"teacher {name} of other code",
            build=lambda partial: adopt.record(partial, teacher, tokens),
            settings={"train_speakers": teacher.train_speakers, "files": teacher.files},
            inputs=[self.corpus_folder, self.tokens_folder()],
        )

    @stage
    def converted_teacher(self, name: str) -> Stage:
        """A model of other code as one of kdlib."""
        found, tokens = self.found_teacher(name), self.tokens
        return Stage(
            self.layout.teacher(name),
            f"teacher {name} of other code",
            build=lambda partial: checkpoints.convert(partial, found, tokens),
            settings={"train_speakers": found.train_speakers, "kind": found.kind},
            inputs=[self.corpus_folder, self.tokens_folder(), *found.files],
        )

    @stage
    def averaged_teacher(self) -> Stage:
        """The mean of the weights of the fold's teachers, of all or of the held-out speaker's level."""
        each, level = self.but(teacher={"average_weights": None}), self.params.teacher.average_weights
        folders = [each.teacher(name) for name in each.target_teachers("" if level == "all" else level)]

        def build(partial: Path) -> None:
            averaging.save_average(partial, folders)

        return Stage(
            self.layout.teacher(AVERAGE),
            f"average of {len(folders)} teachers' weights",
            build=build,
            settings={"average_weights": level},
            inputs=folders,
        )

    @stage
    def imported_outputs(self, name: str, purpose: Purpose) -> Stage:
        """The logits of a teacher of other code, as stores."""
        settings, blocks = self.params.teacher, self.params.blocks

        def build(partial: Path) -> None:
            speech = self.splits.speech_of_all(test=purpose == "analysis")
            job = extract.Extraction(name, purpose, "fp16")
            adopt.adopt(partial, self.found_teacher(name), speech, self.tokens, job, settings)

        return Stage(
            self.layout.outputs(name, purpose),
            f"outputs of {name} for {purpose}, of other code",
            build=build,
            settings={
                "purpose": purpose,
                "blocks": blocks.train if purpose == "training" else blocks.test + blocks.dev,
                "ids": settings.ids.model_dump(),
                "temperature": settings.logits_temperature,
            },
            inputs=[self.corpus_folder, self.imported_teacher(name)],
        )
