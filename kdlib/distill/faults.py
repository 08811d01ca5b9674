"""Faults that have made students collapse, injected on purpose to study their effects.

A fault of the teachers' outputs is a store that returns something else than it holds; the loss and the preflight both
read it, so both see the fault. Faults are set in `params/ablations/collapse.yaml` and nowhere else.
"""

import copy
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.decode.lexicon import Words
from kdlib.errors import UserError
from kdlib.io import resolve_path
from kdlib.logits.store import LogitStore
from kdlib.settings.student import Faults
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.tokens import Tokens, train_tokenizer

Source = Callable[[str], str | None]  # utterance -> the utterance whose output is used in its place
SPECIAL = 3  # BOS, EOS and blank stay where they are when ids are shifted


class FaultyStore(LogitStore):
    """A store that returns outputs of other recordings, shifted in time, or with shifted token ids."""

    def __init__(self, store: LogitStore, source: Source | None, delay: int = 0, shift: int = 0) -> None:
        """`delay` in frames, `shift` in token ids; without a `source` utterances keep their own outputs."""
        vars(self).update(vars(copy.copy(store)))
        self.source, self.delay, self.shift = source or (lambda utt_id: utt_id), delay, shift
        if shift and self.head is not None:
            self.head = tuple(_shift_ids(part, shift, 0) for part in self.head)

    def __contains__(self, utt_id: str) -> bool:
        source = self.source(utt_id)
        return source is not None and super().__contains__(source)

    def __iter__(self):
        return (utt_id for utt_id in super().__iter__() if utt_id in self)

    def frames(self, utt_id: str) -> int:
        """Number of frames of the output used for an utterance."""
        return super().frames(self.source(utt_id))

    def hidden(self, utt_id: str) -> torch.Tensor:
        """The stored output used for an utterance, shifted in time."""
        hidden = super().hidden(self.source(utt_id))
        if self.delay and len(hidden):
            hidden = hidden[np.clip(np.arange(len(hidden)) - self.delay, 0, len(hidden) - 1)]
        return _shift_ids(hidden, self.shift, 1) if self.head is None and self.shift else hidden


def apply_faults(
    faults: Faults, ensemble: TeacherEnsemble, train: Sequence[Utterance] | None, seed: int
) -> TeacherEnsemble:
    """The ensemble with the recipe's faults, or unchanged without any.

    Only training speech gets other recordings: `train`, or None for other speech.
    """
    training = train is not None
    if not (faults.token_shift or faults.frame_jitter or (training and (faults.own_recordings or faults.mispaired))):
        return ensemble
    if faults.own_recordings and faults.mispaired:
        raise UserError("faults: own_recordings and mispaired exclude each other; choose one")
    names, stores = list(ensemble.stores), {}
    delays = np.linspace(-faults.frame_jitter, faults.frame_jitter, len(names)).round().astype(int)
    delays = delays if len(names) > 1 else [0]
    for name, delay in zip(names, delays, strict=True):
        source = None
        if training and faults.own_recordings:
            source = _own_recordings(train, name)
        elif training and faults.mispaired:
            source = _mispaired(train, seed)
        store = FaultyStore(ensemble.stores[name], source, int(delay), faults.token_shift)
        if source is None or any(True for _ in store):  # a teacher without training speech has no own recordings
            stores[name] = store
    if not stores:
        raise UserError("faults.own_recordings: no teacher's speaker is among the training speakers")
    cut = training and (faults.own_recordings or faults.mispaired)
    return TeacherEnsemble(stores, replace(ensemble.weighting, cut=cut), ensemble.excluded)


def limit_words(faults: Faults, utterances: Utterances, seed: int) -> Utterances:
    """Restrict training speech to `faults.max_words` different words."""
    if not faults.max_words:
        return utterances
    words = sorted({utt.text for utt in utterances if utt.text})
    kept = set(random.Random(seed).sample(words, min(faults.max_words, len(words))))
    return utterances.where(lambda utt: utt.text in kept)


def text_decoder(faults: Faults, tokens: Tokens, lexicon: Words) -> Callable[[Iterable[int]], str] | None:
    """The function that evaluation decodes token ids to text with; None if it decodes them correctly."""
    if not faults.changes_decoding:
        return None
    tokenizer = tokens
    if faults.decode_tokenizer == "lexicon":
        with tempfile.TemporaryDirectory() as folder:
            path = train_tokenizer(lexicon, max(len(tokens.pieces), 64), Path(folder))
            tokenizer = Tokens.for_teachers(path)
    elif path := tokenizer_files(faults):
        if not path[0].is_file():
            raise UserError(
                f"faults.decode_tokenizer: there is no file {path[0]}; name a sentencepiece model, or: lexicon"
            )
        tokenizer = Tokens.for_teachers(path[0])
    return lambda ids: tokenizer.decode(token + faults.decode_offset for token in ids)


def tokenizer_files(faults: Faults) -> list[Path]:
    """The tokenizer file that evaluation decodes with, if the recipe names one."""
    name = faults.decode_tokenizer
    return [resolve_path(name)] if name and name != "lexicon" else []


def _own_recordings(train: Sequence[Utterance], teacher: str) -> Source:
    """Use the teacher's own speaker's recording of the word: of the same block and repetition, or the first."""
    by_text: dict[str, list[Utterance]] = defaultdict(list)
    for utt in train:
        if utt.speaker == teacher and utt.text:
            by_text[utt.text].append(utt)
    by_id = {utt.utt_id: utt for utt in train}

    def source(utt_id: str) -> str | None:
        utt = by_id.get(utt_id)
        own = by_text.get(utt.text, []) if utt else []
        same = [match for match in own if (match.block, match.repetition) == (utt.block, utt.repetition)]
        return (same or own)[0].utt_id if own else None

    return source


def _mispaired(train: Sequence[Utterance], seed: int) -> Source:
    """Use another utterance, drawn at random; each is used exactly once."""
    order = sorted(utt.utt_id for utt in train if utt.text)
    random.Random(seed).shuffle(order)
    return dict(zip(order, [*order[1:], *order[:1]], strict=True)).get


def _shift_ids(values: torch.Tensor, shift: int, dim: int) -> torch.Tensor:
    """Move every token's value to the id `shift` later; special ids keep theirs, and the last ids wrap around."""
    special, rest = values.split([SPECIAL, values.shape[dim] - SPECIAL], dim)
    return torch.cat([special, rest.roll(shift, dim)], dim)
