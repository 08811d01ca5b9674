"""`LogitStore`: a teacher's outputs on every utterance, stored once, small, and exact at every temperature.

The head of a CTC or attention model is linear, so its logits over V tokens have the rank d of its input. Stored are
these activations (`fp16`, or `int8` with one scale per frame) and once the head's weights: 2 d bytes per frame instead
of 4 V. `dense16` and `dense32` store logits as they are, for those without a head. A folder contains

    header.json   format, teacher and permitted use           frames.bin   [frames, width]
    index.npy     utterance -> frames, checksum               head.safetensors   weight [V, d], bias [V]

Utterances are appended one by one and enter a journal, index.csv, when they are complete: after a kill the writer
resumes behind the last one. Every read is checked against its checksum. Frames and index are read as they are asked
for: memory does not grow with the corpus.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from kdlib.corpus.inputs import Batch
from kdlib.errors import UserError, nearest
from kdlib.io import read_json, sha256, write_json
from kdlib.logits import index
from kdlib.tokens import Tokens

SCHEMA, READ = 4, (3, 4)  # of the header: 1 had other names, 2 no checksum of its own, 3 an index in text
ENCODINGS = {"fp16": np.float16, "int8": np.int8, "dense16": np.float16, "dense32": np.float32}
BEGUN = "begun.json"  # in the folder of a store that is being written


@dataclass(frozen=True, kw_only=True)
class Header:
    """The format of a store, the teacher that its outputs are from, and their permitted use."""

    teacher: str
    train_speakers: tuple[str, ...]  # the speakers that the teacher was trained on: none of them may be held out
    output: str  # "ctc": one row per frame; "decoder": one row per token, teacher-forced on the reference
    encoding: str  # one of ENCODINGS
    size: int  # V, number of tokens
    width: int  # d, values per row; V where logits are dense
    tokens: str  # fingerprint of the tokenizer with its special ids
    blank: int
    bos: int | None
    eos: int | None
    stride_ms: float  # of CTC frames; 0 for a decoder's steps
    purpose: str = "training"  # "analysis": of a held-out speaker's speech, never a training target
    temperature: float = 1.0  # applied before storing: always 1
    schema: int = SCHEMA

    @property
    def row(self) -> np.dtype:
        """Data type of a row of frames.bin."""
        if self.encoding == "int8":
            return np.dtype([("scale", np.float16), ("values", np.int8, (self.width,))])
        return np.dtype((ENCODINGS[self.encoding], (self.width,)))


class Writer:
    """Append utterances to a store; on the folder of a killed writer, resume behind its last complete utterance.

    A folder with outputs of another header, head or `source` (a fingerprint of what they are copied from) is refused: a
    store has the outputs of one model.
    """

    def __init__(
        self, folder: Path, header: Header, head: tuple[torch.Tensor, torch.Tensor] | None, source: str = ""
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.header = folder, header
        if (head is None) != header.encoding.startswith("dense"):
            raise ValueError(f"encoding {header.encoding!r} {'needs a' if head is None else 'has no'} head")
        if head is not None:
            weight, bias = (part.detach().float().contiguous().cpu() for part in head)
            if tuple(weight.shape) != (header.size, header.width) or tuple(bias.shape) != (header.size,):
                raise ValueError(
                    f"head {tuple(weight.shape)} does not fit {header.size} tokens of width {header.width}"
                )
            weight = weight.half() if header.encoding == "int8" else weight  # as exact as the activations are
            head = {"weight": weight, "bias": bias}
        self._done = {row[0]: row for row in _known_rows(folder)}
        self._rows = sum(frames for _, _, frames, _ in self._done.values())
        self._claim(head, source)
        self._frames = (folder / "frames.bin").open("ab")
        self._frames.truncate(self._rows * header.row.itemsize)  # drops what a killed writer had begun
        self._journal = index.start_journal(folder, self._done.values())
        (folder / index.FILE).unlink(missing_ok=True)

    def _claim(self, head: dict[str, torch.Tensor] | None, source: str) -> None:
        """Refuse a folder that has other outputs; else note in it whose outputs it will have."""
        if head is not None:
            content = save(head)
        self._sums = {"head": hashlib.sha256(content).hexdigest() if head is not None else None, "source": source}
        mine = json.loads(json.dumps(dataclasses.asdict(self.header) | self._sums))  # tuples as lists
        held = self._held()
        if held is not None and held.get("schema") in READ:
            held["schema"] = SCHEMA  # what is written is the same
        if held is not None and held != mine:
            different = ", ".join(sorted(name for name in mine if held.get(name) != mine[name]))
            raise UserError(
                f"{self.folder} holds outputs that were stored before, of other contents ({different}); name another "
                "folder, or remove this one"
            )
        frames, expected = self.folder / "frames.bin", self._rows * self.header.row.itemsize
        found = frames.stat().st_size if frames.is_file() else 0
        if found < expected:
            raise UserError(
                f"{frames} has {found:,} bytes, expected at least {expected:,}: it was truncated; remove the folder, "
                "and extract the store again"
            )
        write_json(self.folder / BEGUN, mine)
        if head is not None:
            (self.folder / "head.safetensors").write_bytes(content)
        (self.folder / "header.json").unlink(missing_ok=True)  # the store is not complete until it is closed again

    def _held(self) -> dict | None:
        """What an earlier writer noted in the folder; None in an empty one."""
        if (self.folder / BEGUN).is_file():
            return read_json(self.folder / BEGUN)
        if (self.folder / "header.json").is_file():
            header = read_json(self.folder / "header.json")
            sums = header.pop("checksums", {})
            return header | {name: sums.get(name) for name in self._sums}
        return {} if (self.folder / index.JOURNAL).is_file() else None

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self._done

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(complete=kind is None)

    def add(self, utt_id: str, activations: torch.Tensor) -> None:
        """Append an utterance's activations, or dense logits, [T, width]."""
        if utt_id in self._done:
            raise ValueError(f"{utt_id} is in the store already")
        values = activations.detach().float().cpu().numpy()
        if values.ndim != 2 or values.shape[1] != self.header.width:
            raise ValueError(f"{utt_id}: expected [T, {self.header.width}], found {list(values.shape)}")
        if not np.isfinite(values).all():
            raise UserError(f"{self.header.teacher}: NaN or infinite outputs on {utt_id}; train the teacher again")
        if self.header.encoding.startswith("dense"):
            _refuse_probabilities(values, self.header.teacher, utt_id)
        rows = _encode(values, self.header)
        if self.header.encoding != "int8" and not np.isfinite(rows).all():
            raise UserError(f"{self.header.teacher}: outputs too large for {self.header.encoding} on {utt_id}")
        content = rows.tobytes()
        self._frames.write(content)
        row = (utt_id, self._rows, len(values), zlib.crc32(content))
        index.append(self._journal, row)
        self._done[utt_id] = row
        self._rows += len(values)

    def flush(self) -> None:
        """Write added utterances to disk: frames first, so that the index never lists a missing one."""
        for file in (self._frames, self._journal):
            file.flush()
            os.fsync(file.fileno())

    def close(self, *, complete: bool = True) -> None:
        """Close the files; only a complete store gets its header, without which it cannot be opened."""
        self.flush()
        self._frames.close()
        self._journal.close()
        if complete:
            index.write(self.folder, self._done.values())
            header = dataclasses.asdict(self.header)
            sums = {"header": _sum_of(header), "index": sha256(self.folder / index.FILE)} | self._sums
            write_json(self.folder / "header.json", header | {"checksums": sums})
            for name in (index.JOURNAL, BEGUN):
                (self.folder / name).unlink()


class LogitStore:
    """A finished store with random access; several processes may read it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header, sums = _read_header(folder)
        name = index.FILE if self.header.schema > 3 else index.JOURNAL
        _check_index(folder / name, sums["index"])
        self._index = index.Index(folder)
        expected = self._index.frames * self.header.row.itemsize
        found = (folder / "frames.bin").stat().st_size if (folder / "frames.bin").is_file() else 0
        if found != expected:
            raise UserError(
                f"{folder}/frames.bin has {found:,} bytes, expected {expected:,}: it was truncated; extract it again"
            )
        self._frames = (folder / "frames.bin").open("rb", buffering=0) if expected else None
        self.head = None if self.header.encoding.startswith("dense") else _read_head(folder, sums["head"])

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, utt_id: str) -> bool:
        return self._index.find(utt_id) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def frames(self, utt_id: str) -> int:
        """Number of rows of an utterance."""
        return self._row(utt_id)[1]

    def hidden(self, utt_id: str) -> torch.Tensor:
        """Stored activations of an utterance, or its logits where they are dense: [T, width], float32."""
        start, frames, checksum = self._row(utt_id)
        if frames == 0:
            return torch.zeros(0, self.header.width)
        size = self.header.row.itemsize
        content = os.pread(self._frames.fileno(), frames * size, start * size)
        if zlib.crc32(content) != checksum:
            raise UserError(f"{self.folder}: {utt_id} is damaged (its checksum differs); extract the store again")
        return torch.from_numpy(_decode(np.frombuffer(content, self.header.row), self.header))

    def logits(self, utt_id: str) -> torch.Tensor:
        """Logits of an utterance, [T, V]."""
        hidden = self.hidden(utt_id)
        return hidden if self.head is None else torch.addmm(self.head[1], hidden, self.head[0].T)

    def activations(self, batch: Batch) -> list[torch.Tensor | None]:
        """Stored activations of the utterances of a batch; None for those that the store does not have."""
        return [self.hidden(utt_id) if utt_id in self else None for utt_id in batch.utt_ids]

    def batch(self, utt_ids: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored activations of several utterances, padded: [B, T, width], and their lengths [B]."""
        parts = [self.hidden(utt_id) for utt_id in utt_ids]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), torch.tensor([len(part) for part in parts])

    def check(self, *, tokens: Tokens, held_out: Iterable[str] = (), training: bool = True) -> None:
        """Raise an error if a store does not fit a student's tokens, or if its use would leak the held-out speaker."""
        header = self.header
        ours = (tokens.fingerprint, tokens.size)
        if (header.tokens, header.size) != ours:
            raise UserError(
                f"{self.folder}: its tokenizer is {header.tokens} of {header.size} tokens, the student's {ours[0]} of "
                f"{ours[1]}; the same id would mean another token: extract the store with the student's tokenizer"
            )
        leaked = sorted(set(header.train_speakers) & set(held_out))
        if leaked:
            raise UserError(
                f"{self.folder}: its teacher {header.teacher} was trained on {', '.join(leaked)}, held out in this "
                "fold; leave this teacher out"
            )
        if training and header.purpose != "training":
            raise UserError(f"{self.folder}: made for analysis of a held-out speaker; it is no training target")

    def _row(self, utt_id: str) -> tuple[int, int, int]:
        if (found := self._index.find(utt_id)) is not None:
            return found
        close = nearest(utt_id, list(self)) if len(self) < 50_000 else ""
        hint = close if "did you mean" in close else ""
        raise UserError(f"{self.folder}: no utterance {utt_id!r} among its {len(self)}{hint}")


def _known_rows(folder: Path) -> list[index.Row]:
    """The rows of what was stored before, or an error that leaves it as it is if the index has changed since."""
    if (folder / "header.json").is_file() and not (folder / index.JOURNAL).is_file():
        _check_index(folder / index.FILE, read_json(folder / "header.json").get("checksums", {}).get("index"))
    return index.read_rows(folder)


def _check_index(path: Path, checksum: str | None) -> None:
    if not path.is_file() or sha256(path) != checksum:
        raise UserError(
            f"{path} is missing or has changed since the store was finished; remove the folder, and extract the store "
            "again"
        )


def _encode(values: np.ndarray, header: Header) -> np.ndarray:
    if header.encoding != "int8":
        with np.errstate(over="ignore"):
            return values.astype(ENCODINGS[header.encoding])
    rows = np.zeros(len(values), header.row)
    rows["scale"] = np.maximum(np.abs(values).max(1, initial=0) / 127, np.finfo(np.float16).tiny)
    scale = rows["scale"].astype(np.float32)[:, None]  # as stored, so that its own rounding costs no precision
    rows["values"] = np.clip(np.rint(values / scale), -127, 127)
    return rows


def _decode(rows: np.ndarray, header: Header) -> np.ndarray:
    if header.encoding != "int8":
        return rows.astype(np.float32)
    return rows["values"].astype(np.float32) * rows["scale"].astype(np.float32)[:, None]


def _refuse_probabilities(values: np.ndarray, teacher: str, utt_id: str) -> None:
    """Raise an error for probabilities: taken for logits they would go through a second softmax."""
    if len(values) and values.min() >= 0 and values.max() <= 1 and np.allclose(values.sum(1), 1, atol=1e-2):
        raise UserError(
            f"{teacher}: the outputs on {utt_id} are probabilities (between 0 and 1, each row sums to 1), not logits; "
            "pass their logarithm, or the input of the softmax"
        )


def _read_header(folder: Path) -> tuple[Header, dict]:
    path = folder / "header.json"
    if not path.is_file():
        raise UserError(f"{folder}: no complete store (no header.json); extract it with notebook 03_logits")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sums = content.pop("checksums")
        schema = content["schema"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; extract the store again") from None
    if schema not in READ:
        raise UserError(
            f"{folder}: written by another version of kdlib (schema {schema}, expected {SCHEMA}); extract the store "
            "again"
        )
    if sums.get("header") != _sum_of(content):
        raise UserError(f"{path} has changed since the store was finished; extract it again")
    return Header(**content | {"train_speakers": tuple(content["train_speakers"])}), sums


def _sum_of(header: dict) -> str:
    """The checksum of a header as a dictionary."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _read_head(folder: Path, checksum: str) -> tuple[torch.Tensor, torch.Tensor]:
    path = folder / "head.safetensors"
    if not path.is_file() or sha256(path) != checksum:
        raise UserError(f"{path} is missing or damaged; extract the store again")
    parts = load_file(path)
    return parts["weight"].float(), parts["bias"]
