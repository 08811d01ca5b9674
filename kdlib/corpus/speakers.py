"""Speakers and folds: who they are, who trains, who decides, who is tested.

The dev speaker of a fold is never its test speaker, and is neither trained on nor averaged. Two sets of level labels
exist for UA-Speech, the published ones and the original study's; both are kept and the fold says which is used.
"""

import csv
import functools
import warnings
from dataclasses import dataclass
from importlib.resources import files

from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.errors import UserError, nearest
from kdlib.params import Params

CONTROL = "CONTROL"


@dataclass(frozen=True, slots=True)
class Speaker:
    """One row of the speaker table."""

    speaker: str
    sex: str
    intelligibility_pct: float
    published_level: str
    seed_level: str

    @property
    def control(self) -> bool:
        """Whether this is a speaker without dysarthria."""
        return self.published_level == CONTROL


@functools.cache
def table() -> dict[str, Speaker]:
    """The UA-Speech speakers and controls, by name."""
    text = files("kdlib").joinpath("data/speakers.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["speaker"]: Speaker(**row | {"intelligibility_pct": float(row["intelligibility_pct"])}) for row in rows}


def level(speaker: str, labels: str = "published") -> str:
    """A speaker's level by the published or the seeds' labels; empty for a speaker who is not in the table."""
    return getattr(table()[speaker], f"{labels}_level") if speaker in table() else ""


def is_control(speaker: str) -> bool:
    """Whether the table knows this speaker as a control."""
    return speaker in table() and table()[speaker].control


def dev_speaker(held_out: str, candidates: list[str]) -> str:
    """The rule behind the fold files: nearest in published intelligibility, then of the same sex, then by name.

    >>> dev_speaker("M08", ["M10", "F05", "M09"])
    'M10'
    """
    me = table()[held_out]
    others = [table()[name] for name in candidates if name != held_out]
    return min(
        others, key=lambda you: (abs(you.intelligibility_pct - me.intelligibility_pct), you.sex != me.sex, you.speaker)
    ).speaker


def teachers(params: Params, speakers: list[str]) -> list[str]:
    """The speakers whose teachers a fold averages. `speakers`: all dysarthric speakers of the corpus."""
    fold = params.fold
    others = [name for name in speakers if name not in (params.held_out, fold.dev)]
    if isinstance(fold.teachers, tuple):
        return list(fold.teachers)
    if fold.teachers == "all":
        return others
    mine = level(params.held_out, fold.levels)
    same = [name for name in others if level(name, fold.levels) == mine]
    if not same:
        warnings.warn(
            f"no other speaker is {mine} by the {fold.levels} labels: all {len(others)} others teach {params.held_out}",
            stacklevel=2,
        )
    return same or others


@dataclass(frozen=True)
class Splits:
    """A fold's utterances by what they may be used for."""

    train: list[Utterance]
    dev: list[Utterance]
    test: list[Utterance]
    controls: list[Utterance]
    train_words: frozenset[str]

    def seen(self, utt: Utterance) -> bool:
        """Whether the word of an utterance was heard in training."""
        return utt.text in self.train_words


def split(corpus: Corpus, params: Params) -> Splits:
    """Divide a corpus for a fold, and check that nobody is on two sides."""
    held_out, fold, blocks = params.held_out, params.fold, params.blocks
    speakers = [name for name in corpus.speakers if not is_control(name)]
    for role, name in (("held-out", held_out), ("dev", fold.dev)):
        if name is not None and name not in speakers:
            raise UserError(f"{corpus.source}: the {role} speaker {name!r} has no utterances{nearest(name, speakers)}")
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
    train = corpus.where(lambda utt: utt.speaker in trained and in_blocks(utt, blocks.train))
    parts = {
        "dev": corpus.where(lambda utt: utt.speaker == fold.dev and in_blocks(utt, blocks.test)),
        "test": corpus.where(lambda utt: utt.speaker == held_out and in_blocks(utt, blocks.test)),
    }
    for name, utterances, asked in (
        ("training", train, blocks.train),
        *((name, part, blocks.test) for name, part in parts.items()),
    ):
        if not utterances and (name != "dev" or fold.dev):
            found = sorted({utt.block or "(none)" for utt in corpus})
            raise UserError(
                f"{corpus.source}: the {name} set is empty: blocks {', '.join(asked)} were asked for, "
                f"the corpus has {', '.join(found)}"
            )
    return Splits(
        train,
        parts["dev"],
        parts["test"],
        corpus.where(lambda utt: is_control(utt.speaker)),
        frozenset(utt.text for utt in train),
    )


def in_blocks(utt: Utterance, blocks: tuple[str, ...]) -> bool:
    """Whether an utterance belongs to one of the blocks; where a corpus has none, to all."""
    return not utt.block or utt.block in blocks
