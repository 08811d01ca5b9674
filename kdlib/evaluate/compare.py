"""Honest comparison: systems in pairs, over any number of speakers (folds) and seeds, with a verdict in words.

Two questions are kept apart. *These speakers*, other recordings of theirs: intervals by bootstrap over utterances
within speakers, a test that flips the signs of paired differences (with one seed and one measure of right or wrong,
McNemar's exact test), Holm's correction over all pairs. *New speakers*: Student's t over the speakers' own differences,
and a test that flips their signs, which with few speakers cannot reach any small p: the smallest is said. All that is
of the models as they were trained. Another training gives another model: where there are several seeds, they are
averaged, and a difference must also stand out from how much it changes from seed to seed.

    python -m kdlib.evaluate.compare hard=DIR mine=DIR theirs=evaluation.json --against hard
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.errors import UserError, nearest
from kdlib.evaluate import predictions
from kdlib.evaluate.score import fold_words
from kdlib.evaluate.statistics import LEVEL, folds_needed, holm, sign_flip_p, training_p
from kdlib.evaluate.verdict import NO_DIFFERENCE, Verdict, verdict_frame, verdict_table

MEASURES = ("wra", "wer")
DRAWS = 2_000  # of the bootstrap
SEVERAL_MICROPHONES = r"^(C?[FM]\d{2}_B\d_\w+)_M[2-8]$"  # UA-Speech's names


def compare(
    systems: Mapping[str, pd.DataFrame],
    *,
    against: str | Mapping[str, str] | None = None,
    measure: str = "wra",
    seed: int = 0,
) -> list[Verdict]:
    """Compare systems in pairs: each with every other, or with `against`: one system, or each one's own.

    A system is a table as `collected` makes it.
    """
    if measure not in MEASURES:
        raise UserError(f"measure: expected one of {', '.join(MEASURES)}, found {measure!r}")
    if len(systems) < 2:
        raise UserError(f"a comparison needs two systems, found {len(systems)}: {', '.join(systems)}")
    pairs = [_Pair(a, b, systems[a], systems[b], measure, seed) for a, b in _pairs(list(systems), against)]
    adjusted = holm([pair.p for pair in pairs])
    for_new = holm([pair.speakers_p for pair in pairs])
    return [pair.verdict(*both, len(pairs)) for pair, *both in zip(pairs, adjusted, for_new, strict=True)]


def collect(
    paths: Sequence[Path],
    decoder: str = "greedy",
    references: Path | None = None,
    *,
    fold_homophones: bool = False,
) -> pd.DataFrame:
    """A system's answers from one file or several: other speakers, or the same ones by other seeds.

    Columns: those of `answers`, and seed, which counts how often an utterance has come before.
    """
    table = pd.concat([predictions.read(path, decoder, references) for path in paths], ignore_index=True)
    table["seed"] = table.groupby("utt_id", sort=False).cumcount()
    for column in ("reference", "speaker"):
        several = table.groupby("utt_id")[column].nunique()
        if (several > 1).any():
            name = several.idxmax()
            values = " and ".join(map(repr, table[column][table.utt_id == name].unique()[:2]))
            raise UserError(
                f"{paths[-1]}: {name} has more than one {column}, {values}; give every recording its own id"
            )
    if fold_homophones:
        for column in ("reference", "hypothesis"):
            table[column] = table[column].map(fold_words)
    return table


class _Pair:
    """Two systems on the utterances that both have heard."""

    def __init__(self, a: str, b: str, left: pd.DataFrame, right: pd.DataFrame, measure: str, seed: int) -> None:
        self.a, self.b, self.measure = a, b, measure
        self.rng = np.random.default_rng(seed)
        both = _shared(a, b, left, right)
        self.speaker = both.speaker.to_numpy()
        told = both.reference.tolist()
        self.size = np.array([len(text.split()) for text in told]) if measure == "wer" else np.ones(len(told))
        self.values = [_measured(table, both.utt_id, told, measure) for table in (left, right)]  # [seeds, utterances]
        self._merge(both.utt_id)
        self.seeds = [len(one) for one in self.values]
        means = [one.mean(0) for one in self.values]
        self.groups = [np.flatnonzero(self.speaker == name) for name in dict.fromkeys(self.speaker)]
        self.shares = np.array([[one[part].sum() / self.size[part].sum() for part in self.groups] for one in means])
        self.by_speaker = self.shares[0] - self.shares[1]
        self.difference = float(self.by_speaker.mean())
        self.parts = np.zeros(len(self.size))  # of the difference, by utterance
        for part in self.groups:
            self.parts[part] = (means[0] - means[1])[part] / self.size[part].sum() / len(self.groups)
        self.p = sign_flip_p(self.parts, self.rng)
        self.speakers_p = sign_flip_p(self.by_speaker, self.rng) if len(self.groups) > 1 else 1.0

    def _merge(self, names: pd.Series) -> None:
        """Take what several microphones recorded for the one utterance that it is."""
        places, utterances = pd.factorize(names.str.replace(SEVERAL_MICROPHONES, r"\1", regex=True))
        if len(utterances) == len(names):
            return
        print(f"{len(names):,} recordings are {len(utterances):,} utterances by several microphones, and count as such")
        self.values = [np.array([np.bincount(places, row) for row in one]) for one in self.values]
        self.size = np.bincount(places, self.size)
        self.speaker = self.speaker[np.unique(places, return_index=True)[1]]

    def verdict(self, holm_p: float, new_p: float, family: int) -> Verdict:
        """What is to be said, `family` being the number of pairs in question."""
        count, runs = len(self.groups), self._runs()
        seeds, seeds_p = len(runs), training_p(runs, 1 / self.size.sum())
        agreeing = int((runs * self.difference > 0).sum())
        these, new = self._these(), self._new()
        good = self.difference > 0 if self.measure == "wra" else self.difference < 0
        sure = holm_p < LEVEL and (seeds == 1 or seeds_p < LEVEL)
        word = ("better" if good else "worse") if sure else NO_DIFFERENCE
        for_new = word if sure and new_p < LEVEL and new[0] * new[1] > 0 else NO_DIFFERENCE
        needed = None if for_new != NO_DIFFERENCE else folds_needed(self.by_speaker, LEVEL / family)
        fixed, broken = self._changed()
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
            for_new,
            needed,
        )

    def _these(self) -> tuple[float, float]:
        """Bootstrap over utterances within speakers. Where no pair parts, what no pair in n can rule out."""
        if not self.parts.any():
            most = 1 - (LEVEL / 2) ** (1 / len(self.parts))
            return -most, most
        a, b = (one.mean(0) for one in self.values)
        total = np.zeros(DRAWS)
        for part in self.groups:
            drawn = self.rng.integers(0, len(part), (DRAWS, len(part)), dtype=np.int32)
            total += (a - b)[part][drawn].sum(1) / self.size[part][drawn].sum(1)
        low, high = np.percentile(total / len(self.groups), [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
        return float(low), float(high)

    def _new(self) -> tuple[float, float]:
        """Student's t over speakers: few of them are the sample, however many utterances each has said."""
        from scipy.stats import t as student

        count = len(self.by_speaker)
        if count < 2 or np.allclose(self.by_speaker, self.by_speaker[0]):  # nothing tells how much speakers differ
            return float("nan"), float("nan")
        reach = student.ppf(1 - LEVEL / 2, count - 1) * self.by_speaker.std(ddof=1) / np.sqrt(count)
        return float(self.difference - reach), float(self.difference + reach)

    def _by_seed(self) -> list[np.ndarray]:
        """Differences by utterance of each seed with its fellow, or with the only one."""
        a, b = self.values
        if len(a) > len(b):
            b = b.mean(0, keepdims=True)
        elif len(b) > len(a):
            a = a.mean(0, keepdims=True)
        count = max(len(a), len(b))
        return [a[min(k, len(a) - 1)] - b[min(k, len(b) - 1)] for k in range(count)]

    def _runs(self) -> np.ndarray:
        """The difference of each seed."""
        return np.array(
            [np.mean([one[part].sum() / self.size[part].sum() for part in self.groups]) for one in self._by_seed()]
        )

    def _changed(self) -> tuple[float, float]:
        """Utterances of which a makes less errors than b, and more, a seed."""
        better = 1 if self.measure == "wra" else -1
        rows = [better * one for one in self._by_seed()]
        return float(np.mean([(one > 0).sum() for one in rows])), float(np.mean([(one < 0).sum() for one in rows]))

    def _mcnemar(self) -> float:
        """McNemar's exact test, on words right or wrong by one seed each."""
        from scipy.stats import binomtest

        if self.measure != "wra" or self.seeds != [1, 1] or self.size.max() > 1:
            return float("nan")
        fixed, broken = map(int, self._changed())
        return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0

    def _wilcoxon(self) -> float:
        from scipy.stats import wilcoxon

        if len(self.by_speaker) < 2 or not self.by_speaker.any():
            return 1.0
        return float(wilcoxon(self.by_speaker).pvalue)


def _pairs(names: list[str], against: str | Mapping[str, str] | None) -> list[tuple[str, str]]:
    if against is None:
        return [(b, a) for a, b in itertools.combinations(names, 2)]
    own = dict.fromkeys(names, against) if isinstance(against, str) else against
    for name in {*own, *own.values()} - set(names):
        raise UserError(f"unknown system {name!r}{nearest(name, names)}")
    return [(name, other) for name, other in own.items() if name != other]


def _shared(a: str, b: str, left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """The utterances of both, once each; a system must have heard them all with all of its seeds."""
    for name, one in ((a, left), (b, right)):
        times = one.groupby("utt_id").size()
        if times.nunique() > 1:
            raise UserError(
                f"{name}: {times.idxmin()} was heard {times.min()} times, {times.idxmax()} {times.max()} times; every "
                "seed must have heard every utterance"
            )
    first, other = (one.drop_duplicates("utt_id").set_index("utt_id") for one in (left, right))
    common = first.index.intersection(other.index)
    if common.empty:
        raise UserError(
            f"{a} and {b} have no utterance in common: {first.index[0]} and {other.index[0]} are ids of theirs"
        )
    if len(common) < max(len(first), len(other)):
        print(f"{a} ({len(first)} utterances) and {b} ({len(other)}) are compared on the {len(common)} of both")
    first, other = first.loc[common].copy(), other.loc[common].copy()
    for one, fellow in ((first, other), (other, first)):
        one["speaker"] = one.speaker.where(one.speaker != "", fellow.speaker)  # a file may not know them
    if len(unlike := common[first.speaker != other.speaker]):
        speakers = " and ".join(repr(one.speaker[unlike[0]]) for one in (first, other))
        raise UserError(f"{a} and {b} name other speakers for {len(unlike)} utterances, first {unlike[0]}: {speakers}")
    if len(unlike := common[first.reference != other.reference]):
        name = unlike[0]
        raise UserError(
            f"{a} and {b} have other references for {len(unlike)} utterances, first {name}: "
            f"{first.reference[name]!r} and {other.reference[name]!r}; they are not of one corpus"
        )
    return first.reset_index()


def _measured(system: pd.DataFrame, order: pd.Series, told: Sequence[str], measure: str) -> np.ndarray:
    """[seeds, utterances]: right (1) or wrong (0), or the number of wrong words."""
    from rapidfuzz.distance import Levenshtein

    rows = []
    for _, part in system.groupby("seed"):
        said = part.set_index("utt_id").hypothesis.reindex(order).tolist()
        if measure == "wra":
            rows.append([float(one == other) for one, other in zip(told, said, strict=True)])
        else:
            rows.append(
                [Levenshtein.distance(one.split(), other.split()) for one, other in zip(told, said, strict=True)]
            )
    return np.array(rows, dtype=float)


def main(arguments: Sequence[str]) -> None:
    """The command: NAME=PATH for each system; a name given twice means further speakers or seeds."""
    parser = argparse.ArgumentParser(description="Compare systems by what they wrote.")
    parser.add_argument("systems", nargs="+", help="NAME=PATH: " + predictions.FORMATS)
    parser.add_argument("--decoder", default="greedy", help="column of hypotheses.csv")
    parser.add_argument("--measure", choices=MEASURES, default="wra")
    parser.add_argument("--against", help="compare with this system only; by default each with every other")
    parser.add_argument("--references", type=Path, help="of plain text files, a line each")
    parser.add_argument("--fold-homophones", action="store_true", help="count TO for TWO, ... as correct")
    parser.add_argument("--out", type=Path, help="a folder for verdicts.csv")
    asked = parser.parse_args(arguments)
    named: dict[str, list[Path]] = {}
    for one in asked.systems:
        name, mark, path = one.partition("=")
        if not mark or not name or not path:
            raise UserError(f"expected NAME=PATH, found {one!r}")
        named.setdefault(name, []).append(Path(path))
    systems = {
        name: collect(paths, asked.decoder, asked.references, fold_homophones=asked.fold_homophones)
        for name, paths in named.items()
    }
    verdicts = compare(systems, against=asked.against, measure=asked.measure)
    print(verdict_table(verdicts).to_string(index=False))
    for one in verdicts:
        print(one.text)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        verdict_frame(verdicts).to_csv(asked.out / "verdicts.csv", index=False)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"\n{error}\n")
