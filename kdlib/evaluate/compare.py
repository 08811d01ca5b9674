"""Compare systems in pairs, over any number of speakers (folds) and seeds, with a verdict in words.

Two questions are separated. *These speakers*, other recordings of theirs: bootstrap intervals over utterances within
speakers, a test that flips the signs of paired differences (with one seed and words right or wrong, McNemar's exact
test), and Holm's correction over all pairs. *New speakers*: Student's t over the speakers' own differences, and a
sign-flip test over speakers, which with few of them cannot reach any small p; the smallest possible p is reported. All
of this holds for the models as trained. Another training gives another model: with several seeds, the seeds are
averaged, and a difference must also stand out from its variation between seeds.

    python -m kdlib verdict hard=DIR kd=DIR original=evaluation.json --against hard
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.errors import UserError, nearest
from kdlib.evaluate import predictions
from kdlib.evaluate.normalisers import NORMALISERS
from kdlib.evaluate.statistics import LEVEL, folds_needed, holm, sign_flip_p, sign_p, training_p
from kdlib.evaluate.verdict import NO_DIFFERENCE, Verdict, verdict_frame

MEASURES, UNITS = ("wra", "wer"), ("utterance", "word")
DRAWS = 2_000  # of the bootstrap
SEVERAL_MICROPHONES = r"^(C?[FM]\d{2}_B\d_\w+)_M[2-8]$"  # UA-Speech's names


def compare(
    systems: Mapping[str, pd.DataFrame],
    *,
    against: str | Mapping[str, str] | None = None,
    measure: str = "wra",
    unit: str = "utterance",
    seed: int = 0,
) -> list[Verdict]:
    """Compare systems in pairs: each with every other, or with `against`: one system, or one for each.

    A system is a table from `collect`. With the unit "word" all recordings of a word by a speaker are drawn together:
    a model that knows a word knows it in most of them, so that many repetitions are no independent evidence.
    """
    if measure not in MEASURES:
        raise UserError(f"measure: expected one of {', '.join(MEASURES)}, found {measure!r}")
    if unit not in UNITS:
        raise UserError(f"unit: expected one of {', '.join(UNITS)}, found {unit!r}")
    if len(systems) < 2:
        raise UserError(f"a comparison needs two systems, found {len(systems)}: {', '.join(systems)}")
    pairs = [_Pair(a, b, systems[a], systems[b], measure, unit, seed) for a, b in _pairs(list(systems), against)]
    adjusted = holm([pair.p for pair in pairs])
    speakers_adjusted = holm([pair.speakers_p for pair in pairs])
    return [pair.verdict(*ps, len(pairs)) for pair, *ps in zip(pairs, adjusted, speakers_adjusted, strict=True)]


def collect(
    paths: Sequence[Path],
    decoder: str = "greedy",
    references: Path | None = None,
    *,
    normaliser: str = "none",
    columns: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Read a system's hypotheses from files or folders of files: of further speakers, or further seeds of the same.

    Columns: those of `predictions.read`, and seed: how many earlier rows have the same utterance.
    """
    files = [file for path in paths for file in predictions.result_files(path, decoder)]
    read = [predictions.read(file, decoder, references, columns=columns) for file in files]
    table = pd.concat(read, ignore_index=True)
    table["seed"] = table.groupby("utt_id", sort=False).cumcount()
    for column in ("reference", "speaker"):
        counts = table.groupby("utt_id")[column].nunique()
        if (counts > 1).any():
            name = counts.idxmax()
            values = " and ".join(map(repr, table[column][table.utt_id == name].unique()[:2]))
            raise UserError(
                f"{paths[-1]}: {name} has more than one {column}, {values}; give every recording its own id"
            )
    if normaliser != "none":
        for column in ("reference", "hypothesis"):
            table[column] = table[column].map(NORMALISERS[normaliser])
    return table


class _Pair:
    """Two systems on the utterances that they share."""

    def __init__(
        self, a: str, b: str, left: pd.DataFrame, right: pd.DataFrame, measure: str, unit: str, seed: int
    ) -> None:
        self.a, self.b, self.measure = a, b, measure
        self.rng = np.random.default_rng(seed)
        shared = _shared_utterances(a, b, left, right)
        self.speaker = shared.speaker.to_numpy()
        refs = shared.reference.tolist()
        self.size = np.array([len(text.split()) for text in refs]) if measure == "wer" else np.ones(len(refs))
        self.values = [_measure(table, shared.utt_id, refs, measure) for table in (left, right)]  # [seeds, utterances]
        if unit == "word":
            self._merge(shared.speaker + "\t" + shared.reference)
        else:
            self._merge_microphones(shared.utt_id)
        self.seeds = [len(values) for values in self.values]
        means = [values.mean(0) for values in self.values]
        self.groups = [np.flatnonzero(self.speaker == name) for name in dict.fromkeys(self.speaker)]
        self.shares = np.array([[row[group].sum() / self.size[group].sum() for group in self.groups] for row in means])
        self.by_speaker = self.shares[0] - self.shares[1]
        self.difference = float(self.by_speaker.mean())
        self.parts = np.zeros(len(self.size))  # of the difference, by utterance
        for group in self.groups:
            self.parts[group] = (means[0] - means[1])[group] / self.size[group].sum() / len(self.groups)
        self.p = sign_flip_p(self.parts, self.rng)
        self.speakers_p = sign_flip_p(self.by_speaker, self.rng) if len(self.groups) > 1 else 1.0

    def _merge_microphones(self, names: pd.Series) -> None:
        """Count the recordings of one utterance by several microphones as one utterance."""
        if count := self._merge(names.str.replace(SEVERAL_MICROPHONES, r"\1", regex=True)):
            print(f"{len(names):,} recordings by several microphones are counted as {count:,} utterances")

    def _merge(self, names: pd.Series) -> int:
        """Count the utterances of one name as one; returned is the number of names, 0 if all are different."""
        places, different = pd.factorize(names)
        if len(different) == len(names):
            return 0
        self.values = [np.array([np.bincount(places, row) for row in values]) for values in self.values]
        self.size = np.bincount(places, self.size)
        self.speaker = self.speaker[np.unique(places, return_index=True)[1]]
        return len(different)

    def verdict(self, holm_p: float, new_p: float, family: int) -> Verdict:
        """The verdict, from p-values corrected over a family of pairs."""
        count, runs = len(self.groups), self._by_run()
        seeds, seeds_p = len(runs), training_p(runs, 1 / self.size.sum())
        agreeing = int((runs * self.difference > 0).sum())
        these, new = self._these_interval(), self._new_interval()
        good = self.difference > 0 if self.measure == "wra" else self.difference < 0
        shown = holm_p < LEVEL and (seeds == 1 or seeds_p < LEVEL)
        word = ("better" if good else "worse") if shown else NO_DIFFERENCE
        new_word = word if shown and new_p < LEVEL and new[0] * new[1] > 0 else NO_DIFFERENCE
        folds = None if new_word != NO_DIFFERENCE else folds_needed(self.by_speaker, LEVEL / family)
        fixed, broken = self._fixed_and_broken()
        return Verdict(
            self.a,
            self.b,
            self.measure,
            *(float(row.mean()) for row in self.shares),
            self.difference,
            *these,
            *new,
            len(self.speaker),
            count,
            seeds,
            agreeing,
            seeds_p,
            fixed,
            broken,
            self.p,
            holm_p,
            self._mcnemar(),
            new_p,
            self._wilcoxon(),
            2.0 ** (1 - count),
            word,
            new_word,
            folds,
        )

    def _these_interval(self) -> tuple[float, float]:
        """Bootstrap over utterances within speakers. If no pair differs: the shares that n pairs cannot rule out."""
        if not self.parts.any():
            most = 1 - (LEVEL / 2) ** (1 / len(self.parts))
            return -most, most
        a, b = (values.mean(0) for values in self.values)
        total = np.zeros(DRAWS)
        for group in self.groups:
            drawn = self.rng.integers(0, len(group), (DRAWS, len(group)), dtype=np.int32)
            total += (a - b)[group][drawn].sum(1) / self.size[group][drawn].sum(1)
        low, high = np.percentile(total / len(self.groups), [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
        return float(low), float(high)

    def _new_interval(self) -> tuple[float, float]:
        """Student's t over speakers: they are the sample, however many utterances each has."""
        from scipy.stats import t as student

        count = len(self.by_speaker)
        if count < 2 or np.allclose(self.by_speaker, self.by_speaker[0]):  # the spread of speakers is unknown
            return float("nan"), float("nan")
        margin = student.ppf(1 - LEVEL / 2, count - 1) * self.by_speaker.std(ddof=1) / np.sqrt(count)
        most = 1.0 if self.measure == "wra" else np.inf  # shares differ by no more
        return float(max(self.difference - margin, -most)), float(min(self.difference + margin, most))

    def _by_seed(self) -> list[np.ndarray]:
        """Differences by utterance: seeds in pairs; where one system has more, each against the other's mean."""
        a, b = self.values
        if len(a) > len(b):
            b = b.mean(0, keepdims=True)
        elif len(b) > len(a):
            a = a.mean(0, keepdims=True)
        count = max(len(a), len(b))
        return [a[min(k, len(a) - 1)] - b[min(k, len(b) - 1)] for k in range(count)]

    def _by_run(self) -> np.ndarray:
        """The difference of each seed."""
        return np.array(
            [np.mean([row[group].sum() / self.size[group].sum() for group in self.groups]) for row in self._by_seed()]
        )

    def _fixed_and_broken(self) -> tuple[float, float]:
        """Utterances in which a makes fewer errors than b, and more, per seed."""
        sign = 1 if self.measure == "wra" else -1
        rows = [sign * row for row in self._by_seed()]
        return float(np.mean([(row > 0).sum() for row in rows])), float(np.mean([(row < 0).sum() for row in rows]))

    def _mcnemar(self) -> float:
        """McNemar's exact test, on words right or wrong with one seed each."""
        if self.measure != "wra" or self.seeds != [1, 1] or self.size.max() > 1:
            return float("nan")
        return sign_p(*map(int, self._fixed_and_broken()))

    def _wilcoxon(self) -> float:
        from scipy.stats import wilcoxon

        if len(self.by_speaker) < 2 or not self.by_speaker.any():
            return 1.0
        return float(wilcoxon(self.by_speaker).pvalue)


def _pairs(names: list[str], against: str | Mapping[str, str] | None) -> list[tuple[str, str]]:
    if against is None:
        return [(b, a) for a, b in itertools.combinations(names, 2)]
    controls = dict.fromkeys(names, against) if isinstance(against, str) else against
    for name in {*controls, *controls.values()} - set(names):
        raise UserError(f"unknown system {name!r}{nearest(name, names)}")
    return [(name, control) for name, control in controls.items() if name != control]


def _shared_utterances(a: str, b: str, left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """The utterances of both systems, one row each; every seed of a system must have all of its utterances."""
    for name, table in ((a, left), (b, right)):
        counts = table.groupby("utt_id").size()
        if counts.nunique() > 1:
            raise UserError(
                f"{name}: {counts.idxmin()} has {counts.min()} hypotheses, {counts.idxmax()} has {counts.max()}; every "
                "seed must have a hypothesis for every utterance"
            )
    left, right = (table.drop_duplicates("utt_id").set_index("utt_id") for table in (left, right))
    common = left.index.intersection(right.index)
    if common.empty:
        raise UserError(
            f"{a} and {b} have no utterance in common; their ids are like {left.index[0]} and {right.index[0]}"
        )
    if len(common) < max(len(left), len(right)):
        print(f"{a} ({len(left)} utterances) and {b} ({len(right)}) are compared on the {len(common)} in common")
    left, right = left.loc[common].copy(), right.loc[common].copy()
    for table, fallback in ((left, right), (right, left)):
        table["speaker"] = table.speaker.where(table.speaker != "", fallback.speaker)  # a file may not name them
    if len(differing := common[left.speaker != right.speaker]):
        speakers = " and ".join(repr(table.speaker[differing[0]]) for table in (left, right))
        raise UserError(
            f"{a} and {b} have different speakers for {len(differing)} utterances, first {differing[0]}: {speakers}"
        )
    if len(differing := common[left.reference != right.reference]):
        name = differing[0]
        raise UserError(
            f"{a} and {b} have different references for {len(differing)} utterances, first {name}: "
            f"{left.reference[name]!r} and {right.reference[name]!r}; they are not of one corpus"
        )
    return left.reset_index()


def _measure(system: pd.DataFrame, order: pd.Series, refs: Sequence[str], measure: str) -> np.ndarray:
    """[seeds, utterances]: right (1) or wrong (0), or the number of wrong words."""
    from rapidfuzz.distance import Levenshtein

    rows = []
    for _, part in system.groupby("seed"):
        pairs = zip(refs, part.set_index("utt_id").hypothesis.reindex(order).tolist(), strict=True)
        if measure == "wra":
            rows.append([float(ref == hyp) for ref, hyp in pairs])
        else:
            rows.append([Levenshtein.distance(ref.split(), hyp.split()) for ref, hyp in pairs])
    return np.array(rows, dtype=float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("systems", nargs="+", help="NAME=PATH: " + predictions.FORMATS)
    parser.add_argument("--decoder", default="greedy", help="column of hypotheses.csv")
    parser.add_argument("--measure", choices=MEASURES, default="wra")
    parser.add_argument(
        "--unit", choices=UNITS, default="utterance", help="word: a speaker's recordings of it together"
    )
    parser.add_argument("--against", help="compare with this system only; by default each with every other")
    parser.add_argument("--references", type=Path, help="references of plain text files, one per line")
    parser.add_argument("--columns", default="", help="of a table: id=...,reference=...,hypothesis=...,speaker=...")
    parser.add_argument("--normaliser", choices=NORMALISERS, default="none", help="what counts as the same text")
    parser.add_argument("--out", type=Path, help="a folder for verdicts.csv")


def compare_files(options: argparse.Namespace) -> list[Verdict]:
    """Compare the systems of the command: NAME=PATH; a name that is repeated adds speakers or seeds."""
    paths: dict[str, list[Path]] = {}
    for system in options.systems:
        name, mark, path = system.partition("=")
        if not mark and Path(system).is_dir() and not predictions.is_single(Path(system), options.decoder):
            for folder in sorted(one for one in Path(system).iterdir() if one.is_dir()):
                paths[folder.name] = [folder]  # a system each
        elif not mark or not name or not path:
            raise UserError(f"expected NAME=PATH, or a folder with a folder for each system, found {system!r}")
        else:
            paths.setdefault(name, []).append(Path(path))
    columns = predictions.named_columns(options.columns)
    systems = {
        name: collect(files, options.decoder, options.references, normaliser=options.normaliser, columns=columns)
        for name, files in paths.items()
    }
    verdicts = compare(systems, against=options.against, measure=options.measure, unit=options.unit)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        verdict_frame(verdicts).to_csv(options.out / "verdicts.csv", index=False)
    return verdicts
