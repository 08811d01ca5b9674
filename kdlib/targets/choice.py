"""A fold's targets: the stores that are opened, the weighting that combines them, and the speech that has a target.

The held-out and the dev speaker's speech has no training target; a teacher trained on either speaker is refused, and so
is one trained on a transcript that the student is without. Weights come from the fold's dev speaker, from the acoustic
similarity of speakers, or from the reference of each utterance, if there is one (CA-MKD, Zhang et al. 2022, weights
teachers by their loss on the label).
"""

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file, save_file

from kdlib.corpus import labels, prepare, speakers
from kdlib.errors import UserError
from kdlib.evaluate import score
from kdlib.logits import extract
from kdlib.logits.extract import Purpose, open_store, teacher_outputs
from kdlib.logits.store import LogitStore
from kdlib.logits.teacher_scores import teacher_scores
from kdlib.models import read_record
from kdlib.params import Params
from kdlib.pretrained.pieces import load_tokens
from kdlib.settings import Aggregation
from kdlib.stage import produce
from kdlib.targets import fusion
from kdlib.targets.aggregation import FUSIONS, TeacherEnsemble, Weighting
from kdlib.targets.similarity import SIMILARITY_CODE, similarity_weights
from kdlib.teachers.adapt import speaker_teacher
from kdlib.teachers.teacher_sets import teaching_students
from kdlib.teachers.training import TEACHER_CODE
from kdlib.training.sampling import set_aside

CHOICE_CODE = ("targets/choice.py", "targets/aggregation.py", "logits/store.py", "corpus/speakers.py")
CHOICE_CODE += ("targets/fusion.py", "objectives/reference_losses.py", *SIMILARITY_CODE)
METHODS = tuple(name for name in get_args(Aggregation.model_fields["method"].annotation) if name != "auto")


def target_teachers(params: Params, method: str = "") -> list[str]:
    """The teachers that a fold averages under a method: all of the fold's, or those of the held-out speaker's level."""
    if params.teacher.backbone == "students":
        return teaching_students(params)
    corpus = prepare.load(params)
    names = speakers.fold_teachers(params, corpus)
    if method != "same_level":
        return names
    level = params.model_copy(update={"fold": params.fold.model_copy(update={"teachers": "same_level"})})
    same = speakers.fold_teachers(level, corpus)
    return [name for name in names if name in same] or names


def load_target(
    params: Params, method: str | None = None, output: str = "ctc", purpose: Purpose = "training"
) -> TeacherEnsemble:
    """Open the fold's teachers under a method, by default the recipe's.

    For `training`: targets on the training speakers only. For `analysis`: outputs on test blocks, no training target.
    """
    method = method or params.aggregation.method
    if method in FUSIONS and output != "ctc":
        raise UserError(
            f"aggregation.method {method!r} is trained on CTC outputs and cannot combine a decoder's; name another for "
            "distill: {heads: decoder}"
        )
    names = target_teachers(params, method)
    return _teacher_ensemble(params, names, weighting(params, method, names, purpose), output, purpose)


def _teacher_ensemble(
    params: Params, names: list[str], chosen: Weighting, output: str, purpose: Purpose
) -> TeacherEnsemble:
    """Open and check the stores, and combine them under a weighting."""
    _check_labels(params, names)
    tokens, excluded = load_tokens(params), _speakers_without_target(params)
    stores: dict[str, LogitStore] = {}
    for name in names:
        stores[name] = open_store(params, name, purpose, output)
        stores[name].check(tokens=tokens, held_out=excluded, training=purpose == "training")
    if purpose != "training":
        excluded = {}
    elif params.use_unlabelled_held_out:  # without transcripts
        excluded = {name: why for name, why in excluded.items() if name != params.held_out}
    return TeacherEnsemble(stores, chosen, excluded)


def weighting(
    params: Params, method: str, names: list[str], purpose: Purpose = "training", half: int | None = None
) -> Weighting:
    """The weighting of a recipe's method; what is estimated on dev speech can be restricted to one half of it."""
    if method in METHODS and method not in methods(params):
        raise UserError(
            f"aggregation.method {method!r} needs teachers of single speakers, but the teachers here are students of "
            f"all speakers; expected one of {', '.join(methods(params))}"
        )
    common = {"missing": params.aggregation.missing, "min_teachers": params.aggregation.min_teachers}
    if method == "weighted_accuracy":
        return Weighting(weights=_usable_weights(accuracies(params, names, half)), **common)
    if method == "weighted_loss":
        losses = {}
        for name in names:  # utterances without a transcript have no loss: equal weights
            rows = teacher_outputs(params, name, purpose).values()
            losses[name] = {row.utt_id: row.ctc_loss for row in rows if not math.isnan(row.ctc_loss)}
        return Weighting(losses=losses, **common)
    if method == "weighted_similarity":
        return Weighting(by_speaker=similarity_weights(params, names), **common)
    if method == "best":
        weights = _usable_weights(accuracies(params, names, half))
        best = max(names, key=lambda name: (weights[name], name))
        return Weighting(weights={name: float(name == best) for name in names}, **common)
    if method in FUSIONS:
        return Weighting(fusion=_trained_fusion(params, method, names, half), **common)
    if method in ("logprob_mean", "same_level"):
        return Weighting(**common)
    if method in ("prob_mean", "own"):
        return Weighting(mean="prob_mean" if method == "prob_mean" else "logprob_mean", own=method == "own", **common)
    if method == "auto":
        raise UserError("aggregation.method is 'auto': `target_report.best_method` gives the method that it selects")
    raise UserError(f"aggregation: unknown method {method!r}; expected one of {', '.join(METHODS)}")


def methods(params: Params) -> list[str]:
    """The methods that a recipe's teachers allow: students as teachers belong to no single speaker."""
    if params.teacher.backbone != "students":
        return list(METHODS)
    return [name for name in METHODS if name not in ("own", "same_level", "weighted_similarity")]


class CrossFitted:
    """A method cross-fitted on the dev speaker: each half of the speech gets what was estimated on the other half."""

    def __init__(self, params: Params, method: str) -> None:
        names = target_teachers(params, method)
        self.halves = [
            _teacher_ensemble(params, names, weighting(params, method, names, "analysis", 1 - half), "ctc", "analysis")
            for half in (0, 1)
        ]
        self.stores = self.halves[0].stores
        self.coverage = self.halves[0].coverage

    def log_probs(self, utt_ids: Sequence[str], speakers: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The target of a batch [B, T, V], and frames [B]."""
        frames = self.halves[0].frames(utt_ids)
        targets: list[torch.Tensor | None] = [None] * len(utt_ids)
        for half, ensemble in enumerate(self.halves):
            if places := [place for place, utt_id in enumerate(utt_ids) if half_of(utt_id) == half]:
                batch = [[values[place] for place in places] for values in (utt_ids, speakers, frames)]
                rows, lengths = ensemble.log_probs(*batch)
                for place, row, length in zip(places, rows, lengths.tolist(), strict=True):
                    targets[place] = row[:length]
        return torch.nn.utils.rnn.pad_sequence(targets, batch_first=True), torch.tensor(frames)


def half_of(utt_id: str) -> int:
    """The half of the dev speech that an utterance belongs to, 0 or 1."""
    return zlib.crc32(utt_id.encode()) % 2


def accuracies(params: Params, names: list[str], half: int | None = None) -> dict[str, float]:
    """Greedy CTC accuracy of teachers on the fold's dev speaker; without one, on their own dev blocks."""
    if params.fold.dev is None:
        records = {name: read_record(speaker_teacher(params, name)) for name in names}
        scores = {
            name: max(0.0, record["best_dev_score"]) for name, record in records.items() if "best_dev_score" in record
        }
        mean = sum(scores.values()) / max(1, len(scores))  # for those without a dev block
        return {name: scores.get(name, mean) for name in names}
    scores = {}
    for name in names:
        rows = [
            row
            for row in score.read_hypotheses(teacher_scores(params, name) / "hypotheses.csv")
            if row.speaker == params.fold.dev and half in (None, half_of(row.utt_id))
        ]
        scores[name] = sum(row.greedy == row.reference for row in rows) / max(1, len(rows))
    return scores


def _trained_fusion(params: Params, kind: str, names: list[str], half: int | None) -> torch.nn.Module:
    """A fusion trained on the dev speaker's test blocks, or half of them; without dev speaker, on set-aside speech."""
    purpose = "analysis" if params.fold.dev else "training"
    parts, steps = {None: "whole", 0: "half0", 1: "half1"}, params.aggregation.fusion_steps

    def build(partial: Path) -> None:
        ensemble = _teacher_ensemble(params, names, Weighting(missing="all"), "ctc", purpose)
        splits = speakers.split(prepare.load(params), params)
        dev = splits.dev or set_aside(splits.train, params.teacher.dev_share, params.seed).dev
        usable = [utt for utt in dev if ensemble.coverage([utt.utt_id]).usable]
        for part, name in parts.items():
            utterances = [utt for utt in usable if part in (None, half_of(utt.utt_id))]
            trained = fusion.fit_fusion(kind, ensemble, utterances, load_tokens(params), params.seed, steps)
            weights = {key: weight.contiguous() for key, weight in trained.state_dict().items()}
            save_file(weights, partial / f"{name}.safetensors")

    folder = produce(
        params.label_folder / "fusion" / params.teacher.teacher_set / kind,
        build,
        what=f"learned fusion ({kind})",
        parameters={"fold": params.fold.model_dump(mode="json"), "held_out": params.held_out, "teachers": names}
        | {"steps": steps},
        inputs=[prepare.corpus_folder(params), *(extract.extract(params, name, purpose) for name in names)],
        seed=params.seed,
        code=(*CHOICE_CODE, *TEACHER_CODE, "corpus/labels.py"),
    )
    model = fusion.new_fusion(kind, _teacher_ensemble(params, names, Weighting(missing="all"), "ctc", purpose))
    model.load_state_dict(load_file(folder / f"{parts[half]}.safetensors"))
    with torch.no_grad():
        return model.eval().requires_grad_(False)


def _check_labels(params: Params, names: list[str]) -> None:
    """Refuse a teacher trained on a transcript that the student is without."""
    for name in names:
        if why := labels.leaks(read_record(speaker_teacher(params, name)).get("labels"), params):
            raise UserError(
                f"teacher {name} {why}: it would leak the other transcripts; name teachers of the same label_fraction, "
                "label_by and seed"
            )


def _usable_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights, or equal ones if all are 0."""
    if any(weights.values()):
        return dict(weights)
    warnings.warn("no teacher recognises a word of the speech that sets the weights: all weigh the same", stacklevel=2)
    return dict.fromkeys(weights, 1.0)


def _speakers_without_target(params: Params) -> dict[str, str]:
    """The speakers whose speech has no training target, and why."""
    excluded = {params.held_out: "is held out"}
    return excluded | ({params.fold.dev: "is the dev speaker"} if params.fold.dev else {})
