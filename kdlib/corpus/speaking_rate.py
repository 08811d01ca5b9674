"""How slowly speakers speak, and the factors that make one's speech as long as another's.

Slow speech is part of dysarthria. Training speech whose tempo is changed to that of speakers of the same severity
(Xiong et al. 2019) resembles the held-out speaker's in that respect, without any speech of theirs.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from kdlib.corpus.manifest import LEVELS, Corpus, Utterance
from kdlib.errors import UserError
from kdlib.tokens import normalise

LEAST, MOST = 0.5, 2.5  # factors


def log_durations(utterances: Iterable[Utterance]) -> dict[str, float]:
    """By speaker: the mean log duration of utterances, relative to those of the same text by all."""
    of_text: dict[str, list[float]] = {}
    of_speaker: dict[str, list[tuple[str, float]]] = {}
    for utt in utterances:
        text, value = normalise(utt.text), float(np.log(max(utt.duration_s, 1e-3)))
        of_text.setdefault(text, []).append(value)
        of_speaker.setdefault(utt.speaker, []).append((text, value))
    means = {text: np.mean(values) for text, values in of_text.items()}
    return {name: float(np.mean([value - means[text] for text, value in rows])) for name, rows in of_speaker.items()}


def nearest_level(corpus: Corpus, speakers: Iterable[str], level: str) -> list[str]:
    """The speakers of a level of intelligibility or, if there are none, of the nearest one."""
    if level not in LEVELS:
        raise UserError(
            f"student.augment: mask_and_matched_tempo needs the held-out speaker's level of intelligibility, found "
            f"{level or 'none'!r}; expected one of {', '.join(LEVELS)} (recipe: speakers)"
        )
    by_level: dict[str, list[str]] = {}
    for name in sorted(speakers):
        if not corpus.is_control(name) and corpus.level(name) in LEVELS:
            by_level.setdefault(corpus.level(name), []).append(name)
    if not by_level:
        raise UserError("student.augment: mask_and_matched_tempo: no training speaker has a level of intelligibility")
    place = LEVELS.index(level)
    return by_level[min(by_level, key=lambda name: (abs(LEVELS.index(name) - place), LEVELS.index(name)))]


def matching_factors(corpus: Corpus, train: Sequence[Utterance], level: str) -> dict[str, list[float]]:
    """By speaker of training speech: the factors to the tempo of each training speaker of a level."""
    slowness = log_durations(utt for utt in train if utt.text)
    like = nearest_level(corpus, slowness, level)
    return {
        name: [float(np.clip(np.exp(slowness[one] - slowness.get(name, 0.0)), LEAST, MOST)) for one in like]
        for name in {utt.speaker for utt in train}
    }
