"""Few labels: choose the training utterances with transcripts, and remove the other transcripts on loading.

A transcript that is never loaded cannot leak: teachers, stores, language models and students all read the corpus
through `prepare.load`, and get an unlabelled utterance as a recording with an empty text. Test blocks keep their
transcripts, for scoring; the other blocks of the held-out and the dev speaker lose theirs. The closed lexicon is
available to all, as a list of words without weights; pieces may be made of it.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import in_blocks
from kdlib.params import Params

CODE = ("corpus/labels.py", "corpus/speakers.py")


def hide_unknown(corpus: Corpus, params: Params) -> Corpus:
    """Return the corpus without the transcripts that a recipe withholds."""
    if not params.labels:
        return corpus
    hidden = {utt.utt_id for utt in corpus if trainable(corpus, utt, params)} - labelled(corpus, params)
    return replace(
        corpus, utterances=tuple(replace(utt, text="") if utt.utt_id in hidden else utt for utt in corpus.utterances)
    )


def trainable(corpus: Corpus, utt: Utterance, params: Params) -> bool:
    """True if an utterance may be trained on: of a training block, and not test speech."""
    if corpus.is_control(utt.speaker) or not in_blocks(utt, params.blocks.train):
        return False
    return utt.speaker not in (params.held_out, params.fold.dev) or not in_blocks(utt, params.blocks.test)


def labelled(corpus: Corpus, params: Params) -> set[str]:
    """Return the ids of the training utterances with transcripts.

    `utterance` draws the same share of each speaker's utterances, `word` a share of the words: all speakers' utterances
    of them. A larger share includes a smaller one. Other microphones' recordings go with their utterance.
    """
    away = (params.held_out, params.fold.dev)
    train = [utt for utt in corpus if trainable(corpus, utt, params) and utt.speaker not in away]
    if params.label_by == "word":
        words = _draw({utt.text for utt in train}, params)
        return {utt.utt_id for utt in train if utt.text in words}
    speaker_ids: dict[str, set[str]] = defaultdict(set)
    for utt in train:
        speaker_ids[utt.speaker].add(utt.copy_of or utt.utt_id)
    chosen = set().union(*(_draw(ids, params) for ids in speaker_ids.values()))
    return {utt.utt_id for utt in train if (utt.copy_of or utt.utt_id) in chosen}


def record(params: Params, unlabelled_held_out: bool = False) -> dict:
    """Record the transcripts of a model's training, and whether it used the held-out speaker without transcripts."""
    labels = {"fraction": params.label_fraction}
    if params.label_fraction < 1:
        labels |= {"by": params.label_by, "seed": params.seed}
    return labels | ({"unlabelled_speakers": [params.held_out]} if unlabelled_held_out else {})


def leaks(model_labels: dict | None, params: Params) -> str:
    """Return why a model that was trained with other labels may not be a teacher here, or an empty string.

    A smaller share of the same draw is part of the student's own labels.
    """
    model, student = model_labels or {"fraction": 1.0}, record(params, params.use_unlabelled_held_out)
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


def _draw(names: Iterable[str], params: Params) -> set[str]:
    ordered = sorted(names, key=lambda name: (random.Random(f"label {params.seed} {name}").random(), name))
    return set(ordered[: math.ceil(params.label_fraction * len(ordered) - 1e-9)])
