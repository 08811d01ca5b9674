"""A fold's targets: whose stores are opened, which choice combines them, and on whose speech there is a target at all.

The held-out and the dev speaker teach nothing and are no targets; a teacher that heard one of them is refused. Weights
come from the fold's dev speaker, or from the reference of each utterance (CA-MKD, Zhang et al. 2022, weighs teachers by
their loss on the label); the latter are known only where there is a reference.
"""

import math
import warnings
from collections.abc import Mapping
from typing import get_args

from kdlib.corpus import labels, prepare, speakers
from kdlib.errors import UserError
from kdlib.models.vocabulary import vocabulary
from kdlib.params import Params
from kdlib.settings import Aggregation
from kdlib.stage import read_json
from kdlib.teachers import adapt
from kdlib.teachers.ensemble import Choice, Ensemble
from kdlib.teachers.extract import Purpose, opened, said
from kdlib.teachers.scores import scores
from kdlib.teachers.store import LogitStore

CODE = ("teachers/targets.py", "teachers/ensemble.py", "teachers/store.py", "corpus/speakers.py")
METHODS = get_args(Aggregation.model_fields["method"].annotation)


def teachers(params: Params, method: str = "") -> list[str]:
    """Whose teachers a fold averages under a method: all of the fold's, or those of the held-out speaker's level."""
    if params.teacher.backbone == "students":
        return adapt.born_again(params)
    corpus = prepare.load(params)
    names = speakers.teachers(params, corpus)
    if method != "same_level":
        return names
    level = params.model_copy(update={"fold": params.fold.model_copy(update={"teachers": "same_level"})})
    same = speakers.teachers(level, corpus)
    return [name for name in names if name in same] or names


def target(params: Params, method: str | None = None, output: str = "ctc", purpose: Purpose = "training") -> Ensemble:
    """The fold's teachers under a method, by default the recipe's.

    For `training` it speaks of the training speakers alone; for `analysis` of test blocks, and is no target.
    """
    method = method or params.aggregation.method
    names = teachers(params, method)
    _check_labels(params, names)
    tokens, away = vocabulary(params), _away(params)
    stores: dict[str, LogitStore] = {}
    for name in names:
        stores[name] = opened(params, name, purpose, output)
        stores[name].check(tokens=tokens, held_out=away, training=purpose == "training")
    barred = away if purpose == "training" else {}
    if params.hear_held_out:  # without transcripts
        barred = {name: why for name, why in barred.items() if name != params.held_out}
    return Ensemble(stores, choice(params, method, names, purpose), barred)


def choice(params: Params, method: str, names: list[str], purpose: Purpose = "training") -> Choice:
    """A method of the recipe, in terms of an ensemble."""
    known = {"missing": params.aggregation.missing, "at_least": params.aggregation.at_least}
    if method == "weighted_accuracy":
        return Choice(weights=_allowed(accuracies(params, names)), **known)
    if method == "weighted_loss":
        rows = {name: said(params, name, purpose).values() for name in names}
        losses = {
            name: {row.utt_id: row.ctc_loss for row in some if not math.isnan(row.ctc_loss)}
            for name, some in rows.items()
        }  # where there is no transcript all weigh the same
        return Choice(losses=losses, **known)
    if method == "best":
        found = _allowed(accuracies(params, names))
        best = max(names, key=lambda name: (found[name], name))
        return Choice(weights={name: float(name == best) for name in names}, **known)
    if method in ("logprob_mean", "same_level"):
        return Choice(**known)
    if method in ("prob_mean", "own"):
        return Choice(mean="prob_mean" if method == "prob_mean" else "logprob_mean", own=method == "own", **known)
    raise UserError(f"aggregation: unknown method {method!r}; expected one of {', '.join(METHODS)}")


def accuracies(params: Params, names: list[str]) -> dict[str, float]:
    """Greedy CTC accuracy of teachers on the fold's dev speaker; without one, on their own dev blocks."""
    if params.fold.dev is None:
        records = {name: read_json(adapt.teacher(params, name) / "model.json") for name in names}
        known = {name: max(0.0, one["best_dev_score"]) for name, one in records.items() if "best_dev_score" in one}
        mean = sum(known.values()) / max(1, len(known))  # for those that have no dev block
        return {name: known.get(name, mean) for name in names}
    found = {}
    for name in names:
        result = read_json(scores(params, name) / "scores.json")
        found[name] = result["decoders"]["greedy"]["by"]["speaker"][params.fold.dev]["wra"]
    return found


def _check_labels(params: Params, names: list[str]) -> None:
    """A teacher may not have seen a transcript that the student is denied."""
    for name in names:
        known = read_json(adapt.teacher(params, name) / "model.json").get("labels")
        if why := labels.leaks(known, params):
            raise UserError(
                f"teacher {name} {why}: it would leak the others; name teachers of the same label_fraction, label_by "
                "and seed"
            )


def _allowed(weights: Mapping[str, float]) -> dict[str, float]:
    if any(weights.values()):
        return dict(weights)
    warnings.warn("no teacher recognises a word of what the choice is made on: all weigh the same", stacklevel=2)
    return dict.fromkeys(weights, 1.0)


def _away(params: Params) -> dict[str, str]:
    """Speakers on whose speech there is no target, and why."""
    found = {params.held_out: "is held out"}
    return found | ({params.fold.dev: "is the dev speaker"} if params.fold.dev else {})
