"""`Index`: where each utterance of a store lies, looked up on disk: memory does not grow with the corpus.

Rows are sorted by utterance id. Of every 64th the id is kept in memory; a look-up reads the 64 rows behind one of
them, unless they are those of the last one. Stores of schema 3 have no such file: their index is sorted when they are
opened, and held in memory.
"""

import csv
import io
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from kdlib.errors import UserError
from kdlib.io import atomic_write

STEP = 64  # rows read at once
FILE, JOURNAL = "index.npy", "index.csv"
COLUMNS = ("utt_id", "start", "frames", "crc32")
Row = tuple[str, int, int, int]


class Index:
    """Start, number of frames and checksum of each utterance, in the order of their ids."""

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        self._file = path.open("rb", buffering=0) if path.is_file() else None
        rows = np.load(path, mmap_mode="r") if self._file else _sorted(read_journal(folder / JOURNAL))
        self._held = None if self._file else rows
        self._row, self._count = rows.dtype, len(rows)
        self._offset = path.stat().st_size - rows.nbytes if self._file else 0
        self._last: tuple[int, list[bytes], np.ndarray] = (-1, [], rows[:0])  # the rows that were read last
        self._firsts, self.frames = [], 0
        for number in range(-(-self._count // STEP)):
            part = self._rows(number)
            self._firsts.append(bytes(part["utt_id"][0]))
            self.frames += int(part["frames"].sum())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        for number in range(len(self._firsts)):
            yield from (name.decode() for name in self._rows(number)["utt_id"].tolist())

    def find(self, utt_id: str) -> tuple[int, int, int] | None:
        """The start, number of frames and checksum of an utterance; None if it is not in the store."""
        name = utt_id.encode()
        number = bisect_right(self._firsts, name) - 1
        if number < 0:
            return None
        last, names, rows = self._last
        if last != number:
            rows = self._rows(number)
            names = rows["utt_id"].tolist()
            self._last = number, names, rows
        place = bisect_left(names, name)
        return rows[place].item()[1:] if place < len(names) and names[place] == name else None

    def _rows(self, number: int) -> np.ndarray:
        start, end = number * STEP, min((number + 1) * STEP, self._count)
        if self._file is None:
            return self._held[start:end]
        size = self._row.itemsize
        content = os.pread(self._file.fileno(), (end - start) * size, self._offset + start * size)
        return np.frombuffer(content, self._row)


def write(folder: Path, rows: Iterable[Row]) -> None:
    """Write the index of a complete store."""
    with atomic_write(folder / FILE) as hidden, hidden.open("wb") as file:
        np.save(file, _sorted(rows))
        file.flush()
        os.fsync(file.fileno())


def _sorted(rows: Iterable[Row]) -> np.ndarray:
    """Rows as an array, sorted by utterance id."""
    named = sorted((utt_id.encode(), *rest) for utt_id, *rest in rows)
    width = max((len(row[0]) for row in named), default=1)
    return np.array(named, [("utt_id", f"S{width}"), ("start", "<i8"), ("frames", "<i4"), ("crc32", "<u4")])


def read_rows(folder: Path) -> list[Row]:
    """Rows of a store, complete or not, in the order in which they were written."""
    if (folder / JOURNAL).is_file():
        return read_journal(folder / JOURNAL)
    if not (folder / FILE).is_file():
        return []
    try:
        rows = np.load(folder / FILE)
    except (EOFError, ValueError, OSError):
        raise UserError(f"{folder / FILE} is damaged; remove the folder, and extract the store again") from None
    written = rows[np.lexsort((rows["frames"], rows["start"]))]  # utterances without frames before the next one
    return [(row[0].decode(), *row[1:]) for row in written.tolist()]


def read_journal(path: Path) -> list[Row]:
    """Rows that a writer has completed, without gaps; one that a killed writer began is dropped."""
    rows: list[Row] = []
    expected = 0
    for row in csv.reader(io.StringIO(path.read_text(encoding="utf-8"))):
        if len(row) == 5 and row[4] == "." and int(row[1]) == expected:
            rows.append((row[0], int(row[1]), int(row[2]), int(row[3])))
            expected += int(row[2])
    return rows


def start_journal(folder: Path, rows: Iterable[Row]) -> IO[str]:
    """Write the journal of these rows, and open it to append others."""
    with atomic_write(folder / JOURNAL) as hidden, hidden.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow([*COLUMNS, "whole"])
        for row in rows:
            append(file, row)
        file.flush()
        os.fsync(file.fileno())
    return (folder / JOURNAL).open("a", newline="", encoding="utf-8")


def append(journal: IO[str], row: Row) -> None:
    """Append a complete row to a journal, with the mark of it."""
    csv.writer(journal, lineterminator="\n").writerow([*row, "."])
