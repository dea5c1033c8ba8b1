"""An operator without some of its eigenvectors, and without the coordinates on which it does nothing."""

from functools import cached_property

import torch
from torch import Tensor

from plasticity_probe.linalg.dense import orthonormal_columns, vector_norm
from plasticity_probe.linalg.operator import SymmetricOperator
from plasticity_probe.linalg.random_vectors import gaussian


class DeflatedOperator:
    """P A P for the projector P onto the orthogonal complement of some vectors and of inactive coordinates.

    Args:
        operator: A, of size n; itself deflated or not.
        vectors: Linearly independent vectors as columns, shape (n, k), k < n; eigenvectors of A up to their residuals.
        active: True where rows of A are not 0, shape (n,); None: everywhere.
    """

    def __init__(self, operator: SymmetricOperator, vectors: Tensor, active: Tensor | None = None) -> None:
        self._operator = operator
        self._active = active
        self._basis = orthonormal_columns(vectors if active is None else vectors * active[:, None])

    @property
    def size(self) -> int:
        """The number n of rows, the deflated directions among them."""
        return self._operator.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of A."""
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        """The device of A."""
        return self._operator.device

    @cached_property
    def inactive(self) -> int:
        """The number of coordinates left out."""
        return 0 if self._active is None else self.size - int(self._active.sum())

    @property
    def dimension(self) -> int:
        """The dimension of the complement."""
        whole = self._operator.dimension if isinstance(self._operator, DeflatedOperator) else self.size
        return whole - self.inactive - self._basis.shape[1]

    def project(self, vectors: Tensor) -> Tensor:
        """P times vectors; applied twice, because once leaves rounding behind."""
        for _ in range(2):
            if isinstance(self._operator, DeflatedOperator):
                vectors = self._operator.project(vectors)
            if self._active is not None:
                vectors = vectors * self._active.reshape(-1, *[1] * (vectors.ndim - 1))
            vectors = vectors - self._basis @ (self._basis.T @ vectors)
        return vectors

    def direction(self, generator: torch.Generator) -> Tensor:
        """A direction uniform on the unit sphere of the complement, shape (n,)."""
        vector = self.project(gaussian(self, generator))
        return vector / vector_norm(vector)

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        inner = self._operator._operator if isinstance(self._operator, DeflatedOperator) else self._operator
        return self.project(inner @ self.project(vectors))
