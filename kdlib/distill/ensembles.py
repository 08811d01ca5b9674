"""A fold's ensembles: several of its students, or several checkpoints of one, scored as one system.

A recipe defines them (`ensembles:`). Their members must be trained already. Scores lie in
`<held-out>/ensembles/<name>/`, next to the students and with the same files.
"""

from collections.abc import Sequence
from pathlib import Path

from kdlib.corpus import prepare
from kdlib.distill.setup import checkpoint_file
from kdlib.distill.student_scores import SCORE_CODE, score_settings, score_trained
from kdlib.errors import UserError, nearest
from kdlib.models import read_record
from kdlib.models.averaging import EnsembleSystem
from kdlib.params import Params
from kdlib.settings import EnsembleMembers
from kdlib.stage import produce

CODE = ("distill/ensembles.py", "models/averaging.py", *SCORE_CODE)


def ensemble_scores(params: Params, name: str) -> Path:
    """Score an ensemble; return the folder of its hypotheses and scores."""
    settings = _settings(params, name)
    members = find_members(params, settings)
    params = _with_members_labels(params, name, members)

    def build(partial: Path) -> None:
        system = EnsembleSystem(members, settings.average)
        if leaked := {params.held_out, params.fold.dev} & set(system.record["train_speakers"]):
            raise UserError(
                f"ensembles.{name}: a member was trained on {leaked.pop()}, which this fold excludes from training"
            )
        score_trained(partial, params, system, f"ensemble {name}", f"ensembles/{name}")

    return produce(
        ensemble_folder(params, name),
        build,
        what=f"ensemble {name}",
        parameters=score_settings(params) | {"labels": params.labels} | {"group": settings.model_dump(mode="json")},
        inputs=[prepare.corpus_folder(params), *dict.fromkeys(folder for folder, _ in members)],
        code=CODE,
    )


def _with_members_labels(params: Params, name: str, members: Sequence[tuple[Path, str]]) -> Params:
    """The recipe with the members' labels, which determine the language model and the unseen words."""
    records = [read_record(folder).get("labels", {"fraction": 1.0}) for folder, _ in members]
    first, *rest = [{key: value for key, value in labels.items() if key != "unlabelled_speakers"} for labels in records]
    if any(labels != first for labels in rest):
        raise UserError(f"ensembles.{name}: its members were trained with different labels; use one ensemble for each")
    return params.model_copy(update={"label_fraction": first["fraction"], "label_by": first.get("by", "utterance")})


def ensemble_folder(params: Params, name: str) -> Path:
    """The folder of an ensemble."""
    return params.fold_folder / "ensembles" / name


def find_members(params: Params, settings: EnsembleMembers) -> list[tuple[Path, str]]:
    """The members' folders and weight files."""
    members = []
    for variant in settings.variants:
        for seed in settings.seeds:
            folder = params.fold_folder / "students" / variant / f"seed{seed}"
            if not (folder / "model.json").is_file():
                raise UserError(
                    f"ensembles: there is no student {variant!r} of seed {seed} in {folder}; train it first: "
                    f"make compare HELD_OUT={params.held_out} VARIANTS={variant} SEEDS={seed}"
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


def _settings(params: Params, name: str) -> EnsembleMembers:
    if name not in params.ensembles:
        hint = nearest(name, list(params.ensembles)) if params.ensembles else "; the recipe names none"
        raise UserError(f"ensembles: unknown ensemble {name!r}{hint}")
    return params.ensembles[name]
