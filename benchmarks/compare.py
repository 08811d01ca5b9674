"""Are the error rates of `compare` as stated? Simulated systems with a known difference: 500 times 5 speakers x 200
words.

For these speakers: how often the interval covers the true difference. For new speakers: how often Student's t over the
speakers does, and, for comparison, a bootstrap over speakers and utterances, as is common. Under no difference: how
often a verdict says there is one: of two models, in a family of six pairs with Holm's correction, and of two recipes
of three trainings each, of which no two give the same model (each is better or worse by a draw of its own, with a
standard deviation of 0.2 in log-odds, some 4 points) - and how often the test over utterances alone would have.
"""

import json

import numpy as np
import pandas as pd

from kdlib.console import progress
from kdlib.evaluate import compare
from kdlib.io import repository_root, write_json

SIMULATIONS, SPEAKERS, WORDS, GAIN, SPREAD = 500, 5, 200, 0.03, 0.03
SEEDS, RUN_SPREAD = 3, 0.2


def system(right: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """A system of [speakers, words] right or wrong."""
    rows = [
        (f"S{speaker}_{word}", f"S{speaker}", "YES", "YES" if one else "NO", seed)
        for speaker, some in enumerate(right)
        for word, one in enumerate(some)
    ]
    return pd.DataFrame(rows, columns=["utt_id", "speaker", "reference", "hypothesis", "seed"])


def drawn(rng: np.random.Generator, gains: np.ndarray, count: int = 2) -> list[np.ndarray]:
    """Systems on the same words, easy and hard ones, the first better by `gains`."""
    easy = rng.beta(2, 2, (SPEAKERS, WORDS)) * 0.6 + 0.1
    better = [easy + gains[:, None], *[easy] * (count - 1)]
    return [rng.random((SPEAKERS, WORDS)) < chance for chance in better]


def trained(rng: np.random.Generator, easy: np.ndarray) -> pd.DataFrame:
    """A recipe's models of several seeds, each better or worse by a draw of its own."""
    runs = []
    for seed in range(SEEDS):
        odds = np.log(easy / (1 - easy)) + RUN_SPREAD * rng.standard_normal()
        runs.append(system(rng.random(easy.shape) < 1 / (1 + np.exp(-odds)), seed))
    return pd.concat(runs)


def two_level(a: np.ndarray, b: np.ndarray, rng: np.random.Generator, draws: int = 1000) -> tuple[float, float]:
    """The common bootstrap: speakers, then utterances within them."""
    parts = a.astype(float) - b
    means = [
        np.mean([parts[who][rng.integers(0, WORDS, WORDS)].mean() for who in rng.integers(0, SPEAKERS, SPEAKERS)])
        for _ in range(draws)
    ]
    return tuple(np.percentile(means, [2.5, 97.5]))


def main() -> None:
    """Measure, print, and write outputs/benchmarks/compare.json."""
    rng = np.random.default_rng(1)
    counts = dict.fromkeys(("these", "new_t", "new_bootstrap", "false_alarm", "false_alarm_new", "family"), 0)
    counts |= {"two_recipes": 0, "two_recipes_by_utterances_alone": 0}
    with progress(SIMULATIONS, "comparisons", "simulation") as bar:
        for _ in range(SIMULATIONS):
            gains = GAIN + SPREAD * rng.standard_normal(SPEAKERS)
            a, b = drawn(rng, gains)
            one = compare.compare({"a": system(a), "b": system(b)}, against="b")[0]
            counts["these"] += one.these_low <= gains.mean() <= one.these_high
            counts["new_t"] += one.new_low <= GAIN <= one.new_high
            low, high = two_level(a, b, rng)
            counts["new_bootstrap"] += low <= GAIN <= high
            four = {str(index): system(right) for index, right in enumerate(drawn(rng, np.zeros(SPEAKERS), 4))}
            pair = compare.compare({name: four[name] for name in "01"})[0]
            counts["false_alarm"] += pair.verdict != "no difference shown"
            counts["false_alarm_new"] += pair.new_speakers != "no difference shown"
            counts["family"] += any(one.verdict != "no difference shown" for one in compare.compare(four))
            easy = rng.beta(2, 2, (SPEAKERS, WORDS)) * 0.6 + 0.1
            recipes = compare.compare({name: trained(rng, easy) for name in "ab"})[0]
            counts["two_recipes"] += recipes.verdict != "no difference shown"
            counts["two_recipes_by_utterances_alone"] += recipes.holm_p < 0.05
            bar.update(1)
    result = {
        "simulations": SIMULATIONS,
        "monte_carlo_error_of_5_percent": round(float(np.sqrt(0.05 * 0.95 / SIMULATIONS)), 4),
        **{name: count / SIMULATIONS for name, count in counts.items()},
    }
    print(json.dumps(result, indent=1))
    folder = repository_root() / "outputs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", result)


if __name__ == "__main__":
    main()
