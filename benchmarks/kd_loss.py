"""What does the distillation loss cost at a batch of 8, 150 frames and 5,000 tokens, forward and backward?

The peers are `log_softmax` and `F.kl_div` as they stand in most code, SpeechBrain's `nll_loss_kd`, and a log-sum-exp
form under `torch.compile`. All are given the same teacher's logits, already divided by the temperature of 2. Memory is
the highest amount in use at once beyond the inputs, in units of the student's logits.
"""

import time

import report
import torch
from torch.nn import functional

from kdlib.objectives.losses import soft_kl
from kdlib.runtime import set_threads

FULL, SMOKE = (8, 150, 5000, 15), (2, 30, 50, 1)  # batch, frames, tokens, rounds
TEMPERATURE = 2.0
PEER = "`log_softmax` and `F.kl_div`"


def naive(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The textbook: two softmaxes, `F.kl_div`, a mask."""
    student = functional.log_softmax(logits / TEMPERATURE, -1)
    teacher = functional.softmax(target, -1)
    each = functional.kl_div(student, teacher, reduction="none").sum(-1)
    return (each * weights).sum() / weights.sum() * TEMPERATURE**2


def speechbrain(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """SpeechBrain's own: cross-entropy of the teacher's probabilities with the student's log-probabilities."""
    from speechbrain.nnet.losses import nll_loss_kd

    student = functional.log_softmax(logits / TEMPERATURE, -1)
    teacher = functional.softmax(target, -1)
    return nll_loss_kd(student, teacher, weights.mean(1)) * TEMPERATURE**2


def by_logsumexp(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The form that is compiled."""
    z, p = logits / TEMPERATURE, target.softmax(-1)
    each = (p * (target - z)).sum(-1) + z.logsumexp(-1) - target.logsumexp(-1)
    return (each * weights).sum() / weights.sum() * TEMPERATURE**2


def ours(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """This repository's."""
    return soft_kl(logits, target, weights, TEMPERATURE)


def gradient(loss, logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Forward and backward; no gradient is left behind."""
    loss(logits, target, weights).backward()
    found, logits.grad = logits.grad, None
    return found


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    torch.manual_seed(0)
    batch, frames, size, rounds = SMOKE if run.smoke else FULL
    logits = (3 * torch.randn(batch, frames, size)).requires_grad_()
    target, weights = 3 * torch.randn(batch, frames, size) / TEMPERATURE, torch.ones(batch, frames)
    weights[1:, frames - 20 :] = 0
    losses = {PEER: naive, "SpeechBrain's `nll_loss_kd`": speechbrain, "kdlib": ours}
    notes = []
    if not run.smoke:
        losses["log-sum-exp, compiled"] = compiled = torch.compile(by_logsumexp)
        started = time.perf_counter()
        gradient(compiled, logits, target, weights)
        notes.append(f"Compiling takes {time.perf_counter() - started:.0f} s once, which is not in the table.")
    forms = {name: lambda loss=loss: gradient(loss, logits, target, weights) for name, loss in losses.items()}
    found = report.against(report.interleaved(forms, rounds), PEER)
    rows = [
        {
            "loss": name,
            "ms": 1000 * found[name][0],
            "ratio of times": found[name][1],
            "memory, in logits": report.torch_bytes(forms[name]) / logits.nbytes,
        }
        for name in forms
    ]
    exact = logits.detach().double().requires_grad_()
    truth = gradient(naive, exact, target.double(), weights.double())
    error = float((gradient(ours, logits, target, weights) - truth).abs().max() / truth.abs().max())
    assert error < 1e-4, f"the losses are not the same: their gradients differ by {error}"
    notes.append(
        f"kdlib's gradient differs from that in double precision by at most {report.shown(error)} of its largest value."
    )
    run.save(rows, notes)


if __name__ == "__main__":
    main()
