"""Symmetric matrices known only through their products with vectors.

Every algorithm of this folder takes a `SymmetricOperator`: something with a size, a dtype, a device and ``@``. Curvature matrices of
networks are such operators; so is a plain matrix, wrapped in `DenseOperator`.
"""

from typing import Protocol

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError

DTYPES = (torch.float32, torch.float64)
"""The precisions that the algorithms work in: half precision fabricates and hides small eigenvalues."""


class SymmetricOperator(Protocol):
    """A real symmetric matrix A of shape (n, n) that can be multiplied with vectors."""

    @property
    def size(self) -> int:
        """The number n of rows."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors it takes and gives: float32 or float64."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the vectors it takes and gives."""
        ...

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """Multiplies A with a vector of shape (n,) or with the columns of a matrix of shape (n, k)."""
        ...


class DenseOperator:
    """A matrix as an operator.

    The matrix must be symmetric up to the rounding of the products that it came from: ``|A - A'| <= 8 n eps max|A|`` elementwise (our
    choice: n eps bounds the rounding of an inner product of length n). NaN and Inf pass, because the algorithms report them as a status.

    Args:
        matrix: Shape (n, n), float32 or float64.

    Raises:
        UsageError: If the matrix is not square, not symmetric, or of another dtype.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise UsageError(f"expected a square matrix, got shape {tuple(matrix.shape)}; pass one of shape (n, n).")
        _check_dtype(matrix.dtype)
        self.matrix = matrix
        self._check_symmetry()

    def _check_symmetry(self) -> None:
        if self.size == 0:
            return
        defect = float((self.matrix - self.matrix.T).abs().max())
        allowed = 8 * self.size * torch.finfo(self.dtype).eps * float(self.matrix.abs().max())
        if defect > allowed:
            raise UsageError(
                f"expected a symmetric matrix, got one that differs from its transpose by up to {defect:.3g} "
                f"(rounding explains {allowed:.3g}); pass (A + A.T) / 2 if its symmetric part is meant."
            )

    @property
    def size(self) -> int:
        """The number n of rows."""
        return self.matrix.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """The device of the matrix."""
        return self.matrix.device

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        return self.matrix @ vectors


class _Wrapper:
    """An operator made from another one of the same size, dtype and device."""

    def __init__(self, operator: SymmetricOperator) -> None:
        self.operator = operator

    @property
    def size(self) -> int:
        """The number n of rows."""
        return self.operator.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the operator inside."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """The device of the operator inside."""
        return self.operator.device


class ScaledOperator(_Wrapper):
    """The operator ``factor * A``.

    Args:
        operator: A.
        factor: The number that multiplies it; a power of two keeps the products exact.
    """

    def __init__(self, operator: SymmetricOperator, factor: float) -> None:
        super().__init__(operator)
        self.factor = factor

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        return (self.operator @ vectors) * self.factor


class ShiftedOperator(_Wrapper):
    """The operator ``A + shift * I``.

    Args:
        operator: A.
        shift: The number that is added to every eigenvalue.
    """

    def __init__(self, operator: SymmetricOperator, shift: float) -> None:
        super().__init__(operator)
        self.shift = shift

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        return self.operator @ vectors + self.shift * vectors


class CountingOperator(_Wrapper):
    """The operator A, counting in `products` the vectors that it was multiplied with.

    Args:
        operator: A.
    """

    def __init__(self, operator: SymmetricOperator) -> None:
        super().__init__(operator)
        self.products = 0

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        self.products += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self.operator @ vectors


def to_dense(operator: SymmetricOperator, *, block: int = 64) -> Tensor:
    """The matrix of an operator, by n products with the columns of the identity.

    Args:
        operator: A, of size n.
        block: How many columns are multiplied at once (our choice: a compromise between speed and memory).

    Returns:
        ``(A + A') / 2``, shape (n, n), in the operator's dtype and on its device.
    """
    matrix = columns(operator, block=block)
    return matrix / 2 + matrix.T / 2


def columns(operator: SymmetricOperator, *, block: int = 64) -> Tensor:
    """The columns ``A e_i`` as they come, shape (n, n): unlike `to_dense` not symmetrised, so that a defect of symmetry shows.

    Args:
        operator: A, of size n.
        block: How many columns are multiplied at once.

    Returns:
        Shape (n, n), in the operator's dtype and on its device.
    """
    size = operator.size
    matrix = torch.empty(size, size, dtype=operator.dtype, device=operator.device)
    for first in range(0, size, block):
        last = min(first + block, size)
        identity = torch.zeros(size, last - first, dtype=operator.dtype, device=operator.device)
        identity[first:last].fill_diagonal_(1.0)
        matrix[:, first:last] = operator @ identity
    return matrix


def check_operator(operator: SymmetricOperator) -> None:
    """Refuses an operator that no algorithm of this folder can work on.

    Args:
        operator: The operator to look at.

    Raises:
        UsageError: If it has no rows, or a dtype other than float32 and float64.
    """
    if operator.size < 1:
        raise UsageError("expected an operator with at least one row, got size 0; are there any parameters to measure?")
    _check_dtype(operator.dtype)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"expected float32 or float64, got {dtype}; convert it first, for example with .float().")
