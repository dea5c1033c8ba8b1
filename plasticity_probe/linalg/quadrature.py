"""The distribution of all eigenvalues by stochastic Lanczos quadrature.

For a random unit vector v the measure ``sum_i (u_i' v)^2 delta(lambda_i)`` is, in the mean, the distribution of the eigenvalues. Lanczos
from v gives its Gauss quadrature: the eigenvalues of T are the nodes, the squared first components of T's eigenvectors the weights, exact
for polynomials of degree below 2m (Golub & Welsch 1969; Bai, Fahey & Golub 1996; Ubaru, Chen & Saad 2017). What share of the spectrum
lies somewhere is read off the weights, never off the number of nodes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.dense import symmetric_eigenpairs
from plasticity_probe.linalg.krylov import Krylov


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Points and weights that stand for the eigenvalues of an operator, one row a draw.

    Args:
        nodes: Where the mass is, float64 on the CPU, shape (draws, nodes). A draw with fewer nodes repeats its largest one with weight 0.
        weights: Share of the eigenvalues at each node, float64 on the CPU, shape (draws, nodes); each row sums to 1.

    Raises:
        UsageError: If the shapes differ, are not two-dimensional, or hold no node.
    """

    nodes: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        if self.nodes.ndim != 2 or self.nodes.shape != self.weights.shape or self.nodes.numel() == 0:
            raise UsageError(
                "expected nodes and weights of one shape (draws, nodes), not empty, "
                f"got {tuple(self.nodes.shape)} and {tuple(self.weights.shape)}."
            )

    @property
    def draws(self) -> int:
        """The number of independent start vectors."""
        return self.nodes.shape[0]


def quadrature_from_krylov(krylov: Krylov) -> Quadrature:
    """The Gauss quadrature of a Krylov space, one draw.

    Only the block of the first start vector counts; what was put in after a breakdown has weight 0.

    Args:
        krylov: A space from a random start vector, nothing locked.

    Returns:
        A quadrature with a single draw.

    Raises:
        UsageError: If the space has no column, met a product that was not finite, or was kept orthogonal to something.
    """
    if krylov.steps == 0 or not krylov.finite or krylov.locked.shape[1] > 0:
        raise UsageError("expected a Krylov space of the whole operator with at least one step and finite products.")
    first = krylov.first_block
    nodes, vectors = symmetric_eigenpairs(krylov.tridiagonal()[:first, :first])
    return Quadrature(nodes.flip(0).unsqueeze(0), vectors[0].square().flip(0).unsqueeze(0))


def exact_quadrature(eigenvalues: Tensor) -> Quadrature:
    """The quadrature that every estimate approaches: each eigenvalue a node of weight 1/n.

    Args:
        eigenvalues: All eigenvalues of an operator, shape (n,), n >= 1.

    Returns:
        A quadrature with a single draw.
    """
    nodes = eigenvalues.detach().double().cpu().reshape(1, -1)
    return Quadrature(nodes, torch.full_like(nodes, 1 / max(1, nodes.numel())))


def density(quadrature: Quadrature, grid: Tensor, bandwidth: float) -> Tensor:
    """The density of the eigenvalues, each node widened to a normal distribution (Ghorbani, Krishnan & Xiao 2019).

    ``density(t) = mean over draws of sum_i w_i N(t; node_i, bandwidth^2)``; it integrates to 1.

    Args:
        quadrature: Nodes and weights.
        grid: Where to evaluate, shape (g,).
        bandwidth: Standard deviation of the normal distributions, in the units of the eigenvalues.

    Returns:
        Shape (g,), float64, in 1 / units of the eigenvalues.

    Raises:
        UsageError: If the bandwidth is not positive.
    """
    if not bandwidth > 0:
        raise UsageError(f"expected a bandwidth > 0, got {bandwidth}; a density of single points is no function.")
    points = grid.double().cpu().reshape(-1, 1)
    total = torch.zeros(points.shape[0], dtype=torch.float64)
    for nodes, weights in zip(quadrature.nodes, quadrature.weights, strict=True):
        total += torch.exp(-0.5 * ((points - nodes) / bandwidth).square()) @ weights
    return total / (quadrature.draws * bandwidth * math.sqrt(2 * math.pi))


def cumulative(quadrature: Quadrature, grid: Tensor) -> Tensor:
    """The share of the eigenvalues that are at most t, averaged over draws.

    Args:
        quadrature: Nodes and weights.
        grid: The values t, shape (g,).

    Returns:
        Shape (g,), float64, between 0 and 1.
    """
    below = quadrature.nodes.unsqueeze(-1) <= grid.double().cpu()
    return (quadrature.weights.unsqueeze(-1) * below).sum(1).mean(0)


def moment(quadrature: Quadrature, power: int) -> float:
    """The mean of the eigenvalues raised to a power, ``tr(A^power) / n``, averaged over draws.

    Args:
        quadrature: Nodes and weights.
        power: The exponent, at least 0.

    Returns:
        The moment, in units of the eigenvalues to that power.
    """
    return float((quadrature.weights * quadrature.nodes**power).sum(1).mean())
