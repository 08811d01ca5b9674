"""Mistakes in a recipe as lines for its author: the file, the setting, what was found, and the nearest valid name."""

import functools
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from kdlib.errors import nearest


def explain(problem: dict, source: str, root: type[BaseModel]) -> str:
    """One of pydantic's problems in a line: what was expected, what was found, what to write."""
    loc = [str(piece) for piece in problem["loc"] if not _is_branch(piece)]
    name, found = ".".join(loc), problem["input"]
    if new := renamed("settings", _place(problem["loc"])):
        return f"{source}: {name} was renamed to {new}"
    if new := renamed("settings", f"{_place(problem['loc'])}.{found}"):
        return f"{source}: {name}: {found!r} was renamed to {new!r}"
    if problem["type"] == "extra_forbidden":
        return f"{source}: unknown parameter {name!r}{nearest(loc[-1], valid_names(loc[:-1], root))}"
    message = (
        problem["msg"].replace("a valid tuple", "a list, such as [M04, F03]").replace(" after validation, not 0", "")
    )
    hint = "; put it in quotes" if problem["type"] == "string_type" and isinstance(found, int) else ""
    if isinstance(found, str) and problem["type"] in ("float_type", "int_type"):
        hint = "; YAML reads 1e-4 as text: write 1.0e-4 or 0.0001" if "e" in found.lower() else "; remove the quotes"
    return f"{source}: {name or 'recipe'}: {message[0].lower()}{message[1:]}, found {found!r}{hint}"


def _place(loc: Sequence[str | int]) -> str:
    """Dotted path of a setting, without the names that a user chose."""
    pieces = [str(piece) for piece in loc if not _is_branch(piece)]
    return ".".join(pieces[:1] + pieces[2:] if pieces[0] in ("ensembles", "variants") else pieces)


@functools.cache
def _renames() -> dict[str, dict[str, str]]:
    return yaml.safe_load(files("kdlib").joinpath("data/renamed.yaml").read_text(encoding="utf-8"))


def renamed(part: str, name: str) -> str:
    """Return the new name of a setting or variant; empty if it was not renamed."""
    return _renames()[part].get(name, "")


def _is_branch(piece: Any) -> bool:
    """True for the branch of a union, which pydantic adds to a location and the user did not write."""
    return isinstance(piece, str) and ("[" in piece or piece.removeprefix("constrained-") in ("int", "str", "float"))


def valid_names(loc: list[str], root: type[BaseModel]) -> list[str]:
    """List the names that are valid at a location; keys that the user chooses, such as speakers, are skipped."""
    model = root
    for piece in loc:
        if piece in model.model_fields:
            model = model_in(model.model_fields[piece].annotation) or model
    return list(model.model_fields)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := model_in(arg))), None)
