"""The students of a set of ablations: which they are, their hypotheses, and the dev curves of their controls."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluate import ablations, compare
from kdlib.evaluate.ablations import Curve
from kdlib.io import read_json
from kdlib.models import read_record
from kdlib.params import load_recipe
from kdlib.pipeline import Fold
from kdlib.training.curves import read_curves


@dataclass(frozen=True)
class Study:
    """A set of ablations whose students are scored."""

    folds: Sequence[Fold]

    @classmethod
    def load(cls, recipe: str | Path, held_out: Sequence[str] = ()) -> "Study":
        """A recipe with a set, on its own folds or on others."""
        first = Fold.load(recipe, held_out[0] if held_out else folds_of(recipe)[0])
        names = held_out or first.params.ablation.folds
        return cls([Fold.load(recipe, name) for name in names])

    @property
    def ablation(self):
        """What is varied."""
        return self.folds[0].params.ablation

    @property
    def about(self) -> str:
        """The size of the set in a line."""
        names, seeds = ", ".join(fold.params.held_out for fold in self.folds), ", ".join(map(str, self.seeds))
        return f"{len(self.ablation.cells)} cells, base {self.ablation.base}, folds {names}, seeds {seeds}"

    @cached_property
    def control(self) -> dict[str, str]:
        """By cell: its control."""
        first = self.folds[0]
        return {cell.variant: first.of(cell.variant).params.distill.control for cell in self.ablation.cells}

    @property
    def variants(self) -> list[str]:
        """All students of the set: controls and cells."""
        return list(dict.fromkeys([*self.control.values(), *self.control]))

    @cached_property
    def curves(self) -> list[Curve]:
        """How far the dev curves of the controls still rise."""
        found = []
        for fold in self.folds:
            count = len(fold.splits.dev)
            for name in dict.fromkeys(self.control.values()):
                for seed in fold.params.seeds:
                    folder = fold.layout.student(seed, name)
                    up, best = ablations.rise(read_curves(folder / "tensorboard"), self.measure)
                    held_out, steps = fold.params.held_out, read_record(folder)["steps"]
                    found.append(Curve(name, held_out, seed, up, count, best, steps))
        return found

    def systems(self, decoder: str) -> dict[str, pd.DataFrame]:
        """The hypotheses of every student by a decoder, over folds and seeds."""
        found = {}
        for name in self.variants:
            paths = [fold.layout.student_scores(seed, name) for seed in self.seeds for fold in self.folds]
            for path in paths:
                if not (path / "scores.json").is_file():
                    raise UserError(f"ablations: no scores in {path}; train the set first: make ablations SET=...")
            if all(decoder in read_json(path / "scores.json")["decoders"] for path in paths):
                found[name] = compare.collect(paths, decoder)
        ablations.check_same_utterances(found)
        return found

    @property
    def out(self) -> Path:
        """The folder of the set's tables and figures."""
        return self.folds[0].layout.recipe / "ablations"

    def has(self, decoder: str) -> bool:
        """True if any cell was scored by a decoder."""
        first = self.folds[0]
        folders = [first.layout.student_scores(self.seeds[0], name) for name in self.variants]
        known = [folder for folder in folders if (folder / "scores.json").is_file()]
        return not known or any(decoder in read_json(folder / "scores.json")["decoders"] for folder in known)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every student."""
        return self.folds[0].params.seeds

    @property
    def measure(self) -> str:
        """WRA, or WER of sentences."""
        return self.folds[0].params.scoring.measure


def folds_of(recipe: str | Path) -> Sequence[str]:
    """The held-out speakers that a set names."""
    folds = load_recipe(recipe).ablation.folds
    if not folds:
        raise UserError(f"{recipe}: ablation.folds names no held-out speaker; write ablation: {{folds: [M08, M05]}}")
    return folds
