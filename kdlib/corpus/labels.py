"""Few labels: choose the training utterances with transcripts, and remove the other transcripts on loading.

A transcript that is never loaded cannot leak: teachers, stores, language models and students all read the corpus
through `Fold.corpus`, and get an unlabelled utterance as a recording with an empty text. Test blocks keep their
transcripts, for scoring; the other blocks of the held-out and the dev speaker lose theirs. The closed lexicon is
available to all, as a list of words without weights; pieces may be made of it.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import in_blocks
from kdlib.corpus.utterances import Utterance
from kdlib.settings.corpus import SplitSettings


def hide_unknown(corpus: Corpus, settings: SplitSettings) -> Corpus:
    """Return the corpus without the transcripts that a recipe withholds."""
    if not settings.labels:
        return corpus
    hidden = {utt.utt_id for utt in corpus if trainable(corpus, utt, settings)} - labelled(corpus, settings)
    return replace(corpus, utterances=(utt.replace(text="") if utt.utt_id in hidden else utt for utt in corpus))


def trainable(corpus: Corpus, utt: Utterance, settings: SplitSettings) -> bool:
    """True if an utterance may be trained on: of a training block, and not test speech."""
    if corpus.is_control(utt.speaker) or not in_blocks(utt, settings.blocks.train):
        return False
    return utt.speaker not in settings.excluded_speakers or not in_blocks(utt, settings.blocks.test)


def labelled(corpus: Corpus, settings: SplitSettings) -> set[str]:
    """Return the ids of the training utterances with transcripts.

    `utterance` draws the same share of each speaker's utterances, `word` a share of the words: all speakers' utterances
    of them. A larger share includes a smaller one. Other microphones' recordings go with their utterance.
    """
    train = [
        utt for utt in corpus if trainable(corpus, utt, settings) and utt.speaker not in settings.excluded_speakers
    ]
    if settings.label_by == "word":
        words = _draw({utt.text for utt in train}, settings)
        return {utt.utt_id for utt in train if utt.text in words}
    speaker_ids: dict[str, set[str]] = defaultdict(set)
    for utt in train:
        speaker_ids[utt.speaker].add(utt.spoken)
    chosen = set().union(*(_draw(ids, settings) for ids in speaker_ids.values()))
    return {utt.utt_id for utt in train if utt.spoken in chosen}


def record(settings: SplitSettings, unlabelled_held_out: bool = False) -> dict:
    """Record the transcripts of a model's training, and whether it used the held-out speaker without transcripts."""
    labels = {"fraction": settings.label_fraction}
    if settings.label_fraction < 1:
        labels |= {"by": settings.label_by, "seed": settings.seed}
    return labels | ({"unlabelled_speakers": [settings.held_out]} if unlabelled_held_out else {})


def leaks(model_labels: dict | None, settings: SplitSettings) -> str:
    """Return why a model that was trained with other labels may not be a teacher here, or an empty string.

    A smaller share of the same draw is part of the student's own labels.
    """
    model, student = model_labels or {"fraction": 1.0}, record(settings, settings.use_unlabelled_held_out)
    if more := set(model.get("unlabelled_speakers", ())) - set(student.get("unlabelled_speakers", ())):
        return f"was trained on {more.pop()} without transcripts, who is held out here (use_unlabelled_held_out)"
    same_draw = all(model.get(name) == student.get(name) for name in ("by", "seed")) or student["fraction"] == 1
    if model["fraction"] <= student["fraction"] and same_draw:
        return ""
    return f"was trained with {_share(model)} of the labels, but the student has {_share(student)}"


def _share(labels: dict) -> str:
    if labels["fraction"] == 1:
        return "all"
    return f"{100 * labels['fraction']:g} % (by {labels['by']}, drawn with seed {labels['seed']})"


def _draw(names: Iterable[str], settings: SplitSettings) -> set[str]:
    ordered = sorted(names, key=lambda name: (random.Random(f"label {settings.seed} {name}").random(), name))
    return set(ordered[: math.ceil(settings.label_fraction * len(ordered) - 1e-9)])
