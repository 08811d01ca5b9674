"""Every setting and command that the page for scripts names exists."""

import re
import typing
from pathlib import Path

import pytest

from kdlib.io import repository_root
from kdlib.params import Params

PAGE = (repository_root() / "docs/from-your-scripts.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:4] for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| flag")]
SETTINGS = sorted({name for row in ROWS for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)`", row[1])})


def field_of(model, name):
    """The type of a setting."""
    kind = model.model_fields[name].annotation
    kinds = [one for one in (kind, *typing.get_args(kind)) if hasattr(one, "model_fields")]
    return kinds[0] if kinds else None


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_exist(name):
    section, _, rest = name.partition(".")
    assert section in Params.model_fields
    assert not rest or rest in field_of(Params, section).model_fields


def test_there_are_enough_of_them():
    assert len(SETTINGS) > 20
    assert len(ROWS) > 25


def test_commands_exist():
    makefile = (repository_root() / "Makefile").read_text(encoding="utf-8")
    for command, variables in re.findall(r"make ([a-z-]+)((?: [A-Z_]+=)*)", PAGE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
        assert all(
            f"$({name})" in makefile or f"option,{name}," in makefile for name in re.findall("[A-Z_]+", variables)
        )


def test_recipes_exist():
    for name in re.findall(r"params/[\w/]+\.yaml", PAGE):
        assert (repository_root() / Path(name)).is_file(), name
