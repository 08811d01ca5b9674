"""How do time and memory grow with the corpus, the vocabulary and the teachers, and what breaks first?

The unit is UA-Speech by one microphone: 15 speakers of 765 utterances, 455 words, 13 teachers. Each form of work is
done at 1, 3.2 and 10 times its unit, in a process of its own, and at 100 times where that takes less than a minute;
else its time there is extrapolated, and said to be. The exponent is the slope of time against size, both in
logarithms: 1 is proportional. Memory is what the process has more at its highest than before, at the largest size that
was run.

Work that a training does at every step - a batch, its targets - is timed for as many steps, whatever the size of the
corpus: its exponent is to be 0. The peer of each is proportional growth. Row `data of a training` is all that a
training has of its corpus: manifest, splits, the order of an epoch, 300 batches. The utterances lie on disk; in memory
are their places in the file, durations, and rows in the splits and the epoch.
"""

import json
import math
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import report

FULL, SMOKE = (1.0, 3.2, 10.0), (0.02, 0.05)
FAR, PATIENCE_S = 100.0, 60.0
UTTERANCES, SPEAKERS, WORDS, TEACHERS = 765, 15, 455, 13
FRAMES, WIDTH, TOKENS, BATCH, STEPS = 40, 144, 200, 16, 30


def corpus(scale: float):
    """A corpus with more speakers of 765 utterances."""
    from kdlib.corpus.manifest import Corpus, Speaker
    from kdlib.corpus.utterances import Utterance

    speakers = [f"S{number:05}" for number in range(max(3, round(SPEAKERS * scale)))]
    utterances = (
        Utterance(
            f"{name}_B{1 + index % 3}_{index}",
            name,
            Path(f"{name}_{index}.wav"),
            1.5,
            f"W{index % WORDS}",
            f"B{1 + index % 3}",
        )
        for name in speakers
        for index in range(UTTERANCES)
    )
    return Corpus(utterances, "scale", {name: Speaker(name, intelligibility_pct=50.0) for name in speakers})


def importing(scale: float, folder: Path) -> Callable[[], object]:
    """Reading a manifest."""
    from kdlib.corpus import manifest

    path = folder / "corpus.csv"
    rows = [(utt.utt_id, 1.5, f"{folder}/{utt.wav}", utt.speaker, utt.text) for utt in corpus(scale)]
    pd.DataFrame(rows, columns=["ID", "duration", "wav", "spk_id", "wrd"]).to_csv(path, index=False)
    return lambda: manifest.read(path)


def splits(scale: float, folder: Path) -> Callable[[], object]:
    """The splits of a fold."""
    from kdlib.corpus.speakers import Splits
    from kdlib.settings.corpus import Fold, SplitSettings

    known = corpus(scale)
    settings = SplitSettings(held_out="S00000", fold=Fold(dev="S00001"))
    return lambda: Splits(known, settings)


def written(scale: float, folder: Path, teachers: int = 1, utterances: int = 0):
    """Teachers' stores of the training speech: small, since only their number of utterances matters here."""
    import torch

    from kdlib.logits.store import Header, LogitStore, Writer

    count = utterances or round(UTTERANCES * SPEAKERS * scale)
    head = torch.randn(TOKENS, 8), torch.randn(TOKENS)
    about = {
        "output": "ctc",
        "encoding": "fp16",
        "size": TOKENS,
        "width": 8,
        "tokens": "t",
        "blank": 2,
        "bos": 0,
        "eos": 1,
    }
    stores = {}
    for number in range(teachers):
        header = Header(teacher=f"T{number}", train_speakers=(f"T{number}",), stride_ms=40.0, **about)
        with Writer(folder / f"T{number}", header, head) as writer:
            for index in range(count):
                writer.add(f"u{index}", torch.randn(FRAMES, 8))
        stores[f"T{number}"] = LogitStore(folder / f"T{number}")
    return stores


def opening(scale: float, folder: Path) -> Callable[[], object]:
    """Opening a store: its index."""
    from kdlib.logits.store import LogitStore

    written(scale, folder)
    return lambda: LogitStore(folder / "T0")


def reading(scale: float, folder: Path) -> Callable[[], object]:
    """The targets of some steps, from a store of a growing corpus."""
    import random

    from kdlib.corpus.inputs import Batch
    from kdlib.corpus.utterances import Utterance
    from kdlib.targets.aggregation import TeacherEnsemble, Weighting

    stores = written(scale, folder)
    ensemble, names, drawn = TeacherEnsemble(stores, Weighting()), list(stores["T0"]), random.Random(0)

    def steps() -> None:
        for _ in range(10 * STEPS):
            chosen = [Utterance(name, "S", Path("x.wav"), 1.6, "") for name in drawn.sample(names, BATCH)]
            ensemble.logits(Batch(chosen))

    return steps


def teachers(scale: float, folder: Path) -> Callable[[], object]:
    """The targets of some steps, from more teachers."""
    from kdlib.corpus.inputs import Batch
    from kdlib.corpus.utterances import Utterance
    from kdlib.targets.aggregation import TeacherEnsemble, Weighting

    stores = written(1, folder, max(1, round(TEACHERS * scale)), utterances=64)
    ensemble = TeacherEnsemble(stores, Weighting())
    batch = Batch([Utterance(f"u{index}", "S", Path("x.wav"), 1.6, "") for index in range(BATCH)])
    return lambda: [ensemble.logits(batch) for _ in range(STEPS)]


def planning(scale: float, folder: Path) -> Callable[[], object]:
    """The order of an epoch."""
    from kdlib.corpus import audio

    known = corpus(scale).utterances
    return lambda: audio.batches(known, BATCH, seed=1)


def drawing(scale: float, folder: Path) -> Callable[[], object]:
    """The batches of some steps of an epoch."""
    epoch = planning(scale, folder)()
    return lambda: [epoch[number % len(epoch)] for number in range(10 * STEPS)]


def training(scale: float, folder: Path) -> Callable[[], object]:
    """All that a training has of its corpus."""
    from kdlib.corpus import audio, manifest
    from kdlib.corpus.speakers import Splits
    from kdlib.settings.corpus import Fold, SplitSettings

    path = folder / "corpus.csv"
    manifest.write_speechbrain(corpus(scale), path, folder)
    settings = SplitSettings(held_out="S00000", fold=Fold(dev="S00001"))

    def data() -> None:
        epoch = audio.batches(Splits(manifest.read(path), settings).train, BATCH, seed=1)
        for number in range(10 * STEPS):
            epoch[number % len(epoch)]

    return data


def lexicon(scale: float, folder: Path) -> Callable[[], object]:
    """The closed lexicon of more words, on 32 utterances."""
    import torch

    from kdlib.decode.lexicon import Lexicon
    from kdlib.models import Emissions
    from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
    from kdlib.tokens import Tokens

    path = folder / "tokenizer.model"
    path.write_bytes(read_tokenizer(SHIPPED_MODEL))
    tokens, rng = Tokens.for_teachers(path), np.random.default_rng(0)
    words = {"".join(rng.choice(list("ABCDEFGHIKLMNOPRSTUW"), 7)) for _ in range(max(3, round(WORDS * scale)))}
    closed = Lexicon({word: [word] for word in sorted(words)}, tokens)
    emissions = Emissions(torch.randn(32, FRAMES, tokens.size), torch.full((32,), FRAMES))
    return lambda: closed.scores(emissions)


def tables(scale: float, count: int) -> dict[str, pd.DataFrame]:
    """Systems of as many utterances."""
    rng, known = np.random.default_rng(0), corpus(scale)
    found = {}
    for number in range(count):
        right = rng.random(len(known)) < 0.5 + 0.02 * number
        rows = {"utt_id": [utt.utt_id for utt in known], "speaker": [utt.speaker for utt in known], "seed": 0}
        rows |= {"reference": [utt.text for utt in known]}
        table = pd.DataFrame(rows)
        found[f"system{number}"] = table.assign(hypothesis=np.where(right, table.reference, "NO"))
    return found


def comparing(scale: float, folder: Path) -> Callable[[], object]:
    """The verdicts of three systems."""
    from kdlib.evaluate import compare

    known = tables(scale, 3)
    return lambda: compare.compare(known, against={"system1": "system0", "system2": "system0"})


def exploring(scale: float, folder: Path) -> Callable[[], object]:
    """The explorer's table of two systems."""
    from kdlib.show.explorer_data import ExplorerData

    for name, table in tables(scale, 2).items():
        (folder / name).mkdir()
        columns = {"level": "", "word_type": "", "seen": "yes", "greedy": table.hypothesis}
        table.drop(columns=["seed", "hypothesis"]).assign(**columns).to_csv(
            folder / name / "hypotheses.csv", index=False
        )
    systems = {name: folder / name for name in ("system0", "system1")}
    return lambda: ExplorerData(systems).table()


FORMS: dict[str, tuple[Callable, str]] = {  # what grows
    "manifest": (importing, "speakers"),
    "splits of a fold": (splits, "speakers"),
    "order of an epoch": (planning, "speakers"),
    "batches of 300 steps": (drawing, "speakers"),
    "data of a training": (training, "speakers"),
    "index of a store": (opening, "speakers"),
    "targets of 300 steps": (reading, "speakers"),
    "targets of 30 steps": (teachers, "teachers"),
    "closed lexicon, 32 utterances": (lexicon, "words"),
    "verdicts of three systems": (comparing, "speakers"),
    "explorer's table": (exploring, "speakers"),
}
CONSTANT = ("batches of 300 steps", "targets of 300 steps")


def one(name: str, scale: float) -> dict:
    """Do one form at one size, in this process: seconds, and MB more at its highest."""
    with tempfile.TemporaryDirectory() as folder:
        work = FORMS[name][0](scale, Path(folder))
        before, started = peak_mb(reset=True), time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        more = peak_mb() - before
    return {"seconds": seconds, "mb": max(0.0, more)}


def peak_mb(*, reset: bool = False) -> float:
    """The highest memory of this process so far, or, after a reset, from now on (Linux; elsewhere since its start)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024


def measured(name: str, scale: float) -> dict:
    """The same in a process of its own: the better of two, for a machine has other work too; once if it takes long."""
    found: list[dict] = []
    while len(found) < 2 and (not found or found[0]["seconds"] < PATIENCE_S / 2):
        command = [sys.executable, __file__, "--one", name, str(scale)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3 * PATIENCE_S)
        except subprocess.TimeoutExpired:
            return {"seconds": math.nan, "mb": math.nan, "error": "to prepare it takes longer than three minutes"}
        if done.returncode:
            return {"seconds": math.nan, "mb": math.nan, "error": done.stderr.strip().splitlines()[-1][:120]}
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return min(found, key=lambda row: row["seconds"])


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], float(sys.argv[3]))))
        return
    run = report.start(__file__, __doc__)
    scales, rows, notes = SMOKE if run.smoke else FULL, [], []
    for name, (_, grows) in FORMS.items():
        found = {scale: (one if run.smoke else measured)(name, scale) for scale in scales}
        notes += [
            f"{name} at {scale:g} times: {one_of['error']}" for scale, one_of in found.items() if "error" in one_of
        ]
        known = [scale for scale in scales if math.isfinite(found[scale]["seconds"])]
        if len(known) < 2:
            continue
        seconds = [found[scale]["seconds"] for scale in known]
        exponent = float(np.polyfit(np.log(known), np.log(seconds), 1)[0])
        far = seconds[-1] * (FAR / known[-1]) ** max(exponent, 0.0)
        how, memory = "extrapolated", found[known[-1]]["mb"]
        if not run.smoke and far < PATIENCE_S and (grows != "teachers"):
            last = measured(name, FAR)
            if math.isfinite(last["seconds"]):
                far, how, memory = last["seconds"], "run", last["mb"]
                exponent = float(np.polyfit(np.log([*known, FAR]), np.log([*seconds, far]), 1)[0])
            else:
                notes.append(f"{name} at 100 times: {last['error']}")
        rows.append(
            {
                "work": name,
                "grows by": grows,
                "s at 1 x": seconds[0],
                "s at 10 x": seconds[-1],
                "s at 100 x": far,
                "100 x": how,
                "exponent": exponent,
                "MB": memory,
            }
        )
    worst = max((row for row in rows if row["work"] not in CONSTANT), key=lambda row: row["exponent"])
    notes.append(f"the steepest is {worst['work']}, with an exponent of {worst['exponent']:.2f}")
    largest = max(rows, key=lambda row: row["MB"])
    notes.append(f"the most memory takes {largest['work']}: {largest['MB']:,.0f} MB at its largest size that was run")
    run.save(rows, notes)


if __name__ == "__main__":
    main()
