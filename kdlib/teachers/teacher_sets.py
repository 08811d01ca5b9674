"""The teachers of a fold: their names, their folders, and the fold settings that they depend on."""

import re
from collections.abc import Sequence
from pathlib import Path

from kdlib.corpus import labels, prepare
from kdlib.corpus.speakers import fold_teachers, in_blocks
from kdlib.errors import UserError, nearest
from kdlib.params import Params
from kdlib.pretrained.pieces import tokens_per_fold


def teacher_root(params: Params) -> Path:
    """The folder of teachers and stores: shared by all folds, unless they depend on a fold's speakers or labels."""
    return params.label_folder if depends_on_fold(params) or params.labels else params.folder


def teacher_names(params: Params, speakers: Sequence[str] | str = ()) -> list[str]:
    """The teachers that a notebook requests: by default the fold's; names; "all"; or a part: "1/2", "2/3 of all"."""
    if params.teacher.backbone == "students":
        return teaching_students(params)
    corpus = prepare.load(params)
    if isinstance(speakers, str):
        part, _, whole = speakers.partition(" of ") if "/" in speakers else ("1/1", "", speakers)
        index, parts = map(int, part.split("/")) if re.fullmatch(r"[1-9]\d*/[1-9]\d*", part) else (1, 0)
        if index > parts or whole not in ("", "all"):
            raise UserError(f'speakers: expected names, "all", "1/2" or "1/2 of all", found {speakers!r}')
        in_training = {utt.speaker for utt in corpus if in_blocks(utt, params.blocks.train)}
        available = [name for name in corpus.dysarthric if name in in_training]
        return (available if whole else fold_teachers(params, corpus))[index - 1 :: parts]
    for name in speakers:
        if name not in corpus.dysarthric:
            hint = nearest(name, corpus.dysarthric)
            raise UserError(f"speakers: there is no teacher for {name!r}, who has no utterances{hint}")
    return list(speakers) or fold_teachers(params, corpus)


def teaching_students(params: Params) -> list[str]:
    """The names of the students that serve as teachers: their subfolders in the fold's folder of students."""
    settings = params.teacher
    return [f"{variant}/seed{seed}" for variant in settings.students for seed in settings.student_seeds]


def depends_on_fold(params: Params) -> bool:
    """True if teachers belong to one fold: they, or the model that they start from, were trained on its speakers."""
    if params.teacher.backbone == "students":
        return True
    from_checkpoint = params.teacher.backbone == "nemo" and params.pretrained == "from_corpus"
    return params.teacher.parent == "from_corpus" or from_checkpoint or tokens_per_fold(params)


def fold_settings(params: Params) -> dict:
    """The settings of the fold and its labels that a stage depends on: none if it is shared by all folds."""
    if teacher_root(params) == params.folder:
        return {}
    return fold_identity(params) | ({"labels": label_settings(params)} if params.labels else {})


def fold_identity(params: Params) -> dict:
    """The fold and its held-out speaker, as recorded by a stage."""
    return {"fold": params.fold.model_dump(mode="json"), "held_out": params.held_out}


def label_settings(params: Params) -> dict:
    """The settings that decide which utterances are labelled."""
    return labels.record(params) | {"use_unlabelled_held_out": params.use_unlabelled_held_out}
