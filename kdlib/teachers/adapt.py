"""Teachers: one per speaker, adapted from a shared base model on that speaker's training blocks.

A shared base model keeps the teachers' CTC spikes in the same frames, without which their average is mostly blank. It
is trained on controls and so is shared by all folds, as are its teachers, each trained on one speaker more; one trained
`from_corpus` belongs to a fold. With `encoder: nemo` the base model is the student's own pretrained encoder, and only
the attention decoder (and the CTC head, where the tokens differ) is trained on the controls before adaptation.
A part of the training blocks, `teacher.dev_share`, is kept for early stopping. (A model that was pretrained
`from_corpus` was trained on that part too, and teachers that start from it stop later than they should.)
"""

from pathlib import Path

from kdlib.corpus.speakers import Splits
from kdlib.errors import UserError
from kdlib.settings.teacher import Teacher
from kdlib.teachers.training import InitialModel, TeacherTraining, train_teacher
from kdlib.training.sampling import TrainingData, set_aside


def train_speaker_teacher(
    partial: Path, speaker: str, splits: Splits, start: InitialModel, how: TeacherTraining
) -> None:
    """Adapt the initial model to a speaker."""
    train_teacher(partial, start, speaker_data(splits, how.settings, speaker), how)


def speaker_data(splits: Splits, settings: Teacher, speaker: str) -> TrainingData:
    """Training and dev utterances of a speaker's teacher."""
    own, fold = splits.speech_of(speaker), splits.settings
    if not own:
        raise UserError(
            f"{splits.corpus.source}: {speaker} has no utterances in the training blocks "
            f"{', '.join(fold.blocks.train)}, so no teacher can be trained; leave the speaker out of fold.teachers, or "
            "change blocks.train"
            + (f" or label_fraction ({fold.label_fraction:g}: no transcript is left)" if fold.labels else "")
        )
    return set_aside(own, settings.dev_share, fold.seed)
