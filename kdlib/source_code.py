"""The code that an artefact depends on, computed: the modules that a function imports, and all that these import.

The fingerprint of code has no comments, docstrings and layout in it: rewording them makes nothing anew.
"""

import ast
import functools
import hashlib
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
# Read at import: the fingerprint is of the code that runs, not of later edits.
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*"))
    if path.suffix in (".py", ".json", ".csv", ".yaml")
}
# They move and show values, and make none.
CARRIERS = {
    "__init__.py",
    "errors.py",
    "failures.py",
    "io.py",
    "console.py",
    "layout.py",
    "stage.py",
    "lock.py",
    "source_code.py",
}
CARRIERS |= {"params.py", "recipe_checks.py"}
# The pipeline itself: what it gives to builders is followed, method by method.
CARRIERS |= {"pipeline.py", "fold_stage.py", "fold_objects.py", "fold_teachers.py", "fold_imports.py"}
CARRIERS |= {"fold_adaptation.py", "fold_students.py", "fold_results.py"}


class lazy:  # noqa: N801
    """A module that is imported when something of it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def closure(modules: Iterable[str]) -> set[str]:
    """All modules that some modules depend on, themselves included, and the data files that they read."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found and name not in CARRIERS:
            found.add(name)
            waiting += _imports(SOURCES[name]) if name.endswith(".py") else []
    return found


def fingerprint(files: Iterable[str]) -> str:
    """Fingerprint files in kdlib/: code without comments, layout and docstrings, and data."""
    digest = hashlib.sha256()
    for name in sorted(set(files)):
        digest.update((_canonical(SOURCES[name]) if name.endswith(".py") else SOURCES[name]).encode())
    return digest.hexdigest()[:16]


def builder_modules(classes: Mapping[str, str], stage: str) -> set[str]:
    """The modules that the `build` of a stage method uses: by itself, by what the method prepares, and by helpers.

    Methods that give a path are not followed: an artefact is an input, by its own fingerprint; nor are properties whose
    values stages record among their settings. `classes` are the class of the stages and its bases, by their modules.
    """
    methods = {
        name: (method, module)
        for module, of in classes.items()
        for name, method in _methods(SOURCES[module], of).items()
    }
    used: set[str] = set()
    seen: set[str] = set()
    method, module = methods[stage]
    prepared = _local_values(method)
    waiting = [(part, module) for part in _builders(method)]
    while waiting:
        tree, module = waiting.pop()
        names = _bindings(SOURCES[module])
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                used |= {names[node.id]} if node.id in names else set()
                waiting += [(value, module) for value in prepared.pop(node.id, [])]
            if isinstance(node, ast.Attribute) and node.attr in methods and node.attr not in seen:
                seen.add(node.attr)
                if not _is_recorded(methods[node.attr][0]):
                    waiting.append(methods[node.attr])
    return used


def _is_recorded(method: ast.FunctionDef) -> bool:
    """True if what a method gives is among a stage's inputs or settings: the folder of another stage, a file."""
    returned = ast.unparse(method.returns) if method.returns else ""
    return returned.removesuffix(" | None") == "Path" or _is_marked(method, "stage", "recorded")


def _is_marked(method: ast.FunctionDef, *marks: str) -> bool:
    """True if a method has one of these decorators."""
    return any(isinstance(mark, ast.Name) and mark.id in marks for mark in method.decorator_list)


def stage_methods(module: str, class_name: str) -> list[str]:
    """The names of a class's stages, in order."""
    return [name for name, method in _methods(SOURCES[module], class_name).items() if _is_marked(method, "stage")]


def _builders(method: ast.FunctionDef) -> list[ast.AST]:
    """What a stage passes as `build`: a lambda, or a function defined in the method."""
    local = {node.name: node for node in ast.walk(method) if isinstance(node, ast.FunctionDef)}
    given = [
        keyword.value
        for node in ast.walk(method)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "build"
    ]
    return [local.get(value.id, value) if isinstance(value, ast.Name) else value for value in given]


def _local_values(method: ast.FunctionDef) -> dict[str, list[ast.AST]]:
    """The values that a method's own variables are given, and its own functions."""
    values: dict[str, list[ast.AST]] = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            for name in (part for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)):
                values.setdefault(name.id, []).append(node.value)
        if isinstance(node, ast.FunctionDef) and node is not method:
            values.setdefault(node.name, []).append(node)
    return values


@functools.cache
def _methods(source: str, class_name: str) -> dict[str, ast.FunctionDef]:
    tree = next(node for node in ast.parse(source).body if getattr(node, "name", "") == class_name)
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@functools.cache
def _imports(source: str) -> frozenset[str]:
    """The modules of kdlib that a module imports, at its top or in a function, and the data files that it names."""
    tree = ast.parse(source)
    constants = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    data = {name for name in SOURCES if not name.endswith(".py") and name in constants}
    return frozenset(_bindings(source).values()) | data


@functools.cache
def _bindings(source: str) -> dict[str, str]:
    """The names that a module imports from kdlib, each with the file that it is from."""
    names, tree = {}, ast.parse(source)
    assigned = {node.value: node.targets[0].id for node in tree.body if _names_a_value(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kdlib":
            package = "/".join(node.module.split(".")[1:])
            for alias in node.names:
                candidates = (f"{package}/{alias.name}.py", f"{package}.py", f"{package}/__init__.py")
                found = next((name for name in candidates if name.lstrip("/") in SOURCES), "__init__.py")
                names[alias.asname or alias.name] = found.lstrip("/")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "lazy":
            package, _, module = node.args[0].value.partition(".")
            if package == "kdlib":
                names[assigned.get(node, module)] = f"{module.replace('.', '/')}.py"
    return names


def _names_a_value(node: ast.stmt) -> bool:
    """True for `name = value`."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


@functools.cache
def _canonical(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant()), *_]:
                node.body.pop(0)
    return ast.dump(tree)
