"""`Utterance`, and sequences of utterances that lie on disk, so that a corpus may be larger than memory.

`Utterances` keeps the fields of each utterance in a file without a name, and of each utterance in memory only its
place there and its duration: some 20 bytes in place of 600. A part of them shares the file, and has the numbers of its
rows. A small corpus lies in memory, packed the same way.
"""

from __future__ import annotations

import marshal
import os
import tempfile
import weakref
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdlib.errors import UserError

IN_MEMORY = 4 * 2**20  # bytes of packed utterances up to which they need no file: some 20,000
AT_ONCE = 1024  # rows that are read together
FIELD_TYPES = frozenset({str, float, type(None)})


class _Fields(NamedTuple):
    utt_id: str
    speaker: str
    path: str
    duration_s: float
    text: str
    block: str
    repetition: str
    word_type: str
    sha256: str
    offset_s: float | None
    features: str
    copy_of: str
    recording_of: str


class Utterance(_Fields):
    """One recording of one word or sentence: a file, or a part of one where `offset_s` is given."""

    __slots__ = ()

    def __new__(
        cls,
        utt_id: str,
        speaker: str,
        wav: Path | str,
        duration_s: float,
        text: str,
        block: str = "",
        repetition: str = "",
        word_type: str = "",
        sha256: str = "",
        offset_s: float | None = None,  # start of the speech, which lasts `duration_s`; None: the whole file
        features: str = "",  # made of the recording: "mels64x8x4"; a file of features is `wav` itself
        copy_of: str = "",  # utterance id of which this is another microphone's recording: for training only
        recording_of: str = "",  # what was said once, where each microphone's recording counts as an utterance
    ) -> Utterance:
        """Make an utterance; its file may be named by a path or by text."""
        offset_s = None if offset_s is None else float(offset_s)  # marshal knows no numbers of numpy
        more = (block, repetition, word_type, sha256, offset_s, features, copy_of, recording_of)
        return cls._make((utt_id, speaker, os.fspath(wav), float(duration_s), text, *more))

    @property
    def wav(self) -> Path:
        """The file."""
        return Path(self.path)

    @property
    def spoken(self) -> str:
        """The utterance that was spoken, which several recordings may be of: they stay together in every draw."""
        return self.copy_of or self.recording_of or self.utt_id

    def replace(self, **changes: object) -> Utterance:
        """The same utterance with other fields; `wav` is one."""
        fields = self._asdict()
        return Utterance(**{"wav": fields.pop("path")} | fields | changes)


class _Table:
    """Packed utterances, one after another, in memory or in a file."""

    def __init__(self, utterances: Iterable[Utterance]) -> None:
        ends, durations, packed, written = array("q", [0]), array("d"), bytearray(), 0
        self._file: int | None = None
        self.unique = False  # whether its ids are known to differ
        for utt in utterances:
            if not FIELD_TYPES.issuperset(map(type, utt)):  # of others marshal writes the bytes
                raise TypeError(f"fields must be str, float or None: {utt}")
            packed += marshal.dumps(tuple(utt))
            ends.append(written + len(packed))
            durations.append(utt.duration_s)
            if len(packed) > IN_MEMORY:
                written += self._write(packed)
                packed.clear()
        if self._file is not None:
            self._write(packed)
            packed.clear()
        self._packed, self._ends = bytes(packed), np.frombuffer(ends, np.int64)
        self.durations = np.frombuffer(durations, np.float64)

    def read(self, rows: np.ndarray) -> Iterator[Utterance]:
        """The utterances of some rows, in their order."""
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            begins, ends = self._ends[some], self._ends[some + 1]
            first, last = int(begins.min()), int(ends.max())
            if last - first <= 4 * int((ends - begins).sum()) + 4096:
                packed = self._bytes(first, last)
                for begin, end in zip((begins - first).tolist(), (ends - first).tolist(), strict=True):
                    yield Utterance._make(marshal.loads(packed[begin:end]))
            else:  # far from each other
                yield from map(self.one, some.tolist())

    def one(self, row: int) -> Utterance:
        """The utterance of a row."""
        return Utterance._make(marshal.loads(self._bytes(int(self._ends[row]), int(self._ends[row + 1]))))

    def _bytes(self, start: int, stop: int) -> bytes:
        if self._file is None:
            return self._packed[start:stop]
        return os.pread(self._file, stop - start, start)

    def _write(self, packed: bytearray) -> int:
        """Append to the file, which has no name and is gone with the table."""
        try:
            if self._file is None:
                with tempfile.TemporaryFile() as file:
                    self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
            left = memoryview(packed)
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: the list of utterances cannot be written there ({error.strerror}); free "
                "some space, or name another folder in the environment variable TMPDIR"
            ) from None
        return len(packed)


class Utterances(Sequence[Utterance]):
    """A sequence of utterances; each is read when it is asked for."""

    __slots__ = ("_rows", "_table")

    def __init__(self, table: _Table, rows: np.ndarray) -> None:
        """Rows of a table."""
        self._table, self._rows = table, rows

    @classmethod
    def of(cls, utterances: Iterable[Utterance]) -> Utterances:
        """The utterances of any iterable, which is read once."""
        if isinstance(utterances, cls):
            return utterances
        table = _Table(utterances)
        return cls(table, np.arange(len(table.durations), dtype=np.int32))

    @property
    def durations(self) -> np.ndarray:
        """Their durations, in seconds."""
        return self._table.durations[self._rows]

    def where(self, condition: Callable[[Utterance], object]) -> Utterances:
        """Those that satisfy a condition."""
        chosen = np.fromiter(map(bool, map(condition, self)), bool, len(self))
        return Utterances(self._table, self._rows[chosen])

    def by_speaker(self) -> dict[str, Utterances]:
        """The utterances of each speaker; speakers are sorted."""
        rows: defaultdict[str, array] = defaultdict(lambda: array("i"))
        for row, utt in zip(self._rows.tolist(), self, strict=True):
            rows[utt.speaker].append(row)
        return {name: Utterances(self._table, np.array(rows[name], np.int32)) for name in sorted(rows)}

    def repeated_ids(self) -> list[str]:
        """The ids that occur more than once."""
        if self._table.unique and len(np.unique(self._rows)) == len(self):
            return []
        hashes = np.fromiter((hash(utt.utt_id) for utt in self), np.int64, len(self))
        if len(np.unique(hashes)) == len(hashes):
            self._table.unique |= len(self) == len(self._table.durations)
            return []
        return [utt_id for utt_id, times in Counter(utt.utt_id for utt in self).items() if times > 1]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Utterance]:
        return self._table.read(self._rows)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Utterances(self._table, self._rows[place])
        return self._table.one(self._rows[place])

    def __add__(self, others: Iterable[Utterance]) -> Utterances:
        if isinstance(others, Utterances) and others._table is self._table:
            return Utterances(self._table, np.concatenate([self._rows, others._rows]))
        return Utterances.of([*self, *others])

    def __eq__(self, others: object) -> bool:
        if not isinstance(others, Sequence):
            return NotImplemented
        return len(self) == len(others) and all(one == other for one, other in zip(self, others, strict=True))

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{len(self):,} utterances>"

    def __reduce__(self):
        return Utterances.of, (list(self),)
