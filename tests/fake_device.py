"""A device that there is none of: tensors that compute on the CPU, say that they are elsewhere, and refuse the CPU's.

What takes a device for granted, such as a tensor made without `device=`, fails here as it would on a GPU.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ELSEWHERE = torch.device("cpu", 1)
ALLOWED = {"_to_copy", "copy_", "_local_scalar_dense", "_ctc_loss", "_ctc_loss_backward"}  # as on a GPU


class Elsewhere(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=ELSEWHERE,
            requires_grad=values.requires_grad,
        )  # fmt: skip
        made.values_ = values
        return made

    def tolist(self):
        return self.values_.tolist()

    def numpy(self, **_):
        raise AssertionError("numpy: a tensor on the device; write .cpu().numpy()")

    def __repr__(self, **_):
        return f"Elsewhere({self.values_})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Tensors made with `device=ELSEWHERE`, and copies to it, are on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    name = func.overloadpacket.__name__
    flat = torch.utils._pytree.tree_leaves((args, kwargs))
    there = [one for one in flat if isinstance(one, Elsewhere)]
    here = [one for one in flat if isinstance(one, torch.Tensor) and not isinstance(one, Elsewhere) and one.dim()]
    by_index = name in ("index", "index_put", "index_put_") and isinstance(args[0], Elsewhere)  # the CPU's are moved
    if there and here and name not in ALLOWED and not by_index:
        shapes = [list(one.shape) for one in here]
        raise AssertionError(f"{name}: tensors {shapes} of the CPU meet tensors on the device")
    wanted = kwargs.get("device")
    on_device = bool(there) if wanted is None else torch.device(wanted) == ELSEWHERE
    if name == "_local_scalar_dense":
        on_device = False
    if wanted is not None and torch.device(wanted) == ELSEWHERE:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain = tree_map(lambda one: one.values_ if isinstance(one, Elsewhere) else one, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if func._schema.is_mutable:  # in place: the result is the argument
        written = [one for one in flat if isinstance(one, Elsewhere)]
        return next((one for one in written if one.values_ is found), _wrap(found, on_device))
    return _wrap(found, on_device)


def _wrap(found, on_device: bool):
    if not on_device:
        return found
    return tree_map(lambda one: Elsewhere(one) if isinstance(one, torch.Tensor) else one, found)


@contextmanager
def fake_device():
    """In this context tensors can be made on, and moved to, the device that is yielded."""
    inference_mode, torch.inference_mode = torch.inference_mode, torch.no_grad  # which has no views of such tensors
    tensor, torch.tensor = torch.tensor, lambda data, device="cpu", **more: tensor(data, **more).to(device)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else `module.to` keeps the old tensors' class
    try:
        with _Factories():
            yield ELSEWHERE
    finally:
        torch.inference_mode, torch.tensor = inference_mode, tensor
        inference_mode, torch.inference_mode = torch.inference_mode, torch.no_grad  # which has no views of such tensors
    tensor, torch.tensor = torch.tensor, lambda data, device="cpu", **more: tensor(data, **more).to(device)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
