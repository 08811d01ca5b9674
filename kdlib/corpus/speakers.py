"""Speakers and folds: metadata, training speakers, teachers, dev speaker, test speaker.

The dev speaker of a fold is never its test speaker; its speech is not trained on, and its teacher is not averaged. Two
sets of level labels exist for UA-Speech, the published ones and the original study's; both are kept and the fold
selects one.
"""

import csv
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files

from kdlib.console import warn
from kdlib.corpus.manifest import LEVELS, Corpus, Speaker
from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.errors import UserError, nearest
from kdlib.settings.corpus import CorpusSettings, SplitSettings


@functools.cache
def published_speakers() -> dict[str, Speaker]:
    """The UA-Speech speakers and controls, by name."""
    text = files("kdlib").joinpath("data/speakers.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["speaker"]: Speaker(**row | {"intelligibility_pct": float(row["intelligibility_pct"])}) for row in rows}


def speaker_info(settings: CorpusSettings, names: Iterable[str]) -> dict[str, Speaker]:
    """Collect the metadata of a corpus's speakers: UA-Speech's table or TORGO's names, then the recipe."""
    if settings.corpus in ("synthetic", "uaspeech") or settings.speakers == "uaspeech":
        speakers = {name: published_speakers().get(name, Speaker(name)) for name in names}
    elif settings.corpus == "torgo":  # FC01: a woman of the control group
        speakers = {name: Speaker(name, sex=name[0], level="CONTROL" if name[1] == "C" else "") for name in names}
    else:
        speakers = {name: Speaker(name) for name in names}
    recipe = {} if isinstance(settings.speakers, str) else settings.speakers
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


class Splits:
    """A fold's utterances by purpose. No speaker is in two of training, dev and test."""

    def __init__(self, corpus: Corpus, settings: SplitSettings) -> None:
        """Split a corpus, and check that the fold's speakers and blocks exist in it."""
        self.corpus, self.settings = corpus, settings
        held_out, fold, blocks = settings.held_out, settings.fold, settings.blocks
        _check_speakers(corpus, settings)
        _check_blocks(corpus, settings)
        given, away = fold.given, {*settings.excluded_speakers, *fold.exclude}
        named = corpus.dysarthric if fold.train == "all" else fold.train
        self.train_speakers = [name for name in named if name not in away]
        if not self.train_speakers:
            raise UserError(
                f"{corpus.source}: no training speaker is left: {held_out} is held out, {fold.dev} is the dev "
                f"speaker, {', '.join(fold.exclude) or 'no speaker is'} excluded"
            )
        own = tuple(block for block in blocks.train if not (given and block in blocks.dev))
        among = frozenset(self.train_speakers)
        trainable = corpus.where(lambda utt: utt.speaker in among and in_blocks(utt, own))
        self.train = trainable.where(lambda utt: utt.text)
        self.unlabelled = trainable.where(lambda utt: not utt.text)  # training speech without transcripts
        if settings.use_unlabelled_held_out:
            self.unlabelled += _unlabelled_held_out(corpus, settings)
        dev, dev_blocks = fold.dev, blocks.dev if given else blocks.test
        self.dev = corpus.where(lambda utt: utt.speaker == (utt.speaker if given else dev) and is_test(utt, dev_blocks))
        self.test = corpus.where(
            lambda utt: utt.speaker == (utt.speaker if given else held_out) and is_test(utt, blocks.test)
        )
        self.controls = corpus.where(lambda utt: corpus.is_control(utt.speaker))
        self.train_words = frozenset(utt.text for utt in self.train)
        self._check_not_empty()

    def seen(self, utt: Utterance) -> bool:
        """True if the word of an utterance is in the training set."""
        return utt.text in self.train_words

    def speech_of(self, speaker: str) -> Utterances:
        """A speaker's labelled utterances in the training blocks: what their teacher is trained on."""
        blocks = self.settings.blocks.train
        return self.corpus.where(lambda utt: utt.text and utt.speaker == speaker and in_blocks(utt, blocks))

    def speech_of_all(self, *, test: bool = False) -> Utterances:
        """The training blocks of all dysarthric speakers, the held-out one included; or the test blocks."""
        corpus, blocks = self.corpus, self.settings.blocks
        if test:
            tested = blocks.test + blocks.dev
            return corpus.where(lambda utt: utt.text and not corpus.is_control(utt.speaker) and is_test(utt, tested))
        return corpus.where(lambda utt: not corpus.is_control(utt.speaker) and in_blocks(utt, blocks.train))

    def teachers(self, most: int | None = None, *, same_level: bool = False) -> list[str]:
        """The speakers whose teachers the fold averages: at most so many, or those of the held-out speaker's level."""
        fold, held_out = self.settings.fold, self.settings.held_out
        if isinstance(fold.teachers, tuple) and not same_level:
            return list(fold.teachers)
        if fold.teachers == "all" and not same_level:
            ordered = [name for name in self.corpus.by_intelligibility if name in self._others]
            return evenly_spaced(ordered, most)
        if not self.same_level:
            level = self.corpus.level(held_out, fold.levels)
            why = f"no other speaker is {level}" if level else f"the level of {held_out} is not known"
            count = len(self._others)
            warn(f"{why} by the {fold.levels} labels: the teachers of {held_out} are all {count} others")
        return self.same_level or self._others

    @property
    def same_level(self) -> list[str]:
        """The other speakers of the held-out speaker's level, by the fold's labels; none where it is not known."""
        labels = self.settings.fold.levels
        level = self.corpus.level(self.settings.held_out, labels)
        return [name for name in self._others if level and self.corpus.level(name, labels) == level]

    @property
    def _others(self) -> list[str]:
        return [name for name in self.corpus.dysarthric if name not in self.settings.excluded_speakers]

    def _check_not_empty(self) -> None:
        blocks = self.settings.blocks
        parts = (
            ("training", self.train, blocks.train),
            ("dev", self.dev, blocks.test),
            ("test", self.test, blocks.test),
        )
        speakers = {"dev": self.settings.fold.dev, "test": self.settings.held_out}
        for name, utterances, expected in parts:
            if utterances or (name == "dev" and not self.settings.fold.dev):
                continue
            speaker = None if self.settings.fold.given else speakers.get(name)
            found = {utt.block or "(none)" for utt in self.corpus if speaker in (None, utt.speaker)}
            raise UserError(
                f"{self.corpus.source}: the {name} set{f' of {speaker}' if speaker else ''} is empty: expected blocks "
                f"{', '.join(expected)}, found {', '.join(sorted(found))}"
            )


def _check_speakers(corpus: Corpus, settings: SplitSettings) -> None:
    """Refuse a fold that names a speaker without utterances."""
    speakers, fold = corpus.dysarthric, settings.fold
    for role, name in () if fold.given else (("held-out", settings.held_out), ("dev", fold.dev)):
        if name is not None and name not in speakers:
            raise UserError(f"{corpus.source}: the {role} speaker {name!r} has no utterances{nearest(name, speakers)}")
    for role in ("train", "teachers"):
        for name in getattr(fold, role) if isinstance(getattr(fold, role), tuple) else ():
            if name not in speakers:
                raise UserError(
                    f"{corpus.source}: fold.{role} names {name!r}, who has no utterances{nearest(name, speakers)}"
                )


def _check_blocks(corpus: Corpus, settings: SplitSettings) -> None:
    """Refuse blocks that the corpus does not have."""
    corpus_blocks = {utt.block for utt in corpus}
    for block in (*settings.blocks.train, *settings.blocks.dev, *settings.blocks.test):
        if corpus_blocks != {""} and block not in corpus_blocks:
            named = ", ".join(sorted(corpus_blocks))
            raise UserError(f"{corpus.source}: blocks: there is no block {block!r} in this corpus; it has {named}")


def _unlabelled_held_out(corpus: Corpus, settings: SplitSettings) -> Utterances:
    """The held-out speaker's speech that is not test speech, without transcripts."""
    held_out, blocks = settings.held_out, settings.blocks.train
    more = corpus.where(lambda utt: utt.speaker == held_out and in_blocks(utt, blocks) and not utt.text)
    if not more:
        raise UserError(
            f"{corpus.source}: use_unlabelled_held_out: {held_out} has no utterance in the training blocks "
            f"{', '.join(blocks)} that is not test speech; remove the setting"
        )
    return more


def in_blocks(utt: Utterance, blocks: tuple[str, ...]) -> bool:
    """True if an utterance belongs to one of the blocks; without a block it belongs to all."""
    return not utt.block or utt.block in blocks


def is_test(utt: Utterance, blocks: tuple[str, ...]) -> bool:
    """True if an utterance may be tested on; another microphone's recording is for training only."""
    return in_blocks(utt, blocks) and not utt.copy_of


def adaptation_speech(corpus: Corpus, speaker: str, settings: SplitSettings, *, test: bool) -> Utterances:
    """A speaker's training blocks less test speech or, with `test`, the test speech."""
    blocks = settings.blocks
    own = corpus.where(
        lambda utt: (
            utt.speaker == speaker
            and not utt.copy_of
            and is_test(utt, blocks.test) == test
            and (test or in_blocks(utt, blocks.train))
        )
    )
    if not own:
        where = "test blocks" if test else f"training blocks {', '.join(blocks.train)} that is not test speech"
        raise UserError(f"{corpus.source}: adapt: {speaker} has no utterance in the {where}; adaptation needs some")
    return own
