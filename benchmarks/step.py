"""What does a training step with stored teachers cost?

A step is the forward and backward pass of NVIDIA's small Conformer with 5,000 tokens on 8 utterances of 3 s, and the
optimiser's update. The peers are the plain CTC step of the same model, and the same step with 14 live teachers of the
original study's shape. Weights are random, on which time does not depend; stores are in fp16, of width 144.
"""

import tempfile
from pathlib import Path

import report
import torch

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
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

FULL, SMOKE = (8, 3.0, 5000, 14, 32, 5), (2, 1.0, 100, 2, 4, 1)  # batch, seconds, tokens, teachers, utterances, rounds
TINY = {"d_model": 16, "layers": 1, "heads": 2, "channels": 8}  # student and teachers of a smoke run
PEER = "hard labels, no teacher"


def stored(folder: Path, teachers: list[Hybrid], frames: int, utterances: int) -> TeacherEnsemble:
    """Stores of every teacher on some utterances."""
    stores = {}
    for number, teacher in enumerate(teachers):
        head, width = teacher.ctc_head, teacher.encoder.width
        known = {"train_speakers": (), "output": "ctc", "encoding": "fp16", "size": len(head.bias), "width": width}
        header = Header(teacher=f"T{number}", tokens="none", blank=2, bos=0, eos=1, stride_ms=40.0, **known)
        with Writer(folder / header.teacher, header, (head.weight, head.bias)) as writer:
            for index in range(utterances):
                writer.add(f"u{index}", torch.randn(frames, width))
        stores[header.teacher] = LogitStore(folder / header.teacher)
    return TeacherEnsemble(stores, Weighting())


def drawn(number: int, size: int, seconds: float, utterances: int, device: torch.device | str = "cpu") -> Batch:
    """A batch of random speech, of some of the utterances that have stored outputs."""
    generator, samples = torch.Generator().manual_seed(number), int(16_000 * seconds)
    names = [f"u{int(one)}" for one in torch.randint(utterances, (size,), generator=generator)]
    listed = [Utterance(name, "S", Path(f"{name}.wav"), seconds, "") for name in names]
    inputs = torch.randn(size, samples, generator=generator) / 10
    loaded = [inputs.to(device), torch.full((size,), samples, device=device)]
    return Batch(listed, [[5, 6, 7, 8]] * size, device=device, loaded=loaded)


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    torch.manual_seed(0)
    size, seconds, tokens, count, utterances, rounds = SMOKE if run.smoke else FULL
    shape = TINY if run.smoke else {}
    student = Hybrid(NeMoEncoder.build(conformer_config(**shape)), Heads(tokens, layers=0))
    teachers = [Hybrid(Conformer(ConformerShape(**shape)), Heads(tokens, layers=0)).eval() for _ in range(count)]
    samples = int(16_000 * seconds)
    with torch.inference_mode():
        frames = int(student.eval()(torch.randn(1, samples), torch.tensor([samples])).lengths[0])
    student.train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def step(objective: Objective, one: Batch) -> None:
        optimiser.zero_grad()
        objective(one)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()

    with tempfile.TemporaryDirectory() as folder:
        learner, ensemble = Learner(student), stored(Path(folder), teachers, frames, utterances)
        one_teacher = TeacherEnsemble({"T0": ensemble.stores["T0"]}, Weighting())
        live = live_ensemble(ensemble, {f"T{number}": LiveModel(one) for number, one in enumerate(teachers)})
        objectives = {PEER: Objective(learner, Distill(alpha=0.0, beta=1.0), TERMS)} | {
            name: Objective(learner, Distill(), TERMS, Sources({"ctc": target}))
            for name, target in (
                ("one stored teacher", one_teacher),
                (f"{count} stored teachers", ensemble),
                (f"{count} live teachers", live),
            )
        }
        forms = {name: lambda one, objective=objective: step(objective, one) for name, objective in objectives.items()}
        found = report.against(
            report.interleaved(forms, rounds, lambda number: drawn(number, size, seconds, utterances)), PEER
        )
    run.save([{"step with": name, "s": taken, "ratio of times": ratio} for name, (taken, ratio) in found.items()])


if __name__ == "__main__":
    main()
