"""A fold's ensembles: several of its students, or several checkpoints of one, scored as one system.

A recipe defines them (`ensembles:`). Their members must be trained already. Scores lie in
`<held-out>/ensembles/<name>/`, next to the students and with the same files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from kdlib.distill.student_scores import StudentScoring, score_student
from kdlib.errors import UserError
from kdlib.models import read_record
from kdlib.models.averaging import EnsembleSystem, Member, checkpoint_file
from kdlib.settings.student import EnsembleMembers


def score_ensemble(partial: Path, name: str, system: EnsembleSystem, how: StudentScoring) -> None:
    """Score an ensemble."""
    if leaked := set(how.splits.settings.excluded_speakers) & set(system.record["train_speakers"]):
        raise UserError(
            f"ensembles.{name}: a member was trained on {leaked.pop()}, which this fold excludes from training"
        )
    score_student(partial, system, f"ensemble {name}", f"ensembles/{name}", how)


def members_labels(name: str, members: Sequence[Member]) -> dict:
    """The members' labels, which determine the language model and the unseen words, as settings of a recipe."""
    records = [read_record(folder).get("labels", {"fraction": 1.0}) for folder, _ in members]
    first, *rest = [{key: value for key, value in labels.items() if key != "unlabelled_speakers"} for labels in records]
    if any(labels != first for labels in rest):
        raise UserError(f"ensembles.{name}: its members were trained with different labels; use one ensemble for each")
    return {"label_fraction": first["fraction"], "label_by": first.get("by", "utterance")}


def find_members(student: Callable[[str, int], Path], held_out: str, settings: EnsembleMembers) -> list[Member]:
    """The members' folders and weight files; `student` gives the folder of a variant and seed."""
    members = []
    for variant in settings.variants:
        for seed in settings.seeds:
            folder = student(variant, seed)
            if not (folder / "model.json").is_file():
                raise UserError(
                    f"ensembles: there is no student {variant!r} of seed {seed} in {folder}; train it first: "
                    f"make compare HELD_OUT={held_out} VARIANTS={variant} SEEDS={seed}"
                )
            files = [checkpoint_file(rank) for rank in range(1, settings.checkpoints + 1)]
            if settings.checkpoints == 1:
                files = ["model.safetensors"]
            kept = len(read_record(folder).get("checkpoints", [0]))
            if kept < settings.checkpoints:
                raise UserError(
                    f"ensembles: {folder} has {kept} checkpoints, {settings.checkpoints} are needed; train it with "
                    f"student: {{keep_checkpoints: {settings.checkpoints}}} and at least as many validations"
                )
            members += [(folder, file) for file in files]
    if len(members) < 2:
        raise UserError("ensembles: a single student is no ensemble; name more variants, seeds or checkpoints")
    return members
