"""What does scoring cost, and comparing? 25,000 utterances of one word; peers measured in the same run.

Scoring (WRA with its interval, WER, CER) against jiwer alone, all at once and one call per utterance; a paired
comparison of two systems of 25,000 utterances by 15 speakers.
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
    references = [rng.choice(words) for _ in range(UTTERANCES)]
    systems = [[word if rng.random() < 0.6 else rng.choice(words) for word in references] for _ in range(2)]
    systems = {
        name: pd.DataFrame(
            {
                "utt_id": [f"u{index}" for index in range(UTTERANCES)],
                "speaker": [f"S{index % 15}" for index in range(UTTERANCES)],
                "reference": references,
                "hypothesis": hypotheses,
                "seed": 0,
            }
        )
        for name, hypotheses in zip("ab", systems, strict=True)
    }
    hypotheses = systems["a"].hypothesis.tolist()
    forms = {
        "jiwer, one call per utterance": lambda: [
            jiwer.wer(*pair) for pair in zip(references, hypotheses, strict=True)
        ],
        "jiwer, all at once": lambda: (jiwer.wer(references, hypotheses), jiwer.cer(references, hypotheses)),
        "score": lambda: score.score(references, hypotheses),
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
