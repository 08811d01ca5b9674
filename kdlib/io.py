"""Files: JSON, atomic writing, checksums, and where the repository and the paths of a recipe lie."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdlib.errors import UserError


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON by way of a hidden sibling, so that a reader never sees half of it."""
    with atomic_write(path) as hidden:
        hidden.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` has written."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A hidden name to write to, renamed to `path` if all went well and removed if not."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield hidden
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def check_writable(folder: Path, what: str) -> None:
    """Make a folder and a file in it, or say which place cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / ".writable") as hidden:
            hidden.touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{what}: cannot write to {short_path(folder)} ({error.strerror}); "
            "make it writable, or name another folder in the recipe: outputs: /path/to/outputs"
        ) from None


def short_path(path: Path) -> str:
    """A path as it is said: below the repository where it lies there."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(repository_root()))
    return str(path)


def resolve_path(name: str) -> Path:
    """A path of a recipe: relative to the repository's root, or from ~, or whole."""
    return repository_root() / Path(name).expanduser()


def repository_root(start: Path | None = None) -> Path:
    """The repository's root: the nearest folder upwards that holds `params/base.yaml`."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "params" / "base.yaml").is_file():
            return folder
    raise UserError(f"no params/base.yaml in {here} or above it: start inside the repository")
