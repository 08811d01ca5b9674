"""Console output: progress bars, lines printed once, filtered logs of headless runs.

`python -m kdlib.console follow LABEL` filters papermill's log; `python -m kdlib.console explain NOTEBOOK.ipynb` prints
why an executed notebook failed.
"""

import functools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from kdlib.io import short_path


def progress(total: int, what: str, unit: str):
    """Make a plain-text progress bar for a terminal, JupyterLab and the log of a headless run."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=what, unit=unit, ascii=True, mininterval=0.2 if sys.stderr.isatty() else 5, dynamic_ncols=True
    )


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


@functools.cache
def print_once(text: str) -> None:
    """Print a line only once per process."""
    print(text)


def filter_log(lines: Iterable[str], prefix: str) -> Iterator[str]:
    """Filter papermill's log: no cell numbers, no tracebacks (`explain` has the reason)."""
    noise = (
        "Executing ",
        "Ending Cell",
        "Input Notebook",
        "Output Notebook",
        "Working directory",
        "<Figure",
        "<IPython",
        "[IPKernelApp]",
        "Black is not installed",
        "Translating Parameters",
        "0.00s - ",
    )
    for line in lines:
        if line.startswith(("Traceback (most recent call last)", "---------------------------------------------")):
            return
        if line.strip() and not line.startswith(noise):
            yield f"{prefix} | {line.rstrip()}"


if __name__ == "__main__":
    if sys.argv[1] == "follow":
        for text in filter_log(sys.stdin, sys.argv[2]):
            print(text, flush=True)
        sys.stdin.read()
    else:
        sys.exit(f"\n{explain_failure(Path(sys.argv[2]))}\n")
