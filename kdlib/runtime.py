"""The process: its threads, its device, its random seeds, and its rank."""

import os
import random
import threading
import time
from typing import TYPE_CHECKING

from kdlib.errors import UserError

if TYPE_CHECKING:
    import torch


def set_threads() -> None:
    """Set one torch thread per process, unless OMP_NUM_THREADS is higher: two on a busy machine are far slower.

    The last bits of sums depend on the number of threads, so this also makes runs repeatable.
    """
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def torch_device(setting: str) -> "torch.device":
    """The device of a recipe's `device`: "auto" is a CUDA GPU where there is one, else the CPU."""
    import torch

    available = torch.cuda.is_available()
    if setting == "cuda" and not available:
        raise UserError("device is 'cuda', but there is no CUDA GPU here; write device: auto")
    return torch.device("cuda" if available and setting != "cpu" else "cpu")


def is_main_process() -> bool:
    """True for the process that writes: the first of several that train one model."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def end_with_parent(every_s: float = 0.5) -> None:
    """End this process soon after the one that started it: a killed run must not go on beside the one that resumes."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_s)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(seed)
