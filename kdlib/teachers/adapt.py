"""Teachers: one per speaker, adapted from a shared base model on that speaker's training blocks.

A shared base model keeps the teachers' CTC spikes in the same frames, without which their average is mostly blank. It
is trained on controls and so is shared by all folds, as are its teachers, each trained on one speaker more; one trained
`from_corpus` belongs to a fold. With `backbone: nemo` the base model is the student's own pretrained encoder, and only
the attention decoder (and the CTC head, where the tokens differ) is trained on the controls before adaptation.
A part of the training blocks, `teacher.dev_share`, is kept for early stopping. (A model that was pretrained
`from_corpus` was trained on that part too, and teachers that start from it stop later than they should.)
"""

from pathlib import Path

from kdlib.corpus import prepare
from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import in_blocks, split
from kdlib.errors import UserError
from kdlib.params import Params
from kdlib.pretrained.model import pretrained_model
from kdlib.pretrained.pieces import tokens_folder
from kdlib.stage import produce
from kdlib.teachers.base_model import base_model, initial_model, pretraining_speakers
from kdlib.teachers.teacher_sets import label_settings, teacher_root
from kdlib.teachers.training import TEACHER_CODE, train_teacher
from kdlib.training.sampling import TrainingData, set_aside


def speaker_teacher(params: Params, speaker: str) -> Path:
    """The folder of a speaker's teacher, trained if it does not exist."""
    settings = params.teacher
    if settings.backbone == "students":
        return _student(params, speaker)
    start = base_model(params)
    inputs = [start / "model.json", start / "model.safetensors"] if start else []
    if settings.backbone == "nemo":
        inputs.append(pretrained_model(params))
    return produce(
        teacher_root(params) / "teachers" / settings.family / speaker,
        lambda partial: _build_teacher(partial, params, speaker),
        what=f"teacher {speaker}",
        parameters=settings.model_dump(
            mode="json", exclude={"base_training", "max_teachers", "students", "student_seeds"}
        )
        | {"blocks": params.blocks.train, "of": speaker}
        | ({"labels": label_settings(params)} if params.labels else {}),
        inputs=[prepare.corpus_folder(params), tokens_folder(params), *inputs],
        seed=params.seed,
        code=TEACHER_CODE,
    )


def _student(params: Params, name: str) -> Path:
    """The folder of a fold's student that is the teacher of the next (born again: Furlanello et al. 2018)."""
    folder = params.fold_folder / "students" / name
    if not (folder / "model.json").is_file():
        variant, seed = name.split("/seed")
        raise UserError(
            f"teacher.students: there is no student {variant!r} of seed {seed} in {folder}; train it first: make "
            f"compare HELD_OUT={params.held_out} VARIANTS={variant} SEEDS={seed}"
        )
    return folder


def speaker_data(params: Params, corpus: Corpus, speaker: str) -> TrainingData:
    """Training and dev utterances of a speaker's teacher."""
    own = corpus.where(lambda utt: utt.text and utt.speaker == speaker and in_blocks(utt, params.blocks.train))
    if not own:
        raise UserError(
            f"{corpus.source}: {speaker} has no utterances in the training blocks {', '.join(params.blocks.train)}, so "
            "no teacher can be trained; leave the speaker out of fold.teachers, or change blocks.train"
            + (f" or label_fraction ({params.label_fraction:g}: no transcript is left)" if params.labels else "")
        )
    return set_aside(own, params.teacher.dev_share, params.seed)


def training_utterances(params: Params, corpus: Corpus, name: str) -> list[Utterance]:
    """Utterances that a teacher was trained on: its speaker's; those of a student, the fold's training speech."""
    if params.teacher.backbone == "students":
        return split(corpus, params).train
    return speaker_data(params, corpus, name).train


def _build_teacher(partial: Path, params: Params, speaker: str) -> None:
    from kdlib.models import hybrid

    corpus, start = prepare.load(params), base_model(params)
    data = speaker_data(params, corpus, speaker)
    if start:
        model, tokens, record = hybrid.load(start)
        earlier_speakers = record["train_speakers"]
    else:
        model, tokens, _ = initial_model(params)
        earlier_speakers = pretraining_speakers(params)
    train_teacher(partial, params, params.teacher.adapt, model, tokens, data, f"teacher {speaker}", earlier_speakers)
