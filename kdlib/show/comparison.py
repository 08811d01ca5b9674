"""Compare students: the baseline, the hard-label run of the same steps and seed, and the distilled students.

`compare_folds` (`make compare`) prints the scores of each fold's
students and ensembles, and the verdict on each against its control over all folds; both are written to
`outputs/<recipe>/compare/`.
"""

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluate import compare
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.evaluate.normalisers import NORMALISERS
from kdlib.evaluate.rounding import percent
from kdlib.evaluate.score import tidy
from kdlib.evaluate.verdict import NO_DIFFERENCE, Verdict, verdict_frame
from kdlib.graph import named_folds
from kdlib.io import atomic_write, read_json
from kdlib.models import read_record
from kdlib.objectives import terms
from kdlib.params import GIVEN, Params
from kdlib.pipeline import Fold
from kdlib.settings.adaptation import UNLABELLED
from kdlib.settings.evaluation import Scoring
from kdlib.show import figures, format
from kdlib.teachers.teacher_sets import student_teachers
from kdlib.tokens import normalise

DECODERS = ("greedy", "lexicon", "lexicon_plain", "lexicon_transductive", "beam")
DECODERS += ("attention", "attention_beam", "attention_lexicon", "joint", "joint_lexicon")
BASELINE, START = "baseline", "start"
STEPS = {"encoder", "decoder_layers", "phases", "batch_size", "accumulate"}
SPEECH = ("held out", "dev")


def student_table(fold: Fold, seed: int) -> pd.DataFrame:
    """WRA (or WER) in per cent by decoder: held-out speaker, and dev speaker, on whom the weights were selected."""
    check_control(fold)
    systems = {(BASELINE if name == "pretrained" else name, seed): path for name, path in fold.systems(seed).items()}
    if own := own_start(fold, seed):
        systems = {(START, seed): own} | systems
    scores = fold_scores(systems)
    scores = scores[scores.measure == fold.params.scoring.measure]
    table = scores.pivot(index="decoder", columns=["speech", "system"], values="value")
    columns = [(speech, name) for speech in SPEECH for name, _ in systems if (speech, name) in table.columns]
    return percent(table.loc[[name for name in DECODERS if name in table.index], columns])


def own_start(fold: Fold, seed: int) -> Path | None:
    """The scores of a student's start, if it is not the pretrained model, whose scores are the baseline."""
    folder = fold.start(seed)
    return None if folder == fold.layout.baseline else folder


def verdict(fold: Fold, seed: int, decoder: str) -> Verdict | None:
    """Test a student against its control, on one speaker and one seed."""
    control, scoring = fold.control, fold.params.scoring
    if control.params.variant == fold.params.variant:
        return None
    systems = {
        run.params.variant: compare.collect([run.scores(seed)], decoder, normaliser=scoring.normaliser)
        for run in (fold, control)
    }
    return compare.compare(systems, against=control.params.variant, measure=scoring.measure, unit=scoring.unit)[0]


def below_start(fold: Fold, seed: int) -> str:
    """A warning that a student ends below what it started from, with what to try; empty if it does not.

    Compared are the closed lexicon (of words) and greedy decoding of the held-out speaker's speech.
    """
    name, scoring, folder = fold.params.variant, fold.params.scoring, fold.start(seed)
    measure = scoring.measure
    if not folder:
        return ""
    worse, sign = [], -1 if measure == "wer" else 1
    scores = fold.scores(seed)
    known = [read_json(path / "scores.json")["decoders"] for path in (folder, scores)]
    for decoder in ("greedy",) if measure == "wer" else ("lexicon", "greedy"):
        if not all(decoder in decoders for decoders in known):
            continue
        systems = {name: compare.collect([scores], decoder), START: compare.collect([folder], decoder)}
        found = compare.compare(systems, against=START, measure=measure, unit=scoring.unit)[0]
        if sign * found.difference < 0:
            values = f"{format.percent(found.a_value):.1f} against {format.percent(found.b_value):.1f} %"
            shown = f"p = {found.p:.2g}" if found.verdict != NO_DIFFERENCE else NO_DIFFERENCE
            worse.append(f"{decoder} {measure.upper()} {values} ({shown})")
    if not worse:
        return ""
    return (
        f"{name}, seed {seed}, ends below where it began on the held-out speaker: {'; '.join(worse)}. Try student: "
        "{augment: none}, a smaller lr, more steps, or more training speech, and compare on the dev speaker"
    )


def start_line(fold: Fold, seed: int) -> str:
    """The kept checkpoint and the start on the dev speaker, in a sentence."""
    record = read_record(fold.student(seed))
    best, kept, steps = record["best_dev_score"], record["best_step"], record["steps"]
    if "start_dev_score" not in record:
        return f"The checkpoint of step {kept} of {steps} is kept."
    if not kept:
        return f"No validation in {steps} steps was better than the start, which is the checkpoint that is kept."
    begin = format.percent(record["start_dev_score"])
    what = "WRA in the balanced closed lexicon" if fold.params.student.choose_by == "words" else "greedy WRA"
    return (
        f"Dev score ({what} less a thousandth of the loss): {begin:.1f} % at the start, "
        f"{format.percent(best):.1f} % at step {kept} of {steps}, which is kept."
    )


def score_folders(fold: Fold, variants: Sequence[str], seeds: Sequence[int], groups: Sequence[str] = ()) -> dict:
    """Map (system, seed) to its folder of scores in a fold: baseline, students, ensembles."""
    folders = {} if fold.params.pretrained == "none" else {(BASELINE, ""): fold.baseline()}
    for name, seed in itertools.product(variants, seeds):
        folder = fold.layout.student_scores(seed, name)
        if not (folder / "scores.json").is_file():
            raise UserError(f"{folder}: no scores here; train this student with: make compare VARIANTS={name}")
        if own := own_start(fold.of(name), seed):
            folders[f"{START} of {name}", seed] = own
        folders[name, seed] = folder
    return folders | {(name, "ensemble"): fold.ensemble(name) for name in groups}


def fold_scores(folders: Mapping[tuple[str, object], Path], fold: str = "") -> pd.DataFrame:
    """Tidy scores of the systems of a fold, on the held-out and on the dev speaker; shares unrounded."""
    rows = []
    for (system, seed), folder in folders.items():
        for speech, part in (("held out", folder), ("dev", folder / "dev")):
            if not (part / "scores.json").is_file():
                continue
            scores = read_json(part / "scores.json")
            ordered = [row for name in DECODERS for row in tidy(scores) if row["decoder"] == name]
            for row in ordered:
                column = row["decoder"] if speech == "held out" else f"dev {row['decoder']}"
                more = {"fold": fold, "system": system, "seed": seed, "speech": speech, "column": column}
                rows.append(row | more | {"remark": scores.get("remark")})
    return pd.DataFrame(rows)


def verdicts(
    folds: Sequence[Mapping[tuple[str, object], Path]],
    control: Mapping[str, str],
    decoder: str,
    scoring: Scoring,
) -> list[Verdict]:
    """Test each system against its control over folds and seeds, where both were decoded with this decoder."""
    folders = _decoded(folds, {decoder})
    pairs = {a: b for a, b in control.items() if a in folders and b in folders}
    if not pairs:
        return []
    compared = {*pairs, *pairs.values()}
    folded = {"normaliser": scoring.normaliser}
    systems = {name: compare.collect(paths, decoder, **folded) for name, paths in folders.items() if name in compared}
    return compare.compare(systems, against=pairs, measure=scoring.measure, unit=scoring.unit)


def families(pairs: Mapping[str, str], adapted: Collection[str]) -> list[dict[str, str]]:
    """The pairs that are corrected together: systems that are adapted on speech without transcripts, and the others."""
    parts = [{a: b for a, b in pairs.items() if (a in adapted) == of_adapted} for of_adapted in (False, True)]
    return [part for part in parts if part]


def passes_table(fold: Fold, variants: Sequence[str], seed: int) -> pd.DataFrame:
    """How many thousand utterances passed the encoder in the training of each student, and of what it begins with."""
    rows = {}
    for name in variants:
        own = fold.of(name).params
        taught = terms.uses_teachers(own.distill) and own.teacher.source == "students"
        members = [member.split("/seed") for member in (student_teachers(own.teacher) if taught else [])]
        if own.adapt:
            members += [(own.adapt.start, seed), *own.adapt.members(seed)]
        others = [_passes(fold, *member) for member in dict.fromkeys(map(tuple, members))]
        rows[name] = {direction: _passes(fold, name, seed).get(direction) for direction in ("forward", "backward")}
        rows[name]["of teachers and start"] = sum(sum(one.values()) for one in others)
    return pd.DataFrame.from_dict(rows, orient="index").dropna() / 1000


def _passes(fold: Fold, variant: str, seed: object) -> dict[str, int]:
    return read_record(fold.layout.student(seed, variant)).get("passes", {})


def _decoded(folds: Sequence[Mapping[tuple[str, object], Path]], decoders: set[str]) -> dict[str, list[Path]]:
    """The folders of scores of each system, where it was decoded with all of these."""
    folders: dict[str, list[Path]] = {}
    for fold in folds:
        for (name, _), folder in fold.items():
            if decoders <= set(read_json(folder / "scores.json")["decoders"]):
                folders.setdefault(name, []).append(folder)
    return folders


def of_beam_search(folds: Sequence[Mapping[tuple[str, object], Path]], scoring: Scoring) -> list[Verdict]:
    """Test the beam search of each system against its greedy decoding: what the language model alone gives."""
    folders = _decoded(folds, {"greedy", "beam"})
    systems = {
        f"{name} ({decoder})": compare.collect(paths, decoder, normaliser=scoring.normaliser)
        for name, paths in folders.items()
        for decoder in ("greedy", "beam")
    }
    pairs = {f"{name} (beam)": f"{name} (greedy)" for name in folders}
    return compare.compare(systems, against=pairs, measure=scoring.measure, unit=scoring.unit) if pairs else []


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


def pseudo_label_table(fold: Fold, sample: int = 400) -> pd.DataFrame | None:
    """How often the teachers' pseudo-labels are used and correct; None for a variant that trains on none.

    The references of speech without transcripts (`label_fraction`) are read for this table alone.
    """
    if not (hypotheses := fold.resolved.teacher_hypotheses()):
        return None
    source, confidence = terms.text_source(fold.params.distill)
    truth = {utt.utt_id: utt.text for utt in fold.all_labels.corpus}
    splits, rows = fold.splits, {}
    for speech, utterances in (("labelled", splits.train), ("without transcript", splits.unlabelled)):
        usable = set(hypotheses.ensemble.coverage([utt.utt_id for utt in utterances]).usable)
        drawn = [utt for utt in utterances if utt.utt_id in usable]
        drawn = random.Random(fold.params.seed).sample(drawn, min(sample, len(drawn)))
        if not drawn:
            continue
        best = hypotheses.best(drawn, source)
        right = [text == normalise(truth[utt.utt_id]) for (text, _), utt in zip(best, drawn, strict=True)]
        kept = [share >= confidence and bool(text) for text, share in best]
        rows[speech] = {
            "utterances": len(utterances),
            "sampled": len(drawn),
            "teachers correct %": percent(np.mean(right)),
            "used %": percent(np.mean(kept)),
            "correct among used %": percent(np.sum(np.logical_and(right, kept)) / max(1, np.sum(kept))),
            "mean confidence %": percent(np.mean([share for _, share in best])),
        }
    return pd.DataFrame.from_dict(rows, orient="index") if rows else None


def check_control(fold: Fold, control: Fold | None = None) -> None:
    """Check that a control is the same student with the same steps, trained on the references alone.

    A variant without teachers may be another student (mixup, attention, a curriculum): its steps are the same. The
    control of an adaptation at test time is the student that it starts from.
    """
    baseline = control or fold.control
    params, control = fold.params, baseline.params
    if params.adapt and params.adapt.speech == "test" and control.variant == params.adapt.start:
        return
    taught = terms.uses_teachers(params.distill)
    same = _steps(fold.resolved.params, whole=taught) == _steps(control, whole=taught)
    if not same or not terms.references_only(control.distill):
        raise UserError(
            f"variants: {control.variant!r} is no control of {params.variant!r}: it must have the same student, steps, "
            "heads, speech and label_fraction, and neither teachers nor smoothing (distill: every weight but beta 0); "
            "set another one: distill: {control: ...}"
        )
    start = baseline.resumed_from(1)
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


def _steps(params: Params, *, whole: bool) -> dict:
    """The settings that a student and its control must share: those of the whole student, or of its steps."""
    shared = {"fold", "held_out", "blocks", "tokens", "pretrained", "nemo_model", "seed", "corpus"}
    shared |= {"label_fraction", "label_by"}
    student = params.student.model_dump(exclude={"resume"}, include=None if whole else STEPS)
    heads = params.distill.model_dump(include={"heads", "ctc_weight", "label_smoothing"})
    return params.model_dump(include=shared) | student | heads | {"resumes": bool(params.student.resume)}


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
    rows: list[tuple[str, Verdict]] = []
    sentences = params.scoring.measure == "wer"  # the closed lexicon then has the test sentences themselves
    if sentences and (of_beam := of_beam_search(folders, params.scoring)):
        print("Beam search, its settings chosen on dev speech, against greedy decoding of the same outputs:")
        print("\n".join(result.text for result in of_beam))
        with atomic_write(out / "beam_against_greedy.csv") as hidden:
            verdict_frame(of_beam).to_csv(hidden, index=False)
    few = {name for name in variants if first.of(name).params.labels}
    adapted = {name for name in variants if (how := first.of(name).params.adapt) and how.targets in UNLABELLED}
    for decoder in (name for name in DECODERS if not (sentences and "lexicon" in name)):
        pairs = control
        if decoder == "beam" or params.pretrained == "from_corpus":  # the baseline's was trained on all transcripts
            pairs = {a: b for a, b in control.items() if a not in few or b != BASELINE}
        for family in families(pairs, adapted):
            rows += [(decoder, result) for result in verdicts(folders, family, decoder, params.scoring)]
    if not rows:
        print("No two of these systems share a decoder: there is nothing to compare.")
        return
    decoders, results = zip(*rows, strict=True)
    table = format.verdict_table(results)
    table.insert(2, "decoder", decoders)
    print(table.drop(columns="measure").to_string(index=False))
    apart = ", those adapted on speech without transcripts and the others apart" if adapted else ""
    print(f"Holm's correction is over the pairs of a decoder{apart}.")
    for decoder, result in rows:
        if result.b != BASELINE:
            print(f"{decoder}: {result.text}")
    frame = verdict_frame(results).assign(decoder=decoders)
    with atomic_write(out / "verdicts.csv") as hidden:
        frame.to_csv(hidden, index=False)
    figures.save(figures.differences(frame), out, "differences")
