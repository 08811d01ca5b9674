"""The layers of kdlib: speech comes in at the first, figures leave at the last, and none imports from a later one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdlib.models.encoders import ENCODERS

KDLIB = Path(__file__).parents[1] / "kdlib"
LAYERS = (
    *("errors", "io", "console", "source_code", "failures", "settings", "tokens", "runtime", "lock", "stage"),
    *("corpus", "models", "decode", "evaluate", "objectives", "training", "pretrained", "teachers"),
    *("logits", "targets", "distill", "diagnose"),
    *(
        "recipe_checks",
        "params",
        "layout",
        "fold_stage",
        "fold_objects",
        "fold_teachers",
        "fold_imports",
        "fold_adaptation",
        "fold_students",
        "fold_results",
        "pipeline",
        "graph",
        "tuning",
        "show",
        "__main__",
    ),
)
MODULES = sorted(path.relative_to(KDLIB).as_posix() for path in KDLIB.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The layers that a module imports from, at its top and within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
        for name in names:
            if name == "kdlib":
                yield from (alias.name for alias in node.names)
            elif name.startswith("kdlib."):
                yield name.split(".")[1]


def layer(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__.py"])
def test_a_module_imports_from_its_own_and_earlier_layers_only(module):
    assert not {name for name in imported(KDLIB / module) if LAYERS.index(name) > LAYERS.index(layer(module))}


def test_figures_are_the_last_layer():
    later = ("show", "__main__")  # the commands call all layers
    assert not {module for module in MODULES if layer(module) not in later and "show" in imported(KDLIB / module)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_one_subject_and_at_most_400_lines(module):
    lines = (KDLIB / module).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (700 if module == "pipeline.py" else 400)  # one file shows all stages
    assert lines[0].startswith('"""')


def test_no_module_compares_the_names_of_encoders():
    """What differs between encoders is theirs to say, or in their entries."""
    found = {}
    for module in MODULES:
        for node in ast.walk(ast.parse((KDLIB / module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                if constants & set(ENCODERS):
                    found[module] = ast.unparse(node)
    assert found == {"models/nemo_files.py": "source == 'nemo'"}  # where the pretrained model is from


def test_models_inputs_have_one_door():
    doors = re.compile(r"audio\.load\(|features\.load\(|soundfile\.read\(")
    callers = [module for module in MODULES if doors.search((KDLIB / module).read_text(encoding="utf-8"))]
    of_models = ("models", "objectives", "training", "pretrained", "teachers", "logits", "distill", "evaluate")
    assert not [module for module in callers if layer(module) in of_models]
    assert "corpus/inputs.py" in callers
