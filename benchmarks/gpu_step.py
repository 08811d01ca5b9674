"""What does a step of a full-size student cost on one GPU, beside plain NeMo fine-tuning?

A step is the forward and backward pass on utterances of 3 s, gradient clipping and AdamW's update, of NVIDIA's small
Conformer-CTC (width 176, 16 layers; a batch of 8, as `params/uaspeech.yaml` has it, and of 32) and of its large one
(width 512, 18 layers; a batch of 32), with 5,000 tokens, in float32 and in bfloat16 under autocast. The peer is NeMo's
own `EncDecCTCModel` with its preprocessor, its SpecAugment and its loss. kdlib's steps have cached features, as a
training has from its second epoch on; stored teachers are of width 144, read from disk in every step.

Times are of five steps in a row, to the end of the last one's work on the GPU. Memory is the highest amount in use at
once beyond weights and the optimiser's state. Weights and speech are random, on which neither depends.
"""

import gc
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import report
import torch
from step import drawn, stored

from kdlib.corpus.inputs import Batch
from kdlib.models.augment import SpecAugment
from kdlib.models.encoder_cache import FeatureCache
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.encoder_nemo import NeMoEncoder
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.models.nemo_files import conformer_config, quiet_nemo
from kdlib.objectives.objective import Learner, Objective
from kdlib.objectives.step import Sources
from kdlib.objectives.terms import TERMS
from kdlib.runtime import set_threads, torch_device
from kdlib.settings.augment import Masks
from kdlib.settings.distill import Distill
from kdlib.targets.aggregation import TeacherEnsemble, Weighting

SMALL = {"d_model": 176, "layers": 16, "heads": 4, "channels": 176}
LARGE = {"d_model": 512, "layers": 18, "heads": 8, "channels": 512}
TINY = {"d_model": 16, "layers": 1, "heads": 2, "channels": 8}
# students with their batches, seconds, tokens, teachers, utterances, steps in a row, rounds
STUDENTS = {"small, batch 8": (SMALL, 8), "small, batch 32": (SMALL, 32), "large, batch 32": (LARGE, 32)}
FULL, SMOKE = (STUDENTS, 3.0, 5000, 14, 64, 5, 4), ({"tiny, batch 2": (TINY, 2)}, 0.6, 20, 2, 4, 1, 1)
PEER = "NeMo: EncDecCTCModel"
PRECISIONS = {"float32": False, "bfloat16": True}


def nemo_model(config: dict, tokens: int):
    """NeMo's complete model with the encoder of a configuration, and tokens without a tokenizer."""
    with quiet_nemo():
        from nemo.collections.asr.models import EncDecCTCModel
        from omegaconf import OmegaConf

        complete = {
            "sample_rate": 16_000,
            **config,
            "spec_augment": {
                "_target_": "nemo.collections.asr.modules.SpectrogramAugmentation",
                **{"freq_masks": 2, "time_masks": 2, "freq_width": 27, "time_width": 0.05},
            },
            "decoder": {
                "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
                **{"feat_in": config["encoder"]["d_model"], "num_classes": tokens},
                "vocabulary": [f"t{number}" for number in range(tokens)],
            },
        }
        return EncDecCTCModel(cfg=OmegaConf.create(complete))


def main() -> None:
    run = report.start(__file__, __doc__)
    if not run.smoke and not torch.cuda.is_available():
        print("gpu_step: there is no CUDA GPU here; not measured")
        return
    set_threads()
    torch.manual_seed(0)
    students, seconds, tokens, count, utterances, steps, rounds = SMOKE if run.smoke else FULL
    device = torch_device("auto")
    shape = TINY if run.smoke else {}
    teachers = [Hybrid(Conformer(ConformerShape(**shape)), Heads(tokens, layers=0)) for _ in range(count)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ensemble = stored(Path(folder), teachers, int(seconds * 25), utterances)
        for (name, (sizes, size)), (precision, half) in itertools.product(students.items(), PRECISIONS.items()):
            forms = steps_of(conformer_config(**sizes), tokens, ensemble, device, half)

            given = [
                [drawn(number * steps + one, size, seconds, utterances, device) for one in range(steps)]
                for number in range(rounds + 1)
            ]
            memory = {form: bytes_beyond(lambda step=step, one=given[0][0]: step(one)) for form, step in forms.items()}
            repeated = {form: lambda batches, step=step: in_a_row(step, batches) for form, step in forms.items()}
            found = report.against(report.interleaved(repeated, rounds, given.__getitem__), PEER)
            rows += [
                {
                    "student": name,
                    "precision": precision,
                    "step": form,
                    "ms": 1000 * taken / steps,
                    "ratio of times": ratio,
                    "GB": memory[form] / 1e9,
                    "ratio of memory": memory[form] / max(1, memory[PEER]),
                }
                for form, (taken, ratio) in found.items()
            ]
            run.save(rows)  # what was found so far, should the time of a lent machine end
            del forms, repeated, given
            gc.collect()
            torch.cuda.empty_cache()


def steps_of(
    config: dict, tokens: int, ensemble: TeacherEnsemble, device: torch.device, half: bool
) -> dict[str, Callable[[Batch], None]]:
    """The steps that are compared, each with a model of its own."""
    plain = nemo_model(config, tokens).train().to(device)

    def plain_loss(batch: Batch) -> torch.Tensor:
        log_probs, frames, _ = plain(input_signal=batch.inputs, input_signal_length=batch.lengths)
        targets = torch.tensor(batch.ids, device=device)
        sizes = torch.full((len(batch),), targets.shape[1], device=device)
        return plain.loss(log_probs=log_probs, targets=targets, input_lengths=frames, target_lengths=sizes)

    def ours(settings: Distill, sources: Sources) -> Callable[[Batch], None]:
        student = Hybrid(NeMoEncoder.build(config), Heads(tokens, layers=0)).train().to(device)
        student.encoder.spec_augment = SpecAugment(Masks(warmup=0))
        objective = Objective(Learner(student), settings, TERMS, sources)
        objective.cache = FeatureCache(student.encoder)
        return step_with(student, lambda batch: objective(batch)["loss"], device, half)

    one = TeacherEnsemble({"T0": ensemble.stores["T0"]}, Weighting())
    return {
        PEER: step_with(plain, plain_loss, device, half),
        "kdlib: hard labels": ours(Distill(alpha=0.0, beta=1.0), Sources({})),
        "kdlib: one stored teacher": ours(Distill(), Sources({"ctc": one})),
        f"kdlib: {len(ensemble.stores)} stored teachers": ours(Distill(), Sources({"ctc": ensemble})),
    }


def step_with(
    model: torch.nn.Module, loss: Callable[[Batch], torch.Tensor], device: torch.device, half: bool
) -> Callable[[Batch], None]:
    """A step of AdamW with a loss."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(batch: Batch) -> None:
        optimiser.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return step


def in_a_row(step: Callable[[Batch], None], batches: list[Batch]) -> None:
    """Several steps, to the end of their work."""
    for batch in batches:
        step(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bytes_beyond(work: Callable[[], None]) -> int:
    """The GPU memory that the second call takes beyond what was in use before it."""
    if not torch.cuda.is_available():
        return report.torch_bytes(work)
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
