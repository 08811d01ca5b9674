"""Files: JSON, atomic writing, checksums, and the paths of the repository and of recipes."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kdlib.errors import UserError


def sha256(path: Path) -> str:
    """Compute the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON by way of a hidden sibling, so that it is never read incomplete."""
    with atomic_write(path) as hidden:
        hidden.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write to, which is renamed to `path` on success and removed on failure."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}")  # of two hosts, processes may agree
    try:
        yield hidden
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def check_writable(folder: Path, what: str) -> None:
    """Make a folder and a file in it, or raise an error that names the folder."""
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
    """Format a path for display: relative to the repository if it is inside."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(repository_root()))
    return str(path)


def resolve_path(name: str) -> Path:
    """Resolve a path of a recipe: relative to the repository's root or to ~, or absolute."""
    return repository_root() / Path(name).expanduser()


def repository_root(start: Path | None = None) -> Path:
    """Find the repository's root: the nearest folder upwards that contains `params/base.yaml`."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "params" / "base.yaml").is_file():
            return folder
    raise UserError(f"no params/base.yaml in {here} or above it: start inside the repository")


class UniqueKeys(yaml.SafeLoader):
    """YAML without names that occur twice in one mapping, of which the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct a mapping, after a look at its names."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
            line = next(key.start_mark.line + 1 for key, _ in reversed(node.value) if key.value == twice)
            raise yaml.YAMLError(f"{twice!r} occurs twice in one mapping, the second time in line {line}")
        return super().construct_mapping(node, deep)
