"""The extreme eigenpairs of a symmetric operator, with what is needed to trust them.

A Krylov space holds one direction per distinct eigenvalue, and a residual says that *an* eigenvalue is near, not that none was missed.
So after the pairs of a first space have converged, further spaces are built in the complement of what was found, from fresh random
vectors, until nothing there exceeds the last value asked for. Whatever was not reached is a status, never a silent number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.dense import column_norms, symmetric_eigenpairs
from plasticity_probe.linalg.inspection import EigenStatus, Inspection, inspect_operator
from plasticity_probe.linalg.krylov import ROUNDING, Krylov, extended, lanczos, ritz
from plasticity_probe.linalg.operator import (
    CountingOperator,
    ScaledOperator,
    SymmetricOperator,
    check_operator,
    columns,
)
from plasticity_probe.linalg.random_vectors import gaussian

__all__ = [
    "EigenStatus",
    "Eigenpairs",
    "ExtremeEigenpairs",
    "Krylov",
    "extended",
    "extreme_eigenpairs",
    "lanczos",
    "ritz",
]

MISSED = 1e-6
"""Probability with which a value that was missed may be declared absent (our choice)."""


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Some eigenpairs of a symmetric operator of size n.

    Args:
        values: Eigenvalues, float64 on the CPU, shape (k,).
        vectors: Orthonormal eigenvectors as columns, in the operator's dtype and on its device, shape (n, k).
        residuals: ``|A v - lambda v|_2`` from products with these vectors, float64 on the CPU, shape (k,). An eigenvalue lies within this
            distance of lambda (Parlett 1980, section 4.5).
        status: Whether the values can be trusted.
        products: Products that the whole search spent, for both ends together.
        steps: Columns of the first Krylov space; 0 where the matrix was formed.
        norm: Estimate of the norm of the operator, from below.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    status: EigenStatus
    products: int
    steps: int
    norm: float


class ExtremeEigenpairs(NamedTuple):
    """Both ends of a spectrum.

    Attributes:
        top: The algebraically largest eigenvalues, descending.
        bottom: The algebraically smallest eigenvalues, ascending.
        krylov: The first Krylov space, from a Gaussian start vector; None where none was needed.
    """

    top: Eigenpairs
    bottom: Eigenpairs
    krylov: Krylov | None


def extreme_eigenpairs(
    operator: SymmetricOperator,
    k_top: int,
    k_bottom: int,
    *,
    generator: torch.Generator,
    tol: float = 1e-3,
    max_steps: int = 300,
    max_products: int | None = None,
    check_every: int = 5,
    dense_below: int = 512,
) -> ExtremeEigenpairs:
    """Computes the largest and the smallest eigenvalues of a symmetric operator.

    The operator is first divided by a power of two near its norm, so its scale does not matter. A pair has converged when its residual is
    at most ``max(tol |lambda|, 64 eps(dtype) norm)``; the second term is what rounding allows for eigenvalues next to zero. Then the
    complement of the found vectors is searched until nothing in it exceeds the last value found (by more than the same margin), or
    until a value that does would have been missed with a probability below 1e-6 (Kuczynski & Wozniakowski 1992: a random start
    fails to see the largest eigenvalue to a share e of the spread after j steps with probability at most
    ``1.648 sqrt(n) exp(-sqrt(e) (2 j - 1))``).

    Args:
        operator: A, of size n.
        k_top: How many of the algebraically largest eigenvalues; at most n are given.
        k_bottom: How many of the algebraically smallest eigenvalues; at most n are given.
        generator: The source of the random vectors.
        tol: Relative residual of a converged pair (our choice: three digits, as eigenvalues of sampled losses have no more).
        max_steps: The most columns a Krylov space may have; the search holds up to three times as many vectors of length n.
        max_products: No Krylov step begins once so many products are spent; None: ten times `max_steps`. Residuals need up to
            ``2 (k_top + k_bottom)`` more.
        check_every: Steps between two tests of convergence.
        dense_below: Operators up to this size are formed and solved directly, whatever `max_products` says (our choice: at 512 that
            takes a fraction of a second). So is one with no more than ``k_top + k_bottom`` rows.

    Returns:
        The two ends and the first Krylov space.

    Raises:
        UsageError: If the operator has no rows or another dtype than float32 and float64, no or a negative number of eigenvalues is
            asked for, `tol` or `check_every` is not positive, or the limits leave no room for the search.
    """
    check_operator(operator)
    size = operator.size
    k_top, k_bottom = min(k_top, size), min(k_bottom, size)
    max_products = 10 * max_steps if max_products is None else max_products
    dense = size <= max(dense_below, k_top + k_bottom)
    _check_request(k_top, k_bottom, tol, check_every, None if dense else min(max_steps, max_products))
    counting = CountingOperator(operator)
    inspection = inspect_operator(counting, generator)
    if inspection.status is not EigenStatus.OK:
        return _without_search(counting, k_top, k_bottom, inspection)
    unit = _power_of_two(inspection.norm, operator.dtype)
    search = _Search(
        operator=ScaledOperator(counting, 1 / unit),
        spent=lambda: counting.products,
        generator=generator,
        norm=inspection.norm / unit,
        tol=tol,
        max_steps=max_steps,
        max_products=max_products,
        check_every=check_every,
    )
    solution = _formed(search, k_top, k_bottom) if dense else _searched(search, k_top, k_bottom)
    if solution.flaw is not None:
        return _without_search(counting, k_top, k_bottom, Inspection(solution.flaw, unit * solution.norm))
    return ExtremeEigenpairs(
        _reported(solution.top, solution, unit, counting.products),
        _reported(solution.bottom, solution, -unit, counting.products),
        solution.krylov.scaled(unit) if solution.krylov else None,
    )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Approximate eigenpairs, values descending, with the products A V that they were made from."""

    values: Tensor
    vectors: Tensor
    images: Tensor

    def residuals(self) -> Tensor:
        return column_norms(self.images - self.vectors * self.values.to(self.vectors))

    def leading(self, count: int) -> "_Pairs":
        return _Pairs(self.values[:count], self.vectors[:, :count], self.images[:, :count])


@dataclass(frozen=True, eq=False)
class _End:
    """One end of the spectrum, as the largest values of A or of -A; `complete` says that the search ended as it should."""

    pairs: _Pairs
    complete: bool


@dataclass(frozen=True, eq=False)
class _Solution:
    """Both ends for the normalised operator."""

    top: _End
    bottom: _End
    norm: float
    asymmetry: float
    krylov: Krylov | None
    search: "_Search"

    @property
    def flaw(self) -> EigenStatus | None:
        """What the products met during the search give away about the operator, if anything."""
        if not all(bool(end.pairs.values.isfinite().all()) for end in (self.top, self.bottom)):
            return EigenStatus.NONFINITE
        visible = math.sqrt(torch.finfo(self.search.operator.dtype).eps)
        return EigenStatus.ASYMMETRIC if self.asymmetry > visible * self.norm else None


@dataclass(frozen=True, eq=False)
class _Search:
    """A normalised operator and the rules that every step of the search keeps to."""

    operator: SymmetricOperator
    spent: Callable[[], int]
    generator: torch.Generator
    norm: float
    tol: float
    max_steps: int
    max_products: int
    check_every: int

    def allowed(self, values: Tensor) -> Tensor:
        """The largest residual of a converged pair, for each value."""
        rounding = ROUNDING * torch.finfo(self.operator.dtype).eps * self.norm
        return (self.tol * values.abs()).clamp(min=rounding)

    def grown(self, krylov: Krylov, done: Callable[[Krylov], bool]) -> Krylov:
        """Extends a Krylov space until it is done, or may not grow any more."""
        while krylov.following is not None and not done(krylov):
            steps = min(self.check_every, self.max_steps - krylov.steps, self.max_products - self.spent())
            if steps <= 0:
                break
            krylov = extended(self.operator, krylov, steps, generator=self.generator)
        return krylov

    def complement(self, pairs: _Pairs) -> Krylov:
        """A Krylov space with no column yet, orthogonal to what was found."""
        start = gaussian(self.operator, self.generator)
        return lanczos(self.operator, start, 0, locked=pairs.vectors, norm=self.norm)

    def converged(self, krylov: Krylov, count: int) -> bool:
        """Whether the leading Ritz pairs have converged, by their estimated residuals."""
        values, _, residuals = ritz(krylov)
        return krylov.steps >= count and bool((residuals[:count] <= self.allowed(values[:count])).all())

    def exhausted(self, krylov: Krylov, threshold: float, wanted: int) -> bool:
        """Whether the space shows all that its surroundings hold above a threshold (`wanted` values at most)."""
        if krylov.steps == 0:
            return False
        values, _, _ = ritz(krylov)
        above = int((values > threshold).sum())
        if above == 0 and self._chance_of_more(krylov, float(values[0]), threshold) <= MISSED:
            return True
        return self.converged(krylov, max(1, min(above, wanted)))

    def _chance_of_more(self, krylov: Krylov, largest: float, threshold: float) -> float:
        """The bound of Kuczynski & Wozniakowski (1992) on the probability that an eigenvalue above the threshold stayed unseen."""
        spread = threshold + max(self.norm, krylov.norm)
        if spread <= 0:
            return 1.0
        share = (threshold - largest) / spread
        return 1.648 * math.sqrt(self.operator.size) * math.exp(-math.sqrt(share) * (2 * krylov.steps - 1))

    def pairs(self, krylov: Krylov, count: int) -> _Pairs:
        """The leading Ritz pairs, with true products; NaN where a product was not finite."""
        if not krylov.finite:
            return _not_finite(self.operator, count)
        _, coordinates, _ = ritz(krylov)
        vectors = krylov.basis @ coordinates[:, :count].to(krylov.basis)
        return _rayleigh_ritz(vectors, self.operator @ vectors)


def _formed(search: _Search, k_top: int, k_bottom: int) -> _Solution:
    """Solves by forming the matrix."""
    matrix = columns(search.operator)
    if not bool(matrix.isfinite().all()):
        top, bottom = _not_finite(search.operator, k_top), _not_finite(search.operator, k_bottom)
        return _Solution(_End(top, False), _End(bottom, False), search.norm, 0.0, None, search)
    asymmetry = float((matrix - matrix.T).abs().max())
    values, vectors = symmetric_eigenpairs(matrix)
    norm = float(values.abs().max())

    def end(sign: float, values: Tensor, vectors: Tensor) -> _End:
        vectors = vectors.to(matrix)
        return _End(_Pairs(values, vectors, sign * (search.operator @ vectors)), complete=True)

    top = end(1.0, values[:k_top], vectors[:, :k_top])
    bottom = end(-1.0, -values.flip(0)[:k_bottom], vectors.flip(1)[:, :k_bottom])
    return _Solution(top, bottom, norm, asymmetry, None, replace(search, norm=norm))


def _searched(search: _Search, k_top: int, k_bottom: int) -> _Solution:
    """Solves by Lanczos: one space for both ends, then each end by itself."""
    first = lanczos(
        search.operator,
        gaussian(search.operator, search.generator),
        k_top + k_bottom + 1,
        generator=search.generator,
        norm=search.norm,
    )
    first = search.grown(
        first, lambda space: search.converged(space, k_top) and search.converged(space.scaled(-1.0), k_bottom)
    )
    norm = max(search.norm, float(ritz(first)[0].abs().max())) if first.steps else search.norm
    search = replace(search, norm=norm)
    top = _completed(search, first, k_top)
    bottom = _completed(replace(search, operator=ScaledOperator(search.operator, -1.0)), first.scaled(-1.0), k_bottom)
    return _Solution(top, bottom, norm, first.asymmetry, first, search)


def _completed(search: _Search, first: Krylov, count: int) -> _End:
    """Takes the leading pairs of a first space and adds what a single Krylov space cannot show, until nothing is missing."""
    pairs = search.pairs(first, count)
    if count == 0 or not first.finite or not search.converged(first, count):
        return _End(pairs, complete=count == 0)
    while bool(pairs.values.isfinite().all()):
        threshold = float(pairs.values[-1] + search.allowed(pairs.values[-1]))
        rest = search.grown(
            search.complement(pairs), lambda space, limit=threshold: search.exhausted(space, limit, count)
        )
        if not rest.finite:
            return _End(_not_finite(search.operator, count), complete=False)
        finished = search.exhausted(rest, threshold, count)
        above = min(count, int((ritz(rest)[0] > threshold).sum()))
        if above == 0:
            return _End(pairs, finished)
        pairs = _merged(pairs, search.pairs(rest, above)).leading(count)
        if not finished:
            break
    return _End(pairs, complete=False)


def _rayleigh_ritz(vectors: Tensor, images: Tensor) -> _Pairs:
    """The best approximate eigenpairs within the span of orthonormal vectors whose products are known."""
    if not bool(images.isfinite().all()):
        return _Pairs(torch.full((vectors.shape[1],), math.nan, dtype=torch.float64), vectors, images)
    values, rotation = symmetric_eigenpairs(vectors.T @ images)
    rotation = rotation.to(vectors)
    return _Pairs(values, vectors @ rotation, images @ rotation)


def _merged(some: _Pairs, others: _Pairs) -> _Pairs:
    return _rayleigh_ritz(torch.cat([some.vectors, others.vectors], 1), torch.cat([some.images, others.images], 1))


def _not_finite(operator: SymmetricOperator, count: int) -> _Pairs:
    vectors = torch.full((operator.size, count), math.nan, dtype=operator.dtype, device=operator.device)
    return _Pairs(torch.full((count,), math.nan, dtype=torch.float64), vectors, vectors)


def _reported(end: _End, solution: _Solution, unit: float, products: int) -> Eigenpairs:
    """The pairs of one end in the units of the operator; a negative unit turns those of -A into those of A."""
    pairs, residuals = end.pairs, end.pairs.residuals()
    reached = end.complete and bool((residuals <= solution.search.allowed(pairs.values)).all())
    return Eigenpairs(
        values=unit * pairs.values,
        vectors=pairs.vectors,
        residuals=abs(unit) * residuals,
        status=EigenStatus.OK if reached else EigenStatus.NOT_CONVERGED,
        products=products,
        steps=solution.krylov.steps if solution.krylov else 0,
        norm=abs(unit) * solution.norm,
    )


def _without_search(counting: CountingOperator, k_top: int, k_bottom: int, found: Inspection) -> ExtremeEigenpairs:
    """The answer where there is nothing to search: zeros for the zero operator, else NaN."""
    zero = found.status is EigenStatus.ZERO_OPERATOR

    def pairs(count: int, *, last: bool) -> Eigenpairs:
        numbers = torch.full((count,), 0.0 if zero else math.nan, dtype=torch.float64)
        vectors = torch.full((counting.size, count), math.nan, dtype=counting.dtype, device=counting.device)
        if zero:
            first = counting.size - count if last else 0
            vectors.zero_()[first : first + count].fill_diagonal_(1.0)
        return Eigenpairs(numbers, vectors, numbers.clone(), found.status, counting.products, 0, found.norm)

    return ExtremeEigenpairs(pairs(k_top, last=False), pairs(k_bottom, last=True), None)


def _power_of_two(norm: float, dtype: torch.dtype) -> float:
    """The power of two next to a norm, such that it and its inverse exist in the dtype."""
    largest = math.frexp(torch.finfo(dtype).max)[1] - 2
    return math.ldexp(1.0, max(-largest, min(largest, math.frexp(norm)[1])))


def _check_request(k_top: int, k_bottom: int, tol: float, check_every: int, room: int | None) -> None:
    if min(k_top, k_bottom) < 0 or k_top + k_bottom == 0:
        raise UsageError(f"expected k_top and k_bottom >= 0 and one of them > 0, got {k_top} and {k_bottom}.")
    if not tol > 0 or check_every < 1:
        raise UsageError(f"expected tol > 0 and check_every >= 1, got {tol} and {check_every}.")
    least = k_top + k_bottom + 4
    if room is not None and room < least:
        raise UsageError(
            f"expected max_steps and max_products of at least k_top + k_bottom + 4 = {least}, got {room}; raise them or ask for fewer."
        )
