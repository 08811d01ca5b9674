"""The selection of training and dev utterances, and their division into batches."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdlib.corpus import audio
from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.settings.student import Curriculum

FRAME_S = 0.04  # of the outputs of encoders of audio


@dataclass(frozen=True)
class BatchPlan:
    """The division of an epoch into parts, each followed by a validation, and the number of steps of each phase.

    An epoch has as many batches as all training speech. A model trained on the labelled part alone repeats it several
    times: with few labels or many, the same steps have the same validations.
    """

    batch_size: int
    groups: int  # batches per epoch
    parts: int
    epoch_steps: int
    steps: list[int]

    def part(self, utterances: Sequence[Utterance], number: int, seed: int) -> Sequence[list[Utterance]]:
        """The batches of a part; `number` counts parts over all epochs."""
        epoch, part = divmod(number, self.parts)
        rows: list[np.ndarray] = []
        while len(rows) < self.groups:
            shuffle = seed * 1009 + epoch + 1_000_003 * len(rows)
            rows += audio.batches(utterances, self.batch_size, seed=shuffle).rows
        size = math.ceil(self.groups / self.parts)
        return audio.Batches(utterances, rows[: self.groups][part * size : (part + 1) * size])


def easiest(
    utterances: Sequence[Utterance], difficulty: Mapping[str, float], curriculum: Curriculum, done: float
) -> Utterances:
    """The pool of a curriculum at a share of the training: the easiest utterances, in the order of the training."""
    share = min(1.0, curriculum.start + (1 - curriculum.start) * done / curriculum.until)
    ranked = sorted(utterances, key=lambda utt: (difficulty[utt.utt_id], utt.utt_id))
    kept = {utt.utt_id for utt in ranked[: math.ceil(share * len(ranked))]}
    return Utterances.of(utterances).where(lambda utt: utt.utt_id in kept)


@dataclass(frozen=True)
class TrainingData:
    """The utterances that a model is trained on, and the dev utterances for early stopping."""

    train: Sequence[Utterance]
    dev: Sequence[Utterance]


def set_aside(utterances: Sequence[Utterance], share: float, seed: int) -> TrainingData:
    """Set a share of the utterances aside, with all their recordings by other microphones.

    Each utterance has its own random draw, so that a base model of the corpus sets the same ones aside as its teachers.
    """

    def is_dev(utt: Utterance) -> bool:
        return random.Random(f"{seed} {utt.spoken}").random() < share

    speech = Utterances.of(utterances)
    dev = speech.where(lambda utt: is_dev(utt) and not utt.copy_of)
    return TrainingData(speech.where(lambda utt: not is_dev(utt)), dev)


def fits_frames(ids: Sequence[int], duration_s: float, frame_s: float = FRAME_S) -> bool:
    """Return whether the tokens fit into the frames for CTC: one frame each, and a blank between equal ones.

    >>> fits_frames([5, 6, 6], 0.16), fits_frames([5, 6, 6], 0.12)
    (True, False)
    """
    return len(ids) + sum(a == b for a, b in itertools.pairwise(ids)) <= int(duration_s / frame_s + 1e-6)
