"""How small does a study's logits become when they are adopted, how fast, and how exact do they stay?

A tenth of the original study: 2,600 utterances of 60 frames and 5,000 tokens in float32, logits of a linear head of
width 144 as its teachers have, a list beside its metadata. They are adopted as a recipe does it
(`teacher: {source: stores}`): the rank is found, coordinates and one basis are stored, and the losses of the references
are computed. The peers keep every logit: one `torch.save` in float16, and a compressed `.npz` in float16. Sizes of all
26,000 utterances are ten times these, less the basis, which is kept once.

The divergence is the mean over frames of KL(as it lay || kept) in nats. Weights and activations are random, with blanks
as a trained model has them: on their values neither time nor size depends.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import report
import torch

from kdlib.corpus.utterances import Utterance
from kdlib.logits import adopt, extract, found
from kdlib.logits.store import LogitStore
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
from kdlib.runtime import set_threads
from kdlib.settings.teacher import Teacher
from kdlib.tokens import Tokens

FULL, SMOKE = (2600, 60, 5000, 144), (60, 30, 200, 8)  # utterances, frames, tokens, width
TEMPERATURES = (1.0, 2.0, 4.0)
ALL = 26_000


def write(folder: Path, utterances: int, frames: int, tokens: int, width: int) -> list[Utterance]:
    """A teacher's files as the study has them; the utterances."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(tokens, width, generator=generator), torch.randn(tokens, generator=generator)
    bias[2] += 25.0  # the blank
    names = [f"M04_B1_{index}" for index in range(utterances)]
    rows = [torch.randn(frames, width, generator=generator) @ weight.T + bias for _ in names]
    torch.save(rows, folder / "M04" / "M04_ctc_logits.pt")
    (folder / "M04" / "M04_metadata.json").write_text(json.dumps({"utterance_ids": names}))
    return [Utterance(name, "M04", Path(f"{name}.wav"), frames * 0.04, "WORD") for name in names]


def divergence(exact: torch.Tensor, kept: torch.Tensor, temperature: float) -> float:
    """Mean KL over frames."""
    p, q = (part.double().div(temperature).log_softmax(-1) for part in (exact, kept))
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    size, frames, count, width = SMOKE if run.smoke else FULL
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "study" / "M04").mkdir(parents=True)
        tokenizer = root / "tokenizer.model"
        tokenizer.write_bytes(read_tokenizer(SHIPPED_MODEL))
        tokens = Tokens.for_teachers(tokenizer, count)
        utterances = write(root / "study", size, frames, count, width)
        lying = found.find(root / "study")[0]
        teacher = adopt.FoundTeacher("M04", ("M04",), {"ctc": lying})
        seconds, sizes, read = {}, {"as they lie, float32": lying.path.stat().st_size}, {}

        def timed(form: str, work) -> None:
            started = time.perf_counter()
            work()
            seconds[form] = time.perf_counter() - started

        job = extract.Extraction("M04", "training", "fp16")
        timed("adopted", lambda: adopt.adopt(root / "own", teacher, utterances, tokens, job, Teacher()))
        store = LogitStore(root / "own" / "ctc")
        once = (root / "own" / "ctc" / "head.safetensors").stat().st_size
        sizes["adopted"] = sum(path.stat().st_size for path in (root / "own" / "ctc").iterdir())
        read["adopted"] = store.logits

        def half() -> None:
            torch.save({key: load().half() for key, load in lying.items.items()}, root / "half.pt")

        timed("torch.save, float16", half)
        sizes["torch.save, float16"] = (root / "half.pt").stat().st_size
        kept = torch.load(root / "half.pt", mmap=True)
        read["torch.save, float16"] = lambda key: kept[key].float()

        def packed() -> None:
            part = list(lying.items)[: max(1, size // 20)]  # of a twentieth, which takes long enough
            np.savez_compressed(root / "half.npz", **{key: lying.items[key]().half().numpy() for key in part})

        timed(".npz, float16, compressed", packed)
        seconds[".npz, float16, compressed"] *= size / max(1, size // 20)
        sizes[".npz, float16, compressed"] = (root / "half.npz").stat().st_size * size // max(1, size // 20)
        sample = list(lying.items)[:: max(1, size // 40)]
        rows = []
        for form, bytes_kept in sizes.items():
            row = {"form": form, "MB": bytes_kept / 1e6}
            fixed = once if form == "adopted" else 0
            row["GB of 26,000 utterances"] = ((bytes_kept - fixed) * ALL / size + fixed) / 1e9
            row["times smaller"] = sizes["as they lie, float32"] / bytes_kept
            if form in seconds:
                row["utterances a second"] = size / seconds[form]
            if form in read:
                for temperature in TEMPERATURES:
                    row[f"KL at T = {temperature:g}"] = float(
                        np.mean([divergence(lying.items[key](), read[form](key), temperature) for key in sample])
                    )
            rows.append(row)
        notes = [f"rank {store.header.width} found, of a head of width {width}"]
        if not run.smoke:
            notes.append(f"{ALL:,} utterances would take {ALL / size * seconds['adopted'] / 60:.0f} minutes to adopt")
    run.save(rows, notes)


if __name__ == "__main__":
    main()
