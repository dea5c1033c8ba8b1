"""A copy of the user's model to measure, so that nothing done to it reaches the user's."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError

Mode = Literal["eval", "train"]


def private_copy(
    model: nn.Module, mode: Mode = "eval", dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """A deep copy without compiled or distributed wrappers, in the asked mode, in at least float32, on the asked device.

    Raises:
        SubjectError: The model has parameters that are not initialised yet (lazy modules).
    """
    bare = _unwrapped(model)
    lazy = [name for name, p in bare.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise SubjectError(
            f"expected initialised parameters, but {', '.join(lazy[:5])} are lazy. Run one batch through the model first."
        )
    # Modules that compute a weight in a hook keep a non-leaf tensor, which deepcopy refuses; a detached stand-in is replaced at the next call.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in bare.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    copied = copy.deepcopy(bare, memo)
    for parent in list(copied.modules()):
        parent.__dict__.pop("_compiled_call_impl", None)
        for name, child in list(parent.named_children()):
            setattr(parent, name, _unwrapped(child))
    for parameter in copied.parameters():
        parameter.grad = None
    copied.train(mode == "train")
    target = dtype or max(
        (p.dtype for p in copied.parameters() if p.is_floating_point()), key=_precision, default=torch.float32
    )
    return copied.to(device=device, dtype=target if _precision(target) >= 32 else torch.float32)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _precision(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
