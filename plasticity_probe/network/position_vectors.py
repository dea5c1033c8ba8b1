"""What a layer's matrix is multiplied with at every position of every example, from both sides, and the inner products of such vectors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

SLAB = 2**20
"""Numbers of one operand converted to float64 at a time, 8 MB (our choice: large enough for fast products, small beside the gradients)."""


@dataclass(frozen=True, eq=False)
class Dense:
    """Vectors as they are.

    Args:
        values: Shape (examples, groups, features, positions).
    """

    values: Tensor

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.values.shape[2]

    @property
    def positions(self) -> int:
        """Number of positions."""
        return self.values.shape[3]

    width: ClassVar[int] = 1

    def read(self, first: int, last: int) -> Tensor:
        """The features of channels first to last, shape (examples, groups, features, positions)."""
        return self.values[:, :, first:last]

    def stored(self) -> Tensor:
        """The tensor that grows with the examples."""
        return self.values


@dataclass(frozen=True, eq=False)
class Windows:
    """What a convolution reads: at every position the window of its padded input under the kernel, cut out when it is needed.

    Args:
        values: The input, shape (examples, groups, channels, *space).
        padding: Zeros around it in every direction of space.
        kernel: Size of the kernel in every direction of space.
        stride: Step of the window.
        dilation: Step inside the window.
        places: Number of positions in every direction.
    """

    values: Tensor
    padding: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.values.shape[2]

    @property
    def positions(self) -> int:
        """Number of positions."""
        return math.prod(self.places)

    @property
    def width(self) -> int:
        """Features per channel."""
        return math.prod(self.kernel)

    def read(self, first: int, last: int) -> Tensor:
        """As `Dense.read`; a channel has as many features as the kernel has entries."""
        around = [size for size in reversed(self.padding) for _ in range(2)]
        cut = F.pad(self.values[:, :, first:last], around)
        for axis, (kernel, stride, dilation, count) in enumerate(
            zip(self.kernel, self.stride, self.dilation, self.places, strict=True), 3
        ):
            cut = cut.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation].narrow(axis, 0, count)
        space = len(self.kernel)
        order = (0, 1, 2, *range(3 + space, 3 + 2 * space), *range(3, 3 + space))
        return cut.permute(order).reshape(*cut.shape[:2], cut.shape[2] * self.width, self.positions)

    def stored(self) -> Tensor:
        """The tensor that grows with the examples."""
        return self.values


@dataclass(frozen=True, eq=False)
class OneHot:
    """What an embedding reads: unit vectors, one per token.

    Args:
        indices: Which entry is one, shape (examples, positions).
        channels: Number of entries, the size of the vocabulary.
        dtype: Type that the vectors are handed out in.
    """

    indices: Tensor
    channels: int
    dtype: torch.dtype

    @property
    def positions(self) -> int:
        """Number of positions."""
        return self.indices.shape[1]

    width: ClassVar[int] = 1

    def read(self, first: int, last: int) -> Tensor:
        """As `Dense.read`."""
        entries = torch.arange(first, last, device=self.indices.device)
        return (self.indices[:, None, None, :] == entries[:, None]).to(self.dtype)

    def stored(self) -> Tensor:
        """The tensor that grows with the examples."""
        return self.indices


Vectors = Dense | Windows | OneHot


def same_kind(one: Vectors, other: Vectors) -> bool:
    """Whether two sets of vectors differ in nothing but the examples."""
    return _description(one) == _description(other)


def room_for(vectors: Vectors, examples: int) -> Vectors:
    """Zeros of the same kind for a number of examples."""
    stored = vectors.stored()
    return _with(vectors, stored.new_zeros(examples, *stored.shape[1:]))


def vectors_of(vectors: Vectors, first: int, last: int) -> Vectors:
    """The vectors of examples first to last."""
    return _with(vectors, vectors.stored()[first:last])


def products_of_pairs(one: Vectors, other: Vectors) -> Tensor:
    """The products r_is'r_jt of all pairs, shape (groups, examples * positions, examples * positions)."""
    if isinstance(one, OneHot) and isinstance(other, OneHot):
        return (one.indices.reshape(-1, 1) == other.indices.reshape(1, -1)).double()[None]
    if isinstance(one, OneHot):
        looked_up = other.read(0, other.channels)[:, 0].transpose(0, 1).flatten(1)
        return looked_up.index_select(0, one.indices.flatten()).double()[None]
    if isinstance(other, OneHot):
        return products_of_pairs(other, one).transpose(1, 2)
    return products_of_dense(one.read(0, one.channels), other.read(0, other.channels))


def products_within(one: Vectors, other: Vectors) -> Tensor:
    """The products r_is'r_it within every example, shape (examples, groups, positions, positions)."""
    if isinstance(one, OneHot) and isinstance(other, OneHot):
        return (one.indices[:, None, :, None] == other.indices[:, None, None, :]).double()
    if isinstance(one, OneHot):
        found = other.read(0, other.channels)
        return found.gather(2, one.indices[:, None, :, None].expand(-1, -1, -1, found.shape[3])).double()
    if isinstance(other, OneHot):
        return products_within(other, one).mT
    return one.read(0, one.channels).mT.double() @ other.read(0, other.channels).double()


def products_of_dense(one: Tensor, other: Tensor) -> Tensor:
    """As `products_of_pairs`, of vectors given as tensors (examples, groups, features, positions)."""
    total: Tensor | None = None
    step = max(1, SLAB // max(one[:, :, :1].numel(), other[:, :, :1].numel()))
    for first, last in ranges(one.shape[2], step):
        a, b = (t[:, :, first:last].permute(1, 0, 3, 2).flatten(1, 2).double() for t in (one, other))
        total = a @ b.mT if total is None else total.baddbmm_(a, b.mT)
    assert total is not None
    return total


def ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most `step` from 0 to `count`."""
    yield from pairwise([*range(0, count, step), count])


def _description(vectors: Vectors) -> tuple[object, ...]:
    others = [getattr(vectors, field.name) for field in fields(vectors) if field.name not in _STORED]
    return type(vectors), tuple(vectors.stored().shape[1:]), *others


def _with(vectors: Vectors, stored: Tensor) -> Vectors:
    (name,) = (field.name for field in fields(vectors) if field.name in _STORED)
    return replace(vectors, **{name: stored})


_STORED = {"values", "indices"}
