"""What does the distillation loss cost at [8, 150, 5000]? Time and peak memory, forward and backward, one thread.

Peers of the same run: log_softmax + `F.kl_div` as it stands in most code, SpeechBrain's `nll_loss_kd`, and
a `torch.compile`d log-sum-exp form (its compilation is timed apart). Buffers are counted in sizes of [B, T, V].
"""

import json
import statistics
import sys
import time

import torch
from torch.nn import functional

from kdlib.io import repository_root, write_json
from kdlib.objectives.losses import soft_kl
from kdlib.runtime import set_threads

B, T, V, TEMPERATURE, ROUNDS = 8, 150, 5000, 2.0, 15


def naive(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The textbook: two softmaxes, `F.kl_div`, a mask."""
    student = functional.log_softmax(logits / TEMPERATURE, -1)
    teacher = functional.softmax(target / TEMPERATURE, -1)
    each = functional.kl_div(student, teacher, reduction="none").sum(-1)
    return (each * weights).sum() / weights.sum() * TEMPERATURE**2


def speechbrain(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """SpeechBrain's own: cross-entropy of the teacher's probabilities with the student's log-probabilities."""
    from speechbrain.nnet.losses import nll_loss_kd

    student = functional.log_softmax(logits / TEMPERATURE, -1)
    teacher = functional.softmax(target / TEMPERATURE, -1)
    return nll_loss_kd(student, teacher, weights.sum(1) / T) * TEMPERATURE**2


def by_logsumexp(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The form that is compiled."""
    z, u = logits / TEMPERATURE, target / TEMPERATURE
    p = u.softmax(-1)
    each = (p * (u - z)).sum(-1) + z.logsumexp(-1) - u.logsumexp(-1)
    return (each * weights).sum() / weights.sum() * TEMPERATURE**2


def ours(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """This repository's."""
    return soft_kl(logits, target, weights, TEMPERATURE)


def seconds(loss, logits, target, weights) -> float:
    """Forward and backward."""
    logits.grad = None
    started = time.perf_counter()
    loss(logits, target, weights).backward()
    return time.perf_counter() - started


def buffers(loss, logits, target, weights) -> float:
    """The highest amount of memory in use at once beyond the inputs, in sizes of [B, T, V]."""
    from torch.profiler import ProfilerActivity, profile

    logits.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss(logits, target, weights).backward()
    used = highest = 0
    for event in sorted((one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"), key=_when):
        used += event.nbytes()
        highest = max(highest, used)
    return highest / (4 * B * T * V)


def _when(event) -> int:
    return event.start_ns()


def main() -> None:
    """Measure, print, and write outputs/benchmarks/kd_loss.json."""
    set_threads()
    torch.manual_seed(0)
    logits = (3 * torch.randn(B, T, V)).requires_grad_()
    target, weights = 3 * torch.randn(B, T, V), torch.ones(B, T)
    weights[1:, T - 20 :] = 0
    forms = {"naive": naive, "SpeechBrain": speechbrain, "this repository": ours}
    if "--no-compile" not in sys.argv:
        compiled = torch.compile(by_logsumexp)
        started = time.perf_counter()
        compiled(logits, target, weights).backward()
        print(f"compiled in {time.perf_counter() - started:.1f} s")
        forms["compiled"] = compiled
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        seconds(form, logits, target, weights)
    for _ in range(ROUNDS):
        for name, form in forms.items():
            times[name].append(seconds(form, logits, target, weights))
    base = statistics.median(times["naive"])
    found = {
        name: {
            "ms": round(1000 * statistics.median(some), 1),
            "of_naive": round(statistics.median(some) / base, 3),
            "buffers": round(buffers(forms[name], logits, target, weights), 2),
        }
        for name, some in times.items()
    }
    exact = logits.detach().double().requires_grad_()
    naive(exact, target.double(), weights.double()).backward()
    logits.grad = None
    ours(logits, target, weights).backward()
    error = ((logits.grad - exact.grad).abs().max() / exact.grad.abs().max()).item()
    result = {"shape": [B, T, V], "forms": found, "gradient_error_of_largest": error}
    print(json.dumps(result, indent=1))
    folder = repository_root() / "outputs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "kd_loss.json", result)


if __name__ == "__main__":
    main()
