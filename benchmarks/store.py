"""How small, how fast and how faithful is a teacher's store compared with what other code does?

    python benchmarks/store.py [UTTERANCES]

On the outputs of real teachers on the demo's training speech: one with the original study's width and number of outputs
(144, and 5,000 of which 64 are real pieces), and one of the demo. Named peers, written and read in the same run: one
torch.save of float32 logits per utterance (the original study), HDF5 in float32 and in float16 with gzip (SpeechBrain's
recipe), a compressed .npz, and the top 64 logits. The divergence is the mean over frames of KL(exact || kept) in nats,
at T = 1-4. Reads are at random, the median of interleaved rounds; `logits/s` are reads that end in logits over all
tokens. Sizes are of the frames alone, and, for all training speech, with the head that is kept once.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from kdlib.corpus import audio
from kdlib.io import repository_root, write_json
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models import hybrid
from kdlib.pipeline import Fold
from kdlib.runtime import set_threads

WIDE = {
    "name": "bench-store",
    "tokens": {"size": 5000},
    "teacher": {"parent": "controls", "d_model": 144, "ffn": 576, "base_training": {"steps": 1200}},
}
SPEAKER, TOP, ROUNDS, READS = "F05", 64, 5, 100


def outputs(fold: Fold, count: int):
    """A real teacher's activations on training speech, its head, and the exact logits."""
    teacher = hybrid.TrainedModel(fold.teacher(SPEAKER), "cpu")
    utterances = random.Random(0).sample(fold.splits.train, count)
    kept = {}
    for batch in audio.batches(utterances, 32):
        said = teacher(*audio.collate(batch))
        for utt, encoded, length in zip(batch, said.encoded, said.lengths.tolist(), strict=True):
            kept[utt.utt_id] = encoded[:length].clone()
    head = teacher.model.ctc_head.weight.detach(), teacher.model.ctc_head.bias.detach()
    return teacher, kept, head, {name: torch.addmm(head[1], one, head[0].T) for name, one in kept.items()}


class Store:
    """This repository's store."""

    def __init__(self, folder: Path, encoding: str, teacher, kept, head) -> None:
        header = Header(
            teacher=SPEAKER,
            train_speakers=(SPEAKER,),
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
    total = frames = 0
    for name in names:
        ours = (kept.logits(name).double() / temperature).log_softmax(-1)
        truth = (exact[name].double() / temperature).log_softmax(-1)
        total += float((truth.exp() * (truth - ours)).sum())
        frames += len(truth)
    return total / frames


def rate(read, names: list[str]) -> float:
    started = time.perf_counter()
    for name in names:
        read(name)
    return len(names) / (time.perf_counter() - started)


def measure(fold: Fold, count: int) -> dict:
    teacher, kept, head, exact = outputs(fold, count)
    frames = sum(map(len, kept.values()))
    train = fold.splits.train
    all_frames = frames / count * len(train)
    ways = {
        "kdlib fp16": lambda folder: Store(folder, "fp16", teacher, kept, head),
        "kdlib int8": lambda folder: Store(folder, "int8", teacher, kept, head),
        "torch.save float32": lambda folder: Files(folder, exact),
        "HDF5 float32": lambda folder: HDF5(folder, exact, "f4"),
        "HDF5 float16 gzip": lambda folder: HDF5(folder, exact, "f2", compression="gzip"),
        "npz float32": lambda folder: Npz(folder, exact),
        "top 64": lambda folder: Top(folder, exact),
    }
    peer = "torch.save float32"
    rows, made = {}, {}
    with tempfile.TemporaryDirectory() as name:
        for way, write in ways.items():
            folder = Path(name) / way.replace(" ", "_")
            folder.mkdir()
            started = time.perf_counter()
            made[way] = write(folder)
            rows[way] = {"write_s": time.perf_counter() - started}
            rows[way]["bytes_a_frame"] = sum(file.stat().st_size for file in folder.iterdir()) / frames
            head_file = folder / "head.safetensors"
            rows[way]["without_head"] = rows[way]["bytes_a_frame"] - (
                head_file.stat().st_size / frames if head_file.is_file() else 0
            )
        rng, stored, expanded = random.Random(1), {way: [] for way in ways}, {way: [] for way in ways}
        for _ in range(ROUNDS):
            names = rng.sample(list(kept), min(READS, count))
            for way, one in made.items():
                stored[way].append(rate(one.read, names))
                expanded[way].append(rate(one.logits, names))
        names = rng.sample(list(kept), min(60, count))
        for way, one in made.items():
            rows[way] |= {
                "reads_a_second": statistics.median(stored[way]),
                "logits_a_second": statistics.median(expanded[way]),
            }
            rows[way] |= {f"kl_at_{t}": divergence(exact, one, names, t) for t in (1, 2, 3, 4)}
    for row in rows.values():
        head_bytes = (row["bytes_a_frame"] - row["without_head"]) * frames
        row["smaller"] = rows[peer]["bytes_a_frame"] / row["without_head"]
        row["smaller_with_head"] = rows[peer]["bytes_a_frame"] / (row["without_head"] + head_bytes / all_frames)
        row["faster_reads"] = row["reads_a_second"] / rows[peer]["reads_a_second"]
    return {"teacher": SPEAKER, "outputs": len(head[1]), "width": head[0].shape[1], "frames": frames, "ways": rows}


def main(count: int) -> None:
    set_threads()
    results = {}
    for title, overrides in (("V = 5,000", WIDE), ("the demo", {})):
        results[title] = found = measure(Fold.load("params/demo.yaml", "M08", overrides=overrides), count)
        print(f"\n{title}: {found['outputs']} outputs, width {found['width']}, {found['frames']} frames")
        print(f"{'':20} B/frame  smaller (with head)  write s  reads/s  faster logits/s  KL at T = 1, 2, 3, 4")
        for way, row in found["ways"].items():
            kl = "  ".join(f"{row[f'kl_at_{t}']:.1e}" for t in (1, 2, 3, 4))
            print(
                f"{way:20} {row['without_head']:7.0f} {row['smaller']:8.1f} {row['smaller_with_head']:11.1f} "
                f"{row['write_s']:8.2f} "
                f"{row['reads_a_second']:8.0f} {row['faster_reads']:7.1f} {row['logits_a_second']:8.0f}  {kl}"
            )
    write_json(repository_root() / "outputs/benchmarks/store.json", json.loads(json.dumps(results)))


if __name__ == "__main__":
    (repository_root() / "outputs/benchmarks").mkdir(parents=True, exist_ok=True)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
