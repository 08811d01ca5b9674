"""Console output: progress bars, lines of what was made, warnings, and the filtered logs of headless runs.

In a terminal all of it is printed. In a notebook that papermill runs, bars and lines go to the log, past the notebook:
what is saved with a cell is one line of what it made, and its warnings. In JupyterLab bars move, and vanish at the end.
"""

import functools
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from kdlib.io import short_path

WARNINGS = ("warning: ", "ALARM: ")  # how lines begin that stand together at the end of a run


class KdlibWarning(UserWarning):
    """A warning of kdlib's own, shown as one line."""


def progress(total: int, what: str, unit: str):
    """Make a plain-text progress bar for a terminal, JupyterLab and the log of a headless run."""
    from tqdm import tqdm

    interactive = attended() or sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        ascii=True,
        mininterval=0.2 if interactive else 5,
        dynamic_ncols=True,
        leave=not attended(),
        file=sys.stderr if interactive else _Lines(log()),
    )


def report(text: str) -> None:
    """Print a line that matters while something is made, and not afterwards: to the terminal or the log."""
    if not attended():
        print(text, file=log(), flush=True)


@functools.cache
def report_once(text: str) -> None:
    """Report a line only once per process."""
    report(text)


def report_made(what: str, seconds: float, folder: Path) -> None:
    """Report that something was made; a notebook's cell says it in one line at its end."""
    if _kernel():
        _made_in_cell.append(f"{what} ({seconds:.1f} s)")
        _watch_cells()
    report(f"{what}: made in {seconds:.1f} s ({short_path(folder)})")


@functools.cache
def print_once(text: str) -> None:
    """Print a line only once per process."""
    print(text)


def warn(text: str, stacklevel: int = 2) -> None:
    """Warn in one line, `warning: ...`."""
    warnings.warn(text, KdlibWarning, stacklevel=stacklevel + 1)


@functools.cache
def warn_in_log(text: str) -> None:
    """Warn once in the terminal or log of a run, of what a notebook shows in another way."""
    report(f"{WARNINGS[0]}{text}")


def _show_plainly() -> None:
    """Show each warning of kdlib's own once, as a line without file and code; all others as before."""
    before, shown = warnings.showwarning, set()

    def show(message, category, *place, **options) -> None:
        if issubclass(category, KdlibWarning):
            if str(message) not in shown:
                print(f"{WARNINGS[0]}{message}", flush=True)
            shown.add(str(message))
        else:
            before(message, category, *place, **options)

    warnings.showwarning = show


_show_plainly()


def attended() -> bool:
    """True in an interactive notebook: runs by papermill allow no input."""
    kernel = _kernel()
    return bool(kernel and kernel.get_parent().get("content", {}).get("allow_stdin"))


def log() -> TextIO:
    """Where a run's lines go: the process's own output or, in a notebook's kernel, that of the program that runs it."""
    return _terminal() or sys.stderr if _kernel() else sys.stdout


@functools.cache
def _terminal() -> TextIO | None:
    """The terminal or log behind a kernel, whose standard streams go into the notebook."""
    copy = getattr(sys.stderr, "_original_stdstream_copy", None)
    return None if copy is None else os.fdopen(os.dup(copy), "w", encoding="utf-8", errors="replace")


def _kernel():
    """The kernel of the notebook that this process runs, if it does."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None)


_made_in_cell: list[str] = []


@functools.cache
def _watch_cells() -> None:
    from IPython import get_ipython

    get_ipython().events.register("post_run_cell", _print_made)


def _print_made(*_: object) -> None:
    """One line of what a cell made; of more than four things the number, and the last three."""
    if _made_in_cell:
        last = _made_in_cell[-3:] if len(_made_in_cell) > 4 else _made_in_cell
        more = f"{len(_made_in_cell)} parts, the last ones " if len(_made_in_cell) > 4 else ""
        print(f"made: {more}{', '.join(last)}")
        _made_in_cell.clear()


class _Lines:
    """A stream for a progress bar whose every state is a line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=self.stream, flush=True)

    def flush(self) -> None:
        """Every line is flushed when it is written."""


def explain_failure(notebook: Path) -> str:
    """Return why an executed notebook failed, in as few lines as possible."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, json.JSONDecodeError):
        return f"{short_path(notebook)}: not executed at all"
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                hint = "" if output["ename"] == "UserError" else f"\n  (the traceback is in {short_path(notebook)})"
                return f"{output['ename']}: {output['evalue']}{hint}"
    return f"{short_path(notebook)}: the kernel died or was killed; run the same command again to resume"


def filter_log(lines: Iterable[str], prefix: str) -> Iterator[str]:
    """Filter papermill's log: no cell numbers, no tracebacks (`explain` has the reason), no objects' addresses."""
    noise = (
        "Executing ",
        "Ending Cell",
        "Input Notebook",
        "Output Notebook",
        "Working directory",
        "<Figure",
        "<IPython",
        "<pandas.",
        "[IPKernelApp]",
        "Black is not installed",
        "Translating Parameters",
        "0.00s - ",
        "made: ",
    )
    for line in lines:
        if line.startswith(("Traceback (most recent call last)", "---------------------------------------------")):
            return
        if line.strip() and not line.startswith(noise):
            yield f"{prefix} | {line.rstrip()}"


def follow(label: str, lines: Iterable[str], kept: Path, traceback: Path | None = None) -> None:
    """Print the filtered log of a job, and keep its warnings in a file for the end of the run.

    Of a job that is no notebook the last line of an exception is printed, and the rest is kept in the file `traceback`.
    """
    lines = iter(lines)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("w", encoding="utf-8") as file:
        for line in filter_log(lines, label):
            print(line, flush=True)
            if line.removeprefix(f"{label} | ").startswith(WARNINGS):
                file.write(f"{line}\n")
                file.flush()
    rest = list(lines)  # a program whose output nobody reads would be killed
    if traceback and (said := [line.rstrip() for line in rest if line.strip()]):
        traceback.write_text("".join(rest), encoding="utf-8")
        print(f"{label} | {said[-1]}\n{label} | the traceback is in {short_path(traceback)}", flush=True)


def warnings_since(folder: Path, start: float) -> list[str]:
    """The warnings of the jobs that ran since a point in time."""
    files = [path for path in sorted(folder.glob("*.warnings")) if path.stat().st_mtime >= start]
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return list({line.partition(" | ")[2]: line for line in reversed(lines)}.values())[::-1]  # each once, the first
