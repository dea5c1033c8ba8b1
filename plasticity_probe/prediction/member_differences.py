"""Models that were trained on an example against models that were not: the difference of what they predict, for many examples at once."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from plasticity_probe.errors import UsageError
from plasticity_probe.prediction.panel import Numbers
from plasticity_probe.prediction.proportions import difference_interval

FEWEST_MODELS = 2
"""Models needed with an example and without it: a standard error takes two of each."""

Marks = NDArray[np.bool_]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Differences:
    """Differences of two means over models, all of one shape: of the models trained on an example less that of the others.

    Args:
        value: The difference; NaN where fewer than `FEWEST_MODELS` models are on a side.
        error: Its standard error, ``sqrt(s1^2 / n1 + s0^2 / n0)`` with the sample variances of the two sides. It is 0 where the models of each
            side agree, which says more than so many models can know; the interval does not.
        low: Lower end of its 95 % interval (`difference_interval`).
        high: Upper end.
        mean_with: Mean over the models trained on the example, n1 of them.
        mean_without: Mean over the n0 others.
        models_with: n1.
        models_without: n0.
    """

    value: Numbers
    error: Numbers
    low: Numbers
    high: Numbers
    mean_with: Numbers
    mean_without: Numbers
    models_with: Counts
    models_without: Counts


def checked(members: ArrayLike, correct: ArrayLike, *, aligned: bool) -> tuple[Marks, Numbers]:
    """Members and predictions as arrays of bool and float.

    Args:
        members: Which model was trained on which example, shape (model, example).
        correct: Whether each model predicts each label, or with what probability, shape (model, example or test example).
        aligned: Whether the predictions are of the same examples.

    Raises:
        UsageError: Shapes that do not fit, or values outside [0, 1].
    """
    inside, right = np.asarray(members), np.asarray(correct, dtype=float)
    if inside.dtype != np.bool_ and not np.isin(inside, (0, 1)).all():
        raise UsageError("members tells which model was trained on which example; expected true and false alone")
    wanted = inside.shape if aligned else (*inside.shape[:1], *right.shape[1:])
    if inside.ndim != 2 or right.ndim != 2 or right.shape != wanted:
        kind = "example" if aligned else "test example"
        raise UsageError(
            f"expected members of shape (model, example) and correct of shape (model, {kind}) for the same models, got {inside.shape} and "
            f"{right.shape}"
        )
    # A NaN compares as false on both sides, so that unknown predictions pass.
    if (right < 0).any() or (right > 1).any():
        raise UsageError(
            f"correct must lie in [0, 1], or be NaN where unknown; got values from {np.nanmin(right):g} to {np.nanmax(right):g}"
        )
    return inside.astype(bool), right


def moments(chosen: Marks, right: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Number, sum and sum of squares of the predictions of chosen models, shape (example,) each.

    Args:
        chosen: Which models to take for each example, shape (model, example).
        right: The predictions, same shape.
    """
    value = np.where(chosen, right, 0.0)
    return chosen.sum(axis=0).astype(float), value.sum(axis=0), np.sum(value**2, axis=0)


def differences(
    n1: Numbers, sum1: Numbers, squares1: Numbers, n0: Numbers, sum0: Numbers, squares0: Numbers
) -> Differences:
    """The differences from the moments of both sides, all of one shape.

    Args:
        n1: Models trained on the example whose prediction is known.
        sum1: Sum of their predictions.
        squares1: Sum of the squares.
        n0: The same of the models that were not.
        sum0: Sum of their predictions.
        squares0: Sum of the squares.
    """
    enough = (n1 >= FEWEST_MODELS) & (n0 >= FEWEST_MODELS)
    mean1, variance1 = _mean_and_variance(n1, sum1, squares1)
    mean0, variance0 = _mean_and_variance(n0, sum0, squares0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(variance1 / n1 + variance0 / n0)
    low, high = difference_interval(mean1, n1, mean0, n0)
    value, error, low, high = (np.where(enough, part, np.nan) for part in (mean1 - mean0, error, low, high))
    counts = (np.rint(n).astype(np.int64) for n in (n1, n0))
    return Differences(value, error, low, high, mean1, mean0, *counts)


def weighted_differences(weights: Numbers, inside: Marks, right: Numbers) -> tuple[Numbers, Numbers]:
    """The differences and their standard errors under weights of models, as a bootstrap draws them or a half has them.

    Args:
        weights: How often each model counts, shape (draw, model).
        inside: Which model was trained on which example, shape (model, example).
        right: The predictions, same shape; NaN where unknown.

    Returns:
        Shape (draw, example) each. Differences are NaN where a side has no weight, errors where one has less than two.
    """
    known = ~np.isnan(right)
    value = np.where(known, right, 0.0)
    means, variances = [], []
    for side in (inside & known, ~inside & known):
        chosen = side.astype(float)
        count, total, squares = weights @ chosen, weights @ (chosen * value), weights @ (chosen * value**2)
        mean, variance = _mean_and_variance(count, total, squares)
        means.append(mean)
        with np.errstate(divide="ignore", invalid="ignore"):
            variances.append(variance / count)
    return means[0] - means[1], np.sqrt(variances[0] + variances[1])


def _mean_and_variance(count: Numbers, total: Numbers, squares: Numbers) -> tuple[Numbers, Numbers]:
    with np.errstate(divide="ignore", invalid="ignore"):
        # Sums that were computed as differences may leave [0, 1] in the last digit.
        mean = np.clip(total / count, 0.0, 1.0)
        return mean, np.maximum(squares - count * mean**2, 0.0) / (count - 1)
