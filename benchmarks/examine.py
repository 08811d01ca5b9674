"""What does an examination of 1,785 predictions cost?

The predictions are as many as in a fold of the original study, of two kinds: short ones, many of them alike, and those
of an untrained head, about 23 tokens for one word and all different. The peer is jiwer's WER and CER of the same
predictions. The examination reads the file, decodes it again at seven offsets, and names the causes; `make examine` is
the whole command, which also starts Python and writes a page and a figure.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import jiwer
import report

from kdlib.corpus.importers.uaspeech import word_list
from kdlib.diagnose import causes, examination
from kdlib.evaluate import predictions
from kdlib.tokens import Tokens, train_tokenizer

FULL, SMOKE = (255, 7, 5), (20, 2, 1)  # words, microphones, rounds
PEER = "jiwer: WER and CER"
SHORT, UNTRAINED = "short", "untrained head"


def made(folder: Path, name: str, tokens: Tokens, words: list[str], microphones: int) -> Path:
    """A file of predictions, decoded with an offset of one."""
    rng, rows = random.Random(0), []
    for word in words:
        for microphone in range(2, 2 + microphones):
            ids = tokens.encode(word if rng.random() < 0.5 else rng.choice(words[:20]))
            if name == UNTRAINED:
                ids = [rng.randrange(3, len(tokens.pieces)) for _ in range(rng.randrange(16, 30))]
            rows.append(
                {
                    "utterance_id": f"M08_B3_{word}_M{microphone}",
                    "target": word,
                    "prediction_tokens": ids,
                    "prediction_text": tokens.decode(one - 1 for one in ids),
                }
            )
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"predictions": rows}), encoding="utf-8")
    return path


def forms(path: Path, tokens: Tokens, folder: Path) -> dict:
    """What is timed, of a file of predictions."""
    rows = predictions.read(path, ids=True)
    references, hypotheses = rows.reference.tolist(), rows.hypothesis.tolist()
    command = [sys.executable, "-m", "kdlib", "examine", str(path), "--out", str(folder / "out")]

    def examined() -> None:
        causes.diagnose(causes.signs(examination.examine(predictions.read(path, ids=True), {"own": tokens})))

    return {
        PEER: lambda: (jiwer.wer(references, hypotheses), jiwer.cer(references, hypotheses)),
        "kdlib: the examination": examined,
        "kdlib: `make examine`": lambda: subprocess.run(command, check=True, capture_output=True),
    }


def main() -> None:
    run = report.start(__file__, __doc__)
    count, microphones, rounds = SMOKE if run.smoke else FULL
    words = sorted(set(word_list().values()))[:count]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = Tokens.for_teachers(train_tokenizer(words, 60 if run.smoke else 1000, folder))
        for kind in [UNTRAINED] if run.smoke else [SHORT, UNTRAINED]:
            path = made(folder, kind, tokens, words, microphones)
            found = report.against(report.interleaved(forms(path, tokens, folder), rounds), PEER)
            rows += [
                {"predictions": kind, "work": work, "s": seconds, "ratio of times": ratio}
                for work, (seconds, ratio) in found.items()
            ]
    run.save(rows)


if __name__ == "__main__":
    main()
