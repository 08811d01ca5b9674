"""A search of settings on the dev speaker of a fold, with Optuna; the held-out speaker is never scored.

Every trial is a student of a variant of its own, `hard+trial-<settings>`: a killed trial continues where it was, and
two processes share one search. What was best is written as a recipe with a variant whose name says of how many.
"""

import argparse
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kdlib.console import report
from kdlib.distill import preflight
from kdlib.errors import DivergedError, UserError
from kdlib.io import atomic_write, repository_root, short_path
from kdlib.models import read_record
from kdlib.params import Params, load
from kdlib.pipeline import Fold
from kdlib.settings.tuning import Range, Tune

HEARTBEAT_S, GRACE_S = 5, 20  # a trial whose process has been silent for so long is taken over
REFUSED = "why"  # of a trial that was not trained to its end


class _BeyondBudgetError(Exception):
    """Two processes began the last run together; this one gives way."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m kdlib tune`."""
    parser.add_argument("recipe", help="whose `tune` names the settings")
    parser.add_argument("held_out", help="the fold, on whose dev speaker is chosen")
    parser.add_argument("--variant", default="", help="by default the recipe's tune.variant")
    parser.add_argument("--runs", type=int, default=0, help="trainings in all, by default the recipe's tune.runs")


def run(options: argparse.Namespace) -> None:
    """Search, and print the runs."""
    search = Search(options.recipe, options.held_out, options.variant, options.runs)
    path = search.run()
    print(search.table().to_string(index=False))
    print(f"written: {short_path(path)}. Next: make ablations RECIPE={short_path(path)}")


class Search:
    """A search over the settings that a recipe names, in one fold."""

    def __init__(self, recipe: str | Path, held_out: str, variant: str = "", runs: int = 0) -> None:
        self.recipe, self.held_out = recipe, held_out
        params = load(recipe, held_out)
        self.settings: Tune = params.tune.model_copy(
            update={"variant": variant or params.tune.variant, "runs": runs or params.tune.runs}
        )
        self.base = Fold.load(recipe, held_out, self.settings.variant)
        if params.ablation.factors:
            raise UserError(f"tune: {recipe} is a set of ablations; name the recipe that it extends")
        if not self.base.params.fold.dev:
            raise UserError(f"tune: the fold {held_out} has no dev speaker to choose on; write fold: {{dev: ...}}")
        if not self.settings.settings:
            raise UserError(
                f"tune: {recipe} names no settings; write for example tune: {{settings: {{student.batch_size: [8, 16, "
                "32], distill.temperature: {low: 1.0, high: 4.0}}}"
            )
        for values in zip(*map(_extremes, self.settings.settings.values()), strict=True):
            self.fold(dict(zip(self.settings.settings, values, strict=True)))  # refuses unknown names before any work

    @property
    def folder(self) -> Path:
        """The folder of the search's records."""
        return self.base.layout.fold / "tuning"

    @cached_property
    def name(self) -> str:
        """Of the variant, and of what is varied: another space is another search."""
        space = {name: _plain(values) for name, values in self.settings.settings.items()}
        base = self.base.params.model_dump(
            mode="json", include={"student", "distill", "aggregation", "teacher", "fold"}
        )
        return f"{self.settings.variant}-{_digest([space, base, self.settings.seed])}"

    @cached_property
    def study(self) -> Any:
        """Optuna's study, in a SQLite file that several processes may use."""
        optuna = _optuna()
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{self.folder / self.settings.variant}.db",
            engine_kwargs={"connect_args": {"timeout": 60}},
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
        pruner = optuna.pruners.MedianPruner(n_startup_trials=self.settings.full_runs, n_warmup_steps=1)
        sampler = optuna.samplers.TPESampler(n_startup_trials=max(4, self.settings.runs // 3))
        return optuna.create_study(
            storage=storage,
            sampler=sampler,
            pruner=pruner,
            study_name=self.name,
            direction="maximize",
            load_if_exists=True,
        )

    def fold(self, values: Mapping[str, Any]) -> Fold:
        """The fold of a trial, whose settings are a variant joined to the base."""
        name = f"trial-{_digest(sorted(values.items()))}"
        overrides = {"variants": {name: self.variant_of(values)}}
        return Fold.load(self.recipe, self.held_out, f"{self.settings.variant}+{name}", overrides=overrides)

    def variant_of(self, values: Mapping[str, Any]) -> dict:
        """Values by dotted name as a recipe writes them; a list is written whole."""
        found: dict = {}
        for name, value in values.items():
            _put(found, name.split("."), value, self.base.params)
        return found

    def run(self) -> Path:
        """Run what is left of the trials; return the recipe that has the best one."""
        state = _optuna().trial.TrialState
        while True:
            _optuna().storages.fail_stale_trials(self.study)
            trials = self.study.get_trials(deepcopy=False)
            done = [trial for trial in trials if trial.state in (state.COMPLETE, state.PRUNED)]
            others = [trial for trial in trials if trial.state == state.RUNNING]
            if len(done) >= self.settings.runs:
                return self.write()
            if len(done) + len(others) >= self.settings.runs:
                report(f"tune: waits for {len(others)} runs of another process, or of a killed one")
                time.sleep(HEARTBEAT_S)
                continue
            self.study.optimize(self._trial, n_trials=1, catch=(_BeyondBudgetError,))

    def _trial(self, trial: Any) -> float:
        optuna, state = _optuna(), _optuna().trial.TrialState
        counted = (state.COMPLETE, state.PRUNED, state.RUNNING)
        earlier = [one for one in self.study.get_trials(deepcopy=False) if one.number < trial.number]
        place = sum(one.state in counted for one in earlier)
        values = {name: _suggest(trial, name, space) for name, space in self.settings.settings.items()}
        if place >= self.settings.runs:  # two processes began the last run together
            raise _BeyondBudgetError
        fold, seed = self.fold(values), self.settings.seed
        shown = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        report(f"tune: run {place + 1} of {self.settings.runs}: {shown}")

        def watch(curves: pd.DataFrame) -> None:
            scores = curves[curves.name == "dev_score"]
            if scores.empty:  # before the first validation
                return
            trial.report(scores.value.max(), len(scores) - 1)
            if trial.should_prune():
                trial.set_user_attr(REFUSED, f"below the median of the other runs after {int(scores.step.max())} steps")
                raise optuna.TrialPruned

        try:
            preflight.require(fold.preflight(seed), fold.params.distill.allow, fold.params.variant)
        except UserError as error:
            trial.set_user_attr(REFUSED, str(error))
            raise optuna.TrialPruned from None
        try:
            return read_record(fold.student(seed, watch=watch))["best_dev_score"]
        except (DivergedError, optuna.TrialPruned) as stopped:
            if isinstance(stopped, DivergedError):
                trial.set_user_attr(REFUSED, str(stopped))
            shutil.rmtree(fold.layout.student(seed).parent)
            raise optuna.TrialPruned from None

    def table(self) -> pd.DataFrame:
        """One row per run: its settings, best dev score in per cent and state, the best first."""
        state = _optuna().trial.TrialState
        rows = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state in (state.COMPLETE, state.PRUNED):
                ended = trial.state == state.COMPLETE
                best = trial.value if ended else max(trial.intermediate_values.values(), default=float("nan"))
                why = "" if ended else trial.user_attrs.get(REFUSED, "")
                values = self._values(trial)
                rows.append({"run": trial.number, **values, "dev_score": best, "ended": ended, "why": why})
        return pd.DataFrame(rows).sort_values(["ended", "dev_score"], ascending=False)

    def _values(self, trial: Any) -> dict[str, Any]:
        """A trial's values by name."""
        lists = {name for name, space in self.settings.settings.items() if not isinstance(space, Range)}
        return {name: json.loads(value) if name in lists else value for name, value in trial.params.items()}

    def write(self) -> Path:
        """Write the table of runs, and the best settings as a set of ablations over the recipe."""
        table = self.table()
        with atomic_write(self.folder / f"{self.settings.variant}.csv") as hidden:
            table.to_csv(hidden, index=False)
        if not table.ended.any():
            raise UserError(f"tune: none of {len(table)} runs ended; see why in {short_path(self.folder)}")
        params, best = self.base.params, self.study.best_trial
        path, count = _recipe_path(self.recipe), len(table)
        stopped, dev = int((~table.ended).sum()), params.fold.dev
        text = (
            f"# The best of {count} runs ({stopped} stopped early) by the dev speaker {dev} of the fold "
            f"{self.held_out}: dev score {100 * best.value:.1f} %\n"
            f"# (greedy WRA less a thousandth of the loss), seed {self.settings.seed}. Compare it with what it began "
            f"with, and both with their controls:\n#   make ablations RECIPE={short_path(path)}\n"
        )
        settings = {
            "extends": Path(self.recipe).name,
            "ablation": {
                "base": self.settings.variant,
                "folds": [self.held_out],
                "factors": {"tuned": {"as_it_was": {}, f"best_of_{count}": self.variant_of(self._values(best))}},
            },
        }
        with atomic_write(path) as hidden:
            hidden.write_text(text + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return path


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("tune needs Optuna, which requirements.lock has: make setup (or pip install optuna)") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
    return optuna


def _suggest(trial: Any, name: str, space: Range | tuple) -> Any:
    if not isinstance(space, Range):
        kept = [json.dumps(value) for value in space]  # Optuna takes numbers and texts alone
        return json.loads(trial.suggest_categorical(name, kept))
    suggest = trial.suggest_int if space.is_whole else trial.suggest_float
    return suggest(name, space.low, space.high, log=space.log)


def _extremes(space: Range | tuple) -> tuple:
    return (space.low, space.high) if isinstance(space, Range) else (space[0], space[-1])


def _plain(space: Range | tuple) -> Any:
    return space.model_dump() if isinstance(space, Range) else list(space)


def _put(found: dict, path: list[str], value: Any, params: Params) -> None:
    """Put a value under a dotted name; the list that it lies in is copied from the recipe."""
    place = next((number for number, part in enumerate(path) if part.isdigit()), None)
    for part in path[:-1] if place is None else path[: place - 1]:
        found = found.setdefault(part, {})
    if place is None:
        found[path[-1]] = value
        return
    whole: Any = params.model_dump(mode="json", exclude_none=True)
    for part in path[:place]:
        whole = whole.get(part) if isinstance(whole, dict) else None
    index = int(path[place])
    if not isinstance(whole, list) or index >= len(whole):
        raise UserError(f"tune: {'.'.join(path)}: {'.'.join(path[:place])} is no list of {index + 1} values")
    rows = found.setdefault(path[place - 1], whole)
    if len(path) == place + 1:
        rows[index] = value
    else:
        _put(rows[index], path[place + 1 :], value, params)


def _recipe_path(recipe: str | Path) -> Path:
    path = Path(recipe)
    path = path if path.is_absolute() else repository_root() / path
    return path.with_name(f"{path.stem}_tuned.yaml")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
