"""Which axis of a tensor runs over the units of a layer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

CONVOLUTIONS = {f"conv{prefix}{d}d": d for prefix in ("", "_transpose") for d in (1, 2, 3)}
"""Spatial axes of each convolution, by the function's name."""

_CHANNEL_NORMS = frozenset({"batch_norm", "group_norm", "instance_norm"})
_LAST_AXIS = frozenset({"linear", "bilinear", "layer_norm", "rms_norm", "multi_head_attention_forward", "embedding"})
_PERMUTATIONS = frozenset(
    {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "adjoint", "T", "mT", "H", "mH"}
)


class UnitAxes:
    """Which axis of a tensor runs over units, followed through the functions that make the tensor.

    Convolutions and the norms over channels put units on axis 1 (before the spatial axes), linear layers, LayerNorm, attention and embeddings
    on the last. Every other function passes the axis on: permutations move it, functions that keep the number of axes keep it, and where
    axes are merged or dropped the one of the same size is taken. So channels-last networks come out right, where the number of axes
    alone would mislead.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()
        self._latest: Literal["channels", "last"] | None = None

    def of(self, tensor: Tensor) -> int:
        """The axis of a tensor's units; by the latest affine or norm operation where the tensor's own way is not known."""
        known = self._known.get(tensor)
        if known is not None and known < tensor.ndim:
            return known
        by_shape = self._latest is None and tensor.ndim > 3
        return 1 if (by_shape or self._latest == "channels") and tensor.ndim > 1 else tensor.ndim - 1

    def put_last(self, tensor: Tensor) -> None:
        """Says that the last axis of a tensor holds its units."""
        self._known[tensor], self._latest = tensor.ndim - 1, "last"

    def follow(
        self,
        name: str,
        operands: Sequence[Any],
        results: Any,
        repeat: Callable[[Tensor], Any] | None,
        product: int | None,
    ) -> None:
        """Notes the unit axis of what a function returned.

        Args:
            name: The function's name.
            operands: All its arguments.
            results: What it returned.
            repeat: Calls the function again with another first argument; None where it has no positional one.
            product: The unit axis, from the end, of a matrix product with a parameter; None for other functions.
        """
        outputs = [tensor for tensor in flat_tensors((results,)) if tensor.ndim]
        if not outputs:
            return
        if name in _LAST_AXIS or product is not None:
            self.put_last(outputs[0])
            self._known[outputs[0]] = max(0, outputs[0].ndim + (product or -1))
        elif name in CONVOLUTIONS or name in _CHANNEL_NORMS:
            spatial = CONVOLUTIONS.get(name, outputs[0].ndim - 2)
            self._known[outputs[0]], self._latest = max(0, outputs[0].ndim - spatial - 1), "channels"
        else:
            source = next((tensor for tensor in flat_tensors(operands) if tensor in self._known), None)
            if source is None:
                return
            for output in outputs:
                moved = repeat if name in _PERMUTATIONS and source is operands[0] else None
                self._known[output] = _axis_after(self._known[source], source, output, moved)


def _axis_after(axis: int, source: Tensor, output: Tensor, moved: Callable[[Tensor], Any] | None) -> int:
    if moved is not None:
        sizes = range(2, 2 + source.ndim)
        return moved(torch.empty(tuple(sizes), device="meta")).shape.index(2 + axis)
    if output.ndim == source.ndim or (axis < output.ndim and output.shape[axis] == source.shape[axis]):
        return axis
    if output.shape[-1] == source.shape[axis]:
        return output.ndim - 1
    return 1 if output.ndim > 3 else output.ndim - 1


def matrix(tensor: Tensor, axis: int) -> Tensor:
    """A tensor as a matrix with units as columns; all other axes (examples, positions, tokens) are rows.

    Args:
        tensor: Activations of a layer, any shape of at least one axis.
        axis: The axis of the units.

    Returns:
        Shape (rows, units).
    """
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


def unit_axis_of_product(name: str, operands: Sequence[Any], weights: frozenset[int]) -> int:
    """Where a matrix product with a parameter puts its units: on the last axis (x @ W), or the one before (W @ x)."""
    if name == "linear":
        return -1
    factors = list(flat_tensors(operands))[1 if name.startswith(("add", "baddbmm")) else 0 :]
    leading = name not in ("einsum", "tensordot", "mv", "addmv") and is_weight(factors[0], weights)
    return -2 if leading else -1


def is_weight(tensor: Tensor, weights: frozenset[int]) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in weights


def flat_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values and in the tuples and lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from flat_tensors(value)
