"""The teachers that a notebook or a command requests, by name, and a process's share of some work."""

import re
from collections.abc import Sequence
from typing import Any

from kdlib.corpus.speakers import Splits, in_blocks
from kdlib.errors import UserError, nearest
from kdlib.settings.teacher import Teacher

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


def share_of(work: Sequence[Any], share: str = "1/1") -> list[Any]:
    """The part of one of several processes: of the share `1/2`, every second one."""
    number, _, parts = share.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise UserError(f"share: expected something like 1/2, found {share!r}")
    return list(work[int(number) - 1 :: int(parts)])
