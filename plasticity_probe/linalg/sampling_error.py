"""How far the weights of random directions are from those of the eigenvalues: a law that is known, so no draws are spent on learning it.

For a direction u uniform on the sphere of R^n the squared components in any orthonormal basis, and so the weights ``(u_i' u)^2`` of the
eigenvalues, follow the Dirichlet law with all parameters 1/2, whatever the matrix. So m draws estimate ``sum_i f(lambda_i)`` with variance

    (2 / m)  n / (n + 2)  sum_i (f(lambda_i) - mean f)^2

and k equal eigenvalues get a weight that is a chi-squared variable of m k degrees of freedom over m n, up to the common sum. Read the other way
round, the number of eigenvalues behind an observed weight w is ``(2 / m)`` times a Poisson variable of mean ``m n w / 2``, give or take the
half count by which the inversion of a continuous law by a discrete one is open (as for a gamma variable and its shape; Garwood 1936). Its third
cumulant makes the interval lean to the side where unlucky draws hide eigenvalues. A Student interval over three draws knows none of this.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv, ndtri  # pyright: ignore[reportMissingTypeStubs]  (scipy ships none)

Array = NDArray[np.float64]

LEVEL = 0.95
"""Share of repetitions in which an interval holds what was estimated."""


class Offsets(NamedTuple):
    """What is to be added to an estimate to get both ends of its interval: lower, at most 0, and upper, at least 0."""

    lower: Array
    upper: Array


def sampling_offsets(values: Array, counts: Array, ends: Array, draws: int, *, level: float = LEVEL) -> Offsets:
    """The interval of sums over eigenvalues of which random directions give the weights.

    Args:
        values: Of each function at the nodes, shape (nodes, functions).
        counts: How many eigenvalues each node stands for, over all draws; they sum to n, shape (nodes,).
        ends: The extreme values of each function where eigenvalues may be, shape (2, functions).
        draws: Number m of directions.
        level: The chance to cover.

    Returns:
        Offsets from ``sum_i counts_i values_i``, each of shape (functions,).
    """
    total = float(counts.sum())
    centre = (counts @ values) / total
    around = values - centre
    second = total / (total + 2) * (2 / draws) * (counts @ np.square(around))
    third = (2 / draws) ** 2 * (counts @ around**3)
    room = np.clip((ends - centre).min(0), None, 0.0), np.clip((ends - centre).max(0), 0.0, None)
    return skewed_offsets(second, (third, third), room, draws, level=level)


def skewed_offsets(
    second: Array, third: tuple[Array, Array], room: tuple[Array, Array], draws: int, *, level: float = LEVEL
) -> Offsets:
    """The same from cumulants.

    Args:
        second: Variances of the estimates.
        third: Third cumulants, for the lower and for the upper end.
        room: What a single eigenvalue can take from and add to the sum at most.
        draws: Number m of directions.
        level: The chance to cover.
    """
    tail = (1 - level) / 2
    lower = room[0] / draws + _quantile(tail, second, third[0])
    upper = room[1] / draws + _quantile(1 - tail, second, third[1])
    return Offsets(np.minimum(lower, 0.0), np.maximum(upper, 0.0))


def _quantile(chance: float, second: Array, third: Array) -> Array:
    """Of the Pearson type III law (a shifted gamma law) with mean 0 and the given cumulants."""
    deviation = np.sqrt(second)
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness = np.where(second > 0, third / (second * deviation), 0.0)
    size = np.abs(skewness).clip(1e-4, 1e3)
    shape = 4 / np.square(size)
    inverse = cast("Callable[[Array, float], Array]", gammaincinv)
    gamma: Array = np.where(skewness > 0, inverse(shape, chance), -inverse(shape, 1 - chance)) * size / 2
    standard = np.where(np.abs(skewness) < 1e-4, float(cast(Any, ndtri)(chance)), gamma - np.sign(skewness) * 2 / size)
    return deviation * standard


def standard_error(offsets: tuple[float, float]) -> float:
    """The standard deviation of a normal law whose interval reaches as far as the longer side of this one."""
    return (
        max(-offsets[0], offsets[1]) / -float(cast(Any, ndtri)((1 - LEVEL) / 2))
        if not math.isnan(offsets[0])
        else math.nan
    )
