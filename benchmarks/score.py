"""What do scoring and comparing cost, with 25,000 utterances of one word?

Scoring gives the word recognition accuracy with its interval, the word error rate and the character error rate. The
peer is jiwer, with one call for all utterances, and with one for each. A comparison is of two systems, paired, of 15
speakers.
"""

import random

import jiwer
import pandas as pd
import report

from kdlib.corpus.importers.uaspeech import word_list
from kdlib.evaluate import compare, score

FULL, SMOKE = (25_000, 5), (300, 1)  # utterances, rounds
PEER = "jiwer: WER and CER, one call"


def main() -> None:
    run = report.start(__file__, __doc__)
    count, rounds = SMOKE if run.smoke else FULL
    words, rng = sorted(set(word_list().values())), random.Random(0)
    references = [rng.choice(words) for _ in range(count)]
    systems = [[word if rng.random() < 0.6 else rng.choice(words) for word in references] for _ in range(2)]
    systems = {
        name: pd.DataFrame(
            {
                "utt_id": [f"u{index}" for index in range(count)],
                "speaker": [f"S{index % 15}" for index in range(count)],
                "reference": references,
                "hypothesis": hypotheses,
                "seed": 0,
            }
        )
        for name, hypotheses in zip("ab", systems, strict=True)
    }
    hypotheses = systems["a"].hypothesis.tolist()
    forms = {
        PEER: lambda: (jiwer.wer(references, hypotheses), jiwer.cer(references, hypotheses)),
        "jiwer: WER, one call per utterance": lambda: [
            jiwer.wer(*pair) for pair in zip(references, hypotheses, strict=True)
        ],
        "kdlib: score": lambda: score.score(references, hypotheses),
        "kdlib: compare two systems": lambda: compare.compare(systems, against="b"),
    }
    found = report.against(report.interleaved(forms, rounds), PEER)
    run.save([{"work": name, "s": seconds, "ratio of times": ratio} for name, (seconds, ratio) in found.items()])


if __name__ == "__main__":
    main()
