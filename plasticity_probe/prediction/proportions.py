"""Intervals of shares and of their differences that are right also where all trials agree."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from plasticity_probe.prediction.panel import Numbers

LEVEL = 0.95
"""Confidence of an interval."""


def difference_interval(
    first: ArrayLike, first_count: ArrayLike, second: ArrayLike, second_count: ArrayLike, level: float = LEVEL
) -> tuple[Numbers, Numbers]:
    """Interval of the difference of two independent proportions from their score intervals (Newcombe 1998, method 10).

    With the Wilson intervals [l1, u1] of p1 and [l2, u2] of p2 it is ``p1 - p2 - sqrt((p1 - l1)^2 + (u2 - p2)^2)`` to
    ``p1 - p2 + sqrt((u1 - p1)^2 + (p2 - l2)^2)``. It has a length also where all trials of each side agree. For means of probabilities
    instead of proportions of right predictions it errs on the safe side, because nothing in [0, 1] of a given mean varies more than 0 and 1 do.

    Args:
        first: p1.
        first_count: Trials that it is a share of.
        second: p2, of the same shape.
        second_count: Trials that it is a share of.
        level: Confidence.

    Returns:
        Lower and upper ends; NaN where a side has no trials.
    """
    p, q = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    p_low, p_high = wilson_interval(p, first_count, level)
    q_low, q_high = wilson_interval(q, second_count, level)
    low = p - q - np.sqrt((p - p_low) ** 2 + (q_high - q) ** 2)
    return low, p - q + np.sqrt((p_high - p) ** 2 + (q - q_low) ** 2)


def wilson_interval(share: ArrayLike, count: ArrayLike, level: float = LEVEL) -> tuple[Numbers, Numbers]:
    """Score interval of a proportion, ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`` (Wilson 1927).

    Args:
        share: p.
        count: n, the trials that it is a share of.
        level: Confidence.

    Returns:
        Lower and upper ends; NaN where there are no trials.
    """
    p, n = np.asarray(share, dtype=float), np.asarray(count, dtype=float)
    square = norm.ppf((1 + level) / 2) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = (p + square / (2 * n)) / (1 + square / n)
        reach = np.sqrt(square * (p * (1 - p) / n + square / (4 * n**2))) / (1 + square / n)
    # At p = 0 and p = 1 one end is p itself; rounding must not carry it beyond.
    return np.minimum(np.maximum(centre - reach, 0.0), p), np.maximum(np.minimum(centre + reach, 1.0), p)
