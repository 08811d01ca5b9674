"""What does an examination cost? 1,785 predictions as in the original study, against jiwer alone in the same run.

Short hypotheses of few different token sequences, and those of an untrained head: 23 tokens for one word, all
different. Reading the file, the examination with a second decoding at seven offsets, and the diagnosis; and the whole
command.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jiwer

from kdlib.corpus.importers.uaspeech import word_list
from kdlib.diagnose import causes, examination
from kdlib.evaluate import predictions
from kdlib.io import repository_root, write_json
from kdlib.tokens import Tokens, train_tokenizer

WORDS, MICROPHONES, ROUNDS = 255, 7, 5


def made(folder: Path, name: str, tokens: Tokens, words: list[str]) -> Path:
    """A file of predictions, decoded with an offset of one."""
    rng, rows = random.Random(0), []
    for word in words:
        for microphone in range(2, 2 + MICROPHONES):
            ids = tokens.encode(word if rng.random() < 0.5 else rng.choice(words[:20]))
            if name == "untrained head":
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


def main() -> None:
    """Measure, print, and write outputs/benchmarks/examine.json."""
    words = sorted(set(word_list().values()))[:WORDS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = Tokens.for_teachers(train_tokenizer(words, 1000, folder))
        result = {}
        for kind in ("short hypotheses", "untrained head"):
            path = made(folder, kind, tokens, words)
            rows = predictions.read(path, ids=True)
            references, hypotheses = rows.reference.tolist(), rows.hypothesis.tolist()
            command = [sys.executable, "-m", "kdlib", "examine", str(path), "--out", str(folder / "out")]
            forms = {
                "jiwer": lambda references=references, hypotheses=hypotheses: (
                    jiwer.wer(references, hypotheses),
                    jiwer.cer(references, hypotheses),
                ),
                "examination": lambda path=path: causes.diagnose(
                    causes.signs(examination.examine(predictions.read(path, ids=True), {"own": tokens}))
                ),
                "make examine, page and figure": lambda command=command: subprocess.run(
                    command, check=True, capture_output=True
                ),
            }
            times: dict[str, list[float]] = {form: [] for form in forms}
            for _ in range(ROUNDS):
                for form, run in forms.items():
                    started = time.perf_counter()
                    run()
                    times[form].append(time.perf_counter() - started)
            base = statistics.median(times["jiwer"])
            result[kind] = {"predictions": len(rows)} | {
                form: {"s": round(statistics.median(one), 2), "of_jiwer": round(statistics.median(one) / base, 1)}
                for form, one in times.items()
            }
    print(json.dumps(result, indent=1))
    out = repository_root() / "outputs" / "benchmarks"
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "examine.json", result)


if __name__ == "__main__":
    main()
