"""Stages: atomic folders of artefacts, with provenance and resume, rebuilt only after a change.

`produce(stage)` calls `stage.build(partial)` on a hidden sibling and renames it when it is complete, with a
`run.json` next to the artefacts. A killed run leaves only the hidden sibling; the next run with the same parameters,
inputs and code resumes there.
"""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from kdlib import lock, source_code
from kdlib.console import report, report_made, report_once
from kdlib.failures import explained
from kdlib.io import check_writable, read_json, sha256, short_path, write_json

FILES = ".files.json"  # of a finished stage: size, time and checksum of its files
SMALL_BYTES, FEW = 2**20, 200  # files of at most this size, in stages of at most so many, are always read
_intact: set[tuple[Path, str]] = set()  # folders and keys that this process has checked
FORMAT = 2  # of the stages' files; 1 had other names
PACKAGES = ("torch", "torchaudio", "nemo_toolkit", "speechbrain", "lightning", "numpy", "scipy", "sentencepiece")
PACKAGES += ("espeakng-loader", "jiwer", "pandas")


@dataclass(frozen=True)
class Stage:
    """An artefact: where it lies, how it is built, and all that it depends on."""

    folder: Path
    what: str  # in messages
    _: KW_ONLY
    build: Callable[[Path], Any]  # a dictionary that it returns is recorded in run.json
    settings: Any = None  # the parameters that it depends on
    inputs: Iterable[Path] = ()  # files, or folders of other stages
    seed: int | None = None
    before: Callable[[], None] | None = None  # called before it is built, to refuse


def produce(stage: Stage, code: Iterable[str] = ()) -> Path:
    """Build a stage's folder, unless it was built with the same parameters, inputs, seed and code.

    `code` are the source files (relative to kdlib/) whose change requires a new run.
    """
    folder, what = stage.folder, stage.what
    depends, key = _dependencies(stage, code)
    damage = ""
    if _key(folder) == key:
        if not (damage := damaged(folder)):
            report_once(f"{what}: up to date ({short_path(folder)})")
            return folder
        report(f"{what}: {short_path(folder)}/{damage}; it is made anew")
    if (old := _record(folder)) and old.get("format") != FORMAT:
        report_once(f"{short_path(folder.parent)}: made by an earlier version of kdlib, with other names; rebuilt")
    if stage.before:
        stage.before()
    check_writable(folder.parent, what)
    try:
        made_s = _make(stage, key, depends, bool(damage))
    except Exception as error:
        if sentence := explained(error, what, folder):
            raise sentence from error
        raise
    if made_s is not None:
        report_made(what, made_s, folder)
    return folder


def is_current(stage: Stage, code: Iterable[str] = ()) -> bool:
    """True if a stage's folder is as it would be built: nothing is built to find out."""
    return _key(stage.folder) == _dependencies(stage, code)[1]


def _dependencies(stage: Stage, code: Iterable[str]) -> tuple[dict, str]:
    """All that a stage depends on, and its key."""
    depends = {
        "parameters": _as_json(stage.settings),
        "inputs": _input_fingerprints(stage.inputs),
        "code": source_code.fingerprint(code),
        "seed": stage.seed,
    }
    return depends, hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def _make(stage: Stage, key: str, depends: dict, is_damaged: bool) -> float | None:
    """Build a stage's folder; returns the seconds, or None if another process, or a killed one, has built it."""
    folder, what = stage.folder, stage.what
    with lock.held(folder, what) as mine:
        if _key(folder) == key and not (is_damaged and damaged(folder)):
            return None
        partial = _partial_folder(folder, key)
        if _key(partial) == key and not damaged(partial):  # complete, but killed before the renaming
            _replace(partial, folder)
            return None
        started = time.monotonic()
        try:
            made = stage.build(partial)
        except Exception:
            mine.check(what)  # if another has taken over, that is why
            raise
        mine.check(what)
        record = {
            "what": what,
            "format": FORMAT,
            "key": key,
            **depends,
            **_provenance(),
            "wall_s": round(time.monotonic() - started, 2),
            **(made if isinstance(made, dict) else {}),
        }
        write_json(partial / FILES, _files(partial))
        write_json(partial / "run.json", record | {"files": sha256(partial / FILES)})
        mine.check(what)
        _replace(partial, folder)
    return record["wall_s"]


def damaged(folder: Path) -> str:
    """The first file of a finished stage that is not as it was made, and how; empty if all are.

    Once per process: sizes and times of all files; contents where the time differs, and of small files always.
    """
    record = _record(folder)
    if "files" not in record or (folder, record["key"]) in _intact:
        return ""  # of a revision that kept no checksums
    if not (folder / FILES).is_file() or sha256(folder / FILES) != record["files"]:
        return f"{FILES} is damaged"
    files = read_json(folder / FILES)
    small = len(files) <= FEW
    for name, (size, time_ns, checksum) in files.items():
        try:
            found = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if found.st_size != size:
            return f"{name} has {found.st_size:,} bytes, not {size:,} as when it was made"
        looks_equal = found.st_mtime_ns == time_ns and not (small and size <= SMALL_BYTES)
        if not looks_equal and _checksum(folder / name) != checksum:
            return f"{name} has changed since it was made"
    _intact.add((folder, record["key"]))
    return ""


def _checksum(path: Path) -> str:
    """CRC-32 of a file: enough against accidents, and several times faster than a cryptographic one."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _files(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Size, time and checksum of every file in a folder, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (FILES, ".key"))
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns, _checksum(path))
        for path in paths
    }


def _input_fingerprints(inputs: Iterable[Path]) -> dict[str, str]:
    """Fingerprints by name; equal names are numbered: `training`, `training 2`."""
    fingerprints: dict[str, str] = {}
    times: Counter[str] = Counter()
    for path in inputs:
        times[path.name] += 1
        fingerprints[f"{path.name} {times[path.name]}" if times[path.name] > 1 else path.name] = fingerprint(path)
    return fingerprints


def fingerprint(path: Path) -> str:
    """Fingerprint a stage folder by its key, a file by its content."""
    if path.is_dir():
        return _key(path) or "none"
    return sha256(path)[:16] if path.is_file() else "none"


def notebook_fingerprint(notebook: Path) -> str:
    """Fingerprint a notebook by its code cells, so that saving it with outputs is no change."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def _record(folder: Path) -> dict:
    """Read the run.json of a stage; empty if it is missing or incomplete."""
    try:
        return read_json(folder / "run.json")
    except (OSError, json.JSONDecodeError):
        return {}


def _key(folder: Path) -> str | None:
    return _record(folder).get("key")


def _partial_folder(folder: Path, key: str) -> Path:
    """Make the hidden sibling; keep that of a killed run with the same key, and remove any other."""
    partial = folder.with_name(f".{folder.name}.partial")
    mark = partial / ".key"
    if partial.exists() and not (mark.is_file() and mark.read_text() == key):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    mark.write_text(key)
    return partial


def _replace(partial: Path, folder: Path) -> None:
    """Move the complete folder into place; executed notebooks of the old one are kept."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        for notebook in folder.glob("*.ipynb"):
            shutil.copy2(notebook, partial)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _provenance() -> dict:
    usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "revision": _revision(),
        "packages": _versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "finished": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "peak_memory_mb": usage // (1024 if sys.platform == "linux" else 1024 * 1024),
    }


@functools.cache
def _revision() -> str:
    command = ["git", "-C", str(source_code.PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _as_json(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
