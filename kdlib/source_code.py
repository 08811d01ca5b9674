"""The code that an artefact depends on, computed: the modules that a function imports, and all that these import.

The fingerprint of code has no comments, docstrings and layout in it: rewording them makes nothing anew.
"""

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent
# Read at import: the fingerprint is of the code that runs, not of later edits.
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*"))
    if path.suffix in (".py", ".json", ".csv", ".yaml")
}
# They move and show values, and make none.
CARRIERS = {"__init__.py", "errors.py", "io.py", "console.py", "layout.py", "stage.py", "source_code.py", "params.py"}


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


def builder_modules(module: str, class_name: str, method: str) -> set[str]:
    """The modules that the `build` of a stage method uses, by itself and by helper methods of its class.

    Other stages are not followed: what they make is an input, by its own fingerprint.
    """
    names, methods = _bindings(SOURCES[module]), _methods(SOURCES[module], class_name)
    used: set[str] = set()
    seen: set[str] = set()
    waiting: list[ast.AST] = _builders(methods[method])
    while waiting:
        for node in ast.walk(waiting.pop()):
            if isinstance(node, ast.Name) and node.id in names:
                used.add(names[node.id])
            if isinstance(node, ast.Attribute) and node.attr in methods and node.attr not in seen:
                seen.add(node.attr)
                if not is_stage(methods[node.attr]):
                    waiting.append(methods[node.attr])
    return used


def is_stage(method: ast.FunctionDef) -> bool:
    """True if a method is decorated as a stage."""
    return any(isinstance(mark, ast.Name) and mark.id == "stage" for mark in method.decorator_list)


def stage_methods(module: str, class_name: str) -> list[str]:
    """The names of a class's stages, in order."""
    return [name for name, method in _methods(SOURCES[module], class_name).items() if is_stage(method)]


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
    names = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kdlib":
            package = "/".join(node.module.split(".")[1:])
            for alias in node.names:
                candidates = (f"{package}/{alias.name}.py", f"{package}.py", f"{package}/__init__.py")
                found = next((name for name in candidates if name.lstrip("/") in SOURCES), "__init__.py")
                names[alias.asname or alias.name] = found.lstrip("/")
    return names


@functools.cache
def _canonical(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant()), *_]:
                node.body.pop(0)
    return ast.dump(tree)
