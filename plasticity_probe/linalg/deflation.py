"""An operator without some of its eigenvectors, and the quadrature of what is left.

Eigenvalues that are known one by one need no random estimate: taken out, they add no variance to what is estimated of the rest (the idea of
Hutch++, Meyer, Musco, Musco & Woodruff 2021).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plasticity_probe.linalg.dense import orthonormal_columns
from plasticity_probe.linalg.krylov import lanczos
from plasticity_probe.linalg.operator import SymmetricOperator
from plasticity_probe.linalg.quadrature import quadrature_from_krylov
from plasticity_probe.linalg.random_vectors import gaussian


class DeflatedOperator:
    """P A P for the projector P onto the orthogonal complement of some vectors.

    Args:
        operator: A, of size n.
        vectors: Linearly independent vectors as columns, shape (n, k), k < n; eigenvectors of A up to their residuals.
    """

    def __init__(self, operator: SymmetricOperator, vectors: Tensor) -> None:
        self._operator = operator
        self._basis = orthonormal_columns(vectors)

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

    def project(self, vectors: Tensor) -> Tensor:
        """P times vectors; applied twice, because once leaves rounding behind."""
        for _ in range(2):
            vectors = vectors - self._basis @ (self._basis.T @ vectors)
        return vectors

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        return self.project(self._operator @ self.project(vectors))


@dataclass(frozen=True, eq=False)
class DeflatedQuadrature:
    """The whole spectrum: eigenvalues known one by one at both ends, nodes and weights between them.

    Args:
        nodes: Shape (draws, nodes): the known smallest, ascending, the nodes of the rest, ascending, the known largest, ascending. Shorter rows
            repeat the last node of the rest. NaN where a product was not finite.
        weights: Share of the n eigenvalues at each node, of the same shape; each row sums to 1. 0 at repeated nodes.
        exhausted: Per draw True where the Krylov space was exhausted, so that the nodes are eigenvalues.
        products: Products that were spent.
    """

    nodes: Tensor
    weights: Tensor
    exhausted: Tensor
    products: int


def deflated_quadrature(
    operator: DeflatedOperator,
    largest: Tensor,
    smallest: Tensor,
    *,
    draws: int,
    steps: int,
    generator: torch.Generator,
    norm: float = 0.0,
) -> DeflatedQuadrature:
    """Runs Lanczos from Gaussian vectors in the complement of known eigenvectors.

    Args:
        operator: P A P, of size n.
        largest: The deflated eigenvalues at the upper end, descending.
        smallest: The deflated eigenvalues at the lower end, ascending.
        draws: Number of start vectors.
        steps: The most Lanczos steps of each.
        generator: The source of the start vectors.
        norm: A lower bound of the norm of A, to which rounding is relative.

    Returns:
        The spectrum with what it cost.
    """
    rows = [_row(operator, largest.flip(0), smallest, steps, generator, norm) for _ in range(draws)]
    width = max(row.nodes.shape[1] for row in rows)
    padded = [_widened(row, width, largest.numel()) for row in rows]
    return DeflatedQuadrature(
        torch.cat([row.nodes for row in padded]),
        torch.cat([row.weights for row in padded]),
        torch.cat([row.exhausted for row in padded]),
        sum(row.products for row in rows),
    )


def _row(
    operator: DeflatedOperator, largest: Tensor, smallest: Tensor, steps: int, generator: torch.Generator, norm: float
) -> DeflatedQuadrature:
    krylov = lanczos(operator, operator.project(gaussian(operator, generator)), steps, norm=norm)
    if not krylov.finite:
        nothing = torch.full((1, largest.numel() + smallest.numel()), torch.nan, dtype=torch.float64)
        return DeflatedQuadrature(nothing, nothing, torch.tensor([False]), krylov.products)
    rest = quadrature_from_krylov(krylov)
    each = 1 / operator.size
    share = 1 - each * (largest.numel() + smallest.numel())
    weights = [torch.full_like(smallest, each), share * rest.weights[0], torch.full_like(largest, each)]
    return DeflatedQuadrature(
        torch.cat([smallest, rest.nodes[0], largest]).unsqueeze(0),
        torch.cat(weights).unsqueeze(0),
        krylov.offdiagonal[-1:] == 0.0,
        krylov.products,
    )


def _widened(row: DeflatedQuadrature, width: int, after: int) -> DeflatedQuadrature:
    place = row.nodes.shape[1] - after
    missing = width - row.nodes.shape[1]
    filler = row.nodes[:, place - 1 : place].expand(1, missing)

    def widened(values: Tensor, filler: Tensor) -> Tensor:
        return torch.cat([values[:, :place], filler, values[:, place:]], 1)

    return DeflatedQuadrature(
        widened(row.nodes, filler), widened(row.weights, torch.zeros_like(filler)), row.exhausted, row.products
    )
