"""The teachers that a notebook or a command requests, by name, and a process's share of some work."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import Splits, in_blocks
from kdlib.errors import UserError, nearest
from kdlib.settings.teacher import Teacher

Found = TypeVar("Found")
WITHOUT = {"loso", "loo", "without", "wo", "no", "not", "except", "minus", "heldout", "held", "test", "fold", "leave"}
MODEL = "model"  # the name of the only teacher, where it is one model for all speakers
AVERAGE = "average"  # and where it has the mean of the weights of others


def student_teachers(settings: Teacher) -> list[str]:
    """The names of the students that serve as teachers: their subfolders in the fold's folder of students."""
    return [f"{variant}/seed{seed}" for variant in settings.students for seed in settings.student_seeds]


def shared_teachers(settings: Teacher) -> list[str]:
    """The names of teachers that are not of single speakers: an average, students, or one model."""
    if settings.average_weights:
        return [AVERAGE]
    return student_teachers(settings) if settings.source == "students" else [MODEL]


def requested_teachers(splits: Splits, settings: Teacher, speakers: Sequence[str] | str = ()) -> list[str]:
    """The requested teachers: by default the fold's; names; "all"; or a share: "1/2", "2/3 of all"."""
    if not settings.of_speakers:
        return shared_teachers(settings)
    corpus, fold_teachers = splits.corpus, splits.teachers(settings.max_teachers)
    if isinstance(speakers, str):
        part, _, whole = speakers.partition(" of ") if "/" in speakers else ("1/1", "", speakers)
        index, parts = map(int, part.split("/")) if re.fullmatch(r"[1-9]\d*/[1-9]\d*", part) else (1, 0)
        if index > parts or whole not in ("", "all"):
            raise UserError(f'speakers: expected names, "all", "1/2" or "1/2 of all", found {speakers!r}')
        in_training = {utt.speaker for utt in corpus if in_blocks(utt, splits.settings.blocks.train)}
        available = [name for name in corpus.dysarthric if name in in_training]
        return (available if whole else fold_teachers)[index - 1 :: parts]
    for name in speakers:
        if name not in corpus.dysarthric:
            hint = nearest(name, corpus.dysarthric)
            raise UserError(f"speakers: there is no teacher for {name!r}, who has no utterances{hint}")
    return list(speakers) or fold_teachers


def trained_on(name: str, settings: Teacher, corpus: Corpus) -> tuple[str, ...]:
    """Whom a teacher of other code was trained on: by the recipe, or by the speaker in its name.

    `loso_M08` may be a model of all but M08: such a name says nothing.
    """
    if name in settings.trained_on:
        return settings.trained_on[name]
    parts = re.split(r"[^A-Za-z0-9]+", name)
    named = {part for part in parts if part in corpus.speakers}
    if len(named) == 1 and not {part.lower() for part in parts} & WITHOUT:
        return tuple(named)
    raise UserError(
        f"teacher.folder: {name} does not say whom this teacher was trained on. Write teacher: {{trained_on: {{{name}: "
        f"[{', '.join(corpus.dysarthric[:2])}, ...]}}}}"
    )


def by_speaker(teachers: Mapping[str, Found]) -> dict[str, Found]:
    """Teachers of other code under their speakers' names, where each has one of its own."""
    of = Counter(one.train_speakers for one in teachers.values())
    found: dict[str, Found] = {}
    for name, one in teachers.items():
        called = one.train_speakers[0] if len(one.train_speakers) == of[one.train_speakers] == 1 else name
        if called in found:
            raise UserError(
                f"teacher.folder: two teachers are called {called}: {name} was trained on {called} alone, or has its "
                "name while another was; give their files or folders other names"
            )
        found[called] = one
    return found


def share_of(work: Sequence[Any], share: str = "1/1") -> list[Any]:
    """The part of one of several processes: of the share `1/2`, every second one."""
    number, _, parts = share.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise UserError(f"share: expected something like 1/2, found {share!r}")
    return list(work[int(number) - 1 :: int(parts)])
