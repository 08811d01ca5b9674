"""n-gram language models from training text, as ARPA files.

`lmplz` (Heafield et al. 2013) estimates them where it is installed; else the estimator here, which follows the same
definitions: interpolated modified Kneser-Ney (Chen & Goodman 1998), lower orders of continuation counts, unigrams
interpolated with the uniform distribution. Texts too small for its discounts get lmplz's own fallback.
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

CODE = ("decode/lm.py",)
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
FALLBACK = (0.5, 1.0, 1.5)  # lmplz's discounts of counts 1, 2, 3 and more, where a text is too small for its own
Gram = tuple[str, ...]


@dataclass(frozen=True)
class NGrams:
    """An n-gram model: log10 probabilities, and log10 back-off weights of contexts."""

    order: int
    logprobs: dict[Gram, float]
    backoffs: dict[Gram, float]

    @property
    def words(self) -> list[str]:
        """Everything that can follow: the words, the end of the text, and the unknown word."""
        return sorted(gram[0] for gram in self.logprobs if len(gram) == 1 and gram[0] != BEGIN)

    def logprob(self, word: str, context: Sequence[str] = ()) -> float:
        """log10 P(word | context); an unknown word is `<unk>`."""
        known = word if (word,) in self.logprobs else UNKNOWN
        kept = tuple(one if (one,) in self.logprobs else UNKNOWN for one in context)[-(self.order - 1) :]
        return self._logprob(known, kept if self.order > 1 else ())

    def _logprob(self, word: str, context: Gram) -> float:
        if (*context, word) in self.logprobs:
            return self.logprobs[*context, word]
        return self.backoffs.get(context, 0.0) + self._logprob(word, context[1:])


def estimate(texts: Iterable[str], order: int = 3) -> NGrams:
    """Interpolated modified Kneser-Ney, as lmplz estimates it without pruning."""
    counts = _counts(texts, order)
    adjusted = [_continuations(counts[size - 1], counts[size]) for size in range(1, order)] + [counts[order - 1]]
    del adjusted[0][(BEGIN,)]
    uniform = 1 / (len(adjusted[0]) + 1)  # over the words, the end of the text and the unknown word
    probs: dict[Gram, float] = {(): uniform}
    weights: dict[Gram, float] = {}
    last = _last(counts)
    for size, level in enumerate(adjusted, start=1):
        occurring = Counter(level.values())
        if last[-size:] in level and size < order:  # lmplz takes what it reads last by its plain count here
            occurring[level[last[-size:]]] -= 1
            occurring[counts[size - 1][last[-size:]]] += 1
        discounts = _discounts(occurring)
        sums: defaultdict[Gram, float] = defaultdict(float)
        freed: defaultdict[Gram, float] = defaultdict(float)  # by discounting, for lower orders
        for gram, count in level.items():
            sums[gram[:-1]] += count
            freed[gram[:-1]] += discounts[min(count, 3) - 1]
        for gram, count in level.items():
            context = gram[:-1]
            own = (count - discounts[min(count, 3) - 1]) / sums[context]
            probs[gram] = own + freed[context] / sums[context] * probs[gram[1:]]
        weights |= {context: freed[context] / sums[context] for context in sums}
    probs[UNKNOWN,] = weights[()] * uniform
    probs[BEGIN,] = 1.0  # never asked for
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
                logprobs[tuple(gram.split(" "))] = float(prob)
                if backoff:
                    backoffs[tuple(gram.split(" "))] = float(backoff[0])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not an ARPA file ({error}); name one that lmplz or kdlib has written") from None
    if not logprobs:
        raise UserError(f"{path}: not an ARPA file (no n-grams in it); name one that lmplz or kdlib has written")
    return NGrams(order, logprobs, backoffs)


def build(texts: Sequence[str], order: int, path: Path) -> str:
    """Estimate a model and write it to an ARPA file; return who estimated it: "lmplz" or "kdlib"."""
    if not any(text.split() for text in texts):
        raise UserError("language model: there is no text to estimate it from; look at fold.train and blocks")
    program = shutil.which("lmplz")
    if program is None:
        write(estimate(texts, order), path)
        return "kdlib"
    command = [program, "-o", str(order), "-S", "20%", "-T", str(path.parent), "--discount_fallback"]
    with atomic_write(path) as hidden:
        ended = subprocess.run(
            [*command, "--arpa", str(hidden)],
            input="\n".join(texts) + "\n",
            text=True,
            capture_output=True,
            check=False,
        )
        if ended.returncode:
            raise UserError(f"language model: lmplz failed: {ended.stderr.strip()[-300:] or ended.returncode}")
    return "lmplz"


def _counts(texts: Iterable[str], order: int) -> list[Counter[Gram]]:
    """How often each n-gram occurs, by its size; texts begin and end with their marks."""
    counts: list[Counter[Gram]] = [Counter() for _ in range(order)]
    for text in texts:
        words = [BEGIN, *(word for word in text.split(" ") if word), END]  # other white space may be part of a word
        if marks := {BEGIN, END, UNKNOWN} & set(words[1:-1]):
            raise UserError(f"language model: the text {text!r} holds the mark {marks.pop()}; remove it")
        for size in range(1, order + 1):
            counts[size - 1].update(zip(*(words[start:] for start in range(size)), strict=False))
    return counts


def _continuations(counts: Counter[Gram], longer: Counter[Gram]) -> dict[Gram, int]:
    """Of each n-gram how many different words stand before it; nothing can stand before the beginning of a text."""
    before = Counter(gram[1:] for gram in longer)
    return {gram: count if gram[0] == BEGIN else before[gram] for gram, count in counts.items()}


def _last(counts: Sequence[Counter[Gram]]) -> Gram:
    """The n-gram that lmplz reads last: the greatest from its end, words in the order in which they first occur."""
    place = {gram[0]: index for index, gram in enumerate(counts[0])}
    place[END], place[BEGIN] = -1, -2
    whole = (gram for level in counts for gram in level if len(gram) == len(counts) or gram[0] == BEGIN)
    return max(whole, key=lambda gram: [place[word] for word in reversed(gram)])


def _discounts(occurring: Counter[int]) -> tuple[float, float, float]:
    """What is taken off counts of 1, 2, and 3 or more (Chen & Goodman 1998, eq. 26), of the counts of counts."""
    ones, twos, threes, fours = (occurring[count] for count in (1, 2, 3, 4))
    if not all((ones, twos, threes)):
        return FALLBACK
    share = ones / (ones + 2 * twos)
    found = tuple(
        size - (size + 1) * share * more / one
        for size, (one, more) in enumerate(itertools.pairwise((ones, twos, threes, fours)), start=1)
    )
    return found if all(0 <= one <= size for size, one in enumerate(found, start=1)) else FALLBACK
