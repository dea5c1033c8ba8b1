"""How well scores of examples tell marked ones, such as those with wrong labels, from the others."""

import math

import numpy as np
from numpy.typing import ArrayLike

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.panel import Numbers
from plasticity_probe.prediction.resampling import DRAWS, UNKNOWN, Interval, interval


def detection_auc(scores: ArrayLike, marked: ArrayLike, *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """The chance that a marked example has a higher score than one of the others, ties counting half: the area under the ROC curve.

    The interval is over examples, drawn within the marked and within the others; the models behind the scores are as they are.

    Args:
        scores: One an example, shape (example,); NaN where there is none.
        marked: Which examples are marked, same shape, bool.
        seed: Seed of the draws.
        draws: Bootstrap draws.

    Returns:
        The area with its intervals; all NaN where either kind has no examples.

    Raises:
        UsageError: Shapes that differ.
    """
    values, marks = np.asarray(scores, dtype=float), np.asarray(marked, dtype=bool)
    if values.ndim != 1 or values.shape != marks.shape:
        raise UsageError(f"expected one score and one mark an example, got shapes {values.shape} and {marks.shape}")
    known = ~np.isnan(values)
    order = np.argsort(values[known], kind="stable")
    ordered, chosen = values[known][order], marks[known][order]
    if not chosen.any() or chosen.all():
        return UNKNOWN
    # Equal scores are one step of the curve.
    starts = np.flatnonzero(np.diff(ordered, prepend=-math.inf) > 0)

    def area(weights: Numbers) -> Numbers:
        high, low = (np.add.reduceat(weights * kind, starts, axis=1) for kind in (chosen, ~chosen))
        below = low.cumsum(axis=1) - low / 2
        return np.sum(high * below, axis=1) / (high.sum(axis=1) * low.sum(axis=1))

    return interval(area, [np.flatnonzero(chosen), np.flatnonzero(~chosen)], seed, draws)
