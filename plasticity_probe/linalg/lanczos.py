"""The extreme eigenpairs of a symmetric operator, with what is needed to trust them.

A residual says that *an* eigenvalue is near, not that none was missed, and a Krylov space from one start holds a single direction of every
eigenspace. So when the pairs of a space have converged, a Lanczos run from an independent random vector looks at what is orthogonal to the
space, until an eigenvalue beyond those found would have been overlooked with a probability below one in ten thousand. What it finds is taken
in, with further starts, and the search goes on. Memory is bounded by thick restarts. Whatever was not reached is a status, never a silent
number.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.dense import column_norms, symmetric_eigenpairs, vector_norm
from plasticity_probe.linalg.inspection import EigenStatus, first_product, inspect_operator
from plasticity_probe.linalg.krylov import ROUNDING
from plasticity_probe.linalg.krylov_space import KrylovSpace
from plasticity_probe.linalg.operator import (
    CountingOperator,
    ScaledOperator,
    SymmetricOperator,
    check_operator,
    columns,
)
from plasticity_probe.linalg.search import MISSED, End, Search, Solution, flawed, searched, visible

__all__ = ["EigenStatus", "Eigenpairs", "ExtremeEigenpairs", "eigenpairs_beyond", "extreme_eigenpairs"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Some eigenpairs of a symmetric operator of size n.

    Args:
        values: Eigenvalues, float64 on the CPU, shape (k,).
        vectors: Orthonormal eigenvectors as columns, in the operator's dtype and on its device, shape (n, k).
        residuals: |A v - lambda v| of each, float64 on the CPU, shape (k,). An eigenvalue lies within this distance of lambda (Parlett 1980,
            section 4.5). Where the matrix was formed each comes from its own product. Else it is what the products of the search leave
            outside of the space, and added to that, as the root of the sum of squares, by how much a product with a random combination of
            all vectors of this end differs from what the search predicts.
        status: Whether the values can be trusted.
        products: Products that the whole search spent, for both ends together.
        steps: Basis vectors at the end of the search; 0 where the matrix was formed.
        norm: Estimate of the norm of the operator, from below.
        overlooked: Bound on the probability that an eigenvalue beyond these was missed; 0 where the matrix was formed, NaN where that was not
            looked into.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    status: EigenStatus
    products: int
    steps: int
    norm: float
    overlooked: float = math.nan


class ExtremeEigenpairs(NamedTuple):
    """Both ends of a spectrum.

    Attributes:
        top: The algebraically largest eigenvalues, descending.
        bottom: The algebraically smallest eigenvalues, ascending.
    """

    top: Eigenpairs
    bottom: Eigenpairs


def extreme_eigenpairs(
    operator: SymmetricOperator,
    k_top: int,
    k_bottom: int,
    *,
    generator: torch.Generator,
    tol: float = 1e-3,
    max_steps: int = 300,
    max_products: int | None = None,
    dense_below: int = 512,
    store: torch.device | None = None,
) -> ExtremeEigenpairs:
    """Computes the largest and the smallest eigenvalues of a symmetric operator.

    The operator is divided by a power of two near its norm, so its scale does not matter. A pair has converged when its residual is at most
    ``max(tol |lambda|, 64 eps(dtype) norm)``; the second term is what rounding allows for eigenvalues next to zero. An end is complete when
    an eigenvalue beyond the last one found, by more than that margin, would have been overlooked with a probability below 1e-4
    (`plasticity_probe.linalg.completeness`), or where that last one is itself rounding, when a random vector outside of the space meets
    nothing else.

    The spectrum outside of the space Q is judged as follows. With H = Q'AQ, Ritz pairs theta_i with residual vectors r_i, and B what A does
    outside of Q, A has beyond t as many eigenvalues as H and ``B + sum r_i r_i' / (t - theta_i)`` together (Haynsworth 1968). The run looks
    at that sum, over theta_i < t alone: those beyond t would only take something away.

    Args:
        operator: A, of size n.
        k_top: How many of the algebraically largest eigenvalues; at most n are given.
        k_bottom: How many of the algebraically smallest eigenvalues; at most n are given.
        generator: The source of the random vectors.
        tol: Relative residual of a converged pair (our choice: three digits, as eigenvalues of sampled losses have no more).
        max_steps: The most basis vectors held; beyond that the search restarts from the best of them. Beside these it holds the returned
            vectors, and a few more.
        max_products: No step begins once so many products are spent; None: ten times `max_steps`. Up to five more judge the result.
        dense_below: Up to this size the matrix is formed by n products and solved densely (our choice: cheaper than any search).
        store: Device for the basis, where the operator's own has no room for it; None: the operator's.

    Returns:
        Both ends. Their statuses are

        - OK: every pair meets the tolerance and none is missing,
        - NOT_CONVERGED: the allowed steps or products did not suffice,
        - ZERO_OPERATOR: every value is 0,
        - NONFINITE, ASYMMETRIC, NOT_REPEATABLE: all values are NaN.

    Raises:
        UsageError: If nothing is asked for, a setting is out of range, or the operator has no rows or another dtype than float32 and float64.
    """
    check_operator(operator)
    size = operator.size
    k_top, k_bottom = min(k_top, size), min(k_bottom, size)
    if min(k_top, k_bottom) < 0 or k_top + k_bottom == 0:
        raise UsageError(f"expected k_top and k_bottom >= 0 and one of them > 0, got {k_top} and {k_bottom}.")
    ends = (End(1.0, k_top), End(-1.0, k_bottom))
    return _solved(operator, ends, generator, tol, max_steps, max_products, max(dense_below, k_top + k_bottom), store)


def eigenpairs_beyond(
    operator: SymmetricOperator,
    *,
    above: float | None = None,
    below: float | None = None,
    generator: torch.Generator,
    tol: float = 1e-3,
    max_steps: int = 300,
    max_products: int | None = None,
    dense_below: int = 512,
    store: torch.device | None = None,
) -> ExtremeEigenpairs:
    """Computes all eigenvalues outside of a window: those of at least `above` and those of at most `below`.

    As `extreme_eigenpairs`, with limits in place of counts. An eigenvalue within the margin ``max(tol |limit|, 64 eps(dtype) norm)`` of its
    limit may be given or not.

    Args:
        operator: A, of size n.
        above: The lower limit of the largest eigenvalues asked for; None: none of them.
        below: The upper limit of the smallest eigenvalues asked for; None: none of them.
        generator: The source of the random vectors.
        tol: Relative residual of a converged pair.
        max_steps: The most basis vectors held; where more eigenvalues lie outside of the window, the status is NOT_CONVERGED.
        max_products: No step begins once so many products are spent; None: ten times `max_steps`.
        dense_below: Up to this size the matrix is formed.
        store: Device for the basis; None: the operator's.

    Returns:
        Both ends, as many as there are.

    Raises:
        UsageError: If neither limit is given, a setting is out of range, or the operator has no rows or another dtype than float32 and float64.
    """
    check_operator(operator)
    limits = [limit for limit in (above, below) if limit is not None]
    if not limits or not all(math.isfinite(limit) for limit in limits):
        raise UsageError(f"expected a finite limit above or below, got {above} and {below}.")
    ends = (
        End(1.0, 0 if above is None else None, above or 0.0),
        End(-1.0, 0 if below is None else None, -(below or 0.0)),
    )
    return _solved(operator, ends, generator, tol, max_steps, max_products, dense_below, store)


def _solved(
    operator: SymmetricOperator,
    ends: tuple[End, End],
    generator: torch.Generator,
    tol: float,
    max_steps: int,
    max_products: int | None,
    dense_below: int,
    store: torch.device | None,
) -> ExtremeEigenpairs:
    dense = operator.size <= dense_below
    max_products = 10 * max_steps if max_products is None else max_products
    _check_request(ends, tol, None if dense else min(max_steps, max_products))
    counting = CountingOperator(operator)
    if dense:
        found = inspect_operator(counting, generator)
        status, norm, start, product = found.status, found.norm, None, None
    else:
        start, product = first_product(counting, generator)
        norm = vector_norm(product)
        status = _status_of(norm)
    if status is not EigenStatus.OK:
        return _without_search(counting, ends, status, norm)
    unit = _power_of_two(norm, operator.dtype)
    scaled = ScaledOperator(counting, 1 / unit)
    ends = (replace(ends[0], limit=ends[0].limit / unit), replace(ends[1], limit=ends[1].limit / unit))
    if start is None or product is None:
        solution = _formed(scaled, ends, norm / unit)
    else:
        space = KrylovSpace(scaled, max_steps, generator, store)
        space.add_start(start)
        space.expand(product=product / unit)
        solution = searched(Search(space, ends, tol, max_products))
    if solution.flaw is not None:
        return _without_search(counting, ends, solution.flaw, unit * solution.norm)
    return ExtremeEigenpairs(
        *(_reported(solution, end, unit, counting.products, tol, operator.dtype) for end in (0, 1))
    )


def _status_of(length: float) -> EigenStatus:
    if not math.isfinite(length):
        return EigenStatus.NONFINITE
    return EigenStatus.OK if length > 0 else EigenStatus.ZERO_OPERATOR


def _formed(operator: SymmetricOperator, ends: tuple[End, End], norm: float) -> Solution:
    """Solves by forming the matrix."""
    matrix = columns(operator)
    if not bool(matrix.isfinite().all()):
        return flawed(EigenStatus.NONFINITE, norm)
    values, vectors = symmetric_eigenpairs(matrix)
    norm = float(values.abs().max())
    if float((matrix - matrix.T).abs().max()) > visible(operator.dtype) * norm:
        return flawed(EigenStatus.ASYMMETRIC, norm)
    chosen = [end.wanted(values) for end in ends]
    found = [vectors[:, places].to(matrix) for places in chosen]
    images = [operator @ each for each in found]
    return Solution(
        values=(values[chosen[0]], values[chosen[1]]),
        vectors=(found[0], found[1]),
        residuals=(
            column_norms(images[0] - found[0] * values[chosen[0]].to(matrix)),
            column_norms(images[1] - found[1] * values[chosen[1]].to(matrix)),
        ),
        overlooked=(0.0, 0.0),
        flaw=None,
        norm=norm,
        steps=0,
    )


def _reported(solution: Solution, end: int, unit: float, products: int, tol: float, dtype: torch.dtype) -> Eigenpairs:
    """The pairs of one end in the units of the operator."""
    values, residuals = solution.values[end], solution.residuals[end]
    allowed = (tol * values.abs()).clamp(min=ROUNDING * torch.finfo(dtype).eps * solution.norm)
    reached = solution.overlooked[end] <= MISSED and bool((residuals <= allowed).all())
    return Eigenpairs(
        values=unit * values,
        vectors=solution.vectors[end],
        residuals=unit * residuals,
        status=EigenStatus.OK if reached else EigenStatus.NOT_CONVERGED,
        products=products,
        steps=solution.steps,
        norm=unit * solution.norm,
        overlooked=solution.overlooked[end],
    )


def _without_search(
    counting: CountingOperator, ends: tuple[End, End], status: EigenStatus, norm: float
) -> ExtremeEigenpairs:
    """The answer where there is nothing to search: zeros for the zero operator, else NaN."""
    zero = status is EigenStatus.ZERO_OPERATOR

    def pairs(end: End) -> Eigenpairs:
        count = end.count if end.count is not None else counting.size if zero and end.limit <= 0 else 0
        numbers = torch.full((count,), 0.0 if zero else math.nan, dtype=torch.float64)
        vectors = torch.full((counting.size, count), math.nan, dtype=counting.dtype, device=counting.device)
        if zero:
            first = counting.size - count if end.sign < 0 else 0
            vectors.zero_()[first : first + count].fill_diagonal_(1.0)
        sure = 0.0 if zero else math.nan
        return Eigenpairs(numbers, vectors, numbers.clone(), status, counting.products, 0, norm, sure)

    return ExtremeEigenpairs(pairs(ends[0]), pairs(ends[1]))


def _power_of_two(norm: float, dtype: torch.dtype) -> float:
    """The power of two next to a norm, such that it and its inverse exist in the dtype."""
    largest = math.frexp(torch.finfo(dtype).max)[1] - 2
    return math.ldexp(1.0, max(-largest, min(largest, math.frexp(norm)[1])))


def _check_request(ends: tuple[End, End], tol: float, room: int | None) -> None:
    if not tol > 0:
        raise UsageError(f"expected tol > 0, got {tol}.")
    least = sum(end.count or 0 for end in ends) + 4
    if room is not None and room < least:
        raise UsageError(
            f"expected max_steps and max_products of at least k_top + k_bottom + 4 = {least}, got {room}; raise them or ask for fewer."
        )
