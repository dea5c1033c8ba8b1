"""A copy of the user's model to measure, so that nothing done to it reaches the user's."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from plasticity_probe.errors import SubjectError

Mode = Literal["eval", "train"]


def private_copy(
    model: nn.Module, mode: Mode = "eval", dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """A deep copy without compiled or distributed wrappers, in the asked mode, in at least float32, on the asked device.

    Weight normalisation is computed by its formula there instead of by torch's fused function, whose second derivative is wrong.

    Raises:
        SubjectError: The model has parameters that are not initialised yet (lazy modules) or complex, or it holds what cannot be copied.
    """
    bare = _unwrapped(model)
    _check_parameters(bare)
    copied = _copied(bare)
    for parameter in copied.parameters():
        parameter.grad = None
    for module in copied.modules():
        _make_twice_differentiable(module)
    copied.train(mode == "train")
    target = dtype or max(
        (p.dtype for p in copied.parameters() if p.is_floating_point()), key=_precision, default=torch.float32
    )
    return copied.to(device=device, dtype=target if _precision(target) >= 32 else torch.float32)


def _check_parameters(model: nn.Module) -> None:
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise SubjectError(
            f"expected initialised parameters, but {', '.join(lazy[:5])} are lazy. Run one batch through the model first."
        )
    complex_ones = [name for name, p in model.named_parameters() if p.is_complex()]
    if complex_ones:
        raise SubjectError(
            f"expected real parameters, but {', '.join(complex_ones[:5])} are complex. Store real and imaginary part as one real parameter "
            "and join them in forward (torch.view_as_complex)."
        )


def _copied(bare: nn.Module) -> nn.Module:
    # Modules that compute a weight in a hook, and recurrent ones that keep their state, hold tensors that are no leaves; deepcopy refuses
    # those. A detached stand-in has the same numbers.
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().clone()
        for module in bare.modules()
        for tensor in _tensors_in(vars(module))
        if not tensor.is_leaf
    }
    try:
        for module in reversed(list(bare.modules())):
            inner = _unwrapped(module)
            if inner is not module:
                memo[id(module)] = copy.deepcopy(inner, memo)
        return copy.deepcopy(bare, memo)
    except (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        raise SubjectError(
            f"the model cannot be copied, and only a copy is measured so that yours stays as it is: {error}. Take what cannot be copied "
            "(locks, files, generators, tensors with a history) out of the model's attributes, or load its weights into a freshly built one."
        ) from error


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among the entries of mappings, tuples and lists, however nested; not those of other modules."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors_in(entry)
    elif isinstance(value, tuple | list | set):
        for entry in value:
            yield from _tensors_in(entry)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


class _Composed(_WeightNorm):
    """Weight normalisation g v / |v| (Salimans & Kingma 2016, equation 2) from functions that can be differentiated twice.

    The first derivative of torch's fused function takes |v| for a constant when it is differentiated again, so that the Hessian comes out
    asymmetric and wrong (torch 2.13, norms over the first or the last dimension).
    """

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return _weight_of(weight_g, weight_v, self.dim)


class _ComposedByHook(WeightNorm):
    """The same for torch.nn.utils.weight_norm, which computes the weight in a hook before each call."""

    def compute_weight(self, module: nn.Module) -> Tensor:
        return _weight_of(getattr(module, f"{self.name}_g"), getattr(module, f"{self.name}_v"), self.dim)


def _make_twice_differentiable(module: nn.Module) -> None:
    if type(module) is _WeightNorm:
        module.__class__ = _Composed
    for hook in module._forward_pre_hooks.values():
        if type(hook) is WeightNorm:
            cast(Any, hook).__class__ = _ComposedByHook


def _weight_of(g: Tensor, v: Tensor, dim: int) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _precision(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
