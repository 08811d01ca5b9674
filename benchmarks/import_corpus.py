"""How long does it take to import and check a corpus the first time, the second time, and with a plain loop instead?

    python benchmarks/import_corpus.py [FILES] [SECONDS_EACH]

Lays out UA-Speech's tree (7 microphones x 765 utterances per speaker) with noise, imports it with every microphone,
checks it again, and compares with the named peer: soundfile reading every file once, one after the other, in the same
run.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from kdlib.corpus.importers import uaspeech
from kdlib.corpus.speakers import published_speakers
from kdlib.io import repository_root, write_json
from kdlib.pipeline import Fold


def lay_out(folder: Path, files: int, seconds: float) -> int:
    noise = np.random.default_rng(0).normal(0, 0.1, 10 * 16_000).astype(np.float32)
    words = uaspeech.word_list()
    made = 0
    for speaker in published_speakers():
        place = folder / "audio" / "original" / speaker
        place.mkdir(parents=True)
        for block in uaspeech.BLOCKS:
            for code in (code.removeprefix(f"{block}_") for code in words if code[0] != "B" or code.startswith(block)):
                for mic in range(2, 9):
                    if made == files:
                        return made
                    start = made * 997 % (10 * 16_000 - int(16_000 * seconds))
                    wav = place / f"{speaker}_{block}_{code}_M{mic}.wav"
                    soundfile.write(wav, noise[start : start + int(16_000 * seconds)], 16_000)
                    made += 1
    return made


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(files: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory(dir=repository_root() / "outputs") as name:
        folder = Path(name)
        made = lay_out(folder, files, seconds)
        settings = {"data_folder": name, "outputs": f"{name}/out", "uaspeech": {"augment": "all"}}
        fold = Fold.load("params/uaspeech.yaml", "M08", overrides=settings)
        first = timed(fold.prepared_corpus)
        wavs = sorted(folder.rglob("*.wav"))
        peer = statistics.median(timed(lambda: [soundfile.read(wav) for wav in wavs]) for _ in range(3))
        second = statistics.median(timed(fold.prepared_corpus) for _ in range(5))
        loaded = statistics.median(timed(lambda: Fold(fold.params).corpus) for _ in range(5))
    result = {
        "files": made,
        "seconds_each": seconds,
        "first_s": round(first, 2),
        "second_s": round(second, 2),
        "load_s": round(loaded, 2),
        "plain_read_s": round(peer, 2),
        "first_over_plain_read": round(first / peer, 2),
        "second_over_plain_read": round(second / peer, 3),
    }
    write_json(repository_root() / "outputs/benchmarks/import_corpus.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    (repository_root() / "outputs/benchmarks").mkdir(parents=True, exist_ok=True)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25_000, float(sys.argv[2]) if len(sys.argv) > 2 else 2.5)
