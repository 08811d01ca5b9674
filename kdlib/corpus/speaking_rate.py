"""How slowly speakers speak, and the factors that make one's speech as long as another's.

Slow speech is part of dysarthria. Training speech whose tempo is changed to that of speakers of the same severity
(Xiong et al. 2019) resembles the held-out speaker's in that respect, without any speech of theirs.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.tokens import normalise

LEAST, MOST = 0.5, 2.5  # factors
LIKE = 4  # speakers whose tempo is matched: a single one may be far from the tempo of others as intelligible


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


def most_alike(corpus: Corpus, speakers: Iterable[str], held_out: str) -> list[str]:
    """The speakers, no controls, whose intelligibility is nearest to that of another."""
    own = corpus.intelligibility(held_out)
    if own is None:
        raise UserError(
            f"student.augment: mask_and_matched_tempo needs the intelligibility of the held-out speaker {held_out}, in "
            "per cent or as a level, found none; write it into the recipe (speakers: ...)"
        )
    known = {name: corpus.intelligibility(name) for name in speakers if not corpus.is_control(name)}
    known = {name: value for name, value in known.items() if value is not None}
    if not known:
        raise UserError("student.augment: mask_and_matched_tempo: no training speaker's intelligibility is known")
    return sorted(sorted(known, key=lambda name: (abs(known[name] - own), name))[:LIKE])


def matching_factors(corpus: Corpus, train: Sequence[Utterance], held_out: str) -> dict[str, list[float]]:
    """By speaker of training speech: the factors to the tempo of each of those most alike the held-out speaker."""
    slowness = log_durations(utt for utt in train if utt.text)
    like = most_alike(corpus, slowness, held_out)
    return {
        name: [float(np.clip(np.exp(slowness[one] - slowness.get(name, 0.0)), LEAST, MOST)) for one in like]
        for name in {utt.speaker for utt in train}
    }
