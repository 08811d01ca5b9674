"""Write docs/benchmarks.md from the results in outputs/benchmarks.

    python benchmarks/page.py [--results FOLDER] [--page FILE]

A section for each benchmark: its question, its method, its table and its notes; what was not measured says so.
"""

import argparse
import ast
import textwrap
from pathlib import Path

from report import RESULTS, Result, paragraphs, table

from kdlib.io import read_json, repository_root

HERE = Path(__file__).parent
WIDTH = 120
TITLES = {  # in the order of the page
    "store": "Store of teacher outputs",
    "adopt": "Adoption of other code's logits",
    "kd_loss": "Distillation loss",
    "step": "Training step",
    "student_step": "Student's step",
    "gpu_step": "Step on a GPU",
    "bilstm": "BiLSTM on feature sequences",
    "targets": "Kinds of targets",
    "lexicon": "Closed lexicon",
    "calibration": "Calibration of the closed lexicon",
    "beam": "Beam search",
    "score": "Scoring",
    "compare": "Error rates of comparisons",
    "examine": "Examination of predictions",
    "import_corpus": "Corpus import",
    "explorer": "Failure explorer",
    "scale": "Scale",
}
NEEDS = {"explorer": " It needs a browser, Debian's `chromium`.", "gpu_step": " It needs a CUDA GPU."}
INTRODUCTION = (
    "`make bench` measures what the machine allows and writes this page anew. Every benchmark answers one question. "
    "Where it is about speed, kdlib and its named peers take turns for several rounds in one process: times are "
    "medians over the rounds, and a ratio, to the first row of its kind, is the median of the ratios within each round."
)


def prose(text: str, first: str = "") -> str:
    """A paragraph, or with `first` an entry of a list, in lines."""
    wrapped = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapped)


def question(name: str) -> str:
    """The question of a script that has no result."""
    return paragraphs(ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))))[0]


def section(name: str, result: Result | None, *, own_machine: bool = False) -> str:
    """A benchmark's section."""
    heading = f"## {TITLES[name]}"
    if result is None:
        command = f"PYTHONPATH=tests .venv/bin/python benchmarks/{name}.py"
        missing = f"Not measured here; run `{command}`.{NEEDS.get(name, '')}"
        return "\n\n".join([heading, prose(question(name)), prose(missing)])
    parts = [heading, *map(prose, [result.question, *result.method]), table(result.rows)]
    if result.notes:
        parts.append("\n".join(prose(note, "- ") for note in result.notes))
    machine = f" Measured on {result.machine}." if own_machine else ""
    return "\n\n".join([*parts, prose(f"Script: `benchmarks/{name}.py`.{machine}")])


def page(results: Path) -> str:
    """The page of all results in a folder."""
    files = {name: results / f"{name}.json" for name in TITLES}
    found = {name: Result(**read_json(file)) if file.is_file() else None for name, file in files.items()}
    machines = {result.machine for result in found.values() if result}
    where = f" Measured on {machines.pop()}." if len(machines) == 1 else ""
    sections = [section(name, result, own_machine=not where) for name, result in found.items()]
    return "\n\n".join(["# Benchmarks", prose(INTRODUCTION + where), *sections]) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=paragraphs(__doc__)[0])
    parser.add_argument("--results", type=Path, default=repository_root() / RESULTS)
    parser.add_argument("--page", type=Path, default=repository_root() / "docs" / "benchmarks.md")
    asked = parser.parse_args()
    asked.page.write_text(page(asked.results), encoding="utf-8")


if __name__ == "__main__":
    main()
