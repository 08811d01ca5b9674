"""Logits of other code as they lie in folders: which teacher and output a file is of, and which utterances it has.

    <TEACHER>/<TEACHER>_decoder_logits.pt, _ctc_logits.pt   a list of tensors, in the order of <TEACHER>_metadata.json
    <TEACHER>.pt, .npz, .h5, .hdf5, .jsonl                  by utterance id
    <TEACHER>/*.pt, *.npy                                   a file per utterance
    tea_infer_8batch.hdf5, tea_infer_8batch_metadata.json   batches of several teachers (SpeechBrain's TIMIT recipe)

Nothing in a file is executed, and an utterance's logits are read when they are asked for.
"""

import functools
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from kdlib.errors import UserError

IDS = ("utterance_ids", "utterances", "ids")  # of a file's utterances, in its metadata
LISTED = re.compile(r"^(?P<teacher>.+?)_(?P<output>ctc|decoder)(_logits)?$")  # names of files
WHOLE = (".pt", ".pth", ".npz", ".h5", ".hdf5", ".jsonl")  # of all utterances of a teacher
SINGLE = (".pt", ".pth", ".npy")  # of one
OUTPUTS = ("ctc", "decoder")
BATCHED = re.compile(r"(?P<set>[^/]+)/(?P<batch>\d+)/(?P<teacher>[^/]+)/(?P<output>p_ctc_tea|p_seq_tea|wer_\w+)$")
BATCH_OUTPUTS = {"p_ctc_tea": "ctc", "p_seq_tea": "decoder"}
Load = Callable[[], object]  # a tensor, an array or lists: [frames, tokens], or [1, frames, tokens]


@dataclass(frozen=True)
class FoundLogits:
    """One teacher's logits of one output."""

    teacher: str
    output: str  # "ctc", "decoder", or empty where the name does not say it
    path: Path
    items: Mapping[str, Load] = field(default_factory=dict)  # utterance id -> its logits [frames, tokens]
    twice: tuple[str, ...] = ()  # sentences: two entries of one id; the first counts
    metadata: Mapping = field(default_factory=dict)
    problem: str = ""  # why it cannot be read
    padded: bool = False  # utterances have the frames of the longest of their batch


def find(folder: Path) -> list[FoundLogits]:
    """The logits below a folder, by teacher."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the one that has a file, or a folder, per teacher")
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += _of_folder(path)
        elif path.suffix in WHOLE:
            metadata = _metadata(path, path.stem)
            found += _of_batches(path, metadata) or [_of_file(path, metadata)]
    if not found:
        raise UserError(
            f"{folder}: no logits in it; expected <TEACHER>/<TEACHER>_decoder_logits.pt beside "
            "<TEACHER>_metadata.json, <TEACHER>.pt, .npz, .h5 or .jsonl by utterance id, or a folder per teacher with "
            "a file per utterance"
        )
    return found


def one(source: Path) -> FoundLogits:
    """The logits of a file, or of a folder with a file per utterance; an error if there are none, or not by id."""
    if not source.exists():
        raise UserError(f"{source}: there is no such file or folder")
    if source.is_dir():
        parts = _of_folder(source) or [FoundLogits(source.name, "", source)]
        if len(parts) > 1:
            names = ", ".join(part.path.name for part in parts)
            raise UserError(f"{source}: logits of several outputs ({names}); name one of them")
        result = parts[0]
    elif source.suffix not in WHOLE:
        raise UserError(f"{source}: expected {', '.join(WHOLE)}, or a folder of {', '.join(SINGLE)} files")
    else:
        result = _of_file(source, _metadata(source, source.stem))
    if result.problem:
        raise UserError(result.problem)
    if not result.items:
        raise UserError(f"{source}: it has no utterances")
    if result.twice:
        raise UserError(f"{source}: {result.twice[0]}; rename one")
    return result


def _of_folder(folder: Path) -> list[FoundLogits]:
    """A teacher's folder: a file for each output, or a file for each utterance, perhaps in a folder for each output."""
    whole = [path for path in sorted(folder.iterdir()) if path.suffix in WHOLE]
    named = [path for path in whole if LISTED.match(path.stem) or path.stem == folder.name or path.suffix not in SINGLE]
    if named:
        return [_of_file(path, _metadata(path, folder.name), folder.name) for path in named]
    parts = [folder / name for name in OUTPUTS if (folder / name).is_dir()] or [folder]
    found = []
    for part in parts:
        files = sorted(path for path in part.iterdir() if path.suffix in SINGLE)
        if files:
            items, twice = _by_id((path.stem, path.name, lambda path=path: _read(path)) for path in files)
            output = part.name if part != folder else ""
            found.append(FoundLogits(folder.name, output, part, items, twice, _metadata(folder / "x", folder.name)))
    return found


def _of_file(path: Path, metadata: Mapping, folder: str = "") -> FoundLogits:
    """A file with all utterances of a teacher; in a folder that is named after it, or itself."""
    named = LISTED.match(path.stem)
    teacher, output = (named["teacher"], named["output"]) if named else (folder or path.stem, "")
    try:
        items, twice = _by_id(_entries(path, metadata))
    except UserError as error:
        return FoundLogits(teacher, output, path, metadata=metadata, problem=str(error))
    return FoundLogits(teacher, output, path, items, twice, metadata)


def _by_id(entries: Iterable[tuple[str, str, Load]]) -> tuple[dict[str, Load], tuple[str, ...]]:
    """Entries by utterance id, and what is said of those that come twice."""
    items: dict[str, Load] = {}
    origins: dict[str, str] = {}
    twice = []
    for name, origin, load in entries:
        if name in items:
            twice.append(f"{origins[name]} and {origin} are both the utterance {name}")
        else:
            items[name], origins[name] = load, origin
    return items, tuple(twice)


def _entries(path: Path, metadata: Mapping) -> Iterator[tuple[str, str, Load]]:
    """Utterance id, name in the file, and what loads the logits."""
    if path.suffix == ".jsonl":
        yield from _lines(path)
        return
    if path.suffix in (".h5", ".hdf5"):
        yield from _hdf5(path)
        return
    content = _read(path)
    if path.suffix == ".npz":
        for name in content.files:
            yield name, name, lambda name=name: _loaded(path, lambda: content[name])
        return
    if isinstance(content, Mapping):
        yield from ((str(name), repr(name), lambda value=value: value) for name, value in content.items())
        return
    if not isinstance(content, list | tuple):
        raise UserError(
            f"{path}: a {type(content).__name__}; expected logits by utterance id, or a list in the order of "
            f"{path.name.split('_')[0]}_metadata.json"
        )
    ids = next((metadata[name] for name in IDS if isinstance(metadata.get(name), list)), None)
    if ids is None:
        named = LISTED.sub(r"\g<teacher>", path.stem)
        raise UserError(
            f"{path}: a list of {len(content)} utterances without their ids; expected them in {named}_metadata.json "
            "(utterance_ids)"
        )
    if len(ids) != len(content):
        raise UserError(
            f"{path}: {len(content)} utterances, but its metadata names {len(ids)}; which is which cannot be known: "
            "extract it again"
        )
    for place, (name, value) in enumerate(zip(ids, content, strict=True), start=1):
        yield str(name), f"entry {place}", lambda value=value: value


def _lines(path: Path) -> Iterator[tuple[str, str, Load]]:
    """The lines of a file: only where each begins is kept, since their numbers fill the memory."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline():
            number += 1
            if line.strip():
                yield (
                    _row(path, number, line)[0],
                    f"line {number}",
                    functools.partial(_at, path, number, file.tell() - len(line)),
                )


def _at(path: Path, number: int, place: int) -> object:
    """The logits of a line."""
    with path.open("rb") as file:
        file.seek(place)
        return _row(path, number, file.readline())[1]


def _row(path: Path, number: int, line: bytes) -> tuple[str, object]:
    try:
        row = json.loads(line)
        return str(row.get("utterance_id") or row["id"]), row["logits"]
    except (ValueError, KeyError, AttributeError):
        raise UserError(f'{path}, line {number}: expected {{"id": ..., "logits": [[...], ...]}}') from None


def _hdf5(path: Path) -> Iterator[tuple[str, str, Load]]:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: HDF5 needs h5py: pip install 'kdlib[hdf5]'") from None
    file = _loaded(path, lambda: h5py.File(path, "r"))
    names = _datasets(file)
    if names and all(re.search(r"batch_?\d+$", name) or BATCHED.match(name) for name in names):
        raise UserError(
            f"{path}: its entries are numbers of batches ({names[0]}, ...), not utterance ids: which utterance is "
            "which depends on the order of that run; write them again by id, or name them in "
            f'{path.stem}_metadata.json ({{"utterance_ids": {{"train": [...], ...}}}}, in the order of the batches)'
        )
    for name in names:
        yield name.replace("/", "_"), name, lambda name=name: _loaded(path, lambda: file[name][()])


def _datasets(file) -> list[str]:
    """The names of the data sets of an HDF5 file."""
    import h5py

    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _of_batches(path: Path, metadata: Mapping) -> list[FoundLogits]:
    """Batches of several teachers, as SpeechBrain's recipe for TIMIT writes them, if their utterances are named.

    A batch is padded to its longest utterance.
    """
    ids = next((metadata[name] for name in IDS if isinstance(metadata.get(name), Mapping)), None)
    if path.suffix not in (".h5", ".hdf5") or ids is None:
        return []
    import h5py

    file, found = _loaded(path, lambda: h5py.File(path, "r")), {}
    matches = ((BATCHED.match(name), name) for name in _datasets(file))
    places = {match: name for match, name in matches if match and match["output"] in BATCH_OUTPUTS}
    for match in sorted(places, key=lambda one: (one["set"], int(one["batch"]), one["teacher"], one["output"])):
        key = match["teacher"], BATCH_OUTPUTS[match["output"]]
        part = found.setdefault(key, {}).setdefault(match["set"], [])
        size = len(file[places[match]])
        part += [(places[match], row) for row in range(size)]
    result = []
    for (teacher, output), parts in found.items():
        items: dict[str, Load] = {}
        problem = ""
        for part, rows in parts.items():
            names = list(map(str, ids.get(part, ())))
            if len(names) != len(rows):
                problem = problem or (
                    f"{path}: {len(rows)} utterances of {teacher} in {part!r}, but its metadata names {len(names)}; "
                    "which is which cannot be known"
                )
            load = (lambda name=name, row=row: _loaded(path, lambda: file[name][row]) for name, row in rows)
            items |= dict(zip(names, load, strict=False))
        items = {} if problem else items
        result.append(FoundLogits(teacher, output, path, items, metadata=metadata, problem=problem, padded=True))
    return result


def _metadata(path: Path, teacher: str) -> Mapping:
    """What lies beside a file: <TEACHER>_metadata.json or metadata.json."""
    named = LISTED.match(teacher)
    names = [f"{teacher}_metadata.json", *([f"{named['teacher']}_metadata.json"] if named else []), "metadata.json"]
    for name in names:
        if path.with_name(name).is_file():
            try:
                content = json.loads(path.with_name(name).read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError):
                continue
            if isinstance(content, dict):
                return content
    return {}


def _read(path: Path):
    """A file's tensors or arrays; nothing in it is executed."""
    if path.suffix in (".pt", ".pth"):
        mapped = zipfile.is_zipfile(path)  # as torch writes them since 1.6: read when it is needed
        return _loaded(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    return _loaded(path, lambda: np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None))


def _loaded(path: Path, load: Callable):
    """What `load` gives, or one sentence."""
    try:
        return load()
    except Exception as error:  # of pickle, zip and HDF5, in many classes
        text = str(error).strip()
        reason = text.splitlines()[0][:200] if text else type(error).__name__
        reason = "it was truncated" if "central directory" in reason else reason
        raise UserError(
            f"{path}: cannot be read as tensors ({reason}); write it again: logits [frames, tokens] by utterance"
        ) from None


def as_array(values: object, utt_id: str, source: Path) -> np.ndarray:
    """What a source has for an utterance, as an array of numbers; a batch of one is unpacked."""
    try:
        array = values.detach().float().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except (ValueError, TypeError):
        array = np.array(None)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{source}: {utt_id} holds a {type(values).__name__}, expected numbers [frames, tokens]")
    return array[0] if array.ndim == 3 and len(array) == 1 else array
