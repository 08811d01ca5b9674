"""Compare students: the baseline, the hard-label run of the same steps and seed, and the distilled students."""

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluate import compare
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.evaluate.rounding import percent
from kdlib.evaluate.score import tidy
from kdlib.evaluate.verdict import NO_DIFFERENCE, Verdict
from kdlib.io import read_json
from kdlib.models import read_record
from kdlib.objectives import terms
from kdlib.params import Params
from kdlib.pipeline import Fold
from kdlib.settings.evaluation import Scoring
from kdlib.show import format
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
        run = folder / "run.json"
        revision = read_json(run).get("revision", "") if run.is_file() else ""
        for speech, part in (("held out", folder), ("dev", folder / "dev")):
            if not (part / "scores.json").is_file():
                continue
            scores = read_json(part / "scores.json")
            ordered = [row for name in DECODERS for row in tidy(scores) if row["decoder"] == name]
            for row in ordered:
                column = row["decoder"] if speech == "held out" else f"dev {row['decoder']}"
                more = {"fold": fold, "system": system, "seed": seed, "speech": speech, "column": column}
                rows.append(row | more | {"revision": revision, "remark": scores.get("remark")})
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


def _decoded(folds: Sequence[Mapping[tuple[str, object], Path]], decoders: set[str]) -> dict[str, list[Path]]:
    """The folders of scores of each system, where it was decoded with all of these."""
    folders: dict[str, list[Path]] = {}
    for fold in folds:
        for (name, _), folder in fold.items():
            if decoders <= set(read_json(folder / "scores.json")["decoders"]):
                folders.setdefault(name, []).append(folder)
    return folders


def of_decoders(
    folds: Sequence[Mapping[tuple[str, object], Path]], decoder: str, against: str, scoring: Scoring
) -> list[Verdict]:
    """Test a decoder of each system against another of the same outputs: what a language model or calibration gives."""
    folders = _decoded(folds, {decoder, against})
    systems = {
        f"{name} ({how})": compare.collect(paths, how, normaliser=scoring.normaliser)
        for name, paths in folders.items()
        for how in (decoder, against)
    }
    pairs = {f"{name} ({decoder})": f"{name} ({against})" for name in folders}
    return compare.compare(systems, against=pairs, measure=scoring.measure, unit=scoring.unit) if pairs else []


def on_dev(folds: Mapping[str, Mapping[tuple[str, object], Path]]) -> list[dict[tuple[str, object], Path]]:
    """The folders of scores on dev speech, by dev speaker."""
    parts = [
        {key: folder / "dev" for key, folder in fold.items() if (folder / "dev" / "scores.json").is_file()}
        for fold in folds.values()
    ]
    return [part for part in parts if part]


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
