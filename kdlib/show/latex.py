"""LaTeX: tables with booktabs and siunitx, macros for numbers. Bold only where a verdict says so."""

import re

import numpy as np
import pandas as pd

from kdlib.evaluate.rounding import percent
from kdlib.evaluate.verdict import NO_DIFFERENCE

NAMES = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")  # macros have letters alone
DIGITS = dict(zip("0123456789", NAMES, strict=True))
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    char: f"\\{char}" for char in "&%$#_{}"
}


def escape(text: str) -> str:
    """A text that LaTeX prints as it is."""
    return "".join(SPECIAL.get(char, char) for char in text)


def macro(words: str) -> str:
    """The name of a macro: letters alone.

    >>> macro("wra ctc_kd+temperature.t4")
    'kdWraCtcKdTemperatureTFour'
    """
    spelt = "".join(f" {DIGITS[char]} " if char in DIGITS else char for char in words)
    return "kd" + "".join(part[:1].upper() + part[1:] for part in re.split(r"[^A-Za-z]+", spelt) if part)


def macros(numbers: dict[str, str]) -> str:
    """numbers.tex: a macro for each number."""
    lines = [f"\\newcommand{{\\{macro(name)}}}{{{value}}}" for name, value in numbers.items()]
    return "\n".join(["% Written by kdlib (make figures); do not edit.", *lines]) + "\n"


def per_cent(share: float) -> str:
    """A share in per cent, as text."""
    return f"{percent(share):.1f}\\,\\%"


def points(difference: float, low: float, high: float) -> str:
    """A difference with its interval, in points."""
    return f"${percent(difference):+.1f}$ points (95\\,\\% ${percent(low):+.1f}$ to ${percent(high):+.1f}$)"


def main_table(table: pd.DataFrame, results) -> str:
    """Systems with folds x seeds, mean and spread over seeds, difference from the control, hours of a training."""
    rows = []
    for row in table.to_dict("records"):
        difference = interval = p = ""
        if not np.isnan(row.get("difference", np.nan)):
            difference = f"{percent(row['difference']):+.1f}"
            if row["verdict"] != NO_DIFFERENCE:
                difference = f"\\bfseries {difference}"
            interval, p = _interval(row["low"], row["high"]), _p(row["p"])
        rows.append(
            {
                "System": escape(str(row["system"])),
                "$n$": f"{row['folds']} $\\times$ {row['seeds']}",
                f"{results.measure.upper()} (\\%)": f"{percent(row[results.measure]):.1f}",
                "s.d.": "" if np.isnan(row["sd"]) else f"{percent(row['sd']):.1f}",
                "$\\Delta$": difference,
                "95\\,\\%": interval,
                "$p$": p,
                "h": "" if np.isnan(row["hours"]) else f"{row['hours']:.2f}",
            }
        )
    return _styled(pd.DataFrame(rows), "lcSSDlll")


def decoder_table(table: pd.DataFrame, results) -> str:
    """Systems by decoders."""
    shown = table.copy()
    shown["system"] = shown.system.map(escape)
    for name in table.columns[1:]:
        shown[name] = ["" if np.isnan(value) else f"{percent(value):.1f}" for value in table[name]]
    shown.columns = ["System", *(f"{{{escape(name)}}}" for name in table.columns[1:])]
    return _styled(shown, "l" + "S" * (len(table.columns) - 1))


def effect_table(table: pd.DataFrame, results) -> str:
    """Effects of the levels of an ablation."""
    rows = []
    for row in table.itertuples():
        value = f"{percent(row.difference):+.1f}"
        bold = row.verdict != NO_DIFFERENCE
        rows.append(
            {
                "Factor": escape(row.factor),
                "Level": escape(row.level),
                "Against": escape(row.against),
                "$\\Delta$": f"\\bfseries {value}" if bold else value,
                "95\\,\\%": _interval(row.these_low, row.these_high),
                "$p$": _p(row.holm_p),
            }
        )
    return _styled(pd.DataFrame(rows), "lllDll")


def _interval(low: float, high: float) -> str:
    return f"[${percent(low):+.1f}$, ${percent(high):+.1f}$]"


def _p(value: float) -> str:
    return "$<$.001" if value < 0.001 else f"{value:.3f}"


def _styled(table: pd.DataFrame, columns: str) -> str:
    """A tabular of booktabs; shares (S) and differences (D) stand in siunitx's columns, whose heads are in braces."""
    formats = {
        "S": "S[table-format=2.1]",
        "D": "S[table-format=+2.1,retain-explicit-plus,detect-weight,table-number-alignment=center]",
    }
    kinds = dict(zip(table.columns, columns, strict=True))
    heads = {name: f"{{{name}}}" for name, kind in kinds.items() if kind in formats and not name.startswith("{")}
    layout = "".join(formats.get(kind, kind) for kind in columns)
    styler = table.rename(columns=heads).style.hide(axis="index")
    return styler.to_latex(hrules=True, column_format=f"@{{}}{layout}@{{}}")
