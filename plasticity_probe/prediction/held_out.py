"""What a predictor adds on runs, and on configurations, that it was not fitted to; and how often it ranks two checkpoints rightly."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.preprocessing import QuantileTransformer

from plasticity_probe.prediction.association import (
    FEWEST_RUNS,
    equal_task_variables,
    mean_interval,
    placed_runs,
)
from plasticity_probe.prediction.panel import Numbers, Panel
from plasticity_probe.prediction.resampling import UNKNOWN, Interval, interval


@dataclass(frozen=True, eq=False)
class Transfer:
    """The gain on configurations that were left out.

    Args:
        gains: For each configuration left out the share of the squared error that the predictor saves; shape (configuration,).
        mean: Their plain mean; NaN without any.
    """

    gains: Numbers
    mean: float


def gain_on_runs(panel: Panel, predictor: Numbers, outcome: Numbers, known: Numbers, seed: int) -> Interval:
    """Share of the squared error on left-out runs that a predictor saves, ``1 - SSE(known, predictor) / SSE(known)``.

    Each run in turn is left out of its configuration. Outcomes are deviations from the mean of the other runs at the same task; they are
    predicted by least squares, fitted to the other runs, from what was known, as ranks and as values at that task, without and with the
    ranks of the predictor. The gain is the plain mean over configurations; a useless predictor loses a little, because its coefficient is
    fitted to noise.

    The fits without a run come from sums of products over all runs: for deviations d of a run from the mean of n runs, leaving it out takes
    ``n / (n - 1) d d^T`` from the sum, and its deviation from the mean of the others is ``n / (n - 1) d``.

    Args:
        panel: Who belongs to which configuration.
        predictor: Shape (run, task).
        outcome: Shape (run, task).
        known: What was known when the predictor was measured, shape (known, run, task); places where any of it is NaN do not count.
        seed: Seed of the bootstrap draws.
    """
    squares: list[tuple[Numbers, Numbers]] = []
    for group in panel.groups:
        if len(group) < FEWEST_RUNS:
            continue
        own = _squares(predictor[group], outcome[group], known[:, group])
        # A configuration whose outcomes do not differ leaves nothing to save.
        if own is not None and own[0].sum() > 1e-20:
            squares.append(own)
    if not squares:
        return UNKNOWN
    placed = placed_runs([np.arange(len(base)) for base, _ in squares])

    def gain(weights: Numbers) -> Numbers:
        shares = [
            (weights[:, own] @ full) / np.maximum(weights[:, own] @ base, 1e-300)
            for own, (base, full) in zip(placed, squares, strict=True)
        ]
        return 1 - np.mean(shares, axis=0)

    return interval(gain, placed, seed)


def gain_on_configurations(panel: Panel, predictor: Numbers, outcome: Numbers, known: Numbers) -> Transfer:
    """The same on configurations that were left out, one after the other: does the predictor carry over to settings never seen?

    The model is linear in the task's mean outcome over the other configurations, in what was known, and in the predictor as a normal score
    of its distribution there.

    Args:
        panel: Who belongs to which configuration.
        predictor: Shape (run, task).
        outcome: Shape (run, task).
        known: Shape (known, run, task).
    """
    places = ~np.isnan(np.concatenate([outcome[None], predictor[None], known])).any(axis=0)
    of_run, of_task = np.nonzero(places)
    belongs = panel.configuration_of[of_run]
    if len(np.unique(belongs)) < 2:
        return Transfer(np.zeros(0), math.nan)
    y, x, h = outcome[places], predictor[places], known[:, places].T
    gains: list[float] = []
    for fitted, left in LeaveOneGroupOut().split(h, y, belongs):
        at_task = _means_at_tasks(of_task[fitted], y[fitted], len(panel.tasks))
        base = np.column_stack([at_task[of_task], h])
        scores = QuantileTransformer(
            n_quantiles=min(1000, len(fitted)), output_distribution="normal", subsample=len(fitted)
        ).fit(x[fitted, None])
        full = np.column_stack([base, scores.transform(x[:, None])])
        errors = [
            float(np.sum((y[left] - LinearRegression().fit(used[fitted], y[fitted]).predict(used[left])) ** 2))
            for used in (base, full)
        ]
        if errors[0] > 1e-20:
            gains.append(1 - errors[1] / errors[0])
    return Transfer(np.array(gains), float(np.mean(gains)) if gains else math.nan)


def ranking_accuracy(panel: Panel, predictor: Numbers, outcome: Numbers, seed: int) -> Interval:
    """How often a predictor orders two checkpoints of a left-out run as their outcomes do (Wang et al. 2026); .5 is guessing.

    Ties of the predictor count one half; pairs with equal outcomes do not count. Whether a high value is good or bad is learned from the
    other runs.

    Args:
        panel: Who belongs to which configuration.
        predictor: Shape (run, task).
        outcome: Shape (run, task).
        seed: Seed of the bootstrap draws.
    """
    shares = np.array([_concordance(x[:, None], y[:, None]) for x, y in zip(predictor, outcome, strict=True)])
    return mean_interval(_oriented(shares), panel.groups, seed)


def ranking_accuracy_at_equal_task(panel: Panel, predictor: Numbers, outcome: Numbers, seed: int) -> Interval:
    """The same for two runs of a configuration at the same task: a left-out run against each of the others.

    Args:
        panel: Who belongs to which configuration.
        predictor: Shape (run, task).
        outcome: Shape (run, task).
        seed: Seed of the bootstrap draws.
    """
    shares = np.full(len(predictor), np.nan)
    for group in panel.groups:
        for run in group:
            others = group[group != run]
            x, y = (np.stack([np.broadcast_to(v[run], v[others].shape), v[others]]) for v in (predictor, outcome))
            shares[run] = _pairs(x[0] - x[1], y[0] - y[1])
    return mean_interval(_oriented(shares), panel.groups, seed)


def _squares(predictor: Numbers, outcome: Numbers, known: Numbers) -> tuple[Numbers, Numbers] | None:
    """Squared errors of each run when it is left out, without and with the predictor; None where nothing can be fitted."""
    places = ~np.isnan(np.concatenate([outcome[None], predictor[None], known])).any(axis=0)
    count = places.sum(axis=0)
    usable = count >= 3
    if usable.sum() < 1:
        return None
    used = np.where(places, 1.0, np.nan)
    scored = equal_task_variables(np.concatenate([outcome[None], predictor[None], known]) * used)
    mean = np.where(places, outcome, 0.0).sum(axis=0) / np.maximum(count, 1)
    deviation = np.where(places & usable, outcome - mean, 0.0)
    d = np.concatenate([deviation[None], scored[2:], scored[1:2]])
    factor = np.where(usable, count / np.maximum(count - 1, 1), 0.0)
    own = np.einsum("vrt,wrt,t->rvw", d, d, factor)
    far = np.einsum("vrt,wrt,t->rvw", d, d, factor**2)
    others = np.einsum("vrt,wrt->vw", d, d) - own
    return _errors(others[:, :-1, :-1], far[:, :-1, :-1]), _errors(others, far)


def _errors(others: Numbers, own: Numbers) -> Numbers:
    """Squared errors of runs under coefficients from the other runs; variable 0 is the outcome."""
    inverse = np.linalg.pinv(others[:, 1:, 1:], rcond=1e-9, hermitian=True)
    signs = np.concatenate([np.ones((len(own), 1)), -np.einsum("rhk,rk->rh", inverse, others[:, 1:, 0])], axis=1)
    return np.einsum("rv,rvw,rw->r", signs, own, signs)


def _means_at_tasks(of_task: NDArray[np.int64], values: Numbers, tasks: int) -> Numbers:
    sums, counts = (np.bincount(of_task, weights=w, minlength=tasks) for w in (values, np.ones_like(values)))
    return np.where(counts > 0, sums / np.maximum(counts, 1), values.mean())


def _concordance(x: Numbers, y: Numbers) -> float:
    later, earlier = np.triu_indices(len(x), 1)
    return _pairs(x[later] - x[earlier], y[later] - y[earlier])


def _pairs(x: Numbers, y: Numbers) -> float:
    """Share of pairs in which two differences have one sign; ties of the first count one half, of the second do not count."""
    counted = ~np.isnan(x) & ~np.isnan(y) & (y != 0)
    if not counted.any():
        return math.nan
    return float(np.mean((np.sign(x[counted]) * np.sign(y[counted]) + 1) / 2))


def _oriented(shares: Numbers) -> Numbers:
    """Shares as they count when the direction comes from all other runs; a direction that the others do not tell makes a guess of it."""
    known = np.where(np.isnan(shares), 0.5, shares) - 0.5
    others = known.sum() - known
    return np.where(np.isnan(shares), np.nan, 0.5 + np.sign(others) * known)
