"""What the benchmarks share: their options, timing and memory, and a result in one shape, for `page.py`.

A result is outputs/benchmarks/<name>.json: the question and the method (the script's docstring), the machine, a table
as a list of rows, and notes.
"""

import argparse
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlib.io import repository_root, write_json

RESULTS = Path("outputs") / "benchmarks"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What a benchmark has found."""

    question: str
    method: list[str]  # paragraphs
    machine: str
    rows: Sequence[Row]
    notes: Sequence[str]


@dataclass(frozen=True)
class Run:
    """A run of a benchmark; a `smoke` run is tiny, and writes only into a folder that is named."""

    name: str
    question: str
    method: list[str]
    smoke: bool
    out: Path | None

    def save(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        """Print the table and the notes, and write the result."""
        print(f"{self.question}\n\n{table(rows)}\n", *notes, sep="\n")
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            result = Result(self.question, self.method, machine(), rows, notes)
            write_json(self.out / f"{self.name}.json", asdict(result))


def start(file: str, doc: str) -> Run:
    """Read the options of a script, and remove its earlier result."""
    question, *method = paragraphs(doc)
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests: the figures mean nothing")
    parser.add_argument("--out", type=Path, help=f"the result's folder; by default {RESULTS}, of a smoke run none")
    asked = parser.parse_args()
    run = Run(
        Path(file).stem,
        question,
        method,
        asked.smoke,
        asked.out or (None if asked.smoke else repository_root() / RESULTS),
    )
    if run.out is not None:
        (run.out / f"{run.name}.json").unlink(missing_ok=True)
    return run


def paragraphs(doc: str) -> list[str]:
    """The paragraphs of a docstring, each as one line."""
    return [" ".join(part.split()) for part in doc.strip().split("\n\n")]


def interleaved(
    forms: Mapping[str, Callable], rounds: int, given: Callable[[int], Any] | None = None
) -> dict[str, list[float]]:
    """The seconds of every form in every round, one form after the other.

    With `given` each form is called with its value for the round, which is made outside the time. A first round is not
    counted unless it is the only one.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + (rounds > 1)):
        for name, form in forms.items():
            values = () if given is None else (given(number),)
            started = time.perf_counter()
            form(*values)
            times[name].append(time.perf_counter() - started)
    return {name: some[-rounds:] for name, some in times.items()}


def against(times: Mapping[str, Sequence[float]], peer: str) -> dict[str, tuple[float, float]]:
    """Of every form the median seconds, and the median of its ratios to the peer's seconds of the same rounds."""
    return {
        name: (
            statistics.median(some),
            statistics.median(one / other for one, other in zip(some, times[peer], strict=True)),
        )
        for name, some in times.items()
    }


def torch_bytes(work: Callable[[], object]) -> int:
    """The highest amount of torch's memory in use at once beyond what there was before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        highest = max(highest, used)
    return highest


def machine() -> str:
    """The machine in words: its processor, its cores, the threads of a process, and its GPU."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else []
    processor = names[0] if names else platform.processor() or platform.machine()
    threads = os.environ.get("OMP_NUM_THREADS", "1")  # as kdlib.runtime.set_threads has it
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {processor}, {threads} thread{'' if threads == '1' else 's'}{gpu}"


def table(rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown, numbers to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[shown(row.get(name)) for name in names] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(names, *cells, strict=True)]
    right = [not any(isinstance(row.get(name), str) for row in rows) for name in names]

    def line(parts: Sequence[str]) -> str:
        padded = (
            part.rjust(width) if to_right else part.ljust(width)
            for part, width, to_right in zip(parts, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (f"{'-' * (width + 1)}{':' if to_right else '-'}" for width, to_right in zip(widths, right, strict=True))
    return "\n".join([line(names), f"|{'|'.join(rule)}|", *map(line, cells)])


def shown(value: Any) -> str:
    """A value of a table: a number with three significant digits.

    >>> [shown(value) for value in (20054, 20054.3, 999.7, 47.04, 0.3204, 3.52e-9, 0.0, None, "fp16")]
    ['20,054', '20,100', '1,000', '47', '0.32', '3.5e-9', '0', '', 'fp16']
    """
    if value is None:
        return ""
    if not isinstance(value, float):
        return value if isinstance(value, str) else f"{value:,}"
    if value and abs(value) < 1e-3:
        return re.sub(r"e-0*", "e-", f"{value:.1e}")
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
