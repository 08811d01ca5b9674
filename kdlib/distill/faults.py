"""The faults that have made students collapse, each made on purpose, so that one can see what it does.

A fault of the teachers' outputs is a store that gives something else than it holds; all that asks it - the loss, and
the preflight - sees the fault. Faults are set in `params/ablations/collapse.yaml` and nowhere else.
"""

import copy
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdlib.corpus import prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import split
from kdlib.errors import UserError
from kdlib.io import resolve_path
from kdlib.logits.store import LogitStore
from kdlib.params import Params
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.tokens import Tokens, train_tokenizer

if TYPE_CHECKING:
    import torch

CODE = ("distill/faults.py",)
Source = Callable[[str], str | None]  # an utterance -> the one whose output stands for it
SPECIAL = 3  # BOS, EOS and blank stay where they are when ids are shifted


class FaultyStore(LogitStore):
    """A store whose outputs are of other recordings, at another time, or of other tokens than they should be."""

    def __init__(self, store: LogitStore, source: Source | None, later: int = 0, shift: int = 0) -> None:
        vars(self).update(vars(copy.copy(store)))
        self.source, self.later, self.shift = source or (lambda utt_id: utt_id), later, shift
        if shift and self.head is not None:
            self.head = tuple(_shifted(part, shift, 0) for part in self.head)

    def __contains__(self, utt_id: str) -> bool:
        other = self.source(utt_id)
        return other is not None and super().__contains__(other)

    def __iter__(self):
        return (utt_id for utt_id in super().__iter__() if utt_id in self)

    def frames(self, utt_id: str) -> int:
        """How many rows there are of what stands for an utterance."""
        return super().frames(self.source(utt_id))

    def hidden(self, utt_id: str) -> "torch.Tensor":
        """What is kept of what stands for an utterance, moved in time."""
        found = super().hidden(self.source(utt_id))
        if self.later and len(found):
            places = np.clip(np.arange(len(found)) - self.later, 0, len(found) - 1)
            found = found[places]
        return _shifted(found, self.shift, 1) if self.head is None and self.shift else found


def apply_faults(params: Params, ensemble: TeacherEnsemble, *, training: bool = True) -> TeacherEnsemble:
    """The ensemble with the recipe's faults; itself where there is none. Other recordings are of training speech."""
    faults = params.faults
    if not (faults.token_shift or faults.frame_jitter or (training and (faults.own_recordings or faults.mispaired))):
        return ensemble
    if faults.own_recordings and faults.mispaired:
        raise UserError("faults: own_recordings and mispaired say both whose outputs are taken; choose one")
    names, stores = list(ensemble.stores), {}
    apart = (
        np.linspace(-faults.frame_jitter, faults.frame_jitter, len(names)).round().astype(int)
        if len(names) > 1
        else [0]
    )
    told = split(prepare.load(params), params).train if training else []
    for name, later in zip(names, apart, strict=True):
        source = None
        if training and faults.own_recordings:
            source = _own(told, name)
        elif training and faults.mispaired:
            source = _others(told, params.seed)
        store = FaultyStore(ensemble.stores[name], source, int(later), faults.token_shift)
        if source is None or any(True for _ in store):  # a teacher without training speech has no own recordings
            stores[name] = store
    if not stores:
        raise UserError("faults.own_recordings: no teacher's speaker is trained on")
    cut = training and (faults.own_recordings or faults.mispaired)
    return TeacherEnsemble(stores, replace(ensemble.choice, cut=cut), ensemble.excluded)


def limit_words(params: Params, utterances: Sequence[Utterance]) -> list[Utterance]:
    """Training speech of so many words alone."""
    if not params.faults.max_words:
        return list(utterances)
    words = sorted({utt.text for utt in utterances if utt.text})
    kept = set(random.Random(params.seed).sample(words, min(params.faults.max_words, len(words))))
    return [utt for utt in utterances if utt.text in kept]


def text_decoder(params: Params, tokens: Tokens) -> Callable[[Iterable[int]], str]:
    """How evaluation makes text of token ids."""
    faults = params.faults
    other = tokens
    if faults.decode_tokenizer == "lexicon":
        with tempfile.TemporaryDirectory() as folder:
            path = train_tokenizer(prepare.spellings(params), max(len(tokens.pieces), 64), Path(folder))
            other = Tokens.for_teachers(path)
    elif path := tokenizer_files(params):
        if not path[0].is_file():
            raise UserError(
                f"faults.decode_tokenizer: there is no file {path[0]}; name a sentencepiece model, or: lexicon"
            )
        other = Tokens.for_teachers(path[0])
    return lambda ids: other.decode(one + faults.decode_offset for one in ids)


def tokenizer_files(params: Params) -> list[Path]:
    """What evaluation reads with, where that is a file."""
    name = params.faults.decode_tokenizer
    return [resolve_path(name)] if name and name != "lexicon" else []


def changes_decoding(params: Params) -> bool:
    """Whether evaluation makes another text of token ids than they mean."""
    return bool(params.faults.decode_offset or params.faults.decode_tokenizer)


def _own(told: Sequence[Utterance], teacher: str) -> Source:
    """The teacher's own speaker's recording of the same word: of the same block and repetition, or the first."""
    mine: dict[str, list[Utterance]] = defaultdict(list)
    for utt in told:
        if utt.speaker == teacher and utt.text:
            mine[utt.text].append(utt)
    by_id = {utt.utt_id: utt for utt in told}

    def source(utt_id: str) -> str | None:
        utt = by_id.get(utt_id)
        there = mine.get(utt.text, []) if utt else []
        same = [one for one in there if (one.block, one.repetition) == (utt.block, utt.repetition)]
        return (same or there)[0].utt_id if there else None

    return source


def _others(told: Sequence[Utterance], seed: int) -> Source:
    """Another utterance, at random; each stands for one other."""
    order = sorted(utt.utt_id for utt in told if utt.text)
    random.Random(seed).shuffle(order)
    return dict(zip(order, [*order[1:], *order[:1]], strict=True)).get


def _shifted(values: "torch.Tensor", shift: int, dim: int) -> "torch.Tensor":
    """Every token's value at the id `shift` later; the special ids keep theirs, and the last become the first."""
    import torch

    special, rest = values.split([SPECIAL, values.shape[dim] - SPECIAL], dim)
    return torch.cat([special, rest.roll(shift, dim)], dim)
