"""A fold's targets: the weighting that combines the teachers' stores, and the speech that has a target.

The held-out and the dev speaker's speech has no training target; a teacher trained on either speaker is refused, and so
is one trained on a transcript that the student is without. Weights come from the fold's dev speaker, from the acoustic
similarity of speakers, or from the reference of each utterance, if there is one (CA-MKD, Zhang et al. 2022, weights
teachers by their loss on the label).
"""

import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from kdlib.console import warn
from kdlib.corpus import labels
from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.evaluate import hypotheses
from kdlib.logits.extract import OUTPUTS, Purpose, read_outputs
from kdlib.logits.store import LogitStore
from kdlib.models import Emissions
from kdlib.settings.corpus import SplitSettings
from kdlib.settings.targets import FUSIONS, METHODS, Aggregation, methods_for
from kdlib.targets.aggregation import TeacherEnsemble, Weighting
from kdlib.targets.similarity import similarity_weights
from kdlib.tokens import Tokens


@dataclass(frozen=True)
class Evidence:
    """What weights can be estimated from; each is looked up only if a method needs it."""

    accuracies: Callable[[], dict[str, float]]  # by teacher
    outputs: Callable[[], dict[str, Path]]  # each teacher's folder of outputs
    features: Callable[[], pd.DataFrame]  # of speakers
    fusion: Callable[[], torch.nn.Module]


def weighting(method: str, names: Sequence[str], settings: Aggregation, evidence: Evidence) -> Weighting:
    """The weighting of a method for the named teachers."""
    common = {"missing": settings.missing, "min_teachers": settings.min_teachers}
    if method == "weighted_accuracy":
        return Weighting(weights=_usable_weights(evidence.accuracies()), **common)
    if method == "weighted_loss":
        return Weighting(losses={name: _losses(folder) for name, folder in evidence.outputs().items()}, **common)
    if method == "weighted_similarity":
        return Weighting(by_speaker=similarity_weights(evidence.features(), names), **common)
    if method == "best":
        weights = _usable_weights(evidence.accuracies())
        best = max(names, key=lambda name: (weights[name], name))
        return Weighting(weights={name: float(name == best) for name in names}, **common)
    if method in FUSIONS:
        return Weighting(fusion=evidence.fusion(), **common)
    if method in ("logprob_mean", "same_level"):
        return Weighting(**common)
    if method in ("prob_mean", "own"):
        return Weighting(mean="prob_mean" if method == "prob_mean" else "logprob_mean", own=method == "own", **common)
    if method == "auto":
        raise UserError("aggregation.method is 'auto': `target_report.best_method` gives the method that it selects")
    raise UserError(f"aggregation: unknown method {method!r}; expected one of {', '.join(METHODS)}")


def combine(
    stores: Mapping[str, LogitStore], chosen: Weighting, tokens: Tokens, fold: SplitSettings, purpose: Purpose
) -> TeacherEnsemble:
    """Check the stores, and combine them under a weighting."""
    excluded = fold.excluded_speakers
    for store in stores.values():
        store.check(tokens=tokens, held_out=excluded, training=purpose == "training")
    if purpose != "training":
        excluded = {}
    elif fold.use_unlabelled_held_out:  # without transcripts
        excluded = {name: why for name, why in excluded.items() if name != fold.held_out}
    return TeacherEnsemble(stores, chosen, excluded)


def check_method(method: str, output: str, of_speakers: bool, *, own_recordings: bool = False) -> None:
    """Refuse a method that cannot combine these teachers, or this output."""
    if own_recordings and method not in ("own", "auto"):
        raise UserError(
            f"aggregation.method {method!r} would mix different recordings: the teachers in teacher.folder have "
            "outputs on their own speaker's recordings alone, and frame t of one is another sound than frame t of "
            "another, also where both are cut to the shortest. What is sound: each speaker's own teacher (aggregation: "
            "{method: own}); word posteriors averaged over the recordings of a word (own, with distill: {words: "
            "{weight: 1.0, pooled: true}}); the teachers' models, run on all recordings (teacher: {source: "
            "checkpoints})"
        )
    if method in FUSIONS and output != "ctc":
        raise UserError(
            f"aggregation.method {method!r} is trained on CTC outputs and cannot combine a decoder's; name another for "
            "distill: {heads: decoder}"
        )
    if method in METHODS and method not in methods_for(of_speakers=of_speakers):
        allowed = ", ".join(methods_for(of_speakers=of_speakers))
        raise UserError(
            f"aggregation.method {method!r} needs teachers of single speakers, but those here are of all speakers "
            f"(teacher.source), or of several; expected one of {allowed}"
        )


def check_labels(records: Mapping[str, dict], fold: SplitSettings) -> None:
    """Refuse a teacher trained on a transcript that the student is without; `records` are those of the teachers."""
    for name, record in records.items():
        if why := labels.leaks(record.get("labels"), fold):
            raise UserError(
                f"teacher {name} {why}: it would leak the other transcripts; name teachers of the same label_fraction, "
                "label_by and seed"
            )


def halves(utterances: Sequence[Utterance]) -> dict[str, int]:
    """The half of the dev speech, 0 or 1, that each utterance belongs to: no text is in both halves.

    What is fitted on one half was fitted on no word of the other, so it gains nothing there by learning this speaker's
    words by heart. Texts in a random order go to the halves in turn, so that few words are divided evenly too.
    Sentences are divided as wholes, and their words recur in both halves; speech of one text is divided by utterance.
    """
    texts = {utt.text for utt in utterances}
    units = {utt.utt_id: utt.text if len(texts) > 1 else utt.utt_id for utt in utterances}
    ordered = sorted(set(units.values()), key=lambda unit: (zlib.crc32(unit.encode()), unit))
    place = {unit: number % 2 for number, unit in enumerate(ordered)}
    return {utt_id: place[unit] for utt_id, unit in units.items()}


class CrossFitted:
    """A method cross-fitted on the dev speaker: each half of the speech gets what was estimated on the other half."""

    def __init__(self, ensembles: Sequence[TeacherEnsemble], half_of: Mapping[str, int]) -> None:
        """`ensembles`: for each half of the dev speech the one estimated on the other; `half_of`: see `halves`."""
        self.ensembles, self.half_of = ensembles, half_of
        self.stores = self.ensembles[0].stores
        self.coverage = self.ensembles[0].coverage

    def log_probs(self, batch: Batch) -> Emissions:
        """The target of a batch, as log-probabilities."""
        frames = self.ensembles[0].frames(batch)
        targets: list[torch.Tensor | None] = [None] * len(batch)
        for half, ensemble in enumerate(self.ensembles):
            if places := [place for place, utt_id in enumerate(batch.utt_ids) if self.half_of[utt_id] == half]:
                rows, lengths = ensemble.log_probs(batch.select(places), frames[places])
                for place, row, length in zip(places, rows, lengths.tolist(), strict=True):
                    targets[place] = row[:length]
        return Emissions(torch.nn.utils.rnn.pad_sequence(targets, batch_first=True), frames)


def dev_accuracies(scores: Mapping[str, Path], utterances: Collection[str]) -> dict[str, float]:
    """Greedy CTC accuracy of teachers on some dev utterances, from their folders of scores."""
    accuracies = {}
    for name, folder in scores.items():
        rows = [row for row in hypotheses.read_hypotheses(folder / "hypotheses.csv") if row.utt_id in utterances]
        accuracies[name] = sum(row.greedy == row.reference for row in rows) / max(1, len(rows))
    return accuracies


def own_accuracies(records: Mapping[str, dict]) -> dict[str, float]:
    """Accuracy of teachers on their own dev blocks; those without one get the mean of the others."""
    scores = {
        name: max(0.0, record["best_dev_score"]) for name, record in records.items() if "best_dev_score" in record
    }
    if not scores:
        raise UserError(
            "aggregation: weights by accuracy need speech that the teachers are scored on: there is no dev speaker, "
            "and these teachers have no record of their own; name a dev speaker (fold.dev), or another method"
        )
    mean = sum(scores.values()) / len(scores)
    return {name: scores.get(name, mean) for name in records}


def _losses(outputs: Path) -> dict[str, float]:
    """A teacher's loss on each reference; utterances without a transcript have none, and get equal weights."""
    rows = read_outputs(outputs / OUTPUTS).values()
    return {row.utt_id: row.ctc_loss for row in rows if not math.isnan(row.ctc_loss)}


def _usable_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights, or equal ones if all are 0."""
    if any(weights.values()):
        return dict(weights)
    warn("no teacher recognises a word of the speech that sets the weights: all weigh the same")
    return dict.fromkeys(weights, 1.0)
