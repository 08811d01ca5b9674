"""Students beside each other: the baseline, the hard-label run of the same steps and seed, and what was distilled.

`python -m kdlib.show.comparison RECIPE FOLD,... VARIANT,... SEED,... [ENSEMBLE,...]` prints the table of each fold's
students and ensembles, and how each compares with its control over all folds; both are written to
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
    """WRA (or WER) in per cent by decoder: of the held-out speaker, and of the dev speaker, who chose the weights."""
    check_control(params, control)
    measure = params.scoring.measure
    rows = [_row(BASELINE, "", baseline(params), measure)]
    for one in (control, params) if control.variant != params.variant else (params,):
        rows.append(_row(one.variant, seed, student_scores(one, seed), measure))
    columns = {}
    for speech, prefix in (("held out", ""), ("dev", "dev ")):
        for row in rows:
            values = {name: row[prefix + name] for name in DECODERS if prefix + name in row}
            if values:
                columns[speech, row["system"]] = values
    table = pd.DataFrame(columns)
    return table.loc[[name for name in DECODERS if name in table.index]]


def verdict(params: Params, control: Params, seed: int, decoder: str) -> Verdict | None:
    """A student against its control, on one speaker and one seed."""
    if control.variant == params.variant:
        return None
    folded = {"fold_homophones": params.scoring.fold_homophones}
    systems = {
        one.variant: compare.collect([student_scores(one, seed)], decoder, **folded) for one in (params, control)
    }
    return compare.compare(systems, against=control.variant, measure=params.scoring.measure)[0]


def score_folders(params: Params, variants: Sequence[str], seeds: Sequence[int], groups: Sequence[str] = ()) -> dict:
    """(system, seed) -> the folder of its scores, in a fold: baseline, students, ensembles."""
    found = {(BASELINE, ""): baseline(params)}
    for name, seed in itertools.product(variants, seeds):
        folder = params.fold_folder / "students" / name / f"seed{seed}" / "scores"
        if not (folder / "scores.json").is_file():
            raise UserError(f"{folder}: no scores there; train this student with: make compare VARIANTS={name}")
        found[name, seed] = folder
    return found | {(name, "ensemble"): ensembles.ensemble_scores(params, name) for name in groups}


def fold_table(there: Mapping[tuple[str, object], Path], measure: str = "wra") -> pd.DataFrame:
    """One row a student of a fold, beside the baseline, and the mean over seeds of each variant."""
    table = pd.DataFrame([_row(*key, folder, measure) for key, folder in there.items()])
    numbers = [name for name in table.columns if name not in ("system", "seed", "remark")]
    several = table[table.seed.map(lambda seed: isinstance(seed, int))]
    means = several.groupby("system", sort=False)[numbers].mean().round(1).reset_index()
    means.insert(1, "seed", "mean")
    return pd.concat([table, means], ignore_index=True).set_index(["system", "seed"])


def verdicts(
    there: Sequence[Mapping[tuple[str, object], Path]],
    control: Mapping[str, str],
    decoder: str,
    scoring: Scoring,
) -> list[Verdict]:
    """Each system against its control over folds and seeds, where both were decoded so."""
    places: dict[str, list[Path]] = {}
    for one in there:
        for (name, _), folder in one.items():
            if decoder in read_json(folder / "scores.json")["decoders"]:
                places.setdefault(name, []).append(folder)
    pairs = {a: b for a, b in control.items() if a in places and b in places}
    if not pairs:
        return []
    named = {*pairs, *pairs.values()}
    folded = {"fold_homophones": scoring.fold_homophones}
    systems = {name: compare.collect(paths, decoder, **folded) for name, paths in places.items() if name in named}
    return compare.compare(systems, against=pairs, measure=scoring.measure)


def changed_utterances(before: Path, after: Path, decoder: str = "greedy") -> pd.DataFrame:
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


def pseudo_label_table(params: Params, sample: int = 400) -> pd.DataFrame | None:
    """How often the teachers' texts are taught and right, where texts or words are; nothing where they are not.

    The references of speech whose transcripts the student is denied are looked up for this table alone.
    """
    used = resolved(params)
    if not used.distill.uses_teachers or not (guessed := teacher_hypotheses(used, student_targets(used))):
        return None
    over, sure = text_source(used)
    truth = {utt.utt_id: utt.text for utt in prepare.load(params.with_all_labels)}
    splits, rows = split(prepare.load(params), params), {}
    for speech, utterances in (("labelled", splits.train), ("without transcript", splits.unlabelled)):
        usable = set(guessed.ensemble.coverage([utt.utt_id for utt in utterances]).usable)
        some = [utt for utt in utterances if utt.utt_id in usable]
        some = random.Random(params.seed).sample(some, min(sample, len(some)))
        if not some:
            continue
        best = guessed.best(some, over)
        right = [text == normalise(truth[utt.utt_id]) for (text, _), utt in zip(best, some, strict=True)]
        taught = [share >= sure and bool(text) for text, share in best]
        rows[speech] = {
            "utterances": len(utterances),
            "looked at": len(some),
            "teachers right %": 100 * np.mean(right),
            "taught %": 100 * np.mean(taught),
            "right of these %": 100 * np.sum(np.logical_and(right, taught)) / max(1, np.sum(taught)),
            "mean share %": 100 * np.mean([share for _, share in best]),
        }
    return pd.DataFrame.from_dict(rows, orient="index").round(1)


def check_control(params: Params, control: Params) -> None:
    """A control is the same student with the same steps, and learns from the references alone."""
    if _steps(resolved(params)) != _steps(control) or not control.distill.references_only:
        raise UserError(
            f"variants: {control.variant!r} is no control of {params.variant!r}: it must have the same student, steps, "
            "heads, speech and label_fraction, and neither teachers nor smoothing (distill: every weight but beta 0); "
            "name the right one: distill: {control: ...}"
        )
    start = resumed_from(control, 1)
    before = read_record(start) if start else {}
    if before.get("uses_teachers") or not before.get("references_only", True):
        raise UserError(
            f"variants: the control {control.variant!r} goes on from {start}, which learnt more than labels"
        )
    if params.use_unlabelled_held_out != control.use_unlabelled_held_out and any(
        phase.epochs for phase in params.student.phases
    ):
        raise UserError(
            f"variants: {params.variant!r} hears the held-out speaker too, so that its epochs have more steps than "
            f"those of {control.variant!r}; say steps in student.phases"
        )


def _steps(params: Params) -> dict:
    """What a student and its control have in common."""
    named = {"fold", "held_out", "blocks", "tokens", "pretrained", "nemo_model", "seed", "corpus"}
    named |= {"label_fraction", "label_by"}
    student = params.student.model_dump(exclude={"resume"})
    heads = params.distill.model_dump(include={"heads", "ctc_weight", "label_smoothing"})
    return params.model_dump(include=named) | student | heads | {"goes on": bool(params.student.resume)}


def _row(name: str, seed: object, folder: Path, measure: str) -> dict:
    found = {"system": name, "seed": seed}
    for part, prefix in ((folder, ""), (folder / "dev", "dev ")):
        if (part / "scores.json").is_file():
            scores = read_json(part / "scores.json")
            decoders = scores["decoders"]
            found |= {"remark": scores["remark"]} if "remark" in scores else {}
            found |= {
                f"{prefix}{column}": round(100 * decoders[column][measure], 1)
                for column in DECODERS
                if column in decoders
            }
    return found


def main(
    recipe: str, held_out: Sequence[str], variants: Sequence[str], seeds: Sequence[int], groups: Sequence[str]
) -> None:
    """The command: tables of the folds, verdicts over all of them, their figure; by default what a recipe compares."""
    every = [load(recipe, name) for name in held_out]
    variants, seeds = variants or every[0].compare, seeds or every[0].seeds
    out = every[0].folder / "compare"
    out.mkdir(parents=True, exist_ok=True)
    control = {name: load(recipe, held_out[0], variant=name).distill.control for name in variants}
    variants = [*sorted(set(control.values()) - set(variants)), *variants]  # each beside its control
    control = {name: control[name] if control.get(name, name) != name else BASELINE for name in variants}
    there = [score_folders(params, variants, seeds, groups) for params in every]
    tables = pd.concat(
        {params.held_out: fold_table(one, params.scoring.measure) for params, one in zip(every, there, strict=True)},
        names=["fold"],
    )
    with atomic_write(out / "table.csv") as hidden:
        tables.to_csv(hidden)
    print(tables.drop(columns="remark", errors="ignore").dropna(axis=1, how="all").to_string(na_rep="-"))
    if "remark" in tables:
        for (held_out, name, seed), remark in tables.remark.dropna().items():
            print(f"{held_out}, {name} {seed}: {remark}")
    of = {name: list(every[0].ensembles[name].variants) for name in groups}
    control |= {name: members[0] if members[0] in variants else BASELINE for name, members in of.items()}
    rows: list[tuple[str, Verdict]] = []
    sentences = every[0].scoring.measure == "wer"  # of which the closed list holds the test's own
    few = {name for name in variants if load(recipe, held_out[0], variant=name).labels}
    for decoder in (name for name in DECODERS if not (sentences and name.endswith("lexicon"))):
        pairs = control
        if decoder == "beam" or every[0].pretrained == "from_corpus":  # the baseline's knows all transcripts
            pairs = {name: other for name, other in control.items() if name not in few or other != BASELINE}
        rows += [(decoder, one) for one in verdicts(there, pairs, decoder, every[0].scoring)]
    if not rows:
        print("No two of these were decoded in the same way: there is nothing to compare.")
        return
    table = verdict_table([one for _, one in rows])
    table.insert(2, "decoder", [decoder for decoder, _ in rows])
    print(table.drop(columns="measure").to_string(index=False))
    print("Holm's correction is over the pairs of a decoder.")
    for decoder, one in rows:
        if one.b != BASELINE:
            print(f"{decoder}: {one.text}")
    with atomic_write(out / "verdicts.csv") as hidden:
        verdict_frame([one for _, one in rows]).assign(decoder=[decoder for decoder, _ in rows]).to_csv(
            hidden, index=False
        )
    figures.save(figures.differences(table), out, "differences")


if __name__ == "__main__":
    try:
        recipe, *listed = sys.argv[1:]
        names, variants, numbers, groups = ([one for one in text.split(",") if one] for text in [*listed, ""][:4])
        main(recipe, names, variants, [int(one) for one in numbers], groups)
    except UserError as error:
        sys.exit(f"\n{error}\n")
