"""What does a step with stored teachers cost? One thread, batch 8 of 3 s, NeMo's small Conformer, 5,000 tokens.

Peers of the same run: the plain CTC fine-tuning step of the same encoder and head, and the same step with 14 live
teachers of the original study's shape run on the batch. Weights are random: time does not depend on them. Stores
hold 14 teachers (fp16 activations, d = 144); the optimiser's update is part of every step.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kdlib.corpus.inputs import Batch
from kdlib.corpus.manifest import Utterance
from kdlib.io import repository_root, write_json
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.encoder_nemo import NeMoEncoder
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.models.nemo_files import conformer_config
from kdlib.objectives.objective import Learner, Objective
from kdlib.objectives.step import Sources
from kdlib.objectives.terms import TERMS
from kdlib.runtime import set_threads
from kdlib.settings.distill import Distill
from kdlib.targets.aggregation import TeacherEnsemble, Weighting
from kdlib.targets.live import LiveModel, live_ensemble

BATCH, SECONDS, SIZE, TEACHERS, ROUNDS, UTTERANCES = 8, 3.0, 5000, 14, 5, 32


def stored(folder: Path, teachers: list[Hybrid], frames: int) -> TeacherEnsemble:
    """Stores of every teacher on some utterances."""
    stores = {}
    for number, teacher in enumerate(teachers):
        known = {
            "train_speakers": (),
            "output": "ctc",
            "encoding": "fp16",
            "size": SIZE,
            "width": 144,
            "tokens": "none",
        }
        header = Header(teacher=f"T{number}", blank=2, bos=0, eos=1, stride_ms=40.0, **known)
        head = teacher.ctc_head
        with Writer(folder / header.teacher, header, (head.weight, head.bias)) as writer:
            for index in range(UTTERANCES):
                writer.add(f"u{index}", torch.randn(frames, 144))
        stores[header.teacher] = LogitStore(folder / header.teacher)
    return TeacherEnsemble(stores, Weighting())


def main() -> None:
    """Measure, print, and write outputs/benchmarks/step.json."""
    set_threads()
    torch.manual_seed(0)
    student = Hybrid(NeMoEncoder.build(conformer_config()), Heads(SIZE, layers=0))
    teachers = [Hybrid(Conformer(ConformerShape()), Heads(SIZE, layers=0)).eval() for _ in range(TEACHERS)]
    samples = int(16_000 * SECONDS)
    with torch.inference_mode():
        frames = int(student.eval()(torch.randn(1, samples), torch.tensor([samples])).lengths[0])
    student.train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def batch(number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        names = [f"u{int(one)}" for one in torch.randint(UTTERANCES, (BATCH,), generator=generator)]
        utterances = [Utterance(name, "S", Path(f"{name}.wav"), SECONDS, "") for name in names]
        inputs = torch.randn(BATCH, samples, generator=generator) / 10
        loaded = [inputs, torch.full((BATCH,), samples)]
        return Batch(utterances, [[50, 60, 70, 80]] * BATCH, loaded=loaded)

    def step(objective: Objective, number: int) -> float:
        one = batch(number)
        started = time.perf_counter()
        optimiser.zero_grad()
        objective(one)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        learner, ensemble = Learner(student), stored(Path(folder), teachers, frames)
        one_teacher = TeacherEnsemble({"T0": LogitStore(Path(folder) / "T0")}, Weighting())
        live = live_ensemble(ensemble, {f"T{number}": LiveModel(one) for number, one in enumerate(teachers)})
        forms = {"hard labels": Objective(learner, Distill(alpha=0.0, beta=1.0), TERMS)} | {
            name: Objective(learner, Distill(), TERMS, Sources({"ctc": target}))
            for name, target in (
                ("one stored teacher", one_teacher),
                ("14 stored teachers", ensemble),
                ("14 live teachers", live),
            )
        }
        times: dict[str, list[float]] = {name: [] for name in forms}
        for number in range(ROUNDS + 1):
            for name, form in forms.items():
                taken = step(form, number)
                if number:
                    times[name].append(taken)
    base = statistics.median(times["hard labels"])
    ratios = {
        name: [one / other for one, other in zip(some, times["hard labels"], strict=True)]
        for name, some in times.items()
    }
    found = {
        name: {"s": round(statistics.median(some), 3), "of_hard_labels": round(statistics.median(ratios[name]), 3)}
        for name, some in times.items()
    }
    result = {
        "batch": BATCH,
        "seconds": SECONDS,
        "frames": frames,
        "tokens": SIZE,
        "hard_s": round(base, 3),
        "forms": found,
    }
    print(json.dumps(result, indent=1))
    folder = repository_root() / "outputs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "step.json", result)


if __name__ == "__main__":
    main()
