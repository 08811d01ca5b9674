"""Which utterances a model is trained on, and in which batches."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from kdlib.corpus import audio
from kdlib.corpus.manifest import Utterance


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch is cut into parts with a look at the dev speaker behind each, and how many steps phases have.

    An epoch is as many batches as all training speech has. Who learns from the labelled part alone hears that several
    times over: few labels or many, the same steps have the same looks.
    """

    batch_size: int
    groups: int  # batches an epoch
    parts: int
    steps: list[int]

    def part(self, utterances: Sequence[Utterance], number: int, seed: int) -> list[list[Utterance]]:
        """The batches of a part; parts are counted through all epochs."""
        epoch, part = divmod(number, self.parts)
        groups: list[list[Utterance]] = []
        while len(groups) < self.groups:
            drawn = seed * 1009 + epoch + 1_000_003 * len(groups)
            groups += audio.batches(utterances, self.batch_size, seed=drawn)
        size = math.ceil(self.groups / self.parts)
        return groups[: self.groups][part * size : (part + 1) * size]


@dataclass(frozen=True)
class TrainingData:
    """What one model is trained on, and what it is stopped on."""

    train: list[Utterance]
    dev: list[Utterance]


def set_aside(utterances: Sequence[Utterance], share: float, seed: int) -> TrainingData:
    """Set a share of the utterances aside, with all their recordings by other microphones.

    An utterance's own draw decides, so that a parent made of the corpus sets the same ones aside as its teachers.
    """

    def apart(utt: Utterance) -> bool:
        return random.Random(f"{seed} {utt.copy_of or utt.utt_id}").random() < share

    return TrainingData(
        [utt for utt in utterances if not apart(utt)], [utt for utt in utterances if apart(utt) and not utt.copy_of]
    )
