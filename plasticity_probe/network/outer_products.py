"""Gradients of one parameter for many examples, kept as what they are made of, and their inner products.

Where a layer multiplies what it reads by a matrix W, the gradient of example i in W is a sum over the positions t (tokens, pixels, time steps,
repeated calls) at which the example uses W:  G_i = sum_t l_it r_it', of a gradient at the layer's output and what the layer read (or the other
way round). The inner product of two of them needs no G:

    <G_i, G_j> = sum_{s,t} (l_is'l_jt) (r_is'r_jt)                                              (*)

which for one position is the product, entry by entry, of two Gram matrices (Goodfellow 2015, arXiv 1510.01799, for i = j; Rochette, Manoel &
Tramel 2019, arXiv 1912.06015, and Li et al. 2022, arXiv 2110.05679, section 4, for positions). For n examples with T positions and a matrix of
r x c it costs n^2 T^2 (r + c) multiplications, the way over G itself n T r c + n^2 r c, some columns of G at a time: the smaller count decides.
Formula (*) is computed in float64, products of columns in the precision of the gradients and summed over blocks of columns in float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plasticity_probe.network.position_vectors import (
    SLAB,
    Dense,
    OneHot,
    Vectors,
    products_of_dense,
    products_of_pairs,
    products_within,
    ranges,
    room_for,
    same_kind,
    vectors_of,
)

PAIRS = 2**20
"""Pairs of positions whose products are held at a time, 8 MB each (our choice, as above)."""


@dataclass(frozen=True, eq=False)
class Products:
    """Per-example sums over positions of outer products, sum_t left_t right_t', in every group.

    Args:
        left: The vectors l.
        right: The vectors r.
    """

    left: Dense
    right: Vectors

    def columns(self, first: int, last: int) -> Tensor:
        """The gradients in some columns of the matrix, shape (examples, groups, rows, columns)."""
        return self.left.values @ self.right.read(first, last).transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class Outer:
    """The gradients of examples in one matrix-shaped parameter that is used once or several times.

    Args:
        terms: One entry per use; the gradient is their sum.
        turned: Whether the parameter is the transpose, so that its rows are the columns here.
    """

    terms: tuple[Products, ...]
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, rows and columns of the matrices."""
        first = self.terms[0]
        _, groups, rows, _ = first.left.values.shape
        return groups, rows, first.right.channels * first.right.width

    def __len__(self) -> int:
        return len(self.terms[0].left.values)

    def rows(self) -> Tensor:
        """The gradients themselves, shape (examples, parameters), in the order of the parameter."""
        groups, rows, columns = self.shape
        found = self.terms[0].left.values.new_empty(len(self), groups, rows, columns)
        for first, last in _channel_blocks(self):
            width = self.terms[0].right.width
            found[..., first * width : last * width] = _columns(self, first, last)
        return (found.transpose(2, 3) if self.turned else found).reshape(len(self), -1)


Gradients = Tensor | Outer
"""The gradients of examples in one parameter: as rows, shape (examples, parameters), or as outer products."""


def as_rows(gradients: Gradients) -> Tensor:
    """The gradients of examples in one parameter, shape (examples, parameters)."""
    return gradients.rows() if isinstance(gradients, Outer) else gradients


def numbers(gradients: Gradients) -> int:
    """How many numbers are kept per example."""
    if not isinstance(gradients, Outer):
        return gradients.shape[1]
    kept = [tensor for term in gradients.terms for tensor in (term.left.values, term.right.stored())]
    return sum(tensor.numel() // len(tensor) for tensor in kept)


def part(gradients: Gradients, first: int, last: int) -> Gradients:
    """The gradients of examples first to last."""
    if not isinstance(gradients, Outer):
        return gradients[first:last]
    return Outer(tuple(_part(term, first, last) for term in gradients.terms), gradients.turned)


def compact(gradients: Gradients) -> Gradients:
    """The same gradients in whatever form is smaller, unless outer products also save work."""
    if not isinstance(gradients, Outer) or pairs_are_cheaper(gradients):
        return gradients
    return as_rows(gradients) if math.prod(gradients.shape) <= numbers(gradients) else gradients


def pairs_are_cheaper(gradients: Outer) -> bool:
    """Whether formula (*) takes fewer multiplications per pair of examples than the product of the gradients themselves."""
    groups, rows, columns = gradients.shape
    positions = sum(term.left.positions for term in gradients.terms)
    read = sum(1 if isinstance(term.right, OneHot) else columns for term in gradients.terms) / len(gradients.terms)
    return positions**2 * groups * (rows + read) < groups * rows * columns


def multiplications(gradients: Gradients) -> int:
    """Multiplications per pair of examples, the cheaper way."""
    if not isinstance(gradients, Outer):
        return gradients.shape[1]
    groups, rows, columns = gradients.shape
    positions = sum(term.left.positions for term in gradients.terms)
    return positions**2 * groups * (rows + columns) if pairs_are_cheaper(gradients) else groups * rows * columns


def summed(parts: Sequence[Gradients]) -> Gradients:
    """The sum of gradients in the same parameter: what its uses contribute, cross terms and all."""
    if len(parts) == 1:
        return parts[0]
    outer = [each for each in parts if isinstance(each, Outer)]
    alike = len(outer) == len(parts) and len({each.shape for each in outer}) == 1
    if not alike or len({each.turned for each in outer}) > 1:
        total = as_rows(parts[0]).clone()
        for each in parts[1:]:
            total += as_rows(each)
        return total
    terms = [term for each in outer for term in each.terms]
    plain = [term for term in terms if isinstance(term.right, Dense)]
    rest = [term for term in terms if not isinstance(term.right, Dense)]
    if len(plain) > 1:
        left = torch.cat([term.left.values for term in plain], 3)
        plain = [Products(Dense(left), Dense(torch.cat([term.right.stored() for term in plain], 3)))]
    return Outer((*plain, *rest), outer[0].turned)


def gathered(kept: Gradients | None, filled: int, new: Gradients, capacity: int) -> Gradients:
    """Puts the gradients of a chunk of examples behind those already kept, in room for as many examples as there will be.

    Args:
        kept: The gradients kept so far, or None before the first.
        filled: How many examples they are of.
        new: Those of further examples; where their form is another, all become rows.
        capacity: Number of examples there is room for; examples that nothing is put in for have zero gradients.
    """
    if kept is None:
        kept = _room(new, capacity)
    elif isinstance(kept, Outer) and not (isinstance(new, Outer) and _alike(kept, new)):
        rows = as_rows(part(kept, 0, filled))
        kept = torch.cat([rows, rows.new_zeros(capacity - filled, rows.shape[1])])
    last = filled + len(new)
    if isinstance(kept, Outer) and isinstance(new, Outer):
        for one, other in zip(kept.terms, new.terms, strict=True):
            one.left.values[filled:last] = other.left.values
            one.right.stored()[filled:last] = other.right.stored()
    elif not isinstance(kept, Outer):
        kept[filled:last] = as_rows(new)
    return kept


def add_inner(total: Tensor, left: Gradients, right: Gradients) -> None:
    """Adds the inner products of two sets of gradients in the same parameter to a matrix.

    Args:
        total: Shape (examples, examples), float64, on the device of the gradients.
        left: The gradients of some examples.
        right: Those of others, or the same object: then only what lies on and below the diagonal is complete (`mirror` completes the rest).
    """
    if isinstance(left, Outer) and isinstance(right, Outer) and pairs_are_cheaper(left):
        _add_over_pairs(total, left, right)
    else:
        _add_over_columns(total, left, right)


def mirror(matrix: Tensor, strip: int = 512) -> None:
    """Copies what lies below the diagonal of a square matrix above it, in place."""
    for first, last in ranges(len(matrix), strip):
        block = matrix[first:last, first:last]
        block.copy_(block.tril() + block.tril(-1).T)
        matrix[first:last, last:] = matrix[last:, first:last].T


def squares(gradients: Gradients) -> Tensor:
    """The squared norms of the gradients of the examples, shape (examples,), float64."""
    total: Tensor | float = 0.0
    if isinstance(gradients, Outer) and pairs_are_cheaper(gradients):
        for one in gradients.terms:
            for other in gradients.terms:
                lefts = one.left.values.mT.double() @ other.left.values.double()
                total = total + (lefts * products_within(one.right, other.right)).sum((1, 2, 3))
    else:
        for slab in _slabs(gradients):
            total = total + slab.double().square().sum(1)
    return torch.as_tensor(total)


def moments(gradients: Gradients) -> tuple[Tensor, Tensor]:
    """The sum over examples, and the sum of squares, of the gradients in every single parameter.

    At a single position the squares are products too, (l_i r_i)^2 = l_i^2 r_i^2, so that no gradient is formed; with several positions the
    gradients are formed, some columns at a time.

    Returns:
        Two of shape (parameters,), in the order of the parameter, float64.
    """
    if not isinstance(gradients, Outer):
        pairs = [_moments_of_rows(slab) for slab in _slabs(gradients)]
        sums, squared = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return sums, squared
    right = gradients.terms[0].right
    found = gradients.terms[0].left.values.new_empty(2, *gradients.shape, dtype=torch.float64)
    single = len(gradients.terms) == 1 and gradients.terms[0].left.positions == 1
    for first, last in _single_blocks(gradients) if single else _channel_blocks(gradients):
        within = slice(first * right.width, last * right.width)
        pair = (
            _moments_of_products(gradients.terms[0], first, last)
            if single
            else _moments_of_rows(_columns(gradients, first, last))
        )
        for place, part_of_it in zip(found, pair, strict=True):
            place[..., within] = part_of_it
    sums, squared = (found.transpose(2, 3) if gradients.turned else found).reshape(2, -1)
    return sums, squared


def _moments_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    doubled = rows.double()
    return doubled.sum(0), doubled.square().sum(0)


def _moments_of_products(single: Products, first: int, last: int) -> tuple[Tensor, Tensor]:
    """As `moments`, for some channels of products at a single position, each of shape (groups, rows, columns)."""
    left = single.left.values[..., 0].double().permute(1, 2, 0)
    right = single.right.read(first, last)[..., 0].double().permute(1, 0, 2)
    return left @ right, left.square() @ right.square()


def _single_blocks(part: Outer) -> Iterator[tuple[int, int]]:
    """Ranges of channels whose vectors at a single position stay within a slab."""
    right = part.terms[0].right
    yield from ranges(right.channels, max(1, SLAB // (len(part) * part.shape[0] * right.width)))


def _room(like: Gradients, capacity: int) -> Gradients:
    """Zero gradients of the same form: pages of memory that are only taken when they are written to."""
    if not isinstance(like, Outer):
        return like.new_zeros(capacity, like.shape[1])
    terms = [
        Products(Dense(_zeros_like(term.left.values, capacity)), room_for(term.right, capacity)) for term in like.terms
    ]
    return Outer(tuple(terms), like.turned)


def _zeros_like(values: Tensor, capacity: int) -> Tensor:
    return values.new_zeros(capacity, *values.shape[1:])


def _alike(one: Outer, other: Outer) -> bool:
    return (one.turned, one.shape, len(one.terms)) == (other.turned, other.shape, len(other.terms)) and all(
        same_kind(a.left, b.left) and same_kind(a.right, b.right) for a, b in zip(one.terms, other.terms, strict=True)
    )


def _channel_blocks(part: Outer) -> Iterator[tuple[int, int]]:
    """Ranges of channels whose columns and whose windows stay within a slab."""
    groups, rows, _ = part.shape
    reader = part.terms[0].right
    most = max(rows * len(part.terms), max(term.right.positions for term in part.terms) // 2)
    step = max(1, SLAB // (len(part) * groups * reader.width * most))
    yield from ranges(reader.channels, step)


def _columns(part: Outer, first: int, last: int) -> Tensor:
    total = part.terms[0].columns(first, last)
    for term in part.terms[1:]:
        total = total + term.columns(first, last)
    return total


def _slabs(part: Gradients, blocks: Sequence[tuple[int, int]] | None = None) -> Iterator[Tensor]:
    if isinstance(part, Outer):
        for first, last in blocks or _channel_blocks(part):
            yield _columns(part, first, last).flatten(1)
    else:
        for first, last in blocks or ranges(part.shape[1], _slab_width(part)):
            yield part[:, first:last]


def _add_over_columns(total: Tensor, left: Gradients, right: Gradients) -> None:
    if isinstance(left, Outer) != isinstance(right, Outer):
        left, right = as_rows(left), as_rows(right)
    larger = left if len(left) >= len(right) else right
    blocks = list(
        _channel_blocks(larger) if isinstance(larger, Outer) else ranges(larger.shape[1], _slab_width(larger))
    )
    if left is right:
        for slab in _slabs(left, blocks):
            _add_lower(total, slab)
        return
    for one, other in zip(_slabs(left, blocks), _slabs(right, blocks), strict=True):
        total += one @ other.T


def _add_lower(total: Tensor, slab: Tensor, strip: int = 128) -> None:
    """Adds slab slab' on and below the diagonal, in vertical strips: little more than half the work of the whole product."""
    for first, last in ranges(len(slab), strip):
        total[first:, first:last] += slab[first:] @ slab[first:last].T


def _add_over_pairs(total: Tensor, left: Outer, right: Outer) -> None:
    for one in left.terms:
        for other in right.terms:
            size = max(1, int((PAIRS / (one.left.positions * other.left.positions * left.shape[0])) ** 0.5))
            for a, b in ranges(len(left), size):
                for c, d in ranges(b if left is right else len(right), size):
                    total[a:b, c:d] += _pairs(_part(one, a, b), _part(other, c, d))


def _pairs(one: Products, other: Products) -> Tensor:
    """Formula (*) for two uses."""
    products = products_of_dense(one.left.values, other.left.values)
    products *= products_of_pairs(one.right, other.right)
    n, m = len(one.left.values), len(other.left.values)
    return products.view(-1, n, one.left.positions, m, other.left.positions).sum((0, 2, 4))


def _part(products: Products, first: int, last: int) -> Products:
    return Products(Dense(products.left.values[first:last]), vectors_of(products.right, first, last))


def _slab_width(rows: Tensor) -> int:
    return max(256, SLAB // max(1, len(rows)))
