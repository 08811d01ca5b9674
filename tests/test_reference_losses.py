"""Losses against references, compared with float64 sums utterance by utterance."""

import pytest
import torch

from kdlib.models import Emissions
from kdlib.objectives.reference_losses import cross_entropy, ctc_loss
from kdlib.tokens import BLANK, EOS


def test_ctc_is_the_sum_over_all_alignments():
    """Three frames, one token: it may take any run of frames, with blanks around it."""
    logits = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    p = logits[0, :3].double().softmax(-1)
    paths = [(a, b, c) for a in (2, 3) for b in (2, 3) for c in (2, 3)]
    runs = [path for path in paths if "3" in "".join(map(str, path)) and "".join(map(str, path)) != "323"]
    total = sum(p[0, a] * p[1, b] * p[2, c] for a, b, c in runs)
    loss = ctc_loss(Emissions(logits, torch.tensor([3])), [[3]])
    assert BLANK == 2
    assert loss.item() == pytest.approx(-total.log().item(), rel=1e-5)


def test_ctc_is_a_mean_per_token_and_ignores_padding():
    logits = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1))
    first, second = (
        ctc_loss(Emissions(logits[i : i + 1, :n], torch.tensor([n])), [ids])
        for i, n, ids in ((0, 9, [3, 4, 5]), (1, 6, [5]))
    )
    both = ctc_loss(Emissions(logits, torch.tensor([9, 6])), [[3, 4, 5], [5]])
    assert both.item() == pytest.approx((first.item() + second.item()) / 2, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_includes_eos_and_no_padding(smoothing):
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2))
    rows = [(0, 0, 5), (0, 1, 6), (0, 2, 4), (0, 3, EOS), (1, 0, 3), (1, 1, EOS)]
    total = 0.0
    for b, step, token in rows:
        target = torch.full((7,), smoothing / 7, dtype=torch.float64)
        target[token] += 1 - smoothing
        total -= (target * logits[b, step].double().log_softmax(0)).sum().item()
    loss = cross_entropy(logits, [[5, 6, 4], [3]], smoothing)
    assert loss.item() == pytest.approx(total / len(rows), rel=1e-5)
