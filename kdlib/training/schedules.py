"""Learning-rate schedules: step number -> factor of the learning rate."""

import math
from collections.abc import Callable

Scale = Callable[[int], float]  # step number -> factor of the learning rate


def cosine(warmup_steps: int, total_steps: int) -> Scale:
    """Linear warm-up, then half a cosine period down to zero."""

    def scale(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return scale


def noam(warmup_steps: int, width: int) -> Scale:
    """Linear warm-up, then inverse square root decay; divided by sqrt(model width) (Vaswani et al. 2017, eq. 3).

    >>> round(noam(100, 176)(99), 6) == round((176 * 100) ** -0.5, 6)
    True
    """
    warm = max(1, warmup_steps)
    return lambda step: width**-0.5 * min((step + 1) ** -0.5, (step + 1) * warm**-1.5)
