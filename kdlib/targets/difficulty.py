"""How difficult utterances are, for a curriculum that begins with the easy ones."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.logits.extract import OUTPUTS, read_outputs
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.tokens import Tokens


def of_speech(
    by: str,
    speech: Sequence[Utterance],
    tokens: Tokens,
    targets: Callable[[], TeacherEnsemble],
    outputs: Callable[[], Sequence[Path]],
) -> dict[str, float]:
    """The difficulty of utterances by a setting of the curriculum; teachers are asked for where it needs them."""
    orders = {
        "length": lambda: by_length(speech, tokens),
        "entropy": lambda: by_entropy(speech, targets()),
        "teacher_loss": lambda: by_loss(speech, outputs()),
        "speaker": lambda: by_speaker(speech, by_loss(speech, outputs())),
    }
    return composite([order() for order in orders.values()]) if by == "composite" else orders[by]()


def by_length(utterances: Sequence[Utterance], tokens: Tokens) -> dict[str, float]:
    """The number of tokens, and of equally long texts the longer recording."""
    return {utt.utt_id: len(tokens.encode(utt.text)) + 1e-4 * utt.duration_s for utt in utterances}


def by_loss(utterances: Sequence[Utterance], outputs: Sequence[Path]) -> dict[str, float]:
    """The teachers' mean CTC loss of the reference, in nats per token; without a reference the mean of all."""
    rows = [read_outputs(folder / OUTPUTS) for folder in outputs]
    found = {}
    for utt in utterances:
        losses = [table[utt.utt_id].ctc_loss for table in rows if utt.utt_id in table]
        known = [min(loss, 1e3) for loss in losses if not np.isnan(loss)]
        found[utt.utt_id] = float(np.mean(known)) if known else np.nan
    middle = float(np.nanmean(list(found.values()))) if found else 0.0
    return {name: middle if np.isnan(value) else value for name, value in found.items()}


def by_speaker(utterances: Sequence[Utterance], losses: Mapping[str, float]) -> dict[str, float]:
    """The mean loss of a speaker's utterances; within a speaker the utterance's own decides."""
    groups: dict[str, list[float]] = defaultdict(list)
    for utt in utterances:
        groups[utt.speaker].append(losses[utt.utt_id])
    means = {speaker: float(np.mean(values)) for speaker, values in groups.items()}
    return {utt.utt_id: means[utt.speaker] + 1e-6 * losses[utt.utt_id] for utt in utterances}


def by_entropy(utterances: Sequence[Utterance], ensemble: TeacherEnsemble) -> dict[str, float]:
    """The mean entropy of the combined teachers' frames, in nats; without their outputs the mean of all."""
    usable = set(ensemble.coverage([utt.utt_id for utt in utterances]).usable)
    found = {}
    for utt in utterances:
        if utt.utt_id in usable:
            log_probs, _ = ensemble.log_probs(Batch([utt]))
            found[utt.utt_id] = float(-(log_probs.exp() * log_probs).sum(-1).mean())
    middle = float(np.mean(list(found.values()))) if found else 0.0
    return {utt.utt_id: found.get(utt.utt_id, middle) for utt in utterances}


def composite(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of the ranks of each utterance in several orders, each from 0 to 1.

    >>> composite([{"a": 1.0, "b": 5.0, "c": 9.0}, {"a": 7.0, "b": 0.1, "c": 8.0}])
    {'a': 0.25, 'b': 0.25, 'c': 1.0}
    """
    names = list(parts[0])
    ranks = [np.argsort(np.argsort([part[name] for name in names], kind="stable")) for part in parts]
    mean = np.mean(ranks, axis=0) / max(1, len(names) - 1)
    return dict(zip(names, map(float, mean), strict=True))
