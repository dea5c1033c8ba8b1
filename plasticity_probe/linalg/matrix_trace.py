"""The trace of an operator from products with random directions, with an interval that holds as often as it says.

Directions are uniform on the sphere, not random signs: their law is the same in every basis, so the interval is right for every matrix
(`plasticity_probe.linalg.sampling_error`), and from the first draw on. Random signs give a smaller variance where much of the matrix is on its
diagonal, but a few draws of them can agree by chance and then hide all of it.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]  (scipy ships none)

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.deflation import DeflatedOperator
from plasticity_probe.linalg.dense import orthonormal_columns
from plasticity_probe.linalg.operator import SymmetricOperator, check_operator
from plasticity_probe.linalg.random_vectors import gaussian, sphere
from plasticity_probe.linalg.sampling_error import LEVEL, skewed_offsets, standard_error


@dataclass(frozen=True)
class TraceEstimate:
    """An estimated trace.

    Args:
        value: The estimate; NaN where a product was not finite.
        standard_error: That of a normal law with the longer side of the interval: the standard deviation of the mean, and more where draws are
            few or a few eigenvalues are most of the matrix.
        draws: Number of independent random vectors behind it.
        products: Products with the operator that were spent.
        lower: Lower end of the 95 % interval.
        upper: Upper end.
    """

    value: float
    standard_error: float
    draws: int
    products: int
    lower: float
    upper: float

    @classmethod
    def of_interval(cls, value: float, lower: float, upper: float, draws: int, products: int) -> "TraceEstimate":
        """From an interval."""
        return cls(value, standard_error((lower - value, upper - value)), draws, products, lower, upper)

    def plus(self, exact: float, products: int) -> "TraceEstimate":
        """The estimate of a sum of which the other part is known, at the cost of some products."""
        return TraceEstimate.of_interval(
            exact + self.value, exact + self.lower, exact + self.upper, self.draws, products + self.products
        )


def hutchinson(
    operator: SymmetricOperator,
    draws: int,
    generator: torch.Generator,
    *,
    ends: tuple[float, float] | None = None,
) -> TraceEstimate:
    """Estimates the trace as n times the mean of ``u' A u`` over random directions u (Girard 1987; Hutchinson 1989).

    Its variance is ``(2 / draws) n / (n + 2)`` times ``|A|_F^2 - tr(A)^2 / n``, and ``n |A u|^2`` is a draw of ``|A|_F^2``, so the products that
    give the trace give its error. A multiple of the identity is met exactly. Sums run in float64.

    Args:
        operator: A, of size n. Of a `DeflatedOperator` the directions are those of its complement, and n its dimension.
        draws: Number of directions, at least 1; one product each.
        generator: The source of the directions.
        ends: Between which all eigenvalues lie. None: a single one may be all of it, which makes the interval a fifth longer at 10 draws.

    Returns:
        The mean and its interval.

    Raises:
        UsageError: If there is no draw, or the operator has no rows or another dtype than float32 and float64.
    """
    check_operator(operator)
    if draws < 1:
        raise UsageError(f"expected at least 1 draw, got {draws}.")
    deflated = isinstance(operator, DeflatedOperator)
    size = operator.dimension if deflated else operator.size
    quotients, rests = torch.empty(draws, dtype=torch.float64), torch.empty(draws, dtype=torch.float64)
    for draw in range(draws):
        direction = operator.direction(generator) if deflated else sphere(operator, generator)
        image, direction = (operator @ direction).double(), direction.double()
        quotients[draw] = direction @ image / (direction @ direction)
        rests[draw] = (image - quotients[draw].to(image) * direction).square().sum()
    if not bool(quotients.isfinite().all() & rests.isfinite().all()):
        return TraceEstimate.of_interval(math.nan, math.nan, math.nan, draws, draws)
    mean = float(quotients.mean())
    variance = size * float(rests.mean() + (quotients - mean).square().mean())
    # What is below rounding is that of a multiple of the identity.
    variance = variance if variance > size * (8 * torch.finfo(operator.dtype).eps * mean) ** 2 else 0.0
    return _interval(size, mean, variance, draws, ends)


def hutch_plus_plus(operator: SymmetricOperator, products: int, generator: torch.Generator) -> TraceEstimate:
    """Estimates the trace by Hutch++ (Meyer, Musco, Musco & Woodruff 2021, algorithm 1).

    A third of the products finds an orthonormal basis Q of where A is large, a third takes the exact trace of ``Q' A Q``, and a third
    estimates what is left, ``(I - Q Q') A (I - Q Q')``, by Hutchinson. The interval is that of the last part, given Q. It is exact up to
    rounding for a matrix whose rank is at most a third of the products.

    It wins over `hutchinson` with as many products where Q takes more than two thirds of ``|A|_F^2``. Where a Krylov space is there already,
    `hutchinson` outside of its basis wins over both: the first two thirds are then paid for.

    Args:
        operator: A, of size n.
        products: Products to spend, at least 3; what a division by three leaves over stays unspent.
        generator: The source of the directions.

    Returns:
        The estimate and the interval of its random part.

    Raises:
        UsageError: If fewer than 3 products are allowed, or the operator has no rows or another dtype than float32 and float64.
    """
    check_operator(operator)
    if products < 3:
        raise UsageError(f"expected at least 3 products, one for each part, got {products}.")
    draws = products // 3
    width = min(draws, operator.size)
    sketch = operator @ torch.stack([gaussian(operator, generator) for _ in range(width)], 1)
    scale = float(sketch.abs().max()) or 1.0
    if not math.isfinite(scale):
        return TraceEstimate.of_interval(math.nan, math.nan, math.nan, draws, width)
    basis = orthonormal_columns(sketch / scale)
    captured = float((basis.double() * (operator @ basis).double()).sum())
    if width == operator.size:
        return TraceEstimate.of_interval(captured, captured, captured, draws, 2 * width)
    return hutchinson(DeflatedOperator(operator, basis), draws, generator).plus(captured, 2 * width)


def mean_estimate(samples: list[float], *, products: int) -> TraceEstimate:
    """The mean of independent draws of an unknown law, with its standard error and Student interval.

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
    mean, error = float(drawn.mean()), deviation / math.sqrt(count)
    half = float(cast(Any, stdtrit)(count - 1, (1 + LEVEL) / 2)) * error if count > 1 else math.nan
    return TraceEstimate(mean, error, count, products, mean - half, mean + half)


def _interval(size: int, mean: float, variance: float, draws: int, ends: tuple[float, float] | None) -> TraceEstimate:
    """The interval from the sum of squared deviations of the eigenvalues; without ends, a single eigenvalue may be all of that."""
    length = math.sqrt(variance)
    low, high = (-length, length) if ends is None else (min(0.0, ends[0] - mean), max(0.0, ends[1] - mean))
    least, most = max(low, -length), min(high, length)
    second = np.array([size / (size + 2) * (2 / draws) * variance])
    third = (2 / draws) ** 2 * variance
    offsets = skewed_offsets(
        second, (np.array([third * least]), np.array([third * most])), (np.array([low]), np.array([high])), draws
    )
    value = size * mean
    return TraceEstimate.of_interval(
        value, value + float(offsets.lower[0]), value + float(offsets.upper[0]), draws, draws
    )
