"""What makes a method of a fold a stage: its folder is made where it is not up to date."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from kdlib import source_code
from kdlib.stage import Stage, produce

# The classes of a fold, from the last to the first, by their modules.
CLASSES = {"pipeline.py": "Fold", "fold_results.py": "StudentResults", "fold_students.py": "StudentObjects"}
CLASSES |= {"fold_adaptation.py": "AdaptationObjects", "fold_imports.py": "ImportedTeachers"}
CLASSES |= {"fold_teachers.py": "TeacherObjects", "fold_objects.py": "FoldObjects"}


def stage(method: Callable[..., Stage]) -> Callable[..., Path]:
    """Make what a method describes unless it is up to date, and return its folder."""

    @functools.wraps(method)
    def made(fold: Any, *args, **kwargs) -> Path:
        return produce(method(fold, *args, **kwargs), code_of(method.__name__))

    return made


@functools.cache
def code_of(name: str) -> frozenset[str]:
    """The source files that a stage depends on."""
    return frozenset(source_code.closure(source_code.builder_modules(CLASSES, name)))


class recorded(cached_property):  # noqa: N801
    """A property whose value stages record among their settings: how it is found is no code of theirs."""
