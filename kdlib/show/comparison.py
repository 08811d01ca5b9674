"""Compare students: the baseline, the hard-label run of the same steps and seed, and the distilled students.

`python -m kdlib.show.comparison RECIPE FOLD,... VARIANT,... SEED,... [ENSEMBLE,...]` prints the scores of each fold's
students and ensembles, and the verdict on each against its control over all folds; both are written to
`outputs/<recipe>/compare/`.
"""

import itertools
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.corpus import prepare
from kdlib.corpus.speakers import split
from kdlib.distill import ensembles
from kdlib.distill.setup import resolved, resumed_from, student_targets, teacher_hypotheses, text_source
from kdlib.distill.student_scores import student_scores
from kdlib.errors import UserError
from kdlib.evaluate import compare
from kdlib.evaluate.baseline import baseline
from kdlib.evaluate.score import read_hypotheses
from kdlib.evaluate.verdict import Verdict, verdict_frame, verdict_table
from kdlib.io import atomic_write, read_json
from kdlib.models import read_record
from kdlib.params import Params, load
from kdlib.settings import Scoring
from kdlib.show import figures
from kdlib.tokens import normalise

DECODERS = ("greedy", "lexicon", "beam", "attention", "attention_beam", "attention_lexicon", "joint", "joint_lexicon")
BASELINE = "baseline"


def student_table(params: Params, control: Params, seed: int) -> pd.DataFrame:
    """WRA (or WER) in per cent by decoder: held-out speaker, and dev speaker, on whom the weights were selected."""
    check_control(params, control)
    measure = params.scoring.measure
    rows = [_row(BASELINE, "", baseline(params), measure)]
    for run in (control, params) if control.variant != params.variant else (params,):
        rows.append(_row(run.variant, seed, student_scores(run, seed), measure))
    columns = {}
    for speech, prefix in (("held out", ""), ("dev", "dev ")):
        for row in rows:
            values = {name: row[prefix + name] for name in DECODERS if prefix + name in row}
            if values:
                columns[speech, row["system"]] = values
    table = pd.DataFrame(columns)
    return table.loc[[name for name in DECODERS if name in table.index]]


def verdict(params: Params, control: Params, seed: int, decoder: str) -> Verdict | None:
    """Test a student against its control, on one speaker and one seed."""
    if control.variant == params.variant:
        return None
    folded = {"fold_homophones": params.scoring.fold_homophones}
    systems = {
        run.variant: compare.collect([student_scores(run, seed)], decoder, **folded) for run in (params, control)
    }
    return compare.compare(systems, against=control.variant, measure=params.scoring.measure)[0]


def score_folders(params: Params, variants: Sequence[str], seeds: Sequence[int], groups: Sequence[str] = ()) -> dict:
    """Map (system, seed) to its folder of scores in a fold: baseline, students, ensembles."""
    folders = {(BASELINE, ""): baseline(params)}
    for name, seed in itertools.product(variants, seeds):
        folder = params.fold_folder / "students" / name / f"seed{seed}" / "scores"
        if not (folder / "scores.json").is_file():
            raise UserError(f"{folder}: no scores here; train this student with: make compare VARIANTS={name}")
        folders[name, seed] = folder
    return folders | {(name, "ensemble"): ensembles.ensemble_scores(params, name) for name in groups}


def fold_table(folders: Mapping[tuple[str, object], Path], measure: str = "wra") -> pd.DataFrame:
    """One row per system of a fold, the baseline included, and the mean over seeds of each variant."""
    table = pd.DataFrame([_row(*key, folder, measure) for key, folder in folders.items()])
    numbers = [name for name in table.columns if name not in ("system", "seed", "remark")]
    students = table[table.seed.map(lambda seed: isinstance(seed, int))]
    means = students.groupby("system", sort=False)[numbers].mean().round(1).reset_index()
    means.insert(1, "seed", "mean")
    return pd.concat([table, means], ignore_index=True).set_index(["system", "seed"])


def verdicts(
    folds: Sequence[Mapping[tuple[str, object], Path]],
    control: Mapping[str, str],
    decoder: str,
    scoring: Scoring,
) -> list[Verdict]:
    """Test each system against its control over folds and seeds, where both were decoded with this decoder."""
    folders: dict[str, list[Path]] = {}
    for fold in folds:
        for (name, _), folder in fold.items():
            if decoder in read_json(folder / "scores.json")["decoders"]:
                folders.setdefault(name, []).append(folder)
    pairs = {a: b for a, b in control.items() if a in folders and b in folders}
    if not pairs:
        return []
    compared = {*pairs, *pairs.values()}
    folded = {"fold_homophones": scoring.fold_homophones}
    systems = {name: compare.collect(paths, decoder, **folded) for name, paths in folders.items() if name in compared}
    return compare.compare(systems, against=pairs, measure=scoring.measure)


def changed_utterances(before: Path, after: Path, decoder: str = "greedy") -> pd.DataFrame:
    """Utterances that exactly one of two scored systems recognises correctly."""
    old, new = (
        pd.DataFrame(read_hypotheses(folder / "hypotheses.csv")).set_index("utt_id") for folder in (before, after)
    )
    old_right, new_right = old[decoder] == old.reference, new[decoder].reindex(old.index) == old.reference
    table = pd.DataFrame(
        {
            "reference": old.reference,
            "seen": old.seen,
            "hard labels": old[decoder],
            "distilled": new[decoder].reindex(old.index),
            "change": ["fixed" if right else "broke" for right in new_right],
        }
    )
    return table[old_right != new_right].sort_values(["change", "reference"])


def pseudo_label_table(params: Params, sample: int = 400) -> pd.DataFrame | None:
    """How often the teachers' pseudo-labels are used and correct; None for a variant that trains on no pseudo-labels.

    The references of speech without transcripts (`label_fraction`) are read for this table alone.
    """
    used = resolved(params)
    if not used.distill.uses_teachers or not (hypotheses := teacher_hypotheses(used, student_targets(used))):
        return None
    source, confidence = text_source(used)
    truth = {utt.utt_id: utt.text for utt in prepare.load(params.with_all_labels)}
    splits, rows = split(prepare.load(params), params), {}
    for speech, utterances in (("labelled", splits.train), ("without transcript", splits.unlabelled)):
        usable = set(hypotheses.ensemble.coverage([utt.utt_id for utt in utterances]).usable)
        drawn = [utt for utt in utterances if utt.utt_id in usable]
        drawn = random.Random(params.seed).sample(drawn, min(sample, len(drawn)))
        if not drawn:
            continue
        best = hypotheses.best(drawn, source)
        right = [text == normalise(truth[utt.utt_id]) for (text, _), utt in zip(best, drawn, strict=True)]
        kept = [share >= confidence and bool(text) for text, share in best]
        rows[speech] = {
            "utterances": len(utterances),
            "sampled": len(drawn),
            "teachers correct %": 100 * np.mean(right),
            "used %": 100 * np.mean(kept),
            "correct among used %": 100 * np.sum(np.logical_and(right, kept)) / max(1, np.sum(kept)),
            "mean confidence %": 100 * np.mean([share for _, share in best]),
        }
    return pd.DataFrame.from_dict(rows, orient="index").round(1)


def check_control(params: Params, control: Params) -> None:
    """Check that a control is the same student with the same steps, trained on the references alone."""
    if _steps(resolved(params)) != _steps(control) or not control.distill.references_only:
        raise UserError(
            f"variants: {control.variant!r} is no control of {params.variant!r}: it must have the same student, steps, "
            "heads, speech and label_fraction, and neither teachers nor smoothing (distill: every weight but beta 0); "
            "set another one: distill: {control: ...}"
        )
    start = resumed_from(control, 1)
    before = read_record(start) if start else {}
    if before.get("uses_teachers") or not before.get("references_only", True):
        raise UserError(
            f"variants: the control {control.variant!r} resumes from {start}, which was not trained on references alone"
        )
    if params.use_unlabelled_held_out != control.use_unlabelled_held_out and any(
        phase.epochs for phase in params.student.phases
    ):
        raise UserError(
            f"variants: {params.variant!r} also trains on the held-out speaker's speech, so its epochs have more steps "
            f"than those of {control.variant!r}; set steps in student.phases"
        )


def _steps(params: Params) -> dict:
    """The settings that a student and its control must share."""
    shared = {"fold", "held_out", "blocks", "tokens", "pretrained", "nemo_model", "seed", "corpus"}
    shared |= {"label_fraction", "label_by"}
    student = params.student.model_dump(exclude={"resume"})
    heads = params.distill.model_dump(include={"heads", "ctc_weight", "label_smoothing"})
    return params.model_dump(include=shared) | student | heads | {"resumes": bool(params.student.resume)}


def _row(name: str, seed: object, folder: Path, measure: str) -> dict:
    """A system's scores in per cent by decoder, on the held-out and the dev speaker."""
    row = {"system": name, "seed": seed}
    for part, prefix in ((folder, ""), (folder / "dev", "dev ")):
        if (part / "scores.json").is_file():
            scores = read_json(part / "scores.json")
            decoders = scores["decoders"]
            row |= {"remark": scores["remark"]} if "remark" in scores else {}
            row |= {f"{prefix}{name}": round(100 * decoders[name][measure], 1) for name in DECODERS if name in decoders}
    return row


def main(
    recipe: str, held_out: Sequence[str], variants: Sequence[str], seeds: Sequence[int], groups: Sequence[str]
) -> None:
    """Run the command: tables of the folds, verdicts over them, their figure; by default all that a recipe compares."""
    folds = [load(recipe, name) for name in held_out]
    first = folds[0]
    variants, seeds = variants or first.compare, seeds or first.seeds
    out = first.folder / "compare"
    out.mkdir(parents=True, exist_ok=True)
    control = {name: load(recipe, held_out[0], variant=name).distill.control for name in variants}
    variants = [*sorted(set(control.values()) - set(variants)), *variants]  # with the control of each
    control = {name: control[name] if control.get(name, name) != name else BASELINE for name in variants}
    folders = [score_folders(params, variants, seeds, groups) for params in folds]
    tables = pd.concat(
        {p.held_out: fold_table(fold, p.scoring.measure) for p, fold in zip(folds, folders, strict=True)},
        names=["fold"],
    )
    with atomic_write(out / "table.csv") as hidden:
        tables.to_csv(hidden)
    print(tables.drop(columns="remark", errors="ignore").dropna(axis=1, how="all").to_string(na_rep="-"))
    if "remark" in tables:
        for (speaker, name, seed), remark in tables.remark.dropna().items():
            print(f"{speaker}, {name} {seed}: {remark}")
    members = {name: list(first.ensembles[name].variants) for name in groups}
    control |= {name: of[0] if of[0] in variants else BASELINE for name, of in members.items()}
    rows: list[tuple[str, Verdict]] = []
    sentences = first.scoring.measure == "wer"  # the closed lexicon then has the test sentences themselves
    few = {name for name in variants if load(recipe, held_out[0], variant=name).labels}
    for decoder in (name for name in DECODERS if not (sentences and name.endswith("lexicon"))):
        pairs = control
        if decoder == "beam" or first.pretrained == "from_corpus":  # the baseline's was trained on all transcripts
            pairs = {a: b for a, b in control.items() if a not in few or b != BASELINE}
        rows += [(decoder, result) for result in verdicts(folders, pairs, decoder, first.scoring)]
    if not rows:
        print("No two of these systems share a decoder: there is nothing to compare.")
        return
    decoders, results = zip(*rows, strict=True)
    table = verdict_table(results)
    table.insert(2, "decoder", decoders)
    print(table.drop(columns="measure").to_string(index=False))
    print("Holm's correction is over the pairs of a decoder.")
    for decoder, result in rows:
        if result.b != BASELINE:
            print(f"{decoder}: {result.text}")
    with atomic_write(out / "verdicts.csv") as hidden:
        verdict_frame(results).assign(decoder=decoders).to_csv(hidden, index=False)
    figures.save(figures.differences(table), out, "differences")


if __name__ == "__main__":
    try:
        recipe, *listed = sys.argv[1:]
        names, variants, numbers, groups = ([name for name in text.split(",") if name] for text in [*listed, ""][:4])
        main(recipe, names, variants, [int(number) for number in numbers], groups)
    except UserError as error:
        sys.exit(f"\n{error}\n")
