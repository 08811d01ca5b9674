"""Where artefacts live: atomic folders, provenance, resume, and no work where nothing changed.

`produce(folder, build, ...)` calls `build(partial)` on a hidden sibling and renames it when it is complete, with a
`run.json` beside the artefacts. A killed run leaves only the hidden sibling; the next one with the same parameters,
inputs and code finds it and goes on there. `python -m kdlib.stage NOTEBOOK.ipynb` says why an executed notebook failed.
"""

import ast
import contextlib
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kdlib.errors import UserError
from kdlib.params import root

PACKAGES = (
    "torch",
    "torchaudio",
    "nemo_toolkit",
    "speechbrain",
    "lightning",
    "numpy",
    "scipy",
    "sentencepiece",
    "espeakng-loader",
    "jiwer",
    "pandas",
)

HOUSE = Path(__file__).parent
# Read at import: what counts is the code that runs, not what is edited meanwhile.
SOURCES = {
    path.relative_to(HOUSE).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(HOUSE.rglob("*"))
    if path.suffix in (".py", ".json", ".csv")
}


def produce(
    folder: Path,
    build: Callable[[Path], None],
    *,
    what: str,
    parameters: Any = None,
    inputs: Iterable[Path] = (),
    code: Iterable[str] = (),
    seed: int | None = None,
) -> Path:
    """Make `folder` by `build(partial)`, unless it was made by the same parameters, inputs and code.

    `inputs` are files or stage folders, `code` the source files (relative to kdlib/) whose change asks for a new run.
    """
    depends = {
        "parameters": _plain(parameters),
        "inputs": _named(inputs),
        "code": code_fingerprint(code),
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    if _key(folder) == key:
        say_once(f"{what}: up to date ({shown(folder)})")
        return folder
    with _locked(folder, what):
        if _key(folder) == key:  # another process made it while this one waited
            return folder
        partial = _partial(folder, key)
        if _key(partial) == key:  # complete, but killed before it was put in place
            _replace(partial, folder)
            return folder
        started = time.monotonic()
        build(partial)
        record = {"what": what, "key": key, **depends, **_provenance(), "wall_s": round(time.monotonic() - started, 2)}
        write_json(partial / "run.json", record)
        _replace(partial, folder)
    print(f"{what}: made in {record['wall_s']:.1f} s ({shown(folder)})")
    return folder


def _named(inputs: Iterable[Path]) -> dict[str, str]:
    """Fingerprints by name; the second of a name is called so: `training 2`."""
    found: dict[str, str] = {}
    times: Counter[str] = Counter()
    for path in inputs:
        times[path.name] += 1
        found[f"{path.name} {times[path.name]}" if times[path.name] > 1 else path.name] = fingerprint(path)
    return found


def fingerprint(path: Path) -> str:
    """Of a stage folder: its key; of a file: its content."""
    if path.is_dir():
        return _key(path) or "none"
    return sha256(path)[:16] if path.is_file() else "none"


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_fingerprint(files: Iterable[str]) -> str:
    """Of files in kdlib/: what the code does (comments, layout and docstrings do not count) and what the data say."""
    digest = hashlib.sha256()
    for name in sorted(set(files)):
        digest.update((_meaning(SOURCES[name]) if name.endswith(".py") else SOURCES[name]).encode())
    return digest.hexdigest()[:16]


def notebook_fingerprint(notebook: Path) -> str:
    """Of a notebook: its code cells, so that saving it with outputs does not count as a change."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Write JSON by way of a hidden sibling, so that a reader never sees half of it."""
    with writing(path) as hidden:
        hidden.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` has written."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A hidden name to write to, renamed to `path` if all went well and removed if not."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield hidden
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def progress(total: int, what: str, unit: str):
    """A progress bar of plain text that moves in a terminal, in JupyterLab and in the log of a headless run."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=what, unit=unit, ascii=True, mininterval=0.2 if sys.stderr.isatty() else 5, dynamic_ncols=True
    )


def check_writable(folder: Path, what: str) -> None:
    """Make a folder and a file in it, or say which place cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder / ".writable") as hidden:
            hidden.touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{what}: cannot write to {shown(folder)} ({error.strerror}); "
            "make it writable, or name another folder in the recipe: outputs: /path/to/outputs"
        ) from None


def set_threads() -> None:
    """One torch thread a process, unless OMP_NUM_THREADS asks for more: two beside a busy neighbour are far slower.

    Sums depend on the number of threads in their last bits, so this also makes runs repeatable.
    """
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def explain(notebook: Path) -> str:
    """Why an executed notebook failed, in as few lines as possible."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, json.JSONDecodeError):
        return f"{shown(notebook)}: not executed at all"
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                hint = "" if output["ename"] == "UserError" else f"\n  (the traceback is in {shown(notebook)})"
                return f"{output['ename']}: {output['evalue']}{hint}"
    return f"{shown(notebook)}: the kernel died or was killed; run the same command again to go on"


@functools.cache
def say_once(text: str) -> None:
    """Print what a process need not say twice."""
    print(text)


def _key(folder: Path) -> str | None:
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))["key"]
    except (OSError, json.JSONDecodeError, KeyError):
        return None


def _partial(folder: Path, key: str) -> Path:
    """The hidden sibling: what a killed run with the same key left is kept, anything else is removed."""
    partial = folder.with_name(f".{folder.name}.partial")
    mark = partial / ".key"
    if partial.exists() and not (mark.is_file() and mark.read_text() == key):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    mark.write_text(key)
    return partial


def _replace(partial: Path, folder: Path) -> None:
    """Put the complete folder in place; executed notebooks of the old one stay."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        for notebook in folder.glob("*.ipynb"):
            shutil.copy2(notebook, partial)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, what: str) -> Iterator[None]:
    """One process at a time makes a folder; the lock goes with its process, however that ends."""
    check_writable(folder.parent, what)
    lock = (folder.parent / f".{folder.name}.lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{what}: another process is making {shown(folder)}; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def _meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body.pop(0)
    return ast.dump(tree)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def shown(path: Path) -> str:
    """A path as it is said: below the repository where it lies there."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(root()))
    return str(path)


def follow(lines: Iterable[str], prefix: str) -> Iterator[str]:
    """What a person wants to read of papermill's log: no cell numbers, no tracebacks (`explain` has the reason)."""
    noise = (
        "Executing ",
        "Ending Cell",
        "Input Notebook",
        "Output Notebook",
        "Working directory",
        "<Figure",
        "<IPython",
        "[IPKernelApp]",
        "Black is not installed",
        "Translating Parameters",
        "0.00s - ",
    )
    for line in lines:
        if line.startswith(("Traceback (most recent call last)", "---------------------------------------------")):
            return
        if line.strip() and not line.startswith(noise):
            yield f"{prefix} | {line.rstrip()}"


if __name__ == "__main__":
    if sys.argv[1] == "follow":
        for text in follow(sys.stdin, sys.argv[2]):
            print(text, flush=True)
        sys.stdin.read()
    else:
        sys.exit(f"\n{explain(Path(sys.argv[1]))}\n")
