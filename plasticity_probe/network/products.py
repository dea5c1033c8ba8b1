"""What a chunk of examples adds to a curvature-vector product: its first-order graph, differentiated once more for every vector.

With L = sum of all loss terms / their number, parameters theta of length P and examples in chunks c:

    hessian      H = d^2 L / d theta^2                      by reverse over reverse (Pearlmutter 1994)
    ggn          G = sum_c J_c' (d^2 L_c / d z_c^2) J_c     z the outputs, J their Jacobian (Schraudolph 2002)
    fisher       F = (1/N) sum_i g_i g_i'                   g_i the gradient of l_i, where L = (1/N) sum_i l_i

Only reverse mode is used, so whatever torch can differentiate twice is covered: a Jacobian-vector product is the derivative of the
vector-Jacobian product, which is linear in its vector (Townsend 2017). Nothing here waits for an accelerator or reads a number from it.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.autograd_nodes import recorded
from plasticity_probe.network.examples import Batch
from plasticity_probe.network.losses import Terms, inputs_and_targets
from plasticity_probe.network.subject import Subject

Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
"""What a chunk adds to a product: parameter-shaped tensors in, the same out, None for a parameter that nothing is added to."""

Graph = Callable[[Subject, Batch], Product]
"""Builds the graph of a chunk and returns its product; the graph lives as long as the product does."""


def hessian_product(subject: Subject, batch: Batch) -> Product:
    """The product with a chunk's share of the Hessian: the derivative of its gradient along a vector.

    Args:
        subject: The network and its loss.
        batch: Some of its examples, on its device.
    """
    parameters = list(subject.parameters.values())
    sums, _ = subject.losses(subject.parameters, batch)
    loss = sums.sum() / subject.terms
    return _transposed_jacobian(_differentiable([loss], parameters, [torch.ones_like(loss)]), parameters)


def ggn_product(subject: Subject, batch: Batch) -> Product:
    """The product with a chunk's share of the generalised Gauss-Newton matrix.

    Args:
        subject: The network and its loss of outputs and targets.
        batch: Some of its examples, on its device.
    """
    of_outputs = cast(Callable[[Tensor, Tensor], Terms], subject.loss.of_outputs)
    outputs = subject.outputs(subject.parameters, batch)
    free = outputs.detach().requires_grad_()
    sums, _ = of_outputs(free, cast(Tensor, inputs_and_targets(batch)[1]))
    loss = sums.sum() / subject.terms
    of_loss = _transposed_jacobian(_differentiable([loss], [free], [torch.ones_like(loss)]), [free])
    return _sandwich(outputs, list(subject.parameters.values()), lambda tangent: of_loss([tangent])[0])


def fisher_product(subject: Subject, batch: Batch) -> Product:
    """The product with a chunk's share of the empirical Fisher.

    Args:
        subject: The network and its loss.
        batch: Some of its examples, on its device.
    """
    sums, _ = subject.losses(subject.parameters, batch)
    examples = len(subject.examples)
    losses = sums * (examples / subject.terms)
    return _sandwich(losses, list(subject.parameters.values()), lambda tangent: tangent / examples)


def _sandwich(values: Tensor, parameters: Sequence[Tensor], inner: Callable[[Tensor], Tensor | None]) -> Product:
    """The product with J' B J, where J is the Jacobian of `values` and B the map `inner`; None is zero."""
    cotangent = torch.zeros_like(values, requires_grad=True)
    transposed = _transposed_jacobian([values], parameters)
    forward = _transposed_jacobian(_differentiable([values], parameters, [cotangent]), [cotangent])

    def product(vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
        (tangent,) = forward(vector)
        along = None if tangent is None else inner(tangent)
        return [None] * len(parameters) if along is None else transposed([along])

    return product


def _transposed_jacobian(values: Sequence[Tensor], inputs: Sequence[Tensor]) -> Product:
    """The map u -> (d values / d inputs)' u on a graph that is kept."""
    influenced = [value.requires_grad for value in values]
    # Edges of the graph, so that the values themselves, as large as the parameters, need not be held.
    live = [get_gradient_edge(value) for value, depends in zip(values, influenced, strict=True) if depends]

    def product(cotangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        if not live:
            return [None] * len(inputs)
        along = [cotangent for cotangent, depends in zip(cotangents, influenced, strict=True) if depends]
        return torch.autograd.grad(live, inputs, along, retain_graph=True, allow_unused=True)

    return product


def _differentiable(values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """(d values / d inputs)' cotangents with a graph of their own; zeros without one where there is no influence."""
    if not any(value.requires_grad for value in values):
        return [torch.zeros((), dtype=each.dtype, device=each.device).expand_as(each) for each in inputs]
    found = torch.autograd.grad(values, inputs, cotangents, create_graph=True, allow_unused=True)
    _check_twice_differentiable(found)
    return [
        torch.zeros((), dtype=each.dtype, device=each.device).expand_as(each) if part is None else part
        for each, part in zip(inputs, found, strict=True)
    ]


def _check_twice_differentiable(gradients: Sequence[Tensor | None]) -> None:
    """Refuses operations marked once_differentiable: torch raises nothing where only some inputs are asked for, and takes them for constants."""
    if any(node.name() == "torch::autograd::Error" for node in recorded(gradients)):
        raise SubjectError(
            "expected operations that can be differentiated twice, but the network or the loss holds a custom one marked once_differentiable, "
            "so there are no curvature-vector products. Write its backward in differentiable operations, or leave out probes of curvature."
        )
