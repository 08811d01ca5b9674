"""A fold's ensembles: several of its students, or several checkpoints of one, as one more system to score.

A recipe names them (`ensembles:`). Their members must have been trained; scored they lie in
`<held-out>/ensembles/<name>/`, beside the students and with the same files.
"""

from collections.abc import Sequence
from pathlib import Path

from kdlib.corpus import prepare
from kdlib.distill.setup import checkpoint_file
from kdlib.distill.student_scores import SCORE_CODE, score_settings, score_trained
from kdlib.errors import UserError, nearest
from kdlib.models import read_record
from kdlib.params import Params
from kdlib.settings import EnsembleMembers
from kdlib.stage import produce

CODE = ("distill/ensembles.py", "models/averaging.py", *SCORE_CODE)


def ensemble_scores(params: Params, name: str) -> Path:
    """The folder of an ensemble's hypotheses and scores."""
    group = _group(params, name)
    members = find_members(params, group)
    params = _with_members_labels(params, name, members)

    def build(partial: Path) -> None:
        from kdlib.models.averaging import EnsembleSystem

        one = EnsembleSystem(members, group.average)
        if leaked := {params.held_out, params.fold.dev} & set(one.record["train_speakers"]):
            raise UserError(f"ensembles.{name}: a member has heard {leaked.pop()}, who may not be heard in this fold")
        score_trained(partial, params, one, f"ensemble {name}", f"ensembles/{name}")

    return produce(
        ensemble_folder(params, name),
        build,
        what=f"ensemble {name}",
        parameters=score_settings(params) | {"labels": params.labels} | {"group": group.model_dump(mode="json")},
        inputs=[prepare.corpus_folder(params), *dict.fromkeys(folder for folder, _ in members)],
        code=CODE,
    )


def _with_members_labels(params: Params, name: str, members: Sequence[tuple[Path, str]]) -> Params:
    """The recipe with the labels that the members were given: their language model and their unseen words are those."""
    known = [read_record(folder).get("labels", {"fraction": 1.0}) for folder, _ in members]
    drawn = [{what: one for what, one in record.items() if what != "unlabelled_speakers"} for record in known]
    if any(one != drawn[0] for one in drawn):
        raise UserError(f"ensembles.{name}: its members were given other labels than each other; name them apart")
    told = {"label_fraction": drawn[0]["fraction"], "label_by": drawn[0].get("by", "utterance")}
    return params.model_copy(update=told)


def ensemble_folder(params: Params, name: str) -> Path:
    """The folder of an ensemble."""
    return params.fold_folder / "ensembles" / name


def find_members(params: Params, group: EnsembleMembers) -> list[tuple[Path, str]]:
    """The members' folders and files of weights."""
    members = []
    for variant in group.variants:
        for seed in group.seeds:
            folder = params.fold_folder / "students" / variant / f"seed{seed}"
            if not (folder / "model.json").is_file():
                raise UserError(
                    f"ensembles: there is no student {variant!r} of seed {seed} in {folder}; train it first: "
                    f"make compare HELD_OUT={params.held_out} VARIANTS={variant} SEEDS={seed}"
                )
            files = [checkpoint_file(rank) for rank in range(1, group.checkpoints + 1)]
            if group.checkpoints == 1:
                files = ["model.safetensors"]
            there = len(read_record(folder).get("checkpoints", [0]))
            if there < group.checkpoints:
                raise UserError(
                    f"ensembles: {folder} keeps {there} of its looks, {group.checkpoints} are asked for; train it "
                    f"with student: {{keep_checkpoints: {group.checkpoints}}} and with as many looks"
                )
            members += [(folder, file) for file in files]
    if len(members) < 2:
        raise UserError("ensembles: one student alone is none; name more variants, seeds or checkpoints")
    return members


def _group(params: Params, name: str) -> EnsembleMembers:
    if name not in params.ensembles:
        hint = nearest(name, list(params.ensembles)) if params.ensembles else "; the recipe names none"
        raise UserError(f"ensembles: unknown ensemble {name!r}{hint}")
    return params.ensembles[name]
