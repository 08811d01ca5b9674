"""Speakers and folds: who they are, who trains, who decides, who is tested.

The dev speaker of a fold is never its test speaker, and is neither trained on nor averaged. Two sets of level labels
exist for UA-Speech, the published ones and the original study's; both are kept and the fold says which is used.
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
    """What is known of a corpus's speakers: from UA-Speech's table or TORGO's names, then from the recipe."""
    if params.corpus in ("synthetic", "uaspeech") or params.speakers == "uaspeech":
        found = {name: published_speakers().get(name, Speaker(name)) for name in names}
    elif params.corpus == "torgo":  # FC01: a woman of the control group
        found = {name: Speaker(name, sex=name[0], level="CONTROL" if name[1] == "C" else "") for name in names}
    else:
        found = {name: Speaker(name) for name in names}
    told = {} if isinstance(params.speakers, str) else params.speakers
    return {
        name: replace(one, **told[name].model_dump(exclude_none=True)) if name in told else one
        for name, one in found.items()
    }


def dev_speaker(held_out: str, candidates: Iterable[str], known: Mapping[str, Speaker]) -> tuple[str, str]:
    """Who is the dev speaker of a fold, and the rule that chose: nearest, then of the same sex, then next by name.

    Nearness counts in per cent of intelligibility among those of whom it is known, else by level; where neither is
    known the next name decides (after the last comes the first), so that everybody is somebody's dev speaker.

    >>> dev_speaker("M08", ["M10", "F05", "M09"], table())
    ('M10', 'the nearest in intelligibility, then of the same sex, then the next by name')
    >>> dev_speaker("C", ["A", "B"], {})
    ('A', 'the next by name, since nothing else is known of the speakers')
    """
    me = known.get(held_out, Speaker(held_out))

    def distance(name: str) -> tuple:
        you = known.get(name, Speaker(name))
        if None not in (me.intelligibility_pct, you.intelligibility_pct):
            near = 0, abs(you.intelligibility_pct - me.intelligibility_pct)
        elif me.level and you.level:
            near = 1, abs(LEVELS.index(you.level) - LEVELS.index(me.level))
        else:
            near = 2, 0
        return *near, you.sex != me.sex, name < held_out, name

    chosen = min((name for name in candidates if name != held_out), key=distance)
    rules = (
        "the nearest in intelligibility, then of the same sex, then the next by name",
        "the nearest in level, then of the same sex, then the next by name",
        "the next by name, since nothing else is known of the speakers",
    )
    return chosen, rules[distance(chosen)[0]]


def fold_teachers(params: Params, corpus: Corpus) -> list[str]:
    """The speakers whose teachers a fold averages."""
    fold = params.fold
    others = [name for name in corpus.dysarthric if name not in (params.held_out, fold.dev)]
    if isinstance(fold.teachers, tuple):
        return list(fold.teachers)
    if fold.teachers == "all":
        return evenly_spaced(
            [name for name in corpus.by_intelligibility if name in others], params.teacher.max_teachers
        )
    mine = corpus.level(params.held_out, fold.levels)
    same = [name for name in others if mine and corpus.level(name, fold.levels) == mine]
    if not same:
        why = f"no other speaker is {mine}" if mine else f"the level of {params.held_out} is not known"
        warnings.warn(
            f"{why} by the {fold.levels} labels: all {len(others)} others teach {params.held_out}", stacklevel=2
        )
    return same or others


def evenly_spaced(ordered: Sequence[str], at_most: int | None) -> list[str]:
    """At most so many of them, evenly from the first to the last, by name.

    >>> evenly(["C", "E", "A", "D", "B"], 3)
    ['A', 'B', 'C']
    """
    if at_most is None or at_most >= len(ordered):
        return sorted(ordered)
    if at_most == 1:
        return [ordered[len(ordered) // 2]]
    return sorted(ordered[round(index * (len(ordered) - 1) / (at_most - 1))] for index in range(at_most))


@dataclass(frozen=True)
class Splits:
    """A fold's utterances by what they may be used for."""

    train: list[Utterance]  # whose transcripts are known
    dev: list[Utterance]
    test: list[Utterance]
    controls: list[Utterance]
    train_words: frozenset[str]
    unlabelled: list[Utterance]  # speech to learn from without transcripts: their texts are empty

    def seen(self, utt: Utterance) -> bool:
        """Whether the word of an utterance was heard in training."""
        return utt.text in self.train_words


def split(corpus: Corpus, params: Params) -> Splits:
    """Divide a corpus for a fold, and check that nobody is on two sides."""
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
    there = {utt.block for utt in corpus}
    for block in (*blocks.train, *blocks.test):
        if there != {""} and block not in there:
            named = ", ".join(sorted(there))
            raise UserError(f"{corpus.source}: blocks: there is no block {block!r} in this corpus; it has {named}")
    out = {held_out, fold.dev, *fold.exclude}
    trained = [name for name in (speakers if fold.train == "all" else fold.train) if name not in out]
    if not trained:
        raise UserError(
            f"{corpus.source}: no training speaker is left: {held_out} is held out, {fold.dev} is the dev "
            f"speaker, {', '.join(fold.exclude) or 'nobody'} excluded"
        )
    heard = corpus.where(lambda utt: utt.speaker in trained and in_blocks(utt, blocks.train))
    train = [utt for utt in heard if utt.text]
    unlabelled = [utt for utt in heard if not utt.text]
    if params.use_unlabelled_held_out:
        more = corpus.where(lambda utt: utt.speaker == held_out and in_blocks(utt, blocks.train) and not utt.text)
        if not more:
            raise UserError(
                f"{corpus.source}: use_unlabelled_held_out: {held_out} says nothing in the training blocks "
                f"{', '.join(blocks.train)} that is not test speech; leave it out"
            )
        unlabelled += more
    dev = corpus.where(lambda utt: utt.speaker == fold.dev and is_test(utt, blocks.test))
    test = corpus.where(lambda utt: utt.speaker == held_out and is_test(utt, blocks.test))
    for name, utterances, asked in (
        ("training", train, blocks.train),
        ("dev", dev, blocks.test),
        ("test", test, blocks.test),
    ):
        if not utterances and (name != "dev" or fold.dev):
            speaker = {"dev": f" of {fold.dev}", "test": f" of {held_out}"}.get(name, "")
            has = sorted({utt.block or "(none)" for utt in corpus if not speaker or utt.speaker == speaker[4:]})
            raise UserError(
                f"{corpus.source}: the {name} set{speaker} is empty: blocks {', '.join(asked)} were asked for, "
                f"there are {', '.join(has)}"
            )
    controls = corpus.where(lambda utt: corpus.is_control(utt.speaker))
    return Splits(train, dev, test, controls, frozenset(utt.text for utt in train), unlabelled)


def in_blocks(utt: Utterance, blocks: tuple[str, ...]) -> bool:
    """Whether an utterance belongs to one of the blocks; where a corpus has none, to all."""
    return not utt.block or utt.block in blocks


def is_test(utt: Utterance, blocks: tuple[str, ...]) -> bool:
    """Another microphone's recording of an utterance is for training only."""
    return in_blocks(utt, blocks) and not utt.copy_of
