"""The distribution of all eigenvalues by stochastic Lanczos quadrature.

For a random unit vector v the measure ``sum_i (u_i' v)^2 delta(lambda_i)`` is, in the mean, the distribution of the eigenvalues. Lanczos
from v gives its Gauss quadrature: the eigenvalues of T are the nodes, the squared first components of T's eigenvectors the weights, exact
for polynomials of degree below 2m (Golub & Welsch 1969; Bai, Fahey & Golub 1996; Ubaru, Chen & Saad 2017). What share of the spectrum
lies somewhere is read off the weights, never off the number of nodes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.dense import symmetric_eigenpairs
from plasticity_probe.linalg.inspection import EigenStatus, inspect_operator
from plasticity_probe.linalg.krylov import Krylov, lanczos
from plasticity_probe.linalg.matrix_trace import TraceEstimate, mean_estimate
from plasticity_probe.linalg.operator import SymmetricOperator
from plasticity_probe.linalg.random_vectors import gaussian, rademacher

START_VECTORS = {"rademacher": rademacher, "gaussian": gaussian}
"""The distributions of start vectors, by name."""


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Points and weights that stand for the eigenvalues of an operator, one row a draw.

    Args:
        nodes: Where the mass is, float64 on the CPU, shape (draws, nodes). A draw with fewer nodes repeats its largest one with weight 0.
        weights: Share of the eigenvalues at each node, float64 on the CPU, shape (draws, nodes); each row sums to 1. NaN in both where
            a product was not finite.

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


@dataclass(frozen=True)
class QuadratureRun:
    """What a quadrature cost and whether it can be trusted.

    Args:
        status: OK, ZERO_OPERATOR (all mass at 0), NONFINITE, ASYMMETRIC or NOT_REPEATABLE (nodes and weights are NaN).
        products: Products with the operator that were spent, three of them to look at it.
        steps: Lanczos steps of each draw; fewer than asked for where the start vector's space was exhausted.
        norm: Estimate of the norm of the operator, from below.
    """

    status: EigenStatus
    products: int
    steps: tuple[int, ...]
    norm: float


def quadrature(
    operator: SymmetricOperator,
    *,
    draws: int,
    steps: int,
    generator: torch.Generator,
    distribution: str = "rademacher",
) -> tuple[Quadrature, QuadratureRun]:
    """Runs Lanczos from random vectors and returns nodes and weights.

    Few draws of many steps resolve more than many draws of few: a Wasserstein error of t times the spread takes about ``12 / t`` steps,
    and for a large operator a single draw (Chen, Trogdon & Ubaru 2021). Two or more draws are needed for any standard error. A draw ends
    where its Krylov space is exhausted, because what lies beyond has weight 0.

    Args:
        operator: A, of size n.
        draws: Number of start vectors.
        steps: The most Lanczos steps of a draw.
        generator: The source of the start vectors.
        distribution: "rademacher" (random signs: the trace of a diagonal operator comes out
            up to rounding) or "gaussian".

    Returns:
        The quadrature, and what it cost.

    Raises:
        UsageError: If draws or steps is below 1, the distribution is unknown, or the operator has no rows or another dtype than float32 and
            float64.
    """
    if draws < 1 or steps < 1 or distribution not in START_VECTORS:
        raise UsageError(
            f"expected draws >= 1, steps >= 1 and one of {sorted(START_VECTORS)}, got {draws}, {steps} and {distribution!r}."
        )
    inspection = inspect_operator(operator, generator)
    if inspection.status is EigenStatus.ZERO_OPERATOR:
        node = torch.zeros(draws, 1, dtype=torch.float64)
        return Quadrature(node, node + 1), QuadratureRun(inspection.status, 1, (0,) * draws, 0.0)
    if inspection.status is not EigenStatus.OK:
        return _nothing(draws), QuadratureRun(inspection.status, 3, (0,) * draws, inspection.norm)
    start_vector = START_VECTORS[distribution]
    drawn = [_draw(lanczos(operator, start_vector(operator, generator), steps)) for _ in range(draws)]
    norm = max(inspection.norm, *(draw.norm for draw in drawn))
    status = _status(drawn, norm, operator.dtype)
    products = 3 + sum(draw.products for draw in drawn)
    run = QuadratureRun(status, products, tuple(draw.tridiagonal.shape[0] for draw in drawn), norm)
    return (_stacked([draw.tridiagonal for draw in drawn]) if status is EigenStatus.OK else _nothing(draws)), run


def quadrature_from_krylov(krylov: Krylov) -> Quadrature:
    """One draw from a Krylov space that was built for something else.

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
    return _stacked([_draw(krylov).tridiagonal])


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


def matrix_function_trace(quadrature: Quadrature, function: Callable[[Tensor], Tensor], size: int) -> TraceEstimate:
    """Estimates ``tr f(A)`` as n times the mean over draws of ``sum_i w_i f(node_i)`` (Ubaru, Chen & Saad 2017).

    Args:
        quadrature: Nodes and weights.
        function: f, elementwise on a tensor.
        size: The number n of rows of A.

    Returns:
        The estimate and its standard error over draws: NaN for a single draw, and blind to the error of too few steps.
    """
    values = torch.where(quadrature.weights > 0, function(quadrature.nodes), 0.0)
    shares = (quadrature.weights * values).sum(1)
    return mean_estimate([size * float(share) for share in shares], products=0)


@dataclass(frozen=True, eq=False)
class _Draw:
    """What is needed of a Krylov space when its basis is gone: the T of its first block, and how the products behaved."""

    tridiagonal: Tensor
    products: int
    norm: float
    asymmetry: float
    finite: bool


def _draw(krylov: Krylov) -> _Draw:
    first = krylov.first_block
    tridiagonal = krylov.tridiagonal()[:first, :first]
    return _Draw(tridiagonal, krylov.products, krylov.norm, krylov.asymmetry, krylov.finite)


def _status(draws: list[_Draw], norm: float, dtype: torch.dtype) -> EigenStatus:
    if not all(draw.finite for draw in draws):
        return EigenStatus.NONFINITE
    visible = math.sqrt(torch.finfo(dtype).eps) * norm
    return EigenStatus.ASYMMETRIC if max(draw.asymmetry for draw in draws) > visible else EigenStatus.OK


def _stacked(tridiagonals: list[Tensor]) -> Quadrature:
    width = max(matrix.shape[0] for matrix in tridiagonals)
    rows = [_gauss(matrix, width) for matrix in tridiagonals]
    return Quadrature(torch.stack([nodes for nodes, _ in rows]), torch.stack([weights for _, weights in rows]))


def _gauss(tridiagonal: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Ascending nodes and their weights, padded to a width."""
    nodes, vectors = symmetric_eigenpairs(tridiagonal)
    nodes, weights = nodes.flip(0), vectors[0].square().flip(0)
    missing = width - nodes.numel()
    return torch.cat([nodes, nodes[-1:].expand(missing)]), torch.cat([weights, weights.new_zeros(missing)])


def _nothing(draws: int) -> Quadrature:
    nothing = torch.full((draws, 1), math.nan, dtype=torch.float64)
    return Quadrature(nothing, nothing)
