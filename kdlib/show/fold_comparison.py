"""`make compare`: the scores of each fold's students and ensembles, and verdicts over all folds.

They are printed, and written to `outputs/<recipe>/compare/`.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from kdlib.corpus.manifest import LEVELS
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.evaluate.normalisers import NORMALISERS
from kdlib.evaluate.rounding import percent
from kdlib.evaluate.verdict import Verdict, verdict_frame
from kdlib.graph import named_folds
from kdlib.io import atomic_write, read_json
from kdlib.params import GIVEN
from kdlib.pipeline import Fold
from kdlib.settings.adaptation import UNLABELLED
from kdlib.settings.evaluation import Scoring
from kdlib.show import figures, format
from kdlib.show.comparison import (
    BASELINE,
    DECODERS,
    below_start,
    fold_scores,
    of_decoders,
    on_dev,
    score_folders,
    verdicts,
)

Folders = Mapping[tuple[str, object], Path]  # of the scores of a fold, by system and seed
CALIBRATION = "calibration", "lexicon", "lexicon_plain"
BEAM = "beam search", "beam", "greedy"  # of sentences: a closed lexicon has the test sentences themselves


def compare_folds(
    recipe: str, held_out: Sequence[str], variants: Sequence[str], seeds: Sequence[int], groups: Sequence[str]
) -> None:
    """Tables of the folds, verdicts over them, their figure; by default all that a recipe compares."""
    names = named_folds(recipe, held_out)
    speakers = [name for name in names if name != GIVEN]
    if speakers:
        _compare(recipe, speakers, variants, seeds, groups)
    if GIVEN in names:
        if speakers:
            print("\nThe corpus's own split, by itself: its test speech is also that of single speakers.")
        _compare(recipe, [GIVEN], variants, seeds, groups, folder=GIVEN if speakers else "")


def _compare(
    recipe: str,
    held_out: Sequence[str],
    variants: Sequence[str],
    seeds: Sequence[int],
    groups: Sequence[str],
    folder: str = "",
) -> None:
    folds = [Fold.load(recipe, name) for name in held_out]
    first, params = folds[0], folds[0].params
    variants, seeds, out = variants or params.compare, seeds or params.seeds, first.layout.compare / folder
    out.mkdir(parents=True, exist_ok=True)
    control = {name: first.of(name).params.distill.control for name in variants}
    variants = [*sorted(set(control.values()) - set(variants)), *variants]  # with the control of each
    control = {name: control[name] if control.get(name, name) != name else BASELINE for name in variants}
    folders = [score_folders(fold, variants, seeds, groups) for fold in folds]
    scores = pd.concat([fold_scores(found, name) for name, found in zip(held_out, folders, strict=True)])
    with atomic_write(out / "scores.csv") as hidden:
        scores.drop(columns="column").to_csv(hidden, index=False)
    table = format.fold_table(scores, params.scoring.measure)
    print(table.drop(columns="remark", errors="ignore").dropna(axis=1, how="all").to_string(na_rep="-"))
    if "remark" in table:
        for (speaker, name, seed), remark in table.remark.dropna().items():
            print(f"{speaker}, {name} {seed}: {remark}")
    normaliser = params.scoring.normaliser
    pairs = zip(held_out, folders, strict=True)
    apart = pd.concat([by_adaptation_words(found, name, normaliser) for name, found in pairs])
    if len(apart):
        print("Words that the adaptation speech holds (yes) and does not hold (no), WRA:")
        shown = apart.pivot_table(index=["system", "held"], columns="decoder", values="value", sort=False)
        print(percent(shown).to_string(na_rep="-"))
        with atomic_write(out / "adaptation_words.csv") as hidden:
            apart.to_csv(hidden, index=False)
    for fold, name, seed in itertools.product(folds, variants, seeds):
        if why := below_start(fold.of(name), seed):
            print(f"{fold.params.held_out}, {why}.")
    if len(passes := passes_table(first, variants, seeds[0])):
        print(f"Thousands of utterances that passed the encoder in training (fold {held_out[0]}, seed {seeds[0]}):")
        print(passes.round(1).to_string())
        with atomic_write(out / "passes.csv") as hidden:
            passes.to_csv(hidden)
    members = {name: list(params.ensembles[name].variants) for name in groups}
    control |= {name: of[0] if of[0] in variants else BASELINE for name, of in members.items()}
    if params.pretrained == "none":
        control = {name: of for name, of in control.items() if of != BASELINE}
    kind, decoder, plain = BEAM if params.scoring.measure == "wer" else CALIBRATION
    of_decoding = of_decoders(folders, decoder, plain, params.scoring)
    (out / f"{decoder}_against_{plain}.csv").unlink(missing_ok=True)
    if of_decoding:
        print(f"What {kind} gives, its settings chosen on dev speech, with the same outputs:")
        print("\n".join(result.text for result in of_decoding))
        with atomic_write(out / f"{decoder}_against_{plain}.csv") as hidden:
            verdict_frame(of_decoding).to_csv(hidden, index=False)
    pairs = _Pairs.of(first, control)
    rows = pairs.verdicts(folders)
    if not rows:
        print("No two of these systems share a decoder: there is nothing to compare.")
        return
    frame = _show_verdicts(rows, "Held-out speakers")
    apart = ", those adapted on speech without transcripts and the others apart" if pairs.adapted else ""
    print(f"Holm's correction is over the pairs of a decoder{apart}; each table is corrected by itself.")
    for how, result in rows:
        if result.b != BASELINE:
            print(f"{how}: {result.text}")
    parts = {("held out", "all"): frame}
    levels = [first.corpus.level(name) for name in held_out]
    for level in sorted(set(levels) - {""}, key=LEVELS.index) if len(set(levels)) > 1 else ():
        of_level = [found for found, its in zip(folders, levels, strict=True) if its == level]
        parts["held out", level] = _show_verdicts(pairs.verdicts(of_level), f"Held-out speakers of level {level}")
    dev = on_dev({fold.params.fold.dev: found for fold, found in reversed([*zip(folds, folders, strict=True)])})
    what = "Dev speakers, by whose speech checkpoints and decoders were chosen"
    parts["dev", "all"] = _show_verdicts(pairs.verdicts(dev), what)
    with atomic_write(out / "verdicts.csv") as hidden:
        known = [part.assign(speech=speech, level=level) for (speech, level), part in parts.items() if len(part)]
        pd.concat(known).to_csv(hidden, index=False)
    figure = figures.differences(frame)
    figures.save(figure, out, "differences")
    plt.close(figure)


@dataclass(frozen=True)
class _Pairs:
    """The systems of a comparison, each with its control."""

    control: Mapping[str, str]
    few: Collection[str]  # trained on a share of the transcripts
    adapted: Collection[str]  # on speech without transcripts
    pretrained: str
    scoring: Scoring

    @classmethod
    def of(cls, fold: Fold, control: Mapping[str, str]) -> "_Pairs":
        known = {name: fold.of(name).params for name in control if name in fold.params.variants}
        few = {name for name, params in known.items() if params.labels}
        adapted = {name for name, params in known.items() if params.adapt and params.adapt.targets in UNLABELLED}
        return cls(control, few, adapted, fold.params.pretrained, fold.params.scoring)

    def verdicts(self, folders: Sequence[Folders]) -> list[tuple[str, Verdict]]:
        """Every decoder's verdicts."""
        rows: list[tuple[str, Verdict]] = []
        for decoder in DECODERS:
            if self.scoring.measure == "wer" and "lexicon" in decoder:
                continue  # it has the test sentences themselves
            pairs = self.control
            if decoder == "beam" or self.pretrained == "from_corpus":  # the baseline's was trained on all transcripts
                pairs = {a: b for a, b in pairs.items() if a not in self.few or b != BASELINE}
            for family in families(pairs, self.adapted):
                rows += [(decoder, result) for result in verdicts(folders, family, decoder, self.scoring)]
        return rows


def _show_verdicts(rows: Sequence[tuple[str, Verdict]], speech: str) -> pd.DataFrame:
    """Print a table of verdicts; returned with all their numbers."""
    if not rows:
        return pd.DataFrame()
    decoders, results = zip(*rows, strict=True)
    table = format.verdict_table(results)
    table.insert(2, "decoder", decoders)
    print(f"\n{speech}:\n{table.drop(columns='measure').to_string(index=False)}")
    return verdict_frame(results).assign(decoder=decoders)


def families(pairs: Mapping[str, str], adapted: Collection[str]) -> list[dict[str, str]]:
    """The pairs that are corrected together: systems that are adapted on speech without transcripts, and the others."""
    parts = [{a: b for a, b in pairs.items() if (a in adapted) == of_adapted} for of_adapted in (False, True)]
    return [part for part in parts if part]


def passes_table(fold: Fold, variants: Sequence[str], seed: int) -> pd.DataFrame:
    """How many thousand utterances passed the encoder in the training of each student, and of those it learns from.

    Those that these have learnt from are among them; teachers that are no students are not.
    """
    rows = {}
    for name in variants:
        others, waiting = {}, fold.of(name).params.learns_from(seed)
        while waiting:
            one = waiting.pop()
            if one not in others:
                others[one] = sum(_passes(fold, *one).values())
                waiting += fold.of(one[0]).params.learns_from(one[1])
        rows[name] = {direction: _passes(fold, name, seed).get(direction) for direction in ("forward", "backward")}
        rows[name]["of other students"] = sum(others.values())
    return pd.DataFrame.from_dict(rows, orient="index").dropna() / 1000


def _passes(fold: Fold, variant: str, seed: int) -> dict[str, int]:
    return read_json(fold.layout.student(seed, variant) / "run.json").get("passes", {})


def by_adaptation_words(
    folders: Mapping[tuple[str, object], Path], fold: str, normaliser: str = "none"
) -> pd.DataFrame:
    """Shares of right words of every system, apart for words that the adaptation speech of a fold holds or does not."""
    contents = {key: read_json(folder / "scores.json") for key, folder in folders.items()}
    same = NORMALISERS[normaliser]
    tables = {key: read_hypotheses(folder / "hypotheses.csv") for key, folder in folders.items()}
    adapted = [tables[key] for key, scores in contents.items() if scores.get("seen_in")]
    marked = next((rows for rows in adapted if any(row.seen == "no" for row in rows)), None)
    if marked is None:  # without adaptation, or to the scored speech itself
        return pd.DataFrame()
    held = {row.utt_id: row.seen for row in marked}
    rows = []
    for (system, seed), hypotheses in tables.items():
        for decoder in (name for name in DECODERS if name in contents[system, seed]["decoders"]):
            for kind in ("yes", "no"):
                part = [row for row in hypotheses if held[row.utt_id] == kind]
                right = [same(getattr(row, decoder)) == same(row.reference) for row in part]
                about = {"fold": fold, "system": system, "seed": seed, "decoder": decoder, "held": kind}
                rows.append(about | {"value": np.mean(right) if right else np.nan, "n": len(right)})
    return pd.DataFrame(rows)
