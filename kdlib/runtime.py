"""The process that computes: its threads, its random numbers, and whether it is the one that writes."""

import os
import random


def set_threads() -> None:
    """One torch thread a process, unless OMP_NUM_THREADS asks for more: two beside a busy neighbour are far slower.

    Sums depend on the number of threads in their last bits, so this also makes runs repeatable.
    """
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def is_main_process() -> bool:
    """Whether this is the process that writes: of several that train one model, the first."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's random numbers."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(seed)
