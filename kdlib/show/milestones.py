"""What a recipe expects of its trainings: on the curves, in a table, and what to try where it is missed."""

import math
from collections.abc import Sequence

import pandas as pd

from kdlib.evaluate import ablations, milestones
from kdlib.evaluate.milestones import Outcome, missed
from kdlib.io import read_json
from kdlib.models import read_record
from kdlib.objectives import terms
from kdlib.pipeline import Fold
from kdlib.settings.milestone import Milestone
from kdlib.show import advice
from kdlib.training.curves import TENSORBOARD, read_curves

__all__ = ["missed"]


def of_recipe(fold: Fold, of: str = "student") -> list[Milestone]:
    """The milestones that hold in this fold."""
    held_out = fold.params.held_out
    return [one for one in fold.params.milestones if one.of == of and one.held_out in (None, held_out)]


class DevMilestones:
    """The milestones of a student's dev curve; call it with curves for the outcomes so far."""

    def __init__(self, fold: Fold) -> None:
        self.milestones = [one for one in of_recipe(fold) if one.speech == "dev"]
        self.epoch_steps = epoch_steps(fold) if any(one.after_epochs for one in self.milestones) else 1

    def __call__(self, curves: pd.DataFrame) -> list[Outcome]:
        """The outcome of every milestone."""
        return [milestones.on_curve(one, curves, self.epoch_steps) for one in self.milestones]


def epoch_steps(fold: Fold) -> int:
    """Steps in an epoch of a student's training."""
    from kdlib.distill.students import batch_plan

    return batch_plan(fold.params.student, fold.student_data()).epoch_steps


def student_outcomes(fold: Fold, seed: int) -> list[Outcome]:
    """The outcomes of a trained and scored student."""
    wanted = of_recipe(fold)
    if not wanted:
        return []
    scores = read_json(fold.scores(seed) / "scores.json")
    on_test = [milestones.on_scores(one, scores) for one in wanted if one.speech == "test"]
    return DevMilestones(fold)(read_curves(fold.student(seed) / TENSORBOARD)) + on_test


def teacher_outcomes(fold: Fold, names: Sequence[str]) -> dict[str, list[Outcome]]:
    """The outcomes of the base model and of teachers, each on the speech that was set aside from its training."""
    training = fold.params.teacher
    folders = {name: (fold.teacher(name), "teacher", training.adapt) for name in names}
    if base := fold.base_model():
        folders = {"base model": (base, "base_model", training.base_training)} | folders
    found = {}
    for name, (folder, kind, schedule) in folders.items():
        if (wanted := of_recipe(fold, kind)) and (folder / TENSORBOARD).is_dir():
            steps = math.ceil(read_record(folder)["train_utterances"] / schedule.batch_size)
            curves = read_curves(folder / TENSORBOARD)
            found[name] = [milestones.on_curve(one, curves, steps) for one in wanted]
    return found


def student_advice(fold: Fold, seed: int) -> pd.DataFrame:
    """What to try where a student falls short: by its dev curve, and by its teachers on the same speech."""
    curves = read_curves(fold.student(seed) / TENSORBOARD)
    taught = terms.uses_teachers(fold.params.distill)
    up, _ = ablations.rise(curves, fold.params.scoring.measure)
    rules = advice.STILL_RISING if up > 0 else advice.NOT_IMPROVING
    if taught and (combined := fold.combined_teachers()):
        mine, theirs = (
            read_json(path / "scores.json")["decoders"]["greedy"]["wra"] for path in (fold.scores(seed), combined)
        )
        rules += advice.BELOW_TEACHERS if mine < theirs - 0.01 else ()
    return _table(advice.advise(fold.params, *rules, taught=taught))


def teacher_advice(fold: Fold) -> pd.DataFrame:
    """What to try where teachers fall short."""
    return _table(advice.advise(fold.params, *advice.SLOW_TEACHER))


def outcome_table(outcomes: dict[str, list[Outcome]]) -> pd.DataFrame:
    """One row per training and milestone, in per cent."""
    rows = [
        {
            "training": name,
            "milestone": outcome.milestone.name,
            "when": outcome.milestone.when,
            "speech": f"{outcome.milestone.speech}, {outcome.milestone.decoder}",
            "expected": outcome.milestone.expects,
            "reached": "" if outcome.value is None else f"{outcome.value:.1f} %",
            "status": outcome.status,
        }
        for name, found in outcomes.items()
        for outcome in found
    ]
    return pd.DataFrame(rows)


def _table(found: Sequence[advice.Advice]) -> pd.DataFrame:
    rows = [(one.setting, one.now, one.value, one.why, one.measured) for one in found]
    return pd.DataFrame(rows, columns=["setting", "now", "to try", "because", "measured here"])
