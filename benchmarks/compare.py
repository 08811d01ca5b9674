"""Are the error rates of `make verdict` and `make compare` as stated?

Systems of known difference are simulated 500 times, with 5 speakers of 200 words each. An interval should cover the
true difference in 95 of 100 simulations; for new speakers a bootstrap over speakers and utterances, as is common, is
the peer of Student's t over the speakers. Where there is no difference, a verdict should find one in at most 5 of 100:
between two models, among the six pairs of four models with Holm's correction, and between two recipes of three
trainings each. No two trainings give the same model: each is better or worse by a draw of its own, with a standard
deviation of 0.2 in log-odds, some 4 points. The peer there is the test over utterances alone.
"""

import numpy as np
import pandas as pd
import report

from kdlib.console import progress
from kdlib.evaluate import compare
from kdlib.evaluate.verdict import NO_DIFFERENCE

FULL, SMOKE = 500, 1  # simulations
SPEAKERS, WORDS, GAIN, SPREAD = 5, 200, 0.03, 0.03
SEEDS, RUN_SPREAD = 3, 0.2
COVERS, ALARMS = "covers the true difference", "finds a difference where there is none"
STATED = {COVERS: "95", ALARMS: "at most 5"}
THESE, NEW, BOOTSTRAP = (
    (COVERS, "interval, these speakers"),
    (COVERS, "interval, new speakers"),
    (COVERS, "bootstrap over speakers and utterances, new speakers"),
)
PAIR, PAIR_NEW, FAMILY, RECIPES, ALONE = (
    (ALARMS, "verdict, these speakers, two models"),
    (ALARMS, "verdict, new speakers, two models"),
    (ALARMS, "verdict, these speakers, any of six pairs"),
    (ALARMS, "verdict, these speakers, two recipes of three trainings"),
    (ALARMS, "test over utterances alone, two recipes of three trainings"),
)


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
    return [rng.random(easy.shape) < chance for chance in better]


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


def simulate(rng: np.random.Generator) -> dict[tuple[str, str], bool]:
    """What holds in one simulation."""
    gains = GAIN + SPREAD * rng.standard_normal(SPEAKERS)
    a, b = drawn(rng, gains)
    one = compare.compare({"a": system(a), "b": system(b)}, against="b")[0]
    low, high = two_level(a, b, rng)
    four = {str(index): system(right) for index, right in enumerate(drawn(rng, np.zeros(SPEAKERS), 4))}
    pair = compare.compare({name: four[name] for name in "01"})[0]
    easy = rng.beta(2, 2, (SPEAKERS, WORDS)) * 0.6 + 0.1
    recipes = compare.compare({name: trained(rng, easy) for name in "ab"})[0]
    return {
        THESE: one.these_low <= gains.mean() <= one.these_high,
        NEW: one.new_low <= GAIN <= one.new_high,
        BOOTSTRAP: low <= GAIN <= high,
        PAIR: pair.verdict != NO_DIFFERENCE,
        PAIR_NEW: pair.new_speakers != NO_DIFFERENCE,
        FAMILY: any(one.verdict != NO_DIFFERENCE for one in compare.compare(four)),
        RECIPES: recipes.verdict != NO_DIFFERENCE,
        ALONE: recipes.holm_p < 0.05,
    }


def main() -> None:
    run = report.start(__file__, __doc__)
    simulations, rng, held = SMOKE if run.smoke else FULL, np.random.default_rng(1), []
    with progress(simulations, "comparisons", "simulation") as bar:
        for _ in range(simulations):
            held.append(simulate(rng))
            bar.update(1)
    shares = pd.DataFrame(held).mean()
    run.save(
        [
            {
                "interval or verdict": which,
                "share in which it": what,
                "stated %": STATED[what],
                "found %": float(100 * share),
            }
            for (what, which), share in shares.items()
        ],
        [f"The standard error of a share of 5 % is {100 * np.sqrt(0.05 * 0.95 / simulations):.1f} %."],
    )


if __name__ == "__main__":
    main()
