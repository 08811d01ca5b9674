"""How small, how fast and how faithful is a teacher's store, compared with what other code does?

Kept are the outputs of two trained teachers of the speaker F05 on 400 utterances of the demo's training speech: one
of the original study's width, 144, with 5,000 outputs, of which 64 are real pieces; and the demo's. They are trained
first where there are none, the first for a few minutes with a base model of two controls. The peers are one
`torch.save` of float32 logits per utterance (the original study's way), HDF5 in float32 and in float16 with gzip
(SpeechBrain's recipe), a compressed `.npz`, and the 64 largest logits.

Bytes are of the frames alone, and then, for all training speech, with the head of the model, which is kept once. Reads
are at random, of what is kept; logits per second counts reads that end in logits over all outputs. The divergence is
the mean over frames of KL(exact || kept) in nats, at three temperatures.
"""

import random
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import report
import torch

from kdlib.corpus import audio, inputs
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models import hybrid
from kdlib.pipeline import Fold
from kdlib.runtime import set_threads

WIDE = {
    "name": "bench-store",
    "tokens": {"size": 5000},
    "pretraining": {"test_controls": 1},  # of three: the base model is trained on the other two
    "teacher": {
        "parent": "controls",
        "d_model": 144,
        "ffn": 576,
        "base_training": {"steps": 200},
        "adapt": {"steps": 60},
    },
}
TINY = {"pretrained": "shipped", "tokens": {"source": "pretrained", "size": 500}, "teacher": {"parent": "none"}}
FULL = (  # teachers: name, recipe, speaker, settings
    ("V = 5,000, d = 144", "params/demo.yaml", "F05", WIDE),
    ("the demo's", "params/demo.yaml", "F05", {}),
)
SMOKE = (("tiny", "params/smoke.yaml", "M04", TINY),)
PEER, TOP = "`torch.save`, float32", 64


def outputs(fold: Fold, speaker: str, count: int):
    """A real teacher's activations on training speech, its head, and the exact logits."""
    teacher = hybrid.TrainedModel(fold.teacher(speaker), "cpu")
    utterances = random.Random(0).sample(fold.splits.train, count)
    kept = {}
    for batch in audio.batches(utterances, 32):
        said = teacher(*inputs.collate(batch))
        for utt, encoded, length in zip(batch, said.encoded, said.lengths.tolist(), strict=True):
            kept[utt.utt_id] = encoded[:length].clone()
    head = teacher.model.ctc_head.weight.detach(), teacher.model.ctc_head.bias.detach()
    return teacher, kept, head, {name: torch.addmm(head[1], one, head[0].T) for name, one in kept.items()}


class Store:
    """This repository's store."""

    def __init__(self, folder: Path, encoding: str, teacher, kept, head) -> None:
        header = Header(
            teacher="T",
            train_speakers=(),
            output="ctc",
            encoding=encoding,
            size=len(head[1]),
            width=head[0].shape[1],
            tokens=teacher.tokens.fingerprint,
            blank=2,
            bos=0,
            eos=1,
            stride_ms=40.0,
        )
        with Writer(folder, header, head) as writer:
            for name, activations in kept.items():
                writer.add(name, activations)
        store = LogitStore(folder)
        self.read, self.logits = store.hidden, store.logits


class Files:
    """One torch.save of float32 logits per utterance."""

    def __init__(self, folder: Path, logits) -> None:
        self.folder = folder
        for name, one in logits.items():
            torch.save(one, folder / f"{name}.pt")

    def read(self, name: str) -> torch.Tensor:
        return torch.load(self.folder / f"{name}.pt")

    logits = read


class HDF5:
    """One data set per utterance."""

    def __init__(self, folder: Path, logits, kind: str, **options) -> None:
        with h5py.File(folder / "logits.h5", "w") as file:
            for name, one in logits.items():
                file.create_dataset(name, data=one.numpy().astype(kind), **options)
        self.file = h5py.File(folder / "logits.h5")

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.file[name][:])

    def logits(self, name: str) -> torch.Tensor:
        return self.read(name).float()


class Npz:
    """A compressed archive."""

    def __init__(self, folder: Path, logits) -> None:
        np.savez_compressed(folder / "logits.npz", **{name: one.numpy() for name, one in logits.items()})
        self.archive = np.load(folder / "logits.npz")

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.archive[name])

    logits = read


class Top:
    """The largest logits in float16 and their ids in 16 bits; the rest of the mass is spread evenly, as at T = 1."""

    def __init__(self, folder: Path, logits) -> None:
        self.size = next(iter(logits.values())).shape[1]
        self.folder = folder
        for name, one in logits.items():
            values, ids = one.log_softmax(-1).topk(min(TOP, self.size - 1))
            np.savez(folder / f"{name}.npz", values=values.half().numpy(), ids=ids.numpy().astype(np.int16))

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        with np.load(self.folder / f"{name}.npz") as kept:
            return torch.from_numpy(kept["values"]), torch.from_numpy(kept["ids"])

    def logits(self, name: str) -> torch.Tensor:
        values, ids = self.read(name)
        rest = (1 - values.double().exp().sum(-1, keepdim=True)).clamp_min(1e-12) / (self.size - values.shape[1])
        full = rest.log().expand(-1, self.size).clone()
        return full.scatter(1, ids.long(), values.double())


def divergence(exact: dict, kept, names: list[str], temperature: float) -> float:
    """The mean over frames of KL(exact || kept), in nats."""
    total = frames = 0
    for name in names:
        ours = (kept.logits(name).double() / temperature).log_softmax(-1)
        truth = (exact[name].double() / temperature).log_softmax(-1)
        total += float((truth.exp() * (truth - ours)).sum())
        frames += len(truth)
    return total / frames


def measured(fold: Fold, speaker: str, count: int, rounds: int, reads: int) -> list[dict]:
    """The rows of a teacher."""
    teacher, kept, head, exact = outputs(fold, speaker, count)
    frames = sum(map(len, kept.values()))
    all_frames = frames / count * len(fold.splits.train)
    ways = {
        PEER: lambda folder: Files(folder, exact),
        "kdlib, fp16": lambda folder: Store(folder, "fp16", teacher, kept, head),
        "kdlib, int8": lambda folder: Store(folder, "int8", teacher, kept, head),
        f"top {TOP} logits": lambda folder: Top(folder, exact),
        "HDF5, float32": lambda folder: HDF5(folder, exact, "f4"),
        "HDF5, float16, gzip": lambda folder: HDF5(folder, exact, "f2", compression="gzip"),
        "`.npz`, float32, compressed": lambda folder: Npz(folder, exact),
    }

    def chosen(number: int) -> list[str]:
        return random.Random(number).sample(list(kept), reads)

    with tempfile.TemporaryDirectory() as name:
        made, write_s, sizes, heads = {}, {}, {}, {}
        for index, (way, write) in enumerate(ways.items()):
            folder = Path(name) / str(index)
            folder.mkdir()
            started = time.perf_counter()
            made[way] = write(folder)
            write_s[way] = time.perf_counter() - started
            files = {file.name: file.stat().st_size for file in folder.iterdir()}
            heads[way] = files.pop("head.safetensors", 0)
            sizes[way] = sum(files.values()) / frames
        stored, expanded = (
            report.against(report.interleaved({way: each(one) for way, one in made.items()}, rounds, chosen), PEER)
            for each in (
                lambda one: lambda names: [one.read(name) for name in names],
                lambda one: lambda names: [one.logits(name) for name in names],
            )
        )
        return [
            {
                "kept as": way,
                "bytes per frame": sizes[way],
                "times smaller": sizes[PEER] / sizes[way],
                "with the head": sizes[PEER] / (sizes[way] + heads[way] / all_frames),
                "write s": write_s[way],
                "reads per second": reads / stored[way][0],
                "times as fast": 1 / stored[way][1],
                "logits per second": reads / expanded[way][0],
            }
            | {f"KL, T = {t}": divergence(exact, one, chosen(0), t) for t in (1, 2, 4)}
            for way, one in made.items()
        ]


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    count, rounds, reads = (8, 1, 4) if run.smoke else (400, 5, 100)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for title, recipe, speaker, settings in SMOKE if run.smoke else FULL:
            fold = Fold.load(recipe, "M08", overrides=settings | ({"outputs": name} if run.smoke else {}))
            rows += [{"teacher": title} | row for row in measured(fold, speaker, count, rounds, reads)]
    run.save(rows)


if __name__ == "__main__":
    main()
