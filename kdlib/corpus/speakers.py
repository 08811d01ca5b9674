"""Speakers and folds: metadata, training speakers, teachers, dev speaker, test speaker.

The dev speaker of a fold is never its test speaker; its speech is not trained on, and its teacher is not averaged. Two
sets of level labels exist for UA-Speech, the published ones and the original study's; both are kept and the fold
selects one.
"""

import csv
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from kdlib.corpus.manifest import LEVELS, Corpus, Speaker, Utterance
from kdlib.errors import UserError, nearest
from kdlib.params import Params


@functools.cache
def published_speakers() -> dict[str, Speaker]:
    """The UA-Speech speakers and controls, by name."""
    text = files("kdlib").joinpath("data/speakers.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["speaker"]: Speaker(**row | {"intelligibility_pct": float(row["intelligibility_pct"])}) for row in rows}


def speaker_info(params: Params, names: Iterable[str]) -> dict[str, Speaker]:
    """Collect the metadata of a corpus's speakers: UA-Speech's table or TORGO's names, then the recipe."""
    if params.corpus in ("synthetic", "uaspeech") or params.speakers == "uaspeech":
        speakers = {name: published_speakers().get(name, Speaker(name)) for name in names}
    elif params.corpus == "torgo":  # FC01: a woman of the control group
        speakers = {name: Speaker(name, sex=name[0], level="CONTROL" if name[1] == "C" else "") for name in names}
    else:
        speakers = {name: Speaker(name) for name in names}
    recipe = {} if isinstance(params.speakers, str) else params.speakers
    return {
        name: replace(speaker, **recipe[name].model_dump(exclude_none=True)) if name in recipe else speaker
        for name, speaker in speakers.items()
    }


def dev_speaker(held_out: str, candidates: Iterable[str], info: Mapping[str, Speaker]) -> tuple[str, str]:
    """Choose the dev speaker of a fold: the nearest, then of the same sex, then the next by name. Returns the rule too.

    Distance is in per cent of intelligibility where both speakers have it, else in levels; without either, the next
    name is chosen (the first one after the last), so that every speaker is the dev speaker of a fold.

    >>> dev_speaker("M08", ["M10", "F05", "M09"], published_speakers())
    ('M10', 'the nearest in intelligibility, then of the same sex, then the next by name')
    >>> dev_speaker("C", ["A", "B"], {})
    ('A', 'the next by name, since nothing else is known of the speakers')
    """
    target = info.get(held_out, Speaker(held_out))

    def distance(name: str) -> tuple:
        speaker = info.get(name, Speaker(name))
        if None not in (target.intelligibility_pct, speaker.intelligibility_pct):
            near = 0, abs(speaker.intelligibility_pct - target.intelligibility_pct)
        elif target.level and speaker.level:
            near = 1, abs(LEVELS.index(speaker.level) - LEVELS.index(target.level))
        else:
            near = 2, 0
        return *near, speaker.sex != target.sex, name < held_out, name

    chosen = min((name for name in candidates if name != held_out), key=distance)
    rules = (
        "the nearest in intelligibility, then of the same sex, then the next by name",
        "the nearest in level, then of the same sex, then the next by name",
        "the next by name, since nothing else is known of the speakers",
    )
    return chosen, rules[distance(chosen)[0]]


def fold_teachers(params: Params, corpus: Corpus) -> list[str]:
    """Return the speakers whose teachers a fold averages."""
    fold = params.fold
    others = [name for name in corpus.dysarthric if name not in (params.held_out, fold.dev)]
    if isinstance(fold.teachers, tuple):
        return list(fold.teachers)
    if fold.teachers == "all":
        ordered = [name for name in corpus.by_intelligibility if name in others]
        return evenly_spaced(ordered, params.teacher.max_teachers)
    level = corpus.level(params.held_out, fold.levels)
    same = [name for name in others if level and corpus.level(name, fold.levels) == level]
    if not same:
        why = f"no other speaker is {level}" if level else f"the level of {params.held_out} is not known"
        text = f"{why} by the {fold.levels} labels: the teachers of {params.held_out} are all {len(others)} others"
        warnings.warn(text, stacklevel=2)
    return same or others


def evenly_spaced(ordered: Sequence[str], count: int | None) -> list[str]:
    """Select at most `count` of them, evenly spaced from the first to the last; sorted by name.

    >>> evenly_spaced(["C", "E", "A", "D", "B"], 3)
    ['A', 'B', 'C']
    """
    if count is None or count >= len(ordered):
        return sorted(ordered)
    if count == 1:
        return [ordered[len(ordered) // 2]]
    return sorted(ordered[round(index * (len(ordered) - 1) / (count - 1))] for index in range(count))


@dataclass(frozen=True)
class Splits:
    """A fold's utterances by purpose."""

    train: list[Utterance]  # with transcripts
    dev: list[Utterance]
    test: list[Utterance]
    controls: list[Utterance]
    train_words: frozenset[str]
    unlabelled: list[Utterance]  # training speech without transcripts: their texts are empty

    def seen(self, utt: Utterance) -> bool:
        """True if the word of an utterance is in the training set."""
        return utt.text in self.train_words


def split(corpus: Corpus, params: Params) -> Splits:
    """Split a corpus for a fold, and check that no speaker is in two splits."""
    held_out, fold, blocks = params.held_out, params.fold, params.blocks
    speakers = corpus.dysarthric
    for role, name in (("held-out", held_out), ("dev", fold.dev)):
        if name is not None and name not in speakers:
            raise UserError(f"{corpus.source}: the {role} speaker {name!r} has no utterances{nearest(name, speakers)}")
    for role in ("train", "teachers"):
        for name in getattr(fold, role) if isinstance(getattr(fold, role), tuple) else ():
            if name not in speakers:
                raise UserError(
                    f"{corpus.source}: fold.{role} names {name!r}, who has no utterances{nearest(name, speakers)}"
                )
    corpus_blocks = {utt.block for utt in corpus}
    for block in (*blocks.train, *blocks.test):
        if corpus_blocks != {""} and block not in corpus_blocks:
            named = ", ".join(sorted(corpus_blocks))
            raise UserError(f"{corpus.source}: blocks: there is no block {block!r} in this corpus; it has {named}")
    away = {held_out, fold.dev, *fold.exclude}
    train_speakers = [name for name in (speakers if fold.train == "all" else fold.train) if name not in away]
    if not train_speakers:
        raise UserError(
            f"{corpus.source}: no training speaker is left: {held_out} is held out, {fold.dev} is the dev "
            f"speaker, {', '.join(fold.exclude) or 'no speaker is'} excluded"
        )
    trainable = corpus.where(lambda utt: utt.speaker in train_speakers and in_blocks(utt, blocks.train))
    train = [utt for utt in trainable if utt.text]
    unlabelled = [utt for utt in trainable if not utt.text]
    if params.use_unlabelled_held_out:
        more = corpus.where(lambda utt: utt.speaker == held_out and in_blocks(utt, blocks.train) and not utt.text)
        if not more:
            raise UserError(
                f"{corpus.source}: use_unlabelled_held_out: {held_out} has no utterance in the training blocks "
                f"{', '.join(blocks.train)} that is not test speech; remove the setting"
            )
        unlabelled += more
    dev = corpus.where(lambda utt: utt.speaker == fold.dev and is_test(utt, blocks.test))
    test = corpus.where(lambda utt: utt.speaker == held_out and is_test(utt, blocks.test))
    parts = (("training", train, blocks.train), ("dev", dev, blocks.test), ("test", test, blocks.test))
    for name, utterances, expected in parts:
        if not utterances and (name != "dev" or fold.dev):
            speaker = {"dev": f" of {fold.dev}", "test": f" of {held_out}"}.get(name, "")
            found = sorted({utt.block or "(none)" for utt in corpus if not speaker or utt.speaker == speaker[4:]})
            raise UserError(
                f"{corpus.source}: the {name} set{speaker} is empty: expected blocks {', '.join(expected)}, "
                f"found {', '.join(found)}"
            )
    controls = corpus.where(lambda utt: corpus.is_control(utt.speaker))
    return Splits(train, dev, test, controls, frozenset(utt.text for utt in train), unlabelled)


def in_blocks(utt: Utterance, blocks: tuple[str, ...]) -> bool:
    """True if an utterance belongs to one of the blocks; without a block it belongs to all."""
    return not utt.block or utt.block in blocks


def is_test(utt: Utterance, blocks: tuple[str, ...]) -> bool:
    """True if an utterance may be tested on; another microphone's recording is for training only."""
    return in_blocks(utt, blocks) and not utt.copy_of
