"""The Hessian of each example's loss in its own input, seen through its products with random vectors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.examples import Batch, map_tensors, tensors_of
from plasticity_probe.network.losses import inputs_and_targets
from plasticity_probe.network.subject import Subject


def squared_input_products(subject: Subject, batch: Batch, draws: int, generator: torch.Generator) -> Tensor | str:
    """The squared norms |H_x v|^2 for the examples of a batch, H_x the Hessian of an example's loss in its input, v Rademacher.

    Their mean over v is tr(H_x^2). Exact by differentiating twice: the loss of an example depends on its own input alone, so the gradient of the
    summed losses holds every example's own gradient. The loss of an example is the mean over its terms; without a term the products are 0.

    Args:
        subject: The network and its loss.
        batch: Some of its examples, on its device.
        draws: Random vectors per example; those of one example are drawn together, so that it does not matter how the examples are cut.
        generator: The source of randomness, on the CPU.

    Returns:
        Shape (n, draws), float64, on the CPU; or a sentence that says why it is not defined: there is no single floating-point input, or the
        examples influence each other.
    """
    found = _only_floating_input(batch)
    if isinstance(found, str):
        return found
    x = found.detach().clone().requires_grad_()
    parameters = {name: value.detach() for name, value in subject.parameters_or_none.items()}
    sums, counts = subject.losses(parameters, _with_input(batch, found, x))
    if len(x) != len(sums):
        return f"The input of shape {tuple(x.shape)} has no row per example, so there is no input-loss curvature."
    if _coupled(sums, x):
        return (
            "The loss of an example depends on the inputs of others (BatchNorm in train mode, a contrastive loss), so there is no input-loss "
            "curvature. Measure with mode='eval'."
        )
    slope = _gradient((sums / torch.where(counts > 0, counts, 1)).sum(), x, create_graph=True)
    signs = torch.randint(0, 2, (len(x), draws, *x.shape[1:]), generator=generator, dtype=torch.int8)
    columns = []
    for draw in signs.unbind(1):
        product = _gradient(slope, x, (2 * draw - 1).to(x))
        columns.append(product.double().flatten(1).square().sum(1))
    return torch.stack(columns, 1).cpu()


def _only_floating_input(batch: Batch) -> Tensor | str:
    try:
        inputs, _ = inputs_and_targets(batch)
    except SubjectError:
        return "The batches are no pairs of inputs and targets, so there is no input-loss curvature."
    floating = [tensor for tensor in tensors_of(inputs) if tensor.is_floating_point() and tensor.ndim]
    if len(floating) != 1:
        return f"The input-loss curvature needs one floating-point input, and there are {len(floating)} (tokens have none)."
    return floating[0]


def _with_input(batch: Batch, old: Tensor, new: Tensor) -> Batch:
    """The batch with one of its inputs replaced; targets stay, also where they are the same tensor."""
    inputs, _ = inputs_and_targets(batch)
    changed = map_tensors(lambda tensor: new if tensor is old else tensor, inputs)
    if isinstance(batch, Mapping):
        return {**batch, **changed}
    if isinstance(batch, Tensor):
        return changed
    entries = [changed, *batch[1:]]
    return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)


def _coupled(sums: Tensor, x: Tensor) -> bool:
    slope = _gradient(sums[0], x)
    # A network with NaN weights gives NaN everywhere, which is no coupling.
    return bool(slope[1:].nan_to_num(0, 0, 0).count_nonzero())


def _gradient(of: Tensor, x: Tensor, along: Tensor | None = None, create_graph: bool = False) -> Tensor:
    """The gradient in x of a number, or of the product of a tensor with `along`; zero where it does not depend on x."""
    if not of.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(
        of, x, along, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return found
