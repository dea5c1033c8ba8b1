"""Layers of many networks at once: what each layer of a fully connected network becomes when all its tensors have an axis over networks.

`torch.func.vmap` does the same for any network, but allocates every gradient anew. Here gradients are written where those of the last update
lie, which on a CPU nearly halves the time of an update of small networks (docs/benchmarks.md).
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plasticity_probe.checkpoints.networks import ACTIVATIONS, MLP, CReLU

UNCHANGED = tuple(kind for kind in ACTIVATIONS.values() if kind is not CReLU)
"""Layers that work element by element and so need no change."""


def side_by_side(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module | None:
    """A network of the same paths that maps inputs (S, N, ...) to the outputs (S, N, ...) of S networks.

    Args:
        network: One of them.
        weights: Their parameters by name, (S, ...), leaves that require gradients.

    Returns:
        The network; its backward pass writes into the `grad` of the weights. None where a layer is of a kind that has no such form here.
    """
    if not any(True for _ in network.children()):
        return None
    whole = copy.deepcopy(network)
    for path, layer in network.named_modules():
        if not any(True for _ in layer.children()):
            changed = _changed(path, layer, weights)
            if changed is None:
                return None
            whole.set_submodule(path, changed)
        elif type(layer) not in (nn.Sequential, MLP):
            return None
    return whole


class Linears(nn.Module):
    """Linear layers of S networks: x (S, N, in) to x W^T + b, (S, N, out).

    Args:
        weight: (S, out, in).
        bias: (S, out), if any.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.tensors = (weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(S, N, in) to (S, N, out)."""
        weight, bias = self.tensors
        return _Affine.apply(x, weight, bias)  # type: ignore[no-any-return]


class LayerNorms(nn.Module):
    """Layer normalisations of S networks over the last axis of (S, N, units).

    Args:
        weight: (S, units).
        bias: (S, units), if any.
        eps: Added to the variance.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.tensors, self.eps = (weight, bias), eps

    def forward(self, x: Tensor) -> Tensor:
        """(S, N, units) to the same."""
        weight, bias = self.tensors
        normalised = functional.layer_norm(x, x.shape[-1:], eps=self.eps) * weight[:, None]
        return normalised if bias is None else normalised + bias[:, None]


class CReLUs(nn.Module):
    """Concatenated ReLU over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """(S, N, units) to (S, N, 2 units)."""
        return torch.cat([x.relu(), (-x).relu()], -1)


class _Affine(torch.autograd.Function):
    """x W^T + b whose gradients are written into the memory of the last ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias
        products = torch.bmm(x, weight.mT)
        return products if bias is None else products.add_(bias[:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        torch.bmm(gradient.mT, x, out=weight.grad)
        if ctx.bias is not None:
            torch.sum(gradient, 1, out=ctx.bias.grad)
        return torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None, None, None


def _changed(path: str, layer: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module | None:
    weight, bias = weights.get(f"{path}.weight"), weights.get(f"{path}.bias")
    if isinstance(layer, UNCHANGED):
        return layer
    if type(layer) is nn.Flatten:
        return nn.Flatten(2)
    if type(layer) is CReLU:
        return CReLUs()
    if type(layer) is nn.Linear and weight is not None:
        return Linears(weight, bias)
    if type(layer) is nn.LayerNorm and weight is not None:
        return LayerNorms(weight, bias, layer.eps)
    return None
