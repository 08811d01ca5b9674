"""A fold's targets: whose stores are opened, which choice combines them, and on whose speech there is a target at all.

The held-out and the dev speaker teach nothing and are no targets; a teacher that heard one of them is refused, and one
that saw a transcript which the student is denied. Weights come from the fold's dev speaker, from how alike speakers
sound, or from the reference of each utterance (CA-MKD, Zhang et al. 2022, weighs teachers by their loss on the label),
where there is one.
"""

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

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
from kdlib.targets.aggregation import FUSIONS, TeacherEnsemble, Weighting
from kdlib.targets.similarity import SIMILARITY_CODE, similarity_weights
from kdlib.teachers.adapt import speaker_teacher
from kdlib.teachers.teacher_sets import teaching_students
from kdlib.teachers.training import TEACHER_CODE
from kdlib.training.sampling import set_aside

if TYPE_CHECKING:
    import torch

CHOICE_CODE = ("targets/choice.py", "targets/aggregation.py", "logits/store.py", "corpus/speakers.py")
CHOICE_CODE += ("targets/fusion.py", "objectives/reference_losses.py", *SIMILARITY_CODE)
METHODS = tuple(name for name in get_args(Aggregation.model_fields["method"].annotation) if name != "auto")


def target_teachers(params: Params, method: str = "") -> list[str]:
    """Whose teachers a fold averages under a method: all of the fold's, or those of the held-out speaker's level."""
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
    """The fold's teachers under a method, by default the recipe's.

    For `training` it speaks of the training speakers alone; for `analysis` of test blocks, and is no target.
    """
    method = method or params.aggregation.method
    if method in FUSIONS and output != "ctc":
        raise UserError(
            f"aggregation.method {method!r} is learnt of CTC outputs, and says nothing of a decoder's; name another "
            "for distill: {heads: decoder}"
        )
    names = target_teachers(params, method)
    return _teacher_ensemble(params, names, weighting(params, method, names, purpose), output, purpose)


def _teacher_ensemble(
    params: Params, names: list[str], chosen: Weighting, output: str, purpose: Purpose
) -> TeacherEnsemble:
    """Checked stores under a choice."""
    _check_labels(params, names)
    tokens, away = load_tokens(params), _held_out_speakers(params)
    stores: dict[str, LogitStore] = {}
    for name in names:
        stores[name] = open_store(params, name, purpose, output)
        stores[name].check(tokens=tokens, held_out=away, training=purpose == "training")
    excluded = away if purpose == "training" else {}
    if params.use_unlabelled_held_out:  # without transcripts
        excluded = {name: why for name, why in excluded.items() if name != params.held_out}
    return TeacherEnsemble(stores, chosen, excluded)


def weighting(
    params: Params, method: str, names: list[str], purpose: Purpose = "training", half: int | None = None
) -> Weighting:
    """A method of the recipe, in terms of an ensemble; what it takes from dev speech, from one half of it alone."""
    if method in METHODS and method not in methods(params):
        raise UserError(
            f"aggregation.method {method!r} asks who speaks, but students of all speakers teach here; expected one of "
            f"{', '.join(methods(params))}"
        )
    known = {"missing": params.aggregation.missing, "min_teachers": params.aggregation.min_teachers}
    if method == "weighted_accuracy":
        return Weighting(weights=_usable_weights(accuracies(params, names, half)), **known)
    if method == "weighted_loss":
        rows = {name: teacher_outputs(params, name, purpose).values() for name in names}
        losses = {
            name: {row.utt_id: row.ctc_loss for row in some if not math.isnan(row.ctc_loss)}
            for name, some in rows.items()
        }  # where there is no transcript all weigh the same
        return Weighting(losses=losses, **known)
    if method == "weighted_similarity":
        return Weighting(by_speaker=similarity_weights(params, names), **known)
    if method == "best":
        found = _usable_weights(accuracies(params, names, half))
        best = max(names, key=lambda name: (found[name], name))
        return Weighting(weights={name: float(name == best) for name in names}, **known)
    if method in FUSIONS:
        return Weighting(fusion=_fusion(params, method, names, half), **known)
    if method in ("logprob_mean", "same_level"):
        return Weighting(**known)
    if method in ("prob_mean", "own"):
        return Weighting(mean="prob_mean" if method == "prob_mean" else "logprob_mean", own=method == "own", **known)
    if method == "auto":
        raise UserError("aggregation.method is 'auto': ask `aggregates.decided` for the method that it comes to")
    raise UserError(f"aggregation: unknown method {method!r}; expected one of {', '.join(METHODS)}")


def methods(params: Params) -> list[str]:
    """The ways of combining that a recipe's teachers allow: students have no voice of their own."""
    if params.teacher.backbone != "students":
        return list(METHODS)
    return [name for name in METHODS if name not in ("own", "same_level", "weighted_similarity")]


class CrossFitted:
    """A method on the dev speaker, each half of whose speech is judged by what was learnt on the other."""

    def __init__(self, params: Params, method: str) -> None:
        names = target_teachers(params, method)
        self.halves = [
            _teacher_ensemble(params, names, weighting(params, method, names, "analysis", 1 - half), "ctc", "analysis")
            for half in (0, 1)
        ]
        self.stores = self.halves[0].stores
        self.coverage = self.halves[0].coverage

    def log_probs(self, utt_ids: Sequence[str], speakers: Sequence[str]) -> "tuple[torch.Tensor, torch.Tensor]":
        """The target of a batch [B, T, V], and frames [B]."""
        import torch

        frames = self.halves[0].frames(utt_ids)
        found: list[torch.Tensor | None] = [None] * len(utt_ids)
        for half, ensemble in enumerate(self.halves):
            if places := [place for place, one in enumerate(utt_ids) if half_of(one) == half]:
                asked = [utt_ids[place] for place in places], [speakers[place] for place in places]
                rows, lengths = ensemble.log_probs(*asked, [frames[place] for place in places])
                for place, row, length in zip(places, rows, lengths.tolist(), strict=True):
                    found[place] = row[:length]
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True), torch.tensor(frames)


def half_of(utt_id: str) -> int:
    """Which half of the dev speech an utterance belongs to."""
    return zlib.crc32(utt_id.encode()) % 2


def accuracies(params: Params, names: list[str], half: int | None = None) -> dict[str, float]:
    """Greedy CTC accuracy of teachers on the fold's dev speaker; without one, on their own dev blocks."""
    if params.fold.dev is None:
        records = {name: read_record(speaker_teacher(params, name)) for name in names}
        known = {name: max(0.0, one["best_dev_score"]) for name, one in records.items() if "best_dev_score" in one}
        mean = sum(known.values()) / max(1, len(known))  # for those that have no dev block
        return {name: known.get(name, mean) for name in names}
    found = {}
    for name in names:
        rows = [
            row
            for row in score.read_hypotheses(teacher_scores(params, name) / "hypotheses.csv")
            if row.speaker == params.fold.dev and half in (None, half_of(row.utt_id))
        ]
        found[name] = sum(row.greedy == row.reference for row in rows) / max(1, len(rows))
    return found


def _fusion(params: Params, kind: str, names: list[str], half: int | None) -> "torch.nn.Module":
    """A fusion trained on the dev speaker's test blocks, or on one half of them; without one, on speech set aside."""
    import torch
    from safetensors.torch import load_file, save_file

    from kdlib.targets import fusion

    purpose = "analysis" if params.fold.dev else "training"
    parts, steps = {None: "whole", 0: "half0", 1: "half1"}, params.aggregation.fusion_steps

    def build(partial: Path) -> None:
        ensemble = _teacher_ensemble(params, names, Weighting(missing="all"), "ctc", purpose)
        splits = speakers.split(prepare.load(params), params)
        apart = splits.dev or set_aside(splits.train, params.teacher.dev_share, params.seed).dev
        learnt = [utt for utt in apart if ensemble.coverage([utt.utt_id]).usable]
        for part, name in parts.items():
            some = [utt for utt in learnt if part in (None, half_of(utt.utt_id))]
            made = fusion.fit_fusion(kind, ensemble, some, load_tokens(params), params.seed, steps)
            save_file(
                {key: one.contiguous() for key, one in made.state_dict().items()}, partial / f"{name}.safetensors"
            )

    folder = produce(
        params.label_folder / "fusion" / params.teacher.teacher_set / kind,
        build,
        what=f"fusion by {kind}",
        parameters={"fold": params.fold.model_dump(mode="json"), "held_out": params.held_out, "teachers": names}
        | {"steps": steps},
        inputs=[prepare.corpus_folder(params), *(extract.extract(params, name, purpose) for name in names)],
        seed=params.seed,
        code=(*CHOICE_CODE, *TEACHER_CODE, "corpus/labels.py"),
    )
    made = fusion.new_fusion(kind, _teacher_ensemble(params, names, Weighting(missing="all"), "ctc", purpose))
    made.load_state_dict(load_file(folder / f"{parts[half]}.safetensors"))
    with torch.no_grad():
        return made.eval().requires_grad_(False)


def _check_labels(params: Params, names: list[str]) -> None:
    """A teacher may not have seen a transcript that the student is denied."""
    for name in names:
        known = read_record(speaker_teacher(params, name)).get("labels")
        if why := labels.leaks(known, params):
            raise UserError(
                f"teacher {name} {why}: it would leak the others; name teachers of the same label_fraction, label_by "
                "and seed"
            )


def _usable_weights(weights: Mapping[str, float]) -> dict[str, float]:
    if any(weights.values()):
        return dict(weights)
    warnings.warn("no teacher recognises a word of what the choice is made on: all weigh the same", stacklevel=2)
    return dict.fromkeys(weights, 1.0)


def _held_out_speakers(params: Params) -> dict[str, str]:
    """Speakers on whose speech there is no target, and why."""
    found = {params.held_out: "is held out"}
    return found | ({params.fold.dev: "is the dev speaker"} if params.fold.dev else {})
