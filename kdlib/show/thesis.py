"""Figures, tables and numbers for a thesis: `make figures`, notebook 07. Everything from tidy tables, without a model.

Three dictionaries say what there is: FIGURES, TABLES and NUMBERS. Every figure is written as PDF in the exact width of
a document class, as PNG, its numbers as CSV, and where they come from as JSON; tables as LaTeX (booktabs, siunitx) and
CSV; headline numbers as LaTeX macros in numbers.tex; index.html shows all, each with a caption and with the sentence
that one may write about it. A file is written only if it changes.
"""

import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.errors import UserError, nearest
from kdlib.io import atomic_write
from kdlib.show import latex, thesis_tables
from kdlib.show import thesis_figures as draw
from kdlib.show import thesis_sentences as sentences
from kdlib.show.drawing import fit_texts
from kdlib.show.figures import style
from kdlib.show.thesis_figures import main_decoder
from kdlib.show.thesis_tables import Results

WIDTHS_IN = {  # text width, or that of a column, by document class
    "thesis": 6.3,
    "article": 345 / 72.27,  # LaTeX's, at 10 pt
    "ieee": 252 / 72.27,  # IEEEtran's column
    "interspeech": 80 / 25.4,  # its column: 80 mm
}


@dataclass(frozen=True)
class Item:
    """A figure or table of the export."""

    table: Callable[[Results], pd.DataFrame]  # tidy; without rows there is nothing to show
    draw: Callable[[pd.DataFrame, Results], object]  # a figure, or a LaTeX table
    caption: str  # {measure}: the study's, in words
    sentence: Callable[[pd.DataFrame, Results], str]

    def title(self, results: Results) -> str:
        """The caption for a study."""
        text = self.caption.format(measure=results.measured)
        return text[0].upper() + text[1:]


# tables of figures


def _accuracy(results: Results) -> pd.DataFrame:
    """The measure of every system by held-out speaker: the mean over seeds, and their spread."""
    part = results.scores[
        (results.scores.measure == results.measure) & (results.scores.decoder == main_decoder(results))
    ]
    grouped = part.groupby(["held_out", "system"], sort=False)
    table = grouped.value.agg(["mean", "std", "count"]).reset_index()
    single = grouped[["low", "high"]].mean().reset_index()
    return table.merge(single, on=["held_out", "system"]).rename(columns={"count": "seeds"})


def _differences(results: Results) -> pd.DataFrame:
    if results.verdicts.empty:
        return pd.DataFrame()
    return results.verdicts[results.verdicts.decoder == main_decoder(results)]


# tables


def _main_table(results: Results) -> pd.DataFrame:
    """One row per system: mean over folds and seeds, spread of seeds, difference from the control, cost."""
    part = results.scores[
        (results.scores.measure == results.measure) & (results.scores.decoder == main_decoder(results))
    ]
    found = _differences(results)
    verdicts = {} if found.empty else {row.a: row for row in found.itertuples()}
    rows = []
    for system, own in part.groupby("system", sort=False):
        by_seed = own.groupby("seed").value.mean()
        row = {
            "system": system,
            "folds": own.held_out.nunique(),
            "seeds": own.seed.nunique(),
            results.measure: own.value.mean(),
        }
        row |= {"sd": by_seed.std(ddof=1) if len(by_seed) > 1 else np.nan}
        if verdict := verdicts.get(system):
            row |= {"control": verdict.b, "difference": verdict.difference, "low": verdict.these_low}
            row |= {"high": verdict.these_high, "p": verdict.holm_p, "verdict": verdict.verdict}
        rows.append(row | {"hours": results.hours.get(system, np.nan)})
    return pd.DataFrame(rows)


def _decoder_table(results: Results) -> pd.DataFrame:
    """The measure of every system by every decoder, the mean over folds and seeds."""
    part = results.scores[results.scores.measure == results.measure]
    wide = part.pivot_table(index="system", columns="decoder", values="value", sort=False)
    return wide[list(dict.fromkeys(part.decoder))].reset_index()


def _effects(results: Results) -> pd.DataFrame:
    if results.effects.empty:
        return pd.DataFrame()
    return results.effects[results.effects.decoder == results.effects.decoder.iloc[0]]


def _left(name: str) -> Callable[[Results], pd.DataFrame]:
    """A table that a notebook left."""
    return lambda results: results.more.get(name, pd.DataFrame())


FIGURES = {
    "accuracy": Item(_accuracy, draw.accuracy, "{measure} by held-out speaker", sentences.accuracy),
    "differences": Item(
        _differences,
        draw.differences,
        "Differences from the control, with 95 % intervals",
        sentences.difference,
    ),
    "gains": Item(
        lambda results: results.gains,
        draw.gains,
        "What each step gives, with 95 % intervals (calibrated closed lexicon)",
        sentences.difference,
    ),
    "speakers": Item(
        lambda results: results.speakers,
        draw.speakers,
        "The pretrained model on every speaker",
        sentences.speaker,
    ),
    "teachers": Item(
        lambda results: results.teachers, draw.teachers, "Every teacher on every speaker", sentences.teacher
    ),
    "targets": Item(
        lambda results: results.targets, draw.targets, "The teachers combined, by method", sentences.target
    ),
    "curves": Item(
        lambda results: results.curves,
        draw.curves,
        "Accuracy on dev speech over the training; shaded: all seeds",
        sentences.curve,
    ),
    "confidence": Item(
        lambda results: results.confidence,
        draw.confidence,
        "Reliability of the closed lexicon's posteriors, in bins of equally many utterances",
        sentences.confidence,
    ),
    "durations": Item(_left("durations"), draw.durations, "Word durations relative to controls", sentences.none),
    "beam_sweep": Item(_left("sweep"), draw.sweep, "WER on dev speech by the settings of beam search", sentences.sweep),
    "effect_sizes": Item(
        _effects, draw.effects, "Effects of the levels of an ablation, with 95 % intervals", sentences.effect
    ),
    "by_speaker": Item(
        _left("by_speaker"), draw.by_speaker, "Differences of cells from their controls, by speaker", sentences.none
    ),
    "fingerprints": Item(
        _left("fingerprints"), draw.fingerprints, "Signs of the causes of a collapse, made on purpose", sentences.none
    ),
    "confusion": Item(_left("confusion"), draw.confusion, "Causes made, and causes named", sentences.confusion),
    "factorial": Item(_left("factorial"), draw.factorial, "What collapses a student, crossed", sentences.none),
}
TABLES = {
    "main": Item(_main_table, latex.main_table, "Systems and their controls", sentences.none),
    "decoders": Item(_decoder_table, latex.decoder_table, "{measure} by decoder", sentences.none),
    "effects": Item(_effects, latex.effect_table, "Effects of the levels of an ablation", sentences.effect),
}
NUMBERS: Mapping[str, Callable[[Results], dict[str, str]]] = {
    "accuracy": lambda results: {
        f"{results.measure} {row['system']}": latex.per_cent(row[results.measure])
        for row in _main_table(results).to_dict("records")
    },
    "difference": lambda results: {
        f"difference {row.a}": latex.points(row.difference, row.these_low, row.these_high)
        for row in _differences(results).itertuples()
    },
    "size": lambda results: {
        "folds": str(results.scores.held_out.nunique()),
        "utterances": str(int(results.scores.groupby("held_out").n.first().sum())),
    },
}


def export(results: Results, out: Path, document: str = "thesis") -> list[Path]:
    """Write everything that the results have; return the files that changed."""
    if document not in WIDTHS_IN:
        raise UserError(f"figures: unknown document class {document!r}{nearest(document, list(WIDTHS_IN))}")
    out.mkdir(parents=True, exist_ok=True)
    changed, shown = [], []
    for name, item in FIGURES.items():
        table = item.table(results)
        if table.empty:
            continue
        figure = item.draw(table, results)
        figure.set_size_inches(WIDTHS_IN[document], figure.get_figheight())
        fit_texts(figure)
        provenance = _provenance(results, item, table, document)
        changed += _write_figure(figure, out / name) + _write_texts(out / name, table, provenance)
        plt.close(figure)
        shown.append((name, item, table, True))
    for name, item in TABLES.items():
        table = item.table(results)
        if not table.empty:
            text = str(item.draw(table, results))
            changed += _write(out / f"{name}.tex", text.encode())
            changed += _write_texts(out / name, table, _provenance(results, item, table, document))
            shown.append((name, item, table, False))
    changed += _write(out / "numbers.tex", latex.macros(numbers(results)).encode())
    changed += _write(out / "index.html", _index(results, shown).encode())
    return changed


def numbers(results: Results) -> dict[str, str]:
    """The headline numbers, by the words of their macros."""
    found: dict[str, str] = {}
    for make in NUMBERS.values():
        found |= make(results) if not results.scores.empty else {}
    return found


def run(
    recipe: str, held_out: Sequence[str], systems: Mapping[str, Sequence[Path]], out: Path | None, document: str
) -> None:
    """The command: export, and say what was written."""
    results = thesis_tables.of_files(systems) if systems else thesis_tables.of_recipe(recipe, held_out)
    folder = out or thesis_tables.folder(recipe, bool(systems))
    changed = export(results, folder, document)
    if results.left_out:
        print(f"left out, because not every fold has them: {', '.join(results.left_out)}")
    print(f"{folder}: {len(changed)} files changed; index.html shows all, numbers.tex has the macros")


def _provenance(results: Results, item: Item, table: pd.DataFrame, document: str) -> dict:
    part = results.scores[results.scores.measure == results.measure]
    return {
        "study": results.name,
        "caption": item.title(results),
        "sentence": item.sentence(table, results),
        "document": document,
        "width_pt": round(WIDTHS_IN[document] * 72.27, 2),
        "folds": list(dict.fromkeys(map(str, part.held_out))),
        "seeds": sorted({int(seed) for seed in part.seed if isinstance(seed, int | np.integer)}),
        "utterances": int(part.groupby("held_out").n.first().sum()),
        "left_out": list(results.left_out),
        "runs": list(results.runs),
    }


def _write_figure(figure: Figure, path: Path) -> list[Path]:
    changed = []
    metadata = {"pdf": {"CreationDate": None, "ModDate": None}, "png": {"Software": None}}
    for kind, about in metadata.items():
        with io.BytesIO() as file, plt.rc_context(style()):
            figure.savefig(file, format=kind, metadata=about)
            changed += _write(path.with_suffix(f".{kind}"), file.getvalue())
    return changed


def _write_texts(path: Path, table: pd.DataFrame, provenance: dict) -> list[Path]:
    text = json.dumps(provenance, indent=1, ensure_ascii=False) + "\n"
    return _write(path.with_suffix(".csv"), table.to_csv(index=False).encode()) + _write(
        path.with_suffix(".json"), text.encode()
    )


def _write(path: Path, content: bytes) -> list[Path]:
    """Write a file if that changes it."""
    if path.is_file() and path.read_bytes() == content:
        return []
    with atomic_write(path) as hidden:
        hidden.write_bytes(content)
    return [path]


def _index(results: Results, shown: Sequence[tuple]) -> str:
    """A page of all figures, tables and numbers."""
    parts = [f"<h1>{html.escape(results.name)}</h1>"]
    for name, item, table, is_figure in shown:
        sentence, title = item.sentence(table, results), html.escape(item.title(results))
        body = f'<img src="{name}.png" alt="{title}">' if is_figure else table.to_html(index=False)
        files = (".pdf", ".png", ".csv", ".json") if is_figure else (".tex", ".csv", ".json")
        links = " ".join(f'<a href="{name}{kind}">{name}{kind}</a>' for kind in files)
        words = f"<p><b>One may write:</b> {html.escape(sentence)}</p>" if sentence else ""
        parts.append(f"<h2>{title}</h2>{body}{words}<p>{links}</p>")
    rows = "".join(
        f"<tr><td><code>\\{latex.macro(name)}</code></td><td>{html.escape(value)}</td></tr>"
        for name, value in numbers(results).items()
    )
    runs = "".join(f"<li>{html.escape(json.dumps(run, ensure_ascii=False))}</li>" for run in results.runs)
    parts += [f"<h2>Numbers</h2><table>{rows}</table>", f"<h2>The runs behind</h2><ul>{runs}</ul>"]
    look = "body{font-family:sans-serif;max-width:60em;margin:2em auto}img{max-width:100%}"
    look += "td,th{padding:2px 8px;text-align:left}"
    head = f"<head><meta charset='utf-8'><style>{look}</style></head>"
    return f"<!DOCTYPE html><html>{head}<body>{''.join(parts)}</body></html>\n"
