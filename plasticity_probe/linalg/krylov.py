"""The Lanczos recurrence: an orthonormal basis in which a symmetric operator is tridiagonal.

In the space spanned by ``v, A v, A^2 v, ...`` an orthonormal basis Q exists with ``A Q = Q T + beta q e'`` and T tridiagonal (Lanczos 1950).
In rounded arithmetic Q loses its orthogonality as soon as an eigenvalue is found, and copies of it appear (Paige 1971), so every new
vector is orthogonalised against all earlier ones, twice: twice is enough (Daniel, Gragg, Kaufman & Stewart 1976; Parlett 1980, section
6.9). All scalars are kept in float64, and each product is divided by its largest entry before anything is squared, so the scale of the
operator does not matter.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.dense import symmetric_eigenpairs, vector_norm
from plasticity_probe.linalg.operator import SymmetricOperator, check_operator
from plasticity_probe.linalg.random_vectors import gaussian

ROUNDING = 64.0
"""Multiple of eps(dtype) times the norm below which a length is rounding (our choice: above what products of networks leave behind)."""


@dataclass(frozen=True, eq=False)
class Krylov:
    """A basis Q and the tridiagonal matrix T = Q' A Q.

    Args:
        basis: Q with orthonormal columns, shape (n, m).
        diagonal: Diagonal of T, float64 on the CPU, shape (m,).
        offdiagonal: Its neighbours, float64 on the CPU, shape (m,): entry j couples the columns j and j + 1; the last one couples the basis
            to `following`. An exact 0 marks a breakdown: the columns up to j span a space that A does not leave.
        following: The unit vector that the next step would add, shape (n,); None where there is none.
        locked: Orthonormal vectors that the basis is kept orthogonal to, shape (n, l). With P = I - L L', T belongs to P A P.
        products: Products with A that were spent.
        norm: A lower bound of the norm of A, the largest number met so far.
        asymmetry: Largest length, over the columns j, of what Q' A q_j should not hold if A is symmetric: rounding, or a sign that
            it is not.
        finite: False where a product held NaN or Inf. The basis then ends before it.
    """

    basis: Tensor
    diagonal: Tensor
    offdiagonal: Tensor
    following: Tensor | None
    locked: Tensor
    products: int
    norm: float
    asymmetry: float
    finite: bool

    @property
    def steps(self) -> int:
        """The number m of columns."""
        return self.diagonal.numel()

    @property
    def starts(self) -> tuple[int, ...]:
        """The columns where a fresh random vector was put in after a breakdown, ascending."""
        return tuple(j + 1 for j, coupling in enumerate(_numbers(self.offdiagonal[:-1])) if coupling == 0.0)

    @property
    def first_block(self) -> int:
        """How many leading columns come from the start vector."""
        return self.starts[0] if self.starts else self.steps

    def tridiagonal(self) -> Tensor:
        """T as a dense matrix, float64, shape (m, m)."""
        inner = self.offdiagonal[:-1]
        return torch.diag(self.diagonal) + torch.diag(inner, 1) + torch.diag(inner, -1)

    def scaled(self, factor: float) -> "Krylov":
        """The same basis as it belongs to ``factor * A``.

        Args:
            factor: The number, other than 0, that multiplies A.

        Returns:
            A new Krylov.
        """
        size = abs(factor)
        return replace(
            self,
            diagonal=self.diagonal * factor,
            offdiagonal=self.offdiagonal * factor,
            norm=self.norm * size,
            asymmetry=self.asymmetry * size,
        )


def lanczos(
    operator: SymmetricOperator,
    start: Tensor,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    locked: Tensor | None = None,
    norm: float = 0.0,
) -> Krylov:
    """Builds a Krylov basis from a start vector.

    A breakdown is declared when ``beta <= 64 eps(dtype) norm``: then the basis spans a space that A does not leave, and a fresh random
    vector, orthogonal to it, continues it. The basis ends early when it spans the whole space (less what is locked).

    Args:
        operator: A, of size n.
        start: The start vector of any length other than 0, shape (n,).
        steps: How many columns to build at most; one product each.
        generator: The source of the fresh vectors. None: the basis ends at a breakdown.
        locked: Orthonormal vectors to stay orthogonal to, shape (n, l).
        norm: A lower bound of the norm of A, if one is known.

    Returns:
        The basis; `extended` continues it.

    Raises:
        UsageError: If the operator has no rows or another dtype than float32 and float64, or the start vector has another shape, is zero,
            not finite, or inside the space of the locked vectors.
    """
    check_operator(operator)
    if start.shape != (operator.size,):
        raise UsageError(f"expected a start vector of shape ({operator.size},), got {tuple(start.shape)}.")
    empty = start.new_empty(operator.size, 0)
    locked = empty if locked is None else locked
    length = vector_norm(start)
    following = _orthogonal_to(start, (locked,)) if 0 < length < math.inf else None
    if following is None:
        raise UsageError(
            f"expected a start vector with a direction of its own, got one of length {length:.3g}; draw another one."
        )
    nothing = torch.empty(0, dtype=torch.float64)
    krylov = Krylov(empty, nothing, nothing, following, locked, 0, norm, 0.0, finite=True)
    return extended(operator, krylov, steps, generator=generator)


def extended(
    operator: SymmetricOperator, krylov: Krylov, steps: int, *, generator: torch.Generator | None = None
) -> Krylov:
    """Continues a Krylov basis.

    Args:
        operator: The operator that the basis belongs to.
        krylov: What is there.
        steps: How many columns to add at most; one product each.
        generator: The source of fresh vectors after a breakdown. None: the basis ends there.

    Returns:
        A new Krylov; the old one stays as it is (the basis is copied).
    """
    first, size = krylov.steps, operator.size
    room = max(0, min(steps, size - krylov.locked.shape[1] - first))
    rows = torch.empty(first + room, size, dtype=operator.dtype, device=operator.device)
    rows[:first] = krylov.basis.T
    diagonal, offdiagonal = _numbers(krylov.diagonal), _numbers(krylov.offdiagonal)
    following, norm, asymmetry, finite = krylov.following, krylov.norm, krylov.asymmetry, krylov.finite
    products = krylov.products
    negligible = ROUNDING * torch.finfo(operator.dtype).eps
    while following is not None and len(diagonal) < first + room:
        rows[len(diagonal)] = following
        known = rows[: len(diagonal) + 1].T
        product = operator @ following
        products += 1
        finite = math.isfinite(float(product.abs().max()))
        if not finite:
            following = None
            break
        step = _step(product, krylov.locked, known, offdiagonal[-1] if offdiagonal else 0.0)
        norm = max(norm, abs(step.alpha), step.beta)
        asymmetry = max(asymmetry, step.asymmetry)
        beta, following = step.beta, step.following
        spans = known.shape[1] + krylov.locked.shape[1] == size
        if spans or following is None or beta <= negligible * norm:
            beta, following = 0.0, None
            if not spans and generator is not None:
                following = _orthogonal_to(gaussian(operator, generator), (krylov.locked, known))
        diagonal.append(step.alpha)
        offdiagonal.append(beta)
    return Krylov(
        basis=rows[: len(diagonal)].T,
        diagonal=torch.tensor(diagonal, dtype=torch.float64),
        offdiagonal=torch.tensor(offdiagonal, dtype=torch.float64),
        following=following,
        locked=krylov.locked,
        products=products,
        norm=norm,
        asymmetry=asymmetry,
        finite=finite,
    )


def ritz(krylov: Krylov) -> tuple[Tensor, Tensor, Tensor]:
    """The eigenpairs of T, which approximate those of A.

    Args:
        krylov: A basis with m columns.

    Returns:
        The eigenvalues of T, descending, shape (m,); its eigenvectors as columns, shape (m, m), so that ``basis @ column`` is the Ritz
        vector; and ``beta |last component|``, the length of the residual in exact arithmetic (Parlett 1980, section 13.2), shape (m,).
        All float64.
    """
    values, coordinates = symmetric_eigenpairs(krylov.tridiagonal())
    coupling = krylov.offdiagonal[-1] if krylov.steps else 0.0
    return values, coordinates, (coordinates[-1:].sum(0) * coupling).abs()


@dataclass(frozen=True, eq=False)
class _Step:
    """What one product adds: T's new entries, the next direction, and what a symmetric operator would not have shown."""

    alpha: float
    beta: float
    following: Tensor | None
    asymmetry: float


def _step(product: Tensor, locked: Tensor, basis: Tensor, coupling: float) -> _Step:
    scale = float(product.abs().max()) or 1.0
    remainder = product / scale
    alpha = float(basis[:, -1].double() @ remainder.double())
    surplus = torch.zeros(basis.shape[1], dtype=basis.dtype, device=basis.device)
    for _ in range(2):
        remainder = remainder - locked @ (locked.T @ remainder)
        coefficients = basis.T @ remainder
        remainder = remainder - basis @ coefficients
        surplus += coefficients
    surplus[-1] = 0.0
    if basis.shape[1] > 1:
        surplus[-2] -= coupling / scale
    beta = vector_norm(remainder)
    following = remainder / beta if beta > 0 else None
    return _Step(scale * alpha, scale * beta, following, scale * vector_norm(surplus))


def _numbers(vector: Tensor) -> list[float]:
    return [float(number) for number in vector]


def _orthogonal_to(vector: Tensor, bases: tuple[Tensor, ...]) -> Tensor | None:
    """The unit vector along the part of `vector` that is orthogonal to all bases; None where nothing but rounding is left."""
    direction = vector / vector_norm(vector)
    for _ in range(3):
        for basis in bases:
            direction = direction - basis @ (basis.T @ direction)
        length = vector_norm(direction)
        if length <= ROUNDING * torch.finfo(vector.dtype).eps:
            return None
        direction = direction / length
    return direction
