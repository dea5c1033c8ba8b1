"""Dense factorisations and lengths, for the small or tall matrices that the matrix-free algorithms come down to."""

import math
from typing import Any, cast

import torch
from torch import Tensor

# torch.linalg carries no type annotations; its results are given types here, in one place.
_linalg = cast("Any", torch.linalg)


def symmetric_eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenpairs of a small symmetric matrix, in float64 on the CPU.

    Args:
        matrix: Shape (m, m), finite; its symmetric part is taken.

    Returns:
        The eigenvalues, descending, shape (m,), and orthonormal eigenvectors as columns, shape (m, m).
    """
    matrix = matrix.double().cpu()
    values, vectors = cast("tuple[Tensor, Tensor]", _linalg.eigh(matrix / 2 + matrix.T / 2))
    return values.flip(0), vectors.flip(1)


def orthonormal_columns(matrix: Tensor) -> Tensor:
    """An orthonormal basis of a space that holds the columns of a tall matrix (Householder QR).

    Args:
        matrix: Shape (n, k) with k <= n, finite.

    Returns:
        Shape (n, k); complete also where the columns of the matrix depend on each other.
    """
    return cast("tuple[Tensor, Tensor]", _linalg.qr(matrix))[0]


def vector_norm(vector: Tensor) -> float:
    """The Euclidean length of a vector, with no overflow or underflow of its squares.

    Args:
        vector: Shape (n,), n >= 1.

    Returns:
        The length; NaN or Inf where an entry is.
    """
    largest = float(vector.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float((vector / largest).square().sum(dtype=torch.float64)))


def column_norms(matrix: Tensor) -> Tensor:
    """The Euclidean lengths of the columns of a matrix of moderate scale.

    Args:
        matrix: Shape (n, k).

    Returns:
        Shape (k,), float64 on the CPU.
    """
    return matrix.square().sum(0, dtype=torch.float64).sqrt().cpu()
