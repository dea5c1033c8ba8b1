"""The trace of an operator from products with random vectors, with its standard error."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.dense import orthonormal_columns
from plasticity_probe.linalg.operator import SymmetricOperator, check_operator
from plasticity_probe.linalg.random_vectors import rademacher


@dataclass(frozen=True)
class TraceEstimate:
    """An estimated trace.

    Args:
        value: The estimate; NaN where a product was not finite.
        standard_error: Standard deviation of the draws over the square root of their number; NaN with fewer than two draws.
        draws: Number of independent random vectors behind the standard error.
        products: Products with the operator that were spent.
    """

    value: float
    standard_error: float
    draws: int
    products: int


def hutchinson(operator: SymmetricOperator, draws: int, generator: torch.Generator) -> TraceEstimate:
    """Estimates the trace as the mean of ``v' A v`` over vectors v of random signs (Hutchinson 1989; Girard 1987).

    The variance of one draw is twice the sum of the squared off-diagonal entries, so a diagonal matrix is met exactly. Sums run in float64.

    Args:
        operator: A, of size n.
        draws: Number of vectors, at least 2; one product each.
        generator: The source of the signs.

    Returns:
        The mean and its standard error.

    Raises:
        UsageError: If there are fewer than two draws, or the operator has no rows or another dtype than float32 and float64.
    """
    check_operator(operator)
    if draws < 2:
        raise UsageError(f"expected at least 2 draws, as one has no standard error, got {draws}.")
    return mean_estimate([_quadratic(operator, rademacher(operator, generator)) for _ in range(draws)], products=draws)


def hutch_plus_plus(operator: SymmetricOperator, products: int, generator: torch.Generator) -> TraceEstimate:
    """Estimates the trace by Hutch++ (Meyer, Musco, Musco & Woodruff 2021, algorithm 1).

    A third of the products finds an orthonormal basis Q of where A is large, a third takes the exact trace of ``Q' A Q``, and a third
    estimates what is left, ``(I - Q Q') A (I - Q Q')``, by Hutchinson. The standard error is that of the last part, given Q. It is exact up to
    rounding for a matrix whose rank is at most a third of the products.

    Args:
        operator: A, of size n.
        products: Products to spend, at least 6; what a division by three leaves over stays unspent.
        generator: The source of the signs.

    Returns:
        The estimate and the standard error of its random part.

    Raises:
        UsageError: If fewer than 6 products are allowed, or the operator has no rows or another dtype than float32 and float64.
    """
    check_operator(operator)
    if products < 6:
        raise UsageError(f"expected at least 6 products, as the remainder needs two draws, got {products}.")
    draws = products // 3
    width = min(draws, operator.size)
    sketch = operator @ torch.stack([rademacher(operator, generator) for _ in range(width)], 1)
    scale = float(sketch.abs().max()) or 1.0
    if not math.isfinite(scale):
        return TraceEstimate(math.nan, math.nan, draws, width)
    basis = orthonormal_columns(sketch / scale)
    captured = float((basis.double() * (operator @ basis).double()).sum())
    remainder = mean_estimate(
        [_quadratic(operator, _outside(rademacher(operator, generator), basis)) for _ in range(draws)],
        products=2 * width + draws,
    )
    return TraceEstimate(captured + remainder.value, remainder.standard_error, draws, remainder.products)


def mean_estimate(samples: list[float], *, products: int) -> TraceEstimate:
    """The mean of independent draws with its standard error.

    Args:
        samples: One estimate a draw.
        products: Products that they cost.

    Returns:
        Mean and standard error; NaN for the latter where there is a single draw.
    """
    drawn = torch.tensor(samples, dtype=torch.float64)
    count = len(samples)
    # Differences, in units of the largest draw: equal draws give exactly 0, and squares neither overflow nor underflow.
    unit = float(drawn.abs().max()) or 1.0
    deviation = unit * float(((drawn - drawn[0]) / unit).std(correction=1)) if count > 1 else math.nan
    return TraceEstimate(float(drawn.mean()), deviation / math.sqrt(count), count, products)


def _quadratic(operator: SymmetricOperator, vector: Tensor) -> float:
    return float(vector.double() @ (operator @ vector).double())


def _outside(vector: Tensor, basis: Tensor) -> Tensor:
    return vector - basis @ (basis.T @ vector)
