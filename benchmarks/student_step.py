"""How much faster is a student's step with cached features and faster layers?

A step is the forward and backward pass with hard labels and the optimiser's update, of the demo's student (width 96, 4
layers, 64 tokens) on 16 words of 0.5 to 3 s of equal length within 10 %, with masks. The peer is what a plain training
does: batches whose lengths differ by up to 56 %, features computed in every step, layers and masks as torch and
torchaudio have them. Each row adds one change to those above it. Weights and speech are random, on which time does not
depend.
"""

from pathlib import Path

import report
import torch
from torch import nn
from torchaudio.transforms import FrequencyMasking, TimeMasking

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.models.augment import SpecAugment
from kdlib.models.encoder_cache import FeatureCache
from kdlib.models.encoder_nemo import NeMoEncoder
from kdlib.models.fast_layers import FastDropout, PointwiseConv, use_fast_layers
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.models.nemo_files import conformer_config
from kdlib.objectives.objective import Learner, Objective
from kdlib.objectives.terms import TERMS
from kdlib.runtime import set_threads
from kdlib.settings.augment import Masks
from kdlib.settings.distill import Distill

FULL, SMOKE = (96, 4, 16, 3.0, 12), (16, 1, 2, 0.6, 1)  # width, layers, utterances, longest in seconds, rounds
PEER = "plain"


class PlainMasks:
    """SpecAugment by torchaudio: two masks of bands and two of frames."""

    def __call__(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        changed = features[:, None]
        for _ in range(2):
            changed = TimeMasking(20, iid_masks=True, p=0.25)(FrequencyMasking(8, iid_masks=True)(changed))
        return changed[:, 0]


def use_plain_layers(model: nn.Module) -> None:
    """Undo `use_fast_layers`."""
    for layer in model.modules():
        if type(layer) is FastDropout:
            layer.__class__ = nn.Dropout
        elif type(layer) is PointwiseConv:
            layer.__class__ = nn.Conv1d
        elif type(layer) is nn.Conv2d:
            layer.to(memory_format=torch.contiguous_format)


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    torch.manual_seed(0)
    width, layers, size, longest, rounds = SMOKE if run.smoke else FULL
    config = conformer_config(d_model=width, layers=layers, heads=4, channels=32, mels=40, kernel=15)
    student = Hybrid(NeMoEncoder.build(config), Heads(64, layers=0)).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    objective, cache = Objective(Learner(student), Distill(alpha=0.0, beta=1.0), TERMS), FeatureCache(student.encoder)
    ours = SpecAugment(Masks(warmup=0))

    def batch(number: int, spread: float) -> Batch:
        generator = torch.Generator().manual_seed(number)
        middle = 0.5 + (longest - 0.5) * ((number * 7) % 12) / 12
        shares = 1 + (spread - 1) * (torch.rand(size, generator=generator) - 0.5)
        lengths = (16_000 * middle * shares).long()
        names = [f"u{number} {row} {spread}" for row in range(size)]
        listed = [Utterance(name, "S", Path(f"{name}.wav"), middle, "") for name in names]
        inputs = torch.randn(size, int(lengths.max()), generator=generator) / 10
        return Batch(listed, [[5, 6, 7]] * size, loaded=[inputs, lengths])

    def form(masks, cached, layers, spread):
        def step(given: tuple[Batch, Batch]) -> None:
            student.encoder.spec_augment, objective.cache = masks, cache if cached else None
            layers(student)
            optimiser.zero_grad()
            objective(given[spread])["loss"].backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()

        return step

    def given(number: int) -> tuple[Batch, Batch]:
        batches = batch(number, 1.56), batch(number, 1.1)
        for one in batches:  # a training computes features in its first epoch only
            cache(one)
        return batches

    forms = {
        PEER: form(PlainMasks(), False, use_plain_layers, 0),
        "lengths within 10 %": form(PlainMasks(), False, use_plain_layers, 1),
        "masks for the whole batch": form(ours, False, use_plain_layers, 1),
        "features cached": form(ours, True, use_plain_layers, 1),
        "faster layers": form(ours, True, use_fast_layers, 1),
    }
    found = report.against(report.interleaved(forms, rounds, given), PEER)
    run.save([{"step": name, "s": taken, "ratio of times": ratio} for name, (taken, ratio) in found.items()])


if __name__ == "__main__":
    main()
