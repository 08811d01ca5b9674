"""Students beside each other: the baseline, the hard-label run of the same steps and seed, and what was distilled.

`python -m kdlib.distill.results RECIPE HELD_OUT VARIANT,... SEED,...` prints the table of a fold's students and writes
it to `<held-out>/students/table.csv`.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kdlib.distill import ingredients, students
from kdlib.errors import UserError
from kdlib.evaluate.baseline import baseline
from kdlib.evaluate.score import read_hypotheses
from kdlib.params import Params, load
from kdlib.stage import read_json, writing

COLUMNS = ("greedy", "lexicon", "attention", "attention_lexicon")


def beside(params: Params, control: Params, seed: int) -> pd.DataFrame:
    """WRA of the held-out speaker: baseline, hard-label run, student; and of the dev speaker, who chose the weights."""
    check_control(params, control)
    rows = [_row("baseline", "", baseline(params))]
    for one in (control, params) if control.variant != params.variant else (params,):
        rows.append(_row(one.variant, seed, students.scored(one, seed)))
    return pd.DataFrame(rows).set_index("system")


def fold(params: Params, variants: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """One row a student of a fold, beside the baseline, and the mean over seeds of each variant."""
    rows = [_row("baseline", "", baseline(params))]
    for name, seed in itertools.product(variants, seeds):
        folder = params.fold_folder / "students" / name / f"seed{seed}" / "scores"
        if not (folder / "scores.json").is_file():
            raise UserError(f"{folder}: no scores there; train this student with: make compare VARIANTS={name}")
        rows.append(_row(name, seed, folder))
    table = pd.DataFrame(rows)
    numbers = [name for name in table.columns if name not in ("system", "seed")]
    means = table[table.seed != ""].groupby("system", sort=False)[numbers].mean().round(1).reset_index()
    means.insert(1, "seed", "mean")
    return pd.concat([table, means], ignore_index=True).set_index(["system", "seed"])


def changed(before: Path, after: Path, decoder: str = "greedy") -> pd.DataFrame:
    """Utterances that one of two scored systems gets right and the other wrong."""
    old, new = (
        pd.DataFrame(read_hypotheses(folder / "hypotheses.csv")).set_index("utt_id") for folder in (before, after)
    )
    was, is_now = old[decoder] == old.reference, new[decoder].reindex(old.index) == old.reference
    table = pd.DataFrame(
        {
            "reference": old.reference,
            "seen": old.seen,
            "hard labels": old[decoder],
            "distilled": new[decoder].reindex(old.index),
            "change": ["fixed" if now else "broke" for now in is_now],
        }
    )
    return table[was != is_now].sort_values(["change", "reference"])


def in_words(before: Path, after: Path, decoder: str = "greedy") -> str:
    """What changed, with the p of McNemar's exact test: how often chance alone would part two equal systems so far."""
    from scipy.stats import binomtest

    counts = changed(before, after, decoder).change.value_counts()
    fixed, broke = int(counts.get("fixed", 0)), int(counts.get("broke", 0))
    if not fixed + broke:
        return f"{decoder}: both get the same utterances right"
    p = binomtest(fixed, fixed + broke).pvalue
    verdict = "no difference shown" if p >= 0.05 else "better" if fixed > broke else "worse"
    return f"{decoder}: {fixed} fixed, {broke} broken, {verdict} (McNemar p = {p:.2g}; one speaker, one seed)"


def check_control(params: Params, control: Params) -> None:
    """A control is the same student with the same steps, and learns from the references alone."""
    if _steps(ingredients.effective(params)) != _steps(control) or control.distill.taught:
        raise UserError(
            f"variants: {control.variant!r} is no control of {params.variant!r}: it must have the same student, steps, "
            "heads and speech, and no teacher (alpha, alpha_end, gamma and pseudo.weight 0); name the right one: "
            "distill: {control: ...}"
        )
    start = ingredients.resumed(control, 1)
    if start and read_json(start / "model.json").get("taught"):
        raise UserError(f"variants: the control {control.variant!r} goes on from {start}, which was distilled")


def _steps(params: Params) -> dict:
    """What a student and its control have in common."""
    named = {"fold", "held_out", "blocks", "tokens", "pretrained", "nemo_model", "seed", "corpus"}
    student = params.student.model_dump(exclude={"resume"})
    heads = params.distill.model_dump(include={"heads", "ctc_weight", "label_smoothing"})
    return params.model_dump(include=named) | student | heads | {"goes on": bool(params.student.resume)}


def _row(name: str, seed: object, folder: Path) -> dict:
    found = {"system": name, "seed": seed}
    for part, prefix in ((folder, ""), (folder / "dev", "dev ")):
        if (part / "scores.json").is_file():
            decoders = read_json(part / "scores.json")["decoders"]
            found |= {
                f"{prefix}{column}": round(100 * decoders[column]["wra"], 1) for column in COLUMNS if column in decoders
            }
    return found


if __name__ == "__main__":
    try:
        asked = load(sys.argv[1], sys.argv[2])
        found = fold(asked, sys.argv[3].split(","), [int(one) for one in sys.argv[4].split(",")])
        with writing(asked.fold_folder / "students" / "table.csv") as hidden:
            found.to_csv(hidden)
        print(found.to_string(na_rep="-"))
    except UserError as error:
        sys.exit(f"\n{error}\n")
