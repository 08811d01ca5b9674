"""How long does it take to import and check a corpus, the first time and again?

The corpus is 25,000 recordings of 2.5 s, laid out as UA-Speech is and imported with all its microphones. The peer is
soundfile reading every file once, one after the other.
"""

import tempfile
from pathlib import Path

import numpy as np
import report
import soundfile

from kdlib.corpus.importers import uaspeech
from kdlib.corpus.speakers import published_speakers
from kdlib.io import repository_root
from kdlib.pipeline import Fold

FULL, SMOKE = (25_000, 2.5, 3), (60, 0.3, 1)  # recordings, seconds of each, rounds
PEER = "soundfile reads every file"


def lay_out(folder: Path, files: int, seconds: float) -> None:
    """Lay out UA-Speech's tree: 7 microphones and 765 utterances of each speaker, of noise."""
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
                        return
                    start = made * 997 % (10 * 16_000 - int(16_000 * seconds))
                    wav = place / f"{speaker}_{block}_{code}_M{mic}.wav"
                    soundfile.write(wav, noise[start : start + int(16_000 * seconds)], 16_000)
                    made += 1


def main() -> None:
    run = report.start(__file__, __doc__)
    files, seconds, rounds = SMOKE if run.smoke else FULL
    outputs = repository_root() / "outputs"
    outputs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=None if run.smoke else outputs) as name:
        folder = Path(name)
        lay_out(folder, files, seconds)
        wavs = sorted(folder.rglob("*.wav"))

        def fold(number: int | str) -> Fold:
            settings = {"data_folder": name, "outputs": f"{name}/{number}", "uaspeech": {"augment": "all"}}
            return Fold.load("params/uaspeech.yaml", "M08", overrides=settings)

        known = fold("known")
        known.prepared_corpus()
        forms = {
            PEER: lambda _: [soundfile.read(wav) for wav in wavs],
            "kdlib: import and check": lambda new: new.prepared_corpus(),
            "kdlib: find it unchanged": lambda _: known.prepared_corpus(),
            "kdlib: load it": lambda _: Fold(known.params).corpus,
        }
        found = report.against(report.interleaved(forms, rounds, fold), PEER)
    run.save([{"work": name, "s": seconds, "ratio of times": ratio} for name, (seconds, ratio) in found.items()])


if __name__ == "__main__":
    main()
