"""What does scoring cost, and comparing? 25,000 utterances of one word; peers measured in the same run.

Scoring (WRA with its interval, WER, CER) beside jiwer alone, all at once and a call an utterance; a paired comparison
of two systems of 25,000 utterances by 15 speakers.
"""

import json
import random
import statistics
import time

import jiwer
import pandas as pd

from kdlib.corpus.importers.uaspeech import word_list
from kdlib.evaluate import compare, score
from kdlib.io import repository_root, write_json

UTTERANCES, ROUNDS = 25_000, 5


def main() -> None:
    """Measure, print, and write outputs/benchmarks/score.json."""
    words, rng = sorted(set(word_list().values())), random.Random(0)
    told = [rng.choice(words) for _ in range(UTTERANCES)]
    said = [[word if rng.random() < 0.6 else rng.choice(words) for word in told] for _ in range(2)]
    systems = {
        name: pd.DataFrame(
            {
                "utt_id": [f"u{index}" for index in range(UTTERANCES)],
                "speaker": [f"S{index % 15}" for index in range(UTTERANCES)],
                "reference": told,
                "hypothesis": heard,
                "seed": 0,
            }
        )
        for name, heard in zip("ab", said, strict=True)
    }
    forms = {
        "jiwer, an utterance a call": lambda: [jiwer.wer(*pair) for pair in zip(told, said[0], strict=True)],
        "jiwer, all at once": lambda: (jiwer.wer(told, said[0]), jiwer.cer(told, said[0])),
        "score": lambda: score.score(told, said[0]),
        "compare": lambda: compare.compare(systems, against="b"),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - started)
    base = statistics.median(times["jiwer, all at once"])
    result = {
        name: {"s": round(statistics.median(one), 3), "of_jiwer": round(statistics.median(one) / base, 2)}
        for name, one in times.items()
    }
    print(json.dumps(result, indent=1))
    folder = repository_root() / "outputs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "score.json", result)


if __name__ == "__main__":
    main()
