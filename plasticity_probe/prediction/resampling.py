"""Inference with the run as its unit: what is random is drawn, left out, exchanged or turned run by run, never task by task."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, chi2, norm
from scipy.stats import t as student

from plasticity_probe.prediction.panel import Numbers

DRAWS = 2000
"""Bootstrap draws: Efron and Tibshirani 1993, section 14.3, hold at least 1000 to be needed for the ends of bias-corrected intervals."""
EXCHANGES = 4999
"""Random exchanges of a permutation test (our choice: the smallest p, 1/5000, survives the control of a hundred predictors)."""

Groups = Sequence[NDArray[np.int64]]
Statistic = Callable[[Numbers], Numbers]
"""A statistic of weighted runs: weights of shape (draw, run) in, values of shape (draw,) out."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap intervals.

    Args:
        value: The estimate.
        error: Its jackknife standard error.
        low: Lower end of the 95 % interval.
        high: Upper end.
        narrow_low: Lower end of the 90 % interval, the one of two one-sided tests at 5 %.
        narrow_high: Upper end.
    """

    value: float
    error: float
    low: float
    high: float
    narrow_low: float
    narrow_high: float


UNKNOWN = Interval(*[math.nan] * 6)


def interval(statistic: Statistic, groups: Groups, seed: int, draws: int = DRAWS) -> Interval:
    """Bias-corrected and accelerated bootstrap intervals over runs within configurations (Efron 1987).

    Args:
        statistic: The statistic of weighted runs.
        groups: For each configuration the indices of its runs.
        seed: Seed of the draws.
        draws: Number of draws.

    Returns:
        All NaN where the statistic is undefined on the runs as they are, or on half of the draws.
    """
    runs = sum(map(len, groups))
    value = float(statistic(np.ones((1, runs)))[0])
    found = statistic(_drawn(groups, runs, draws, np.random.default_rng(seed)))
    found = found[~np.isnan(found)]
    if math.isnan(value) or found.size < draws / 2:
        return UNKNOWN
    influence = _influence(statistic, groups, value, runs)
    error = math.sqrt(float(np.sum(influence**2)))
    below = (np.sum(found < value) + np.sum(found == value) / 2) / found.size
    if error == 0 or not 0 < below < 1:
        low, narrow_low, narrow_high, high = np.quantile(found, [0.025, 0.05, 0.95, 0.975])
        return Interval(value, error, *map(float, (low, high, narrow_low, narrow_high)))
    bias, acceleration = norm.ppf(below), float(np.sum(influence**3)) / (6 * error**3)
    z = bias + norm.ppf([0.025, 0.975, 0.05, 0.95])
    ends = np.quantile(found, norm.cdf(bias + z / (1 - acceleration * z)))
    return Interval(value, error, *map(float, ends))


def jackknife_error(statistic: Statistic, runs: int) -> float:
    """Standard error of a statistic of independent runs, ``sqrt((n - 1) / n sum (s_(i) - mean)^2)`` (Efron and Tibshirani 1993, eq. 11.5).

    Args:
        statistic: The statistic of weighted runs.
        runs: Number of runs, at least 2.
    """
    left_out = statistic(1 - np.eye(runs))
    return math.sqrt((runs - 1) / runs * float(np.sum((left_out - left_out.mean()) ** 2)))


def exchange_p(crossed: Sequence[Numbers], seed: int, exchanges: int = EXCHANGES) -> float:
    """Two-sided p of the null hypothesis that predictor trajectories belong to no outcome trajectory in particular.

    Whole trajectories of the predictor are exchanged between the runs of a configuration, which leaves every autocorrelation and every drift
    as it is. The statistic is the sum over configurations of mean products, divided by its standard error from the spread over runs; a
    permutation test of a correlation that is not studentised also answers to unequal spread (DiCiccio and Romano 2017).

    Args:
        crossed: For each configuration the products of the predictor of run i with the outcome of run j, summed over tasks, shape (run, run).
        seed: Seed of the exchanges.
        exchanges: Number of random exchanges.
    """
    rng = np.random.default_rng(seed)
    sums, squares = np.zeros(exchanges + 1), np.zeros(exchanges + 1)
    for products in crossed:
        runs = len(products)
        order = np.concatenate([np.arange(runs)[None], rng.permuted(np.tile(np.arange(runs), (exchanges, 1)), axis=1)])
        chosen = products[order, np.arange(runs)]
        sums += chosen.mean(axis=1)
        squares += chosen.var(axis=1, ddof=1) / runs
    return _share_as_large(_studentised(sums, squares))


def turning_p(values: Sequence[Numbers], seed: int, turns: int = EXCHANGES) -> float:
    """Two-sided p of the null hypothesis that values of runs lie symmetrically around zero, by turning signs of whole runs.

    Args:
        values: For each configuration one value a run.
        seed: Seed of the signs.
        turns: Number of random choices of signs.
    """
    rng = np.random.default_rng(seed)
    sums, squares = np.zeros(turns + 1), np.zeros(turns + 1)
    for own in values:
        signs = np.concatenate([np.ones((1, own.size)), rng.choice([-1.0, 1.0], (turns, own.size))])
        sums += (signs * own).mean(axis=1)
        squares += (signs * own).var(axis=1, ddof=1) / own.size
    return _share_as_large(_studentised(sums, squares))


def sign_flip_p(estimates: Numbers, errors: Numbers, runs: NDArray[np.int64]) -> float:
    """The p of the null hypothesis that all configurations' effects have one sign: no qualitative interaction (Gail and Simon 1985, eq. 4).

    Their test takes the standard errors for known. These come from a few runs, so each ratio of estimate and error is replaced by the normal
    score of the same probability under Student's t with one degree of freedom less than there are runs (our choice).

    Args:
        estimates: One estimate a configuration, shape (configuration,).
        errors: Their standard errors, same shape.
        runs: Number of runs behind each, same shape.

    Returns:
        NaN with fewer than two configurations.
    """
    if estimates.size < 2:
        return math.nan
    # An error of zero is that of runs that agree to the last digit; it counts as a tiny one.
    ratios = np.abs(estimates) / np.maximum(errors, 1e-12)
    # Beyond 1e-300 the normal score of a probability is no longer a number.
    z = np.sign(estimates) * norm.isf(np.maximum(student.sf(ratios, runs - 1), 1e-300))
    statistic = min(float(np.sum(z[z > 0] ** 2)), float(np.sum(z[z < 0] ** 2)))
    if statistic == 0:
        return 1.0
    freedom = np.arange(1, estimates.size)
    return float(np.sum(binom.pmf(freedom, estimates.size - 1, 0.5) * chi2.sf(statistic, freedom)))


def _drawn(groups: Groups, runs: int, draws: int, rng: np.random.Generator) -> Numbers:
    weights = np.zeros((draws, runs))
    for group in groups:
        size = len(group)
        places = rng.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None]
        weights[:, group] = np.bincount(places.ravel(), minlength=draws * size).reshape(draws, size)
    return weights


def _influence(statistic: Statistic, groups: Groups, value: float, runs: int) -> Numbers:
    """Jackknife estimate of each run's influence, scaled so that the squares add up to the squared standard error."""
    left_out = statistic(1 - np.eye(runs))
    sizes = np.ones(runs)
    for group in groups:
        sizes[group] = len(group)
    influence = np.sqrt((sizes - 1) / sizes) * (value - left_out)
    return np.where(np.isnan(influence), 0.0, influence)


def _studentised(sums: Numbers, squares: Numbers) -> Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares > 0, sums / np.sqrt(squares), np.sign(sums) * np.inf)


def _share_as_large(statistics: Numbers) -> float:
    # The first is the one observed; it counts among its equals, so that p is never zero (Phipson and Smyth 2010).
    sizes = np.abs(np.nan_to_num(statistics, nan=0.0, posinf=np.inf, neginf=-np.inf))
    return float(np.mean(sizes >= sizes[0] * (1 - 1e-12)))
