"""Few labels: of which training utterances the transcripts are known. The others' are removed where a corpus is read.

What nobody is given, nobody can leak: teachers, stores, language models and students all read the corpus through
`prepare.load`, and of an utterance whose label is denied they get the recording and an empty text. Test blocks keep
their transcripts, for scoring; the held-out and the dev speaker's other blocks lose theirs. Known to all is the closed
lexicon, as a list of words without weights; pieces may be made of it.
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
    """The corpus without the transcripts that a recipe denies."""
    if not params.labels:
        return corpus
    told = labelled(corpus, params)
    denied = {utt.utt_id for utt in corpus if trainable(corpus, utt, params)} - told
    return replace(
        corpus, utterances=tuple(replace(utt, text="") if utt.utt_id in denied else utt for utt in corpus.utterances)
    )


def trainable(corpus: Corpus, utt: Utterance, params: Params) -> bool:
    """Whether an utterance is of a kind that is trained on: of a training block, and nobody's test speech."""
    blocks = params.blocks
    if corpus.is_control(utt.speaker) or not in_blocks(utt, blocks.train):
        return False
    apart = utt.speaker in (params.held_out, params.fold.dev)
    return not (apart and in_blocks(utt, blocks.test))


def labelled(corpus: Corpus, params: Params) -> set[str]:
    """The ids of the training utterances whose transcripts are known.

    `utterance` draws the same share of every speaker's, `word` of the words: everybody's utterances of them. A larger
    share holds all of a smaller one. Other microphones' recordings go with their utterance.
    """
    speak = [
        utt
        for utt in corpus
        if trainable(corpus, utt, params) and utt.speaker not in (params.held_out, params.fold.dev)
    ]
    if params.label_by == "word":
        words = _drawn({utt.text for utt in speak}, params)
        return {utt.utt_id for utt in speak if utt.text in words}
    names: dict[str, set[str]] = defaultdict(set)
    for utt in speak:
        names[utt.speaker].add(utt.copy_of or utt.utt_id)
    chosen = set().union(*(_drawn(one, params) for one in names.values()))
    return {utt.utt_id for utt in speak if (utt.copy_of or utt.utt_id) in chosen}


def record(params: Params, heard: bool = False) -> dict:
    """Which transcripts were known, as models write it down; whether they `heard` the held-out speaker without."""
    found = {"fraction": params.label_fraction}
    if params.label_fraction < 1:
        found |= {"by": params.label_by, "seed": params.seed}
    return found | ({"unlabelled_speakers": [params.held_out]} if heard else {})


def leaks(taught_by: dict | None, params: Params) -> str:
    """Why a model that was trained with other labels may not teach here, or nothing.

    Fewer of the same draw are a part of those that the student has.
    """
    theirs, ours = taught_by or {"fraction": 1.0}, record(params, params.use_unlabelled_held_out)
    if more := set(theirs.get("unlabelled_speakers", ())) - set(ours.get("unlabelled_speakers", ())):
        return f"has heard {more.pop()} without transcripts, who is held out here (use_unlabelled_held_out)"
    draws = ("by", "seed")
    alike = all(theirs.get(name) == ours.get(name) for name in draws) or ours["fraction"] == 1
    if theirs["fraction"] <= ours["fraction"] and alike:
        return ""
    return f"was trained with {_said(theirs)} of the labels, the student is given {_said(ours)}"


def _said(one: dict) -> str:
    if one["fraction"] == 1:
        return "all"
    return f"{100 * one['fraction']:g} % (by {one['by']}, drawn with seed {one['seed']})"


def _drawn(names: Iterable[str], params: Params) -> set[str]:
    ordered = sorted(names, key=lambda name: (random.Random(f"label {params.seed} {name}").random(), name))
    return set(ordered[: math.ceil(params.label_fraction * len(ordered) - 1e-9)])
