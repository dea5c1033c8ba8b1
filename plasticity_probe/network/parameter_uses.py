"""Where a loss uses its parameters, and each example's gradient there, read off autograd's graph.

Every use of a parameter is a node of the graph that the forward pass left behind, whether a module or a function made it, once or several times,
under one name or two. One backward pass of the summed loss down to the outputs of those nodes (and no further into the parameters) gives each
node's output gradients D; with what the node has saved of its input they are the gradients of single examples. Which nodes there are and what
they save is autograd's own business and may change, so whoever uses this compares it with plain per-example gradients first; a use that no rule
here knows is reported as such and left to other means.

A weight may itself be computed from parameters alone (weight_norm, a slice of attention's joint projection, a permuted view): such a use is a
gradient in the computed weight, which is pulled back to the parameters example by example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from plasticity_probe.network.outer_products import Gradients, Outer, Products, as_rows, summed
from plasticity_probe.network.position_vectors import Dense, OneHot, Windows

Node = Any
"""A node of autograd's graph; its saved tensors are attributes that torch does not declare."""

Order = Literal["first", "last"]
"""Whether rows of a node that are examples times positions run over the examples first or last, as in (N, T, ...) or (T, N, ...)."""


@dataclass(frozen=True)
class Weight:
    """What a layer multiplies or adds: a parameter, or a tensor computed from parameters alone.

    Args:
        node: The node that computes it, or the accumulator of the parameter.
        output: Which of the node's outputs it is.
        shape: Its shape.
        names: The parameters that it is, or is computed from.
    """

    node: Node
    output: int
    shape: torch.Size
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a weight.

    Args:
        node: The node that uses it.
        argument: As which of its arguments.
        weight: The weight.
        turned: Whether it is handed over transposed.
    """

    node: Node
    argument: int
    weight: Weight
    turned: bool

    @property
    def known(self) -> bool:
        """Whether there is a rule for such a use."""
        return (self.node.name(), self.argument) in RULES


@dataclass(frozen=True)
class Rows:
    """How the rows of a node's output belong to the examples.

    Args:
        examples: Number of examples.
        order: Whether examples run first or last.
    """

    examples: int
    order: Order

    def of(self, values: Tensor) -> Tensor:
        """Shape (rows, ...) as (examples, positions, ...)."""
        if len(values) % self.examples:
            raise _UnknownUse
        positions = len(values) // self.examples
        if self.order == "first":
            return values.reshape(self.examples, positions, *values.shape[1:])
        return values.reshape(positions, self.examples, *values.shape[1:]).transpose(0, 1)

    def vectors(self, values: Tensor) -> Dense:
        """Shape (rows, features) as vectors, one per position."""
        return Dense(self.of(values).transpose(1, 2)[:, None])

    def sums(self, values: Tensor) -> Tensor:
        """Shape (rows, ...) summed over each example's positions and flattened, (examples, numbers)."""
        return self.of(values).sum(1).reshape(self.examples, -1)


Rule = Callable[[Use, Tensor, Rows], Gradients]
"""(use, gradients at the node's output, rows) -> the examples' gradients in the weight."""


class _UnknownUse(Exception):
    """A use has a known node, but not in a form that its rule covers."""


def gradients_by_use(
    losses: Tensor, parameters: Mapping[str, Tensor], orders: Mapping[str, Order]
) -> dict[str, Gradients | None]:
    """Gradients of examples by parameter, from one backward pass.

    Args:
        losses: The loss of each example, with the graph that it came from.
        parameters: The parameters by name, as the graph was made with them.
        orders: For each parameter of interest, how the rows of its uses run over the examples.

    Returns:
        For each parameter of interest its examples' gradients; None where a use of it is not understood. A parameter that the loss does not use
        is left out: its gradients are zero.
    """
    uses = find_uses(losses, {name: parameters[name] for name in orders})
    nodes = list(dict.fromkeys(use.node for group in uses.values() for use in group if use.known))
    edges = [GradientEdge(node, 0) for node in nodes]
    arriving = torch.autograd.grad(losses.sum(), edges, retain_graph=True, allow_unused=True) if edges else ()
    flowing = dict(zip(nodes, arriving, strict=True))
    parts: dict[str, list[Gradients]] = {}
    unknown: set[str] = set()
    for weight, group in uses.items():
        try:
            with torch.no_grad():
                found = _of_weight(group, flowing, Rows(len(losses), orders[weight.names[0]]))
        except _UnknownUse:
            unknown |= set(weight.names)
            continue
        for name, part in _by_parameter(weight, found, parameters).items() if found is not None else ():
            parts.setdefault(name, []).append(part)
    return {name: None if name in unknown else summed(parts[name]) for name in {*parts, *unknown}}


def find_uses(losses: Tensor, parameters: Mapping[str, Tensor]) -> dict[Weight, list[Use]]:
    """The uses of every weight that is one of some parameters or computed from them."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    origins: dict[Node, frozenset[str] | None] = {None: None}
    order = _inputs_first(losses.grad_fn)
    for node in order:
        origins[node] = _origin(node, names, origins)
    uses: dict[Weight, list[Use]] = {}
    for node in order:
        for argument, (source, output) in enumerate(node.next_functions):
            if origins[node] is None and origins[source]:
                weight, turned = _weight(source, output, origins)
                uses.setdefault(weight, []).append(Use(node, argument, weight, turned))
    return uses


def _inputs_first(root: Node) -> list[Node]:
    """All nodes of a graph, each after those that it reads."""
    order: list[Node] = []
    seen: set[Node] = set()
    todo = [(root, False)] if root is not None else []
    while todo:
        node, ready = todo.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [(source, False) for source, _ in node.next_functions if source is not None]
    return order


def _origin(
    node: Node, names: Mapping[int, str], origins: Mapping[Node, frozenset[str] | None]
) -> frozenset[str] | None:
    """The parameters asked for that a node is computed from, where no data is in it; None where some may be."""
    if _is_leaf(node):
        return frozenset(names[key] for key in [id(node.variable)] if key in names)
    below = [origins[source] for source, _ in node.next_functions]
    if node.name() not in COMPUTED_WEIGHTS or None in below:
        return None
    return frozenset().union(*(part for part in below if part is not None))


def _weight(source: Node, output: int, origins: Mapping[Node, frozenset[str] | None]) -> tuple["Weight", bool]:
    turned = source.name() == "TBackward0" and _is_leaf(source.next_functions[0][0])
    if turned:
        source, output = source.next_functions[0]
    shape = source.variable.shape if _is_leaf(source) else torch.Size(source._input_metadata[output].shape)
    return Weight(source, output, shape, tuple(sorted(origins[source] or ()))), turned


def _is_leaf(node: Node) -> bool:
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


COMPUTED_WEIGHTS = frozenset(
    f"{name}Backward{number}"
    for number in (0, 1)
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Split", "SplitWithSizes", "Slice",
        "Select", "Unbind", "Cat", "Stack", "Clone", "Mul", "Div", "Add", "Sub", "Mm", "Mv", "Dot", "Norm", "LinalgVectorNorm", "Sqrt",
        "Rsqrt", "Pow", "Sum", "Mean", "Abs", "Neg", "Exp", "Tanh", "Sigmoid", "Softplus", "WeightNormInterface",
    )
)  # fmt: skip
"""Nodes that compute a weight where everything that goes into them comes from parameters: they have no hidden input such as an index."""


def _of_weight(uses: Sequence[Use], flowing: Mapping[Node, Tensor | None], rows: Rows) -> Gradients | None:
    """The examples' gradients in a weight, over all its uses; None where the loss does not depend on it.

    Raises:
        _UnknownUse: A use is not understood.
    """
    found: list[Gradients] = []
    for use in uses:
        rule = RULES.get((use.node.name(), use.argument))
        if rule is None or (use.turned and rule is not _product):
            raise _UnknownUse
        arriving = flowing.get(use.node)
        if arriving is not None:
            found.append(rule(use, arriving, rows))
    return summed(found) if found else None


def _by_parameter(weight: Weight, gradients: Gradients, parameters: Mapping[str, Tensor]) -> dict[str, Gradients]:
    """The gradients in a weight as gradients in the parameters that it is, or is computed from."""
    if _is_leaf(weight.node):
        return {weight.names[0]: gradients}
    each = as_rows(gradients).reshape(-1, *weight.shape)
    leaves = [parameters[name] for name in weight.names]
    edge = [GradientEdge(weight.node, weight.output)]
    found = torch.autograd.grad(edge, leaves, [each], is_grads_batched=True, retain_graph=True)
    return {name: part.flatten(1) for name, part in zip(weight.names, found, strict=True)}


def _saved(node: Node, name: str) -> Tensor:
    """What a node has kept of its input, without the graph behind it."""
    return getattr(node, f"_saved_{name}").detach()


def _product(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    """The product x W (or x W' where W is handed over transposed): every row of x is a position."""
    if use.node.name() == "AddmmBackward0" and use.node._saved_alpha != 1:
        raise _UnknownUse
    read = _saved(use.node, "mat1") if use.node.name() == "AddmmBackward0" else _saved(use.node, "self")
    left, right = rows.vectors(read), rows.vectors(flowing)
    return Outer((Products(right, left) if use.turned else Products(left, right),))


def _added_to_product(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    if use.node._saved_beta != 1:
        raise _UnknownUse
    return _broadcast(flowing, rows, use.weight.shape)


def _convolution(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    """Every place of the output is a position, and what is read there is a window of the input; transposed, the two change roles."""
    node = use.node
    if node._saved_input.ndim != len(use.weight.shape):
        raise _UnknownUse
    whole, sliding = (
        (flowing, _saved(node, "input")) if not node._saved_transposed else (_saved(node, "input"), flowing)
    )
    groups = node._saved_groups
    places, kernel = tuple(whole.shape[2:]), tuple(use.weight.shape[2:])
    left = rows.of(whole.unflatten(1, (groups, -1)).flatten(3))
    steps = tuple(node._saved_padding), kernel, tuple(node._saved_stride), tuple(node._saved_dilation), places
    windows = Windows(sliding.unflatten(1, (groups, -1)), *steps)
    if len(whole) == rows.examples:
        return Outer((Products(Dense(left[:, 0]), windows),))
    right = rows.of(windows.read(0, windows.channels))
    return Outer((Products(*(Dense(part.permute(0, 2, 3, 1, 4).flatten(3)) for part in (left, right))),))


def _channel_bias(use: Use, flowing: Tensor, rows: Rows) -> Gradients:  # noqa: ARG001 -- as every rule
    return rows.sums(flowing.flatten(2).sum(2) if flowing.ndim > 2 else flowing)


def _embedding(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    node = use.node
    if node._saved_scale_grad_by_freq:
        raise _UnknownUse
    indices = _saved(node, "indices").flatten()
    flowing = flowing.reshape(len(indices), -1) * (indices != node._saved_padding_idx)[:, None]
    return Outer(
        (Products(rows.vectors(flowing), OneHot(rows.of(indices), int(use.weight.shape[0]), flowing.dtype)),),
        turned=True,
    )


def _batch_norm(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    node = use.node
    if node._saved_training:
        raise _UnknownUse
    mean, scale = _saved(node, "running_mean"), (_saved(node, "running_var") + node._saved_eps).rsqrt()
    space = (1,) * (flowing.ndim - 2)
    normal = (_saved(node, "input") - mean.view(-1, *space)).mul_(scale.view(-1, *space))
    return _channel_bias(use, normal.mul_(flowing), rows)


def _layer_norm(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    node = use.node
    return _broadcast(
        flowing * (_saved(node, "input") - _saved(node, "result1")) * _saved(node, "result2"), rows, use.weight.shape
    )


def _group_norm(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    node = use.node
    split = _saved(node, "input").reshape(len(flowing), node._saved_group, -1)
    normal = (split - _saved(node, "result1").unsqueeze(2)) * _saved(node, "result2").unsqueeze(2)
    return _channel_bias(use, normal.reshape(flowing.shape).mul_(flowing), rows)


def _added(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    scale = use.node._saved_alpha if use.argument == 1 else 1
    sign = -1 if use.node.name() == "SubBackward0" and use.argument == 1 else 1
    return _broadcast(sign * scale * flowing, rows, use.weight.shape)


def _multiplied(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    other = _saved(use.node, "self") if use.argument == 1 else _saved(use.node, "other")
    return _broadcast(flowing * other, rows, use.weight.shape)


def _expanded(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    return _broadcast(flowing, rows, use.weight.shape)


def _repeated(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    if len(use.weight.shape) != 1 or len(use.node._saved_repeats) != 1:
        raise _UnknownUse
    return _broadcast(flowing.reshape(-1, *use.weight.shape), rows, use.weight.shape)


def _prelu(use: Use, flowing: Tensor, rows: Rows) -> Gradients:
    read = _saved(use.node, "self")
    return _broadcast(flowing * read * (read < 0), rows, use.weight.shape)


def _broadcast(flowing: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
    """Gradients in a weight that was broadcast to the shape of `flowing`: its leading axes of size one are rows."""
    sizes = [1] * (flowing.ndim - len(shape)) + list(shape)
    leading = next((axis for axis, size in enumerate(sizes) if size != 1), len(sizes))
    leading = min(leading, max(flowing.ndim - 1, 1))
    if not leading or sizes[0] != 1:
        raise _UnknownUse
    summed_over = [axis for axis in range(leading, flowing.ndim) if sizes[axis] == 1 and flowing.shape[axis] != 1]
    narrow = flowing.sum(summed_over, keepdim=True) if summed_over else flowing
    return rows.sums(narrow.flatten(0, leading - 1))


RULES: Mapping[tuple[str, int], Rule] = MappingProxyType(
    {
        ("AddmmBackward0", 0): _added_to_product,
        ("AddmmBackward0", 2): _product,
        ("MmBackward0", 1): _product,
        ("ConvolutionBackward0", 1): _convolution,
        ("ConvolutionBackward0", 2): _channel_bias,
        ("EmbeddingBackward0", 0): _embedding,
        ("NativeBatchNormBackward0", 1): _batch_norm,
        ("NativeBatchNormBackward0", 2): _channel_bias,
        ("CudnnBatchNormBackward0", 1): _batch_norm,
        ("CudnnBatchNormBackward0", 2): _channel_bias,
        ("NativeLayerNormBackward0", 1): _layer_norm,
        ("NativeLayerNormBackward0", 2): _expanded,
        ("NativeGroupNormBackward0", 1): _group_norm,
        ("NativeGroupNormBackward0", 2): _channel_bias,
        ("AddBackward0", 0): _added,
        ("AddBackward0", 1): _added,
        ("SubBackward0", 0): _added,
        ("SubBackward0", 1): _added,
        ("MulBackward0", 0): _multiplied,
        ("MulBackward0", 1): _multiplied,
        ("ExpandBackward0", 0): _expanded,
        ("RepeatBackward0", 0): _repeated,
        ("PreluKernelBackward0", 1): _prelu,
    }
)
"""What is known about which argument of which node."""
