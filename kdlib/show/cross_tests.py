"""The matrix of cross tests: every teacher on every speaker, from a folder of result files of any toolkit.

The speaker is that of the rows, of the file's header or of the ids, or else the one that the file's name ends with
(`wer_M08.txt`, `M04_on_M08.json`). The teacher is the speaker that the path names besides (`teacher_M04/wer_M08.txt`);
a path that names one speaker alone is that teacher on its own speech.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.corpus.speakers import published_speakers
from kdlib.errors import UserError
from kdlib.evaluate import predictions
from kdlib.evaluate.rounding import percent
from kdlib.evaluate.score import score
from kdlib.io import atomic_write, repository_root
from kdlib.logits.teacher_scores import own_and_others


def cross_tests(folder: Path, measure: str = "wra") -> pd.DataFrame:
    """Tidy rows: teacher, speaker, value, n; the mean over files of the same pair."""
    if not folder.is_dir() or predictions.is_single(folder):
        raise UserError(f"{folder}: expected a folder of result files, such as teacher_M04/wer_M08.txt")
    rows = []
    for path in predictions.result_files(folder):
        table = predictions.read(path, speaker_of_path=False)
        table["speaker"] = table.speaker.replace("", _last_named(path))
        for speaker, part in table.groupby("speaker"):
            if not speaker:
                raise UserError(
                    f"{path}: whose speech it is of is not known: neither its ids nor its name have a speaker"
                )
            found = score(part.reference.tolist(), part.hypothesis.tolist(), bootstrap=100)
            rows.append((teacher_of(path, folder, speaker), speaker, getattr(found, measure), len(part)))
    table = pd.DataFrame(rows, columns=["teacher", "speaker", "value", "n"])
    return table.groupby(["teacher", "speaker"], as_index=False).agg(value=("value", "mean"), n=("n", "sum"))


def _last_named(path: Path) -> str:
    """The speaker that a file's name ends with; empty if it has none."""
    return next(reversed(predictions.IN_PATH.findall(path.stem)), "")


def teacher_of(path: Path, folder: Path, speaker: str) -> str:
    """The teacher that a path names."""
    named = [
        name for part in path.relative_to(folder).with_suffix("").parts for name in predictions.IN_PATH.findall(part)
    ]
    others = [name for name in dict.fromkeys(named) if name != speaker]
    if len(others) > 1:
        raise UserError(f"{path}: several speakers are in its path ({', '.join(others)}); which one is the teacher?")
    if not named:
        raise UserError(f"{path}: no teacher is in its path; expected names such as teacher_M04/wer_M08.txt")
    return others[0] if others else speaker


def matrix(table: pd.DataFrame) -> pd.DataFrame:
    """Teachers (rows) by speakers (columns), from the least to the most intelligible where that is known."""
    known = published_speakers()

    def order(name: str) -> tuple:
        person = known.get(name)
        return (person.intelligibility_pct if person else np.inf, name)

    wide = table.pivot(index="teacher", columns="speaker", values="value")
    return wide.reindex(index=sorted(wide.index, key=order), columns=sorted(wide.columns, key=order))


def summary(wide: pd.DataFrame, measure: str = "wra") -> str:
    """What the matrix says of the teachers: own against others, and the order of the others."""
    pairs, lines = own_and_others(wide).dropna(), []
    if len(pairs):
        own, others = (percent(pairs[name].mean()) for name in ("own teacher", "other teachers"))
        lines.append(
            f"{measure.upper()} of a speaker's own teacher {own} %, of the others {others} % (mean of {len(pairs)})"
        )
    without = wide.copy()
    for name in set(wide.index) & set(wide.columns):
        without.loc[name, name] = np.nan
    means = without.mean(axis=1).dropna().sort_values(ascending=measure == "wer")
    ranked = ", ".join(f"{name} {percent(value)}" for name, value in means.items())
    lines.append(f"on other speakers, best first: {ranked}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("folder", type=Path, help="result files of teachers on speakers: teacher_M04/wer_M08.txt")
    parser.add_argument("--measure", choices=("wra", "wer"), default="wra")
    parser.add_argument("--out", type=Path, help="by default outputs/cross_tests/<folder>")


def run(options: argparse.Namespace) -> None:
    """Run the command: the matrix as a table, a CSV and a figure."""
    table = cross_tests(options.folder, options.measure)
    wide = matrix(table)
    print(percent(wide).to_string(na_rep="-"))
    print(summary(wide, options.measure))
    from kdlib.show import figures  # after the table: its import takes a second

    out = options.out or repository_root() / "outputs" / "cross_tests" / options.folder.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "matrix.csv") as hidden:
        table.assign(measure=options.measure).to_csv(hidden, index=False)
    order = "by intelligibility" if set(wide.columns) <= set(published_speakers()) else "by name"
    figures.save(figures.teacher_matrix({options.folder.name: wide}, order, options.measure), out, "matrix")
    print(f"\nWritten: {out}/matrix.csv, matrix.png and .pdf")
