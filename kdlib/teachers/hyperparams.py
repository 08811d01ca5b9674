"""Values of a SpeechBrain `hyperparams.yaml`, read without running it: HyperPyYAML would call any code that it names.

Objects (`!new:`, `!name:`, `!apply:`) stay descriptions: the name of a class, and its arguments. References are
resolved, arithmetic in them is that of numbers alone.
"""

import ast
import operator
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdlib.errors import UserError

REFERENCE = re.compile(r"<([\w.\[\]]+)>")
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ARITHMETIC |= {ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}
DEEPEST = 30  # references that lead to each other


@dataclass(frozen=True)
class Described:
    """An object that a file describes: it is not made."""

    kind: str  # of the tag: new, name, apply, ref, ...
    of: str  # the class or function
    value: Any = field(default=None)  # its arguments

    @property
    def name(self) -> str:
        """The class without its module."""
        return self.of.rsplit(".", 1)[-1]


class _Loader(yaml.SafeLoader):
    """Plain values, and descriptions of everything with a tag."""


def _describe(loader: _Loader, suffix: str, node: yaml.Node) -> Described:
    if isinstance(node, yaml.MappingNode):
        value = loader.construct_mapping(node, deep=True)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_scalar(node)
    kind, _, of = suffix.partition(":")
    return Described(kind, of, value)


_Loader.add_multi_constructor("!", _describe)


class Hyperparams:
    """The values of a file, with references resolved when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(self.values, dict):
            raise UserError(f"{path}: expected names and values, found a {type(self.values).__name__}")

    def get(self, name: str, default: Any = None) -> Any:
        """A value by its name, resolved."""
        return self.resolved(self.values[name]) if name in self.values else default

    def objects(self, class_name: str) -> list[tuple[str, dict]]:
        """The descriptions of objects of a class: their names, and their arguments, resolved."""
        return [
            (name, self.resolved(value.value) or {})
            for name, value in self.values.items()
            if isinstance(value, Described) and value.kind == "new" and value.name == class_name
        ]

    def order(self, name: str) -> list[str]:
        """The names that a list of modules refers to, in order: `!new:torch.nn.ModuleList [[!ref <CNN>, ...]]`."""
        listed = self.values.get(name)
        parts = listed.value if isinstance(listed, Described) else listed
        while isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], list):
            parts = parts[0]
        names = []
        for part in parts or []:
            if (
                isinstance(part, Described)
                and part.kind == "ref"
                and (found := REFERENCE.fullmatch(part.value.strip()))
            ):
                names.append(found[1])
            else:  # SpeechBrain saves the file with its references resolved: the same object, by an anchor of YAML
                names += [name for name, value in self.values.items() if value is part]
        return names

    def resolved(self, value: Any, depth: int = 0) -> Any:
        """A value without references; objects are given by their class."""
        if depth > DEEPEST:
            raise UserError(f"{self.path}: its references lead to each other")
        if isinstance(value, Described):
            if value.kind in ("ref", "copy"):
                return self._reference(str(value.value), depth)
            return value.of if value.kind == "name" and not value.value else value
        if isinstance(value, dict):
            return {name: self.resolved(part, depth + 1) for name, part in value.items()}
        if isinstance(value, list):
            return [self.resolved(part, depth + 1) for part in value]
        if isinstance(value, str) and re.fullmatch(r"\(.*\)", value.strip()):  # HyperPyYAML's tuples
            try:
                return list(ast.literal_eval(value.strip()))
            except (ValueError, SyntaxError, TypeError):
                return value
        return value

    def _reference(self, text: str, depth: int) -> Any:
        whole = REFERENCE.fullmatch(text.strip())
        if whole:
            return self._named(whole[1], depth)
        filled = REFERENCE.sub(lambda found: str(self._named(found[1], depth)), text)
        try:
            return _calculated(ast.parse(filled, mode="eval").body)
        except (ValueError, SyntaxError, ZeroDivisionError, OverflowError):
            return filled

    def _named(self, name: str, depth: int) -> Any:
        first, *rest = re.split(r"[.\[\]]+", name.strip("]"))
        if first not in self.values:
            raise UserError(f"{self.path}: it refers to <{name}>, which it does not define")
        value = self.resolved(self.values[first], depth + 1)
        for part in filter(None, rest):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, TypeError, ValueError):
                raise UserError(f"{self.path}: it refers to <{name}>, which it does not define") from None
        return value


def _calculated(node: ast.AST) -> float:
    """The value of an expression of numbers."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_calculated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = _calculated(node.left), _calculated(node.right)
        if isinstance(node.op, ast.Pow) and max(abs(left), abs(right)) > 1000:
            raise ValueError
        return ARITHMETIC[type(node.op)](left, right)
    raise ValueError
