"""n-gram language models from training text, as ARPA files.

They are estimated by `lmplz` (Heafield et al. 2013) if it is installed, else by the estimator below, which follows the
same definitions: interpolated modified Kneser-Ney (Chen & Goodman 1998), continuation counts in the lower orders, and
unigrams interpolated with the uniform distribution. Texts too small for its discounts get lmplz's own fallback.
"""

import itertools
import math
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import UserError
from kdlib.io import atomic_write

ARPA = "lm.arpa"  # the file of a language model

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
FALLBACK = (
    0.5,
    1.0,
    1.5,
)  # lmplz's discounts of counts 1, 2, 3 and more, for texts too small to estimate them
Gram = tuple[str, ...]


@dataclass(frozen=True)
class NGrams:
    """An n-gram model: log10 probabilities, and log10 back-off weights of contexts."""

    order: int
    logprobs: dict[Gram, float]
    backoffs: dict[Gram, float]

    @property
    def words(self) -> list[str]:
        """All possible next words: the vocabulary, the end of the text, and the unknown word."""
        return sorted(gram[0] for gram in self.logprobs if len(gram) == 1 and gram[0] != BEGIN)

    def logprob(self, word: str, context: Sequence[str] = ()) -> float:
        """log10 P(word | context); an unknown word is `<unk>`."""
        *history, word = (entry if (entry,) in self.logprobs else UNKNOWN for entry in (*context, word))
        return self._logprob(word, tuple(history[-(self.order - 1) :]) if self.order > 1 else ())

    def _logprob(self, word: str, context: Gram) -> float:
        if (*context, word) in self.logprobs:
            return self.logprobs[*context, word]
        return self.backoffs.get(context, 0.0) + self._logprob(word, context[1:])


def estimate(texts: Iterable[str], order: int = 3) -> NGrams:
    """Estimate an interpolated modified Kneser-Ney model, equal to lmplz's without pruning."""
    counts = _counts(texts, order)
    adjusted = [_continuations(counts[size - 1], counts[size]) for size in range(1, order)] + [counts[order - 1]]
    del adjusted[0][(BEGIN,)]
    uniform = 1 / (len(adjusted[0]) + 1)  # over the words, the end of the text and the unknown word
    probs: dict[Gram, float] = {(): uniform}
    weights: dict[Gram, float] = {}
    last = _last(counts)
    for size, level in enumerate(adjusted, start=1):
        occurring = Counter(level.values())
        if last[-size:] in level and size < order:  # lmplz uses the raw count of the n-gram that it reads last
            occurring[level[last[-size:]]] -= 1
            occurring[counts[size - 1][last[-size:]]] += 1
        discounts = _discounts(occurring)
        sums: defaultdict[Gram, float] = defaultdict(float)
        freed: defaultdict[Gram, float] = defaultdict(float)  # discounted mass, for lower orders
        for gram, count in level.items():
            sums[gram[:-1]] += count
            freed[gram[:-1]] += discounts[min(count, 3) - 1]
        for gram, count in level.items():
            context = gram[:-1]
            discounted = (count - discounts[min(count, 3) - 1]) / sums[context]
            probs[gram] = discounted + freed[context] / sums[context] * probs[gram[1:]]
        weights |= {context: freed[context] / sums[context] for context in sums}
    probs[UNKNOWN,] = weights[()] * uniform
    probs[BEGIN,] = 1.0  # never queried
    logprobs = {gram: math.log10(prob) for gram, prob in probs.items() if gram}
    return NGrams(order, logprobs, {gram: math.log10(max(weight, 1e-99)) for gram, weight in weights.items() if gram})


def write(model: NGrams, path: Path) -> None:
    """Write an ARPA file."""
    levels = [sorted(gram for gram in model.logprobs if len(gram) == size) for size in range(1, model.order + 1)]
    with atomic_write(path) as hidden, hidden.open("w", encoding="utf-8") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {size}={len(grams)}\n" for size, grams in enumerate(levels, start=1))
        for size, grams in enumerate(levels, start=1):
            file.write(f"\n\\{size}-grams:\n")
            for gram in grams:
                backoff = f"\t{model.backoffs.get(gram, 0.0):.7g}" if size < model.order else ""
                file.write(f"{model.logprobs[gram]:.7g}\t{' '.join(gram)}{backoff}\n")
        file.write("\n\\end\\\n")


def read(path: Path) -> NGrams:
    """Read an ARPA file."""
    logprobs: dict[Gram, float] = {}
    backoffs: dict[Gram, float] = {}
    order = 0
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        for line in lines:
            if line.endswith("-grams:"):
                order = int(line[1 : line.index("-")])
            elif order and line and not line.startswith("\\"):
                prob, gram, *backoff = line.split("\t")
                logprobs[tuple(gram.split(" "))] = _finite(prob)
                if backoff:
                    backoffs[tuple(gram.split(" "))] = _finite(backoff[0])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not an ARPA file ({error}); name one written by lmplz or kdlib") from None
    if not logprobs:
        raise UserError(f"{path}: not an ARPA file (no n-grams in it); name one written by lmplz or kdlib")
    return NGrams(order, logprobs, backoffs)


def _finite(text: str) -> float:
    """A number of an ARPA file; log10 of 0 may be written as -inf."""
    value = float(text)
    if math.isnan(value) or value == math.inf:
        raise ValueError(f"{text!r} is no log-probability")
    return value


def build(texts: Sequence[str], order: int, path: Path) -> str:
    """Estimate a model and write it to an ARPA file; return the estimator: "lmplz" or "kdlib"."""
    if not any(text.split() for text in texts):
        raise UserError("language model: no text to estimate it from; check fold.train and blocks")
    program = shutil.which("lmplz")
    if program is None:
        write(estimate(texts, order), path)
        return "kdlib"
    command = [program, "-o", str(order), "-S", "20%", "-T", str(path.parent), "--discount_fallback"]
    with atomic_write(path) as hidden:
        command += ["--arpa", str(hidden)]
        run = subprocess.run(command, input="\n".join(texts) + "\n", text=True, capture_output=True, check=False)
        if run.returncode:
            raise UserError(f"language model: lmplz failed: {run.stderr.strip()[-300:] or run.returncode}")
    return "lmplz"


def _counts(texts: Iterable[str], order: int) -> list[Counter[Gram]]:
    """Count the n-grams of each size; texts begin and end with their marks."""
    counts: list[Counter[Gram]] = [Counter() for _ in range(order)]
    for text in texts:
        words = [BEGIN, *(word for word in text.split(" ") if word), END]  # other white space may be part of a word
        if marks := {BEGIN, END, UNKNOWN} & set(words[1:-1]):
            raise UserError(f"language model: the text {text!r} contains the mark {marks.pop()}; remove it")
        for size in range(1, order + 1):
            counts[size - 1].update(zip(*(words[start:] for start in range(size)), strict=False))
    return counts


def _continuations(counts: Counter[Gram], longer: Counter[Gram]) -> dict[Gram, int]:
    """Count the distinct words before each n-gram; the beginning of a text has none, and keeps its count."""
    before = Counter(gram[1:] for gram in longer)
    return {gram: count if gram[0] == BEGIN else before[gram] for gram, count in counts.items()}


def _last(counts: Sequence[Counter[Gram]]) -> Gram:
    """The n-gram that lmplz reads last: the greatest when read backwards, words in order of first occurrence."""
    place = {gram[0]: index for index, gram in enumerate(counts[0])}
    place[END], place[BEGIN] = -1, -2
    complete = (gram for level in counts for gram in level if len(gram) == len(counts) or gram[0] == BEGIN)
    return max(complete, key=lambda gram: [place[word] for word in reversed(gram)])


def _discounts(occurring: Counter[int]) -> tuple[float, float, float]:
    """Discounts of counts of 1, 2, and 3 or more (Chen & Goodman 1998, eq. 26), from the counts of counts."""
    ones, twos, threes, fours = (occurring[count] for count in (1, 2, 3, 4))
    if not all((ones, twos, threes)):
        return FALLBACK
    share = ones / (ones + 2 * twos)
    discounts = tuple(
        size - (size + 1) * share * larger / smaller
        for size, (smaller, larger) in enumerate(itertools.pairwise((ones, twos, threes, fours)), start=1)
    )
    return discounts if all(0 <= value <= size for size, value in enumerate(discounts, start=1)) else FALLBACK
