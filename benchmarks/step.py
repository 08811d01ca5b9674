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

from kdlib.io import repository_root, write_json
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.encoder_nemo import NeMoEncoder
from kdlib.models.hybrid import Heads, Hybrid, NeMoHybridStudent
from kdlib.models.nemo_files import conformer_config
from kdlib.objectives.objective import Batch, Objective, TrainableStudent
from kdlib.runtime import set_threads
from kdlib.settings.distill import Distill
from kdlib.targets.aggregation import TeacherEnsemble, Weighting

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


class Live:
    """The same ensemble, but its teachers run on the batch now."""

    fixed_temperature = False

    def __init__(self, teachers: list[Hybrid]) -> None:
        self.teachers, self.batch = teachers, None

    def to(self, device):
        """Stay on the device."""
        return self

    def coverage(self, utt_ids):
        """Every utterance has a target."""
        return type("Coverage", (), {"usable": list(utt_ids)})

    def logits(self, utt_ids, speakers, lengths, temperature):
        """The mean of their logits."""
        with torch.inference_mode():
            total = sum(one(self.batch.wavs, self.batch.wav_lens).ctc.logits for one in self.teachers)
        return (total / len(self.teachers)).clone(), torch.tensor(lengths)


def main() -> None:
    """Measure, print, and write outputs/benchmarks/step.json."""
    set_threads()
    torch.manual_seed(0)
    student = NeMoHybridStudent(NeMoEncoder.built(conformer_config()), Heads(SIZE, layers=0))
    teachers = [Hybrid(Conformer(ConformerShape()), Heads(SIZE, layers=0)).eval() for _ in range(TEACHERS)]
    samples = int(16_000 * SECONDS)
    with torch.inference_mode():
        frames = int(student.eval()(torch.randn(1, samples), torch.tensor([samples])).lengths[0])
    student.train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def batch(number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        names = [f"u{int(one)}" for one in torch.randint(UTTERANCES, (BATCH,), generator=generator)]
        wavs = torch.randn(BATCH, samples, generator=generator) / 10
        return Batch(wavs, torch.full((BATCH,), samples), [[50, 60, 70, 80]] * BATCH, names, ["S"] * BATCH)

    def step(objective: Objective, number: int) -> float:
        one = batch(number)
        for ensemble in objective.targets.values():
            if isinstance(ensemble, Live):
                ensemble.batch = one
        started = time.perf_counter()
        optimiser.zero_grad()
        objective(one)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        learner, ensemble = TrainableStudent(student), stored(Path(folder), teachers, frames)
        one_teacher = TeacherEnsemble({"T0": LogitStore(Path(folder) / "T0")}, Weighting())
        forms = {
            "hard labels": Objective(learner, Distill(alpha=0.0, beta=1.0), {}),
            "one stored teacher": Objective(learner, Distill(), {"ctc": one_teacher}),
            "14 stored teachers": Objective(learner, Distill(), {"ctc": ensemble}),
            "14 live teachers": Objective(learner, Distill(), {"ctc": Live(teachers)}),
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
