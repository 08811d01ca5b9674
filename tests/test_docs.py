"""The README and docs/: what they name exists, and the README stays short."""

import re
from pathlib import Path

import pytest
import yaml

from kdlib.__main__ import COMMANDS
from kdlib.params import Params, load
from kdlib.settings.messages import model_in

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ANY = object()  # below it names are the user's


def fields(model):
    """The names of a section, each with the section below it, if there is one."""
    found = {}
    for name, field in model.model_fields.items():
        below = model_in(field.annotation)
        mapped = getattr(field.annotation, "__origin__", None) is dict or "dict[" in str(field.annotation)
        found[name] = (ANY, below) if mapped else below
    return found


def unknown(settings, model, place=""):
    """The keys of settings that a recipe may not have."""
    wrong, known = [], fields(model)
    for name, value in settings.items():
        where = f"{place}{name}"
        if name not in known:
            wrong.append(where)
            continue
        below = known[name]
        if isinstance(below, tuple):
            continue
        rows = value if isinstance(value, list) else [value]
        for row in rows if below else []:
            wrong += unknown(row, below, f"{where}.") if isinstance(row, dict) else []
    return wrong


def spans(text):
    """What stands between backticks, with line breaks closed up."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def blocks(text):
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", TEXTS)
def test_every_make_command_and_its_variables_exist(page):
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+)\s*[:?]?=", MAKEFILE, flags=re.MULTILINE)) | set(
        re.findall(r"\$\((?:call option,)?([A-Z_]+)[,)]", MAKEFILE)
    )
    lines = [*spans(TEXTS[page]), *(line for _, block in blocks(TEXTS[page]) for line in block.splitlines())]
    for line in lines:
        if match := re.match(r"make ([a-z][\w-]*)(.*)", line):
            assert match[1] in targets, line
            named = set(re.findall(r"\b([A-Z][A-Z_]+)=", match[2].split("#")[0]))
            assert named <= variables, line
        if match := re.match(r"python -m kdlib ([\w-]+)", line):
            assert match[1] in COMMANDS, line


@pytest.mark.parametrize("page", TEXTS)
def test_every_setting_exists(page):
    """Fragments of recipes such as `distill: {alpha: 0.5}`, and names such as `distill.alpha`."""
    for span in spans(TEXTS[page]):
        if re.match(r"[a-z_]+: ", span):
            settings = yaml.safe_load(span)
            top = fields(Params)
            if isinstance(settings, dict) and set(settings) <= set(top):
                assert unknown(settings, Params) == [], span
            else:  # a key named within its section, such as `label_by: word`
                assert any(name in every_name() for name in settings), span
        elif re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span) and span.split(".")[0] in fields(Params):
            settings = {}
            *sections, last = span.split(".")
            inner = settings
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = None
            assert unknown(settings, Params) == [], span


def every_name(model=Params):
    """The names of all settings, at any place."""
    found = set()
    for name, below in fields(model).items():
        found.add(name)
        below = below[1] if isinstance(below, tuple) else below
        found |= every_name(below) if below else set()
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_every_recipe_block_is_valid(page):
    for kind, block in blocks(TEXTS[page]):
        if kind == "yaml":
            settings = yaml.safe_load(block)
            settings.pop("extends", None)
            assert unknown(settings, Params) == [], block


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_that_is_named_exists(page):
    text, here = TEXTS[page], (ROOT if page == "README.md" else ROOT / "docs")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (here / target).exists(), target
    for span in spans(text):
        if re.fullmatch(r"(kdlib|params|notebooks|tests|benchmarks|docs)/[\w./-]+", span) and "<" not in span:
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("page", TEXTS)
def test_every_variant_that_is_made_by_a_command_exists(page):
    """VARIANTS=... of a recipe named in the same command, or of the demo."""
    commands = re.findall(r"make [^`\n]*VARIANTS=[^`\n]*", TEXTS[page])
    for command in commands:
        recipe = (re.findall(r"RECIPE=(\S+)", command) or ["params/demo.yaml"])[0]
        if (ROOT / recipe).is_file():
            known = load(recipe, "M08").variants
            names = re.findall(r"VARIANTS=([\w,+]+)", command)[0]
            assert set(re.split("[,+]", names)) <= set(known), command


def test_the_readme_has_at_most_1300_words():
    assert len(TEXTS["README.md"].split()) <= 1300


def test_benchmark_figures_stand_in_one_page():
    """Ratios against other software are measured, and belong to the page that is made of the measurements."""
    for page, text in TEXTS.items():
        if page != "benchmarks.md":
            assert not re.search(r"\d times (the time|a loop|faster|as fast)", text), page


def test_the_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert citation["version"] == version
    assert citation["authors"] == [{"name": "the kdlib contributors"}]
    assert citation["title"].lower().startswith("kdlib")


def test_the_picture_is_small():
    picture = ROOT / "docs" / "explorer.png"
    assert picture.stat().st_size < 300_000
    assert "docs/explorer.png" in TEXTS["README.md"]
