"""The gradients of single examples, parameter by parameter, by the cheapest way that is right for the network at hand.

Three ways: read off autograd's graph after one backward pass of a whole chunk (`parameter_uses`); torch.func.vmap; one example after the
other. Which of them serves which parameter is found once per subject, by comparing them on a few examples.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.examples import Batch, batch_size, map_tensors
from plasticity_probe.network.losses import Loss, Terms, inputs_and_targets, outputs_of
from plasticity_probe.network.outer_products import Gradients, as_rows, compact, multiplications, numbers, part
from plasticity_probe.network.parameter_uses import Order, gradients_by_use
from plasticity_probe.network.subject import Subject

TRIAL = 4
"""Examples on which the ways to per-example gradients are tried once (our choice: enough for a coupling to show)."""

AGREEMENT = 1e-3
"""Relative difference at which two computations of a gradient count as different: far above rounding, far below a coupling's effect."""

ROUNDING = 64
"""Units of rounding, relative to the gradient in all parameters, below which the gradient in one is nothing but rounding (our choice)."""


@dataclass(frozen=True)
class Route:
    """How the per-example gradients of a subject are taken.

    Args:
        orders: The parameters read off the graph, and how the rows of their uses run over examples.
        otherwise: How those of all other parameters are found.
        kept: Numbers kept per example, by parameter.
        multiplications: Multiplications that the inner product of two examples' gradients takes.
        refusal: Why there are no per-example gradients; empty where there are.
    """

    orders: Mapping[str, Order]
    otherwise: Literal["vmap", "loop"]
    kept: Mapping[str, int]
    multiplications: int
    refusal: str = ""

    @property
    def numbers(self) -> int:
        """Numbers kept per example."""
        return sum(self.kept.values())


def example_gradients(subject: Subject, batch: Batch, names: Collection[str] | None = None) -> dict[str, Gradients]:
    """The gradients of the losses of a batch's examples by parameter; those left out are zero.

    Args:
        subject: The network and its loss.
        batch: Some of its examples, on its device.
        names: The parameters asked for; by default all.

    Raises:
        SubjectError: The examples of a batch influence each other, so that an example has no gradient of its own.
    """
    route = _open_route(subject)
    asked = list(subject.parameters) if names is None else list(names)
    found: dict[str, Gradients | None] = {name: None for name in asked if name not in route.orders}
    read: dict[str, Order] = {name: route.orders[name] for name in asked if name in route.orders}
    if read:
        with _seen_through(subject.model):
            losses = subject.losses(subject.parameters, batch)[0]
            found |= gradients_by_use(losses, subject.parameters, read)
    return _completed(subject, batch, found)


def traced_outputs(subject: Subject, batch: Batch) -> Tensor:
    """The outputs for a batch with the graph that `output_gradients` reads.

    Args:
        subject: The network and its loss.
        batch: Some of its examples, on its device.

    Raises:
        SubjectError: As `example_gradients`.
    """
    _open_route(subject)
    with torch.enable_grad(), _seen_through(subject.model):
        return subject.outputs(subject.parameters, batch)


def output_gradients(subject: Subject, batch: Batch, outputs: Tensor, along: Tensor) -> dict[str, Gradients]:
    """The gradients J_i'u_i of every example's outputs along a vector of its own, by parameter; those left out are zero.

    Args:
        subject: The network; of its loss only the route is used.
        batch: Some of its examples, on its device.
        outputs: Their outputs as `traced_outputs` gives them, for any number of calls.
        along: The vectors u_i, in the shape of the outputs.
    """
    route = _open_route(subject)
    found: dict[str, Gradients | None] = {name: None for name in subject.parameters if name not in route.orders}
    if route.orders:
        found |= gradients_by_use(_per_example(outputs * along), subject.parameters, route.orders)
    # The ways that run the network themselves cut the batch, so the vectors travel as its targets.
    product = replace(subject, loss=Loss("outputs along a vector", _product_with_targets, None))
    return _completed(product, (inputs_and_targets(batch)[0], along), found)


def _product_with_targets(model: nn.Module, batch: Batch) -> Terms:
    products = _per_example(outputs_of(model, batch) * batch[1])
    return products, torch.ones_like(products)


def _per_example(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1)


def _completed(subject: Subject, batch: Batch, found: dict[str, Gradients | None]) -> dict[str, Gradients]:
    """Gradients read off the graph, and those that no rule there knew (None) found by the route's other way."""
    missing = [name for name, gradients in found.items() if gradients is None]
    if missing:
        way = _vectorised if route_of(subject).otherwise == "vmap" else _one_at_a_time
        found |= way(subject, batch, subject.parameters, missing)
    return {name: compact(found[name]) for name in subject.parameters if found.get(name) is not None}  # type: ignore[arg-type]


def _open_route(subject: Subject) -> Route:
    route = route_of(subject)
    if route.refusal:
        raise SubjectError(route.refusal)
    return route


def route_of(subject: Subject) -> Route:
    """The way that serves each parameter, tried once per subject on a few examples and remembered.

    The trial runs at random weights: what a use does to the gradient shows there even where a dead layer, a fitted loss or a NaN hides it at the
    subject's own.
    """
    return subject.once("per_example_route", lambda: _tried(subject))


def _tried(subject: Subject) -> Route:
    size = subject.size
    whole = {name: parameter.numel() for name, parameter in subject.parameters.items()}
    if refusal := _statistics_of_the_batch(subject.model):
        return Route({}, "loop", whole, size, refusal)
    if not subject.examples.sliceable:
        return Route({}, "loop", whole, size)
    few = next(iter(subject.examples.chunks(TRIAL)))
    for weights in (_random_weights(subject.parameters), subject.parameters):
        trial = _Trial(subject, few, weights)
        if trial.finite:
            break
    if trial.finite and not trial.adds_up:
        return Route({}, "loop", whole, size, _COUPLED)
    orders = trial.orders()
    held = trial.forms(orders)
    rest = [name for name in subject.parameters if name not in orders]
    other = sum(subject.parameters[name].numel() for name in rest)
    way = "vmap" if rest and trial.vectorises(rest) else "loop"
    return Route(
        orders,
        way,
        dict.fromkeys(whole, 0)
        | {name: whole[name] for name in rest}
        | {name: numbers(each) for name, each in held.items()},
        sum(map(multiplications, held.values())) + other,
    )


class _Trial:
    """Every way on the same few examples, compared with each example by itself."""

    def __init__(self, subject: Subject, few: Batch, weights: Mapping[str, Tensor]) -> None:
        self.subject, self.few, self.weights = subject, few, weights
        with _seen_through(subject.model):
            losses = subject.losses(weights, few)[0]
            self.read: dict[Order, dict[str, Gradients | None]] = {
                order: gradients_by_use(losses, weights, dict.fromkeys(weights, order)) for order in ("first", "last")
            }
        summed = _gradient(losses.sum(), weights)
        del losses
        self.finite = all(bool(gradient.isfinite().all()) for gradient in summed.values())
        self.errors: dict[Order, dict[str, float]] = {order: dict.fromkeys(weights, 0.0) for order in self.read}
        self.sizes = dict.fromkeys(weights, 0.0)
        self.between = dict.fromkeys(weights, 0.0)
        total = 0.0
        for index, example in enumerate(pieces(few, 1)):
            alone = _gradient(subject.losses(weights, example)[0].sum(), weights)
            total += sum(float(gradient.square().sum()) for gradient in alone.values()) ** 0.5
            for name in list(alone):
                gradient = alone.pop(name)
                self.sizes[name] += float(gradient.square().sum())
                summed[name] -= gradient
                self._compare(name, index, gradient.reshape(-1))
        left_over = sum(float(gradient.square().sum()) for gradient in summed.values()) ** 0.5
        self.adds_up = left_over <= AGREEMENT * total
        self.unit = ROUNDING * torch.finfo(subject.dtype).eps * sum(self.sizes.values()) ** 0.5

    def orders(self) -> dict[str, Order]:
        """The order that fits each parameter, where one does; where several do, the one that fits all others."""
        fits: dict[str, list[Order]] = {
            name: [order for order in self.read if self._fits(order, name)] for name in self.weights
        }
        sure: set[Order] = {orders[0] for orders in fits.values() if len(orders) == 1}
        common: Order | None = sure.pop() if len(sure) == 1 else None
        chosen: dict[str, Order] = {}
        for name, orders in fits.items():
            if len(orders) == 1:
                chosen[name] = orders[0]
            elif orders and (common or self._order_is_idle(name)):
                chosen[name] = common or "first"
        return chosen

    def forms(self, orders: Mapping[str, Order]) -> dict[str, Gradients]:
        """What is kept of the few examples."""
        found = {name: self.read[order].get(name) for name, order in orders.items()}
        return {name: compact(gradients) for name, gradients in found.items() if gradients is not None}

    def vectorises(self, names: Collection[str]) -> bool:
        """Whether vmap finds the gradients in some parameters."""
        try:
            found = _vectorised(self.subject, self.few, self.weights, names)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError):
            # What torch.func cannot vectorise it refuses with one of these. A mistake of the model or the loss has come up before.
            return False
        if not self.finite:
            return True
        alone = _one_at_a_time(self.subject, self.few, self.weights, names)
        difference = sum(float((found[name] - alone[name]).square().sum()) for name in names) ** 0.5
        return difference <= AGREEMENT * sum(self.sizes[name] for name in names) ** 0.5 + self.unit

    def _fits(self, order: Order, name: str) -> bool:
        if self.read[order].get(name, self) is None:
            return False
        return not self.finite or self.errors[order][name] ** 0.5 <= AGREEMENT * self.sizes[name] ** 0.5 + self.unit

    def _order_is_idle(self, name: str) -> bool:
        """Whether both orders find the same, and not for want of any gradient."""
        unused = all(name not in found for found in self.read.values())
        return unused or self.between[name] ** 0.5 <= AGREEMENT * self.sizes[name] ** 0.5 > 0

    def _compare(self, name: str, index: int, exact: Tensor) -> None:
        """Takes in the gradient of one example in one parameter, computed from that example alone."""
        rows: list[Tensor] = []
        for order, found in self.read.items():
            gradients = found.get(name)
            if gradients is None and name in found:
                self.errors[order][name] = float("inf")
                continue
            rows.append(torch.zeros_like(exact) if gradients is None else as_rows(part(gradients, index, index + 1))[0])
            self.errors[order][name] += float((rows[-1] - exact).norm()) ** 2
        if len(rows) > 1:
            self.between[name] += float((rows[0] - rows[1]).norm()) ** 2


def _gradient(loss: Tensor, weights: Mapping[str, Tensor], retain: bool = False) -> dict[str, Tensor]:
    """The gradient of one number; zero where the number does not depend on a parameter."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}
    leaves = list(weights.values())
    found = torch.autograd.grad(loss, leaves, retain_graph=retain, allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))


def _random_weights(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a usual size: matrices keep the scale of their input, vectors lie between 1/2 and 3/2."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        if parameter.ndim > 1:
            values.normal_(std=(len(parameter) / parameter.numel()) ** 0.5, generator=generator)
        else:
            values.uniform_(0.5, 1.5, generator=generator)
        drawn[name] = values.to(parameter.device).requires_grad_()
    return drawn


@contextmanager
def _seen_through(model: nn.Module) -> Iterator[None]:
    """Recurrent layers as the products they are made of: oneDNN's fused ones hide them from autograd."""
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = before


def _statistics_of_the_batch(model: nn.Module) -> str:
    coupled = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    if not coupled:
        return ""
    return (
        f"expected the loss of an example to depend on that example alone, but BatchNorm uses the statistics of the batch "
        f"({', '.join(coupled[:3])}), so no example has a gradient of its own. Measure with mode='eval', where BatchNorm uses its running "
        "statistics."
    )


_COUPLED = (
    "expected the loss of an example to depend on that example alone, but the gradients of single examples do not add up to the gradient "
    "of their batch. Likely causes: a loss that compares the examples of a batch, a normalisation over the batch, or a model that treats "
    "a batch of one differently. Per-example gradients are not defined there."
)


def _vectorised(
    subject: Subject, batch: Batch, weights: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    held = {name: weight.detach() for name, weight in weights.items()}

    def loss(chosen: dict[str, Tensor], example: Batch) -> Tensor:
        alone = map_tensors(lambda tensor: tensor.unsqueeze(0), example)
        return subject.losses(held | chosen, alone)[0].sum()

    with warnings.catch_warnings():
        # Where torch.func lacks a batching rule it loops and says so; that is no slower than what would be done instead.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = vmap(grad(loss), in_dims=(None, 0))({name: held[name] for name in names}, batch)
    return {name: gradient.reshape(len(gradient), -1) for name, gradient in found.items()}


def _one_at_a_time(
    subject: Subject, batch: Batch, weights: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """One forward pass per example, or one in all for a batch that cannot be cut, and one backward pass per example."""
    rows: list[dict[str, Tensor]] = []
    leaves = {name: weights[name] for name in names}
    for piece in pieces(batch, 1) if subject.examples.sliceable else [batch]:
        sums, _ = subject.losses(weights, piece)
        if len(sums) != batch_size(piece):
            raise SubjectError(
                f"expected one loss per example, {batch_size(piece)} for this batch, got {len(sums)}. Sum the terms of each example."
            )
        rows += [_gradient(each, leaves, retain=len(sums) > 1) for each in sums]
    return {name: torch.stack([row[name].reshape(-1) for row in rows]) for name in names}


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch cut into pieces of at most `size` examples."""
    for start in range(0, batch_size(batch), size):
        yield map_tensors(lambda tensor, start=start: tensor[start : start + size], batch)
