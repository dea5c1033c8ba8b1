"""How predictor and outcome go together: over the tasks of a run, between runs at equal task and history, between configurations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, permutations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from plasticity_probe.prediction.panel import Numbers, Panel
from plasticity_probe.prediction.resampling import (
    EXCHANGES,
    UNKNOWN,
    Groups,
    Interval,
    exchange_p,
    interval,
    jackknife_error,
    sign_flip_p,
    turning_p,
)

FEWEST_RUNS = 5
"""Configurations with fewer runs do not count (our choice: five runs can be exchanged in 120 ways, the least that lets p fall below .01)."""
FEWEST_TASKS = 3
"""Ranks of fewer than three points agree or disagree fully by chance."""
FEWEST_CONFIGURATIONS = 3
"""So are those of fewer than three configurations."""
EXACT = 8
"""Up to this many configurations all their orders are gone through (8! = 40 320)."""


@dataclass(frozen=True, eq=False)
class Association:
    """How closely two quantities go together, with the configurations apart.

    Args:
        estimate: Plain mean of the configurations' values, with its intervals.
        p: Two-sided p of no association.
        flip_p: p of one sign in all configurations; NaN for a single one.
        configurations: Indices of the configurations that count.
        values: Their values, shape (configuration,).
        errors: Standard errors of those, same shape.
        runs: Number of runs that count in each, same shape.
    """

    estimate: Interval
    p: float
    flip_p: float
    configurations: NDArray[np.int64]
    values: Numbers
    errors: Numbers
    runs: NDArray[np.int64]


NOTHING = Association(UNKNOWN, math.nan, math.nan, np.zeros(0, int), np.zeros(0), np.zeros(0), np.zeros(0, int))


def moving_together(panel: Panel, predictor: Numbers, outcome: Numbers, seed: int) -> Association:
    """Spearman's rank correlation over the tasks of each run, averaged over the runs of each configuration.

    Args:
        panel: Who belongs to which configuration.
        predictor: Shape (run, task).
        outcome: Shape (run, task).
        seed: Seed of draws and signs.
    """
    own = rank_correlations(predictor, outcome)
    kept, groups = _enough(panel, ~np.isnan(own))
    if not groups:
        return NOTHING
    values = [own[group] for group in groups]
    errors = np.array([v.std(ddof=1) / math.sqrt(v.size) for v in values])
    means = np.array([v.mean() for v in values])
    found = mean_interval(own, groups, seed)
    sizes = _sizes(groups)
    return Association(found, turning_p(values, seed), sign_flip_p(means, errors, sizes), kept, means, errors, sizes)


def at_equal_history(panel: Panel, predictor: Numbers, outcome: Numbers, known: Numbers, seed: int) -> Association:
    """Rank correlation of predictor and outcome between runs of a configuration at the same task, freed from what was known already.

    Ranks over the runs of a configuration at a task are centred and scaled to unit variance. With S the mean over runs and tasks of their
    products, the value of a configuration is ``rho = R_xy / sqrt(R_xx R_yy)`` where ``R_ab = S_ab - S_ah S_hh^+ S_hb``. What was known
    enters as ranks and as values. The estimate is the plain mean over configurations.

    Args:
        panel: Who belongs to which configuration.
        predictor: Shape (run, task).
        outcome: Shape (run, task).
        known: What was known, shape (known, run, task); places where any of it is NaN do not count.
        seed: Seed of draws and exchanges.
    """
    kept, groups, scored = _scored(panel, predictor, outcome, known)
    if not groups:
        return NOTHING
    moments = [_moments(scores) for scores in scored]
    values = np.array([_weighted(own, np.ones((1, len(own))))[0] for own in moments])
    errors = np.array([jackknife_error(partial(_weighted, own), len(own)) for own in moments])
    p, sizes = exchange_p([_crossed(scores) for scores in scored], seed), _sizes(groups)
    flip_p = sign_flip_p(values, errors, sizes)
    return Association(_mean_association(groups, moments, seed), p, flip_p, kept, values, errors, sizes)


def estimate_at_equal_history(
    panel: Panel, predictor: Numbers, outcome: Numbers, known: Numbers, seed: int
) -> Interval:
    """The estimate of `at_equal_history` alone, without its tests.

    Args:
        panel: Who belongs to which configuration.
        predictor: Shape (run, task).
        outcome: Shape (run, task).
        known: What was known, shape (known, run, task).
        seed: Seed of draws.
    """
    _, groups, scored = _scored(panel, predictor, outcome, known)
    return _mean_association(groups, [_moments(scores) for scores in scored], seed) if groups else UNKNOWN


def between_configurations(panel: Panel, predictor: Numbers, outcome: Numbers) -> tuple[float, float, int]:
    """Rank correlation of the configurations' means, its exact two-sided permutation p, and their number.

    Args:
        panel: Who belongs to which configuration.
        predictor: Shape (run, task).
        outcome: Shape (run, task).

    Returns:
        (correlation, p, configurations); NaN with fewer than three. Beyond eight, p is that of random orders, always the same ones.
    """
    defined = ~np.isnan(predictor) & ~np.isnan(outcome)
    means = np.array(
        [
            (predictor[group][defined[group]].mean(), outcome[group][defined[group]].mean())
            for group in panel.groups
            if defined[group].any()
        ]
    ).reshape(-1, 2)
    if len(means) < FEWEST_CONFIGURATIONS or np.ptp(means, axis=0).min() == 0:
        return math.nan, math.nan, len(means)
    x, y = (standard(rankdata(column)) for column in means.T)
    count = len(x)
    if count <= EXACT:
        orders = np.array(list(permutations(range(count))))
    else:
        rng = np.random.default_rng(0)
        orders = np.concatenate(
            [np.arange(count)[None], rng.permuted(np.tile(np.arange(count), (EXCHANGES, 1)), axis=1)]
        )
    found = x[orders] @ y / count
    return float(found[0]), float(np.mean(np.abs(found) >= abs(found[0]) - 1e-12)), count


def equal_task_variables(variables: Numbers) -> Numbers:
    """Outcome and predictor as ranks at equal task, then what was known as ranks and as values at equal task.

    Ranks alone would not take out all that the known explains: a predictor that is a noisy copy of the last outcome keeps a rank correlation of
    about .08 with the next outcome given the last one's rank, although it tells nothing new (tests/prediction/test_association.py).

    Args:
        variables: Outcome, predictor and what was known, shape (2 + known, run, task); a place counts where all are known.

    Returns:
        Shape (2 + 2 known, run, task), each centred and scaled to unit variance over the runs at each task.
    """
    known = _known(variables)
    return np.concatenate([equal_task_scores(variables), _standardised(variables[2:], known)])


def equal_task_scores(variables: Numbers) -> Numbers:
    """Ranks over the runs of one configuration at each task, centred and scaled to unit variance.

    Args:
        variables: Shape (variable, run, task); a place counts where all variables are known.

    Returns:
        Same shape; 0 at places that do not count and at tasks where a variable does not vary or fewer than three runs are known.
    """
    known = _known(variables)
    return _standardised(np.asarray(rankdata(np.where(known, variables, np.inf), axis=1), dtype=float), known)


def rank_correlations(predictor: Numbers, outcome: Numbers) -> Numbers:
    """Spearman's rank correlation over the tasks of each run, shape (run,); NaN with fewer than three tasks or without variation.

    Args:
        predictor: Shape (run, task).
        outcome: Shape (run, task).
    """
    known = ~(np.isnan(predictor) | np.isnan(outcome))
    scores = equal_task_scores(
        np.stack([np.where(known, predictor, np.nan), np.where(known, outcome, np.nan)]).swapaxes(1, 2)
    )
    x, y = scores
    varied = (x != 0).any(axis=0) & (y != 0).any(axis=0)
    return np.where(varied, (x * y).sum(axis=0) / np.maximum(known.sum(axis=1), 1), np.nan)


def standard(values: Numbers) -> Numbers:
    """Values centred and scaled to unit variance."""
    return (values - values.mean()) / values.std()


def _known(variables: Numbers) -> NDArray[np.bool_]:
    return np.asarray(~np.isnan(variables).any(axis=0))


def _standardised(values: Numbers, known: NDArray[np.bool_]) -> Numbers:
    count = known.sum(axis=0)
    mean = np.where(known, values, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(known, values - mean, 0.0)
    size = np.abs(centred).max(axis=1, keepdims=True, initial=0)
    # Values of any scale: their squares must neither overflow nor vanish. What differs by rounding alone does not vary.
    varied = (size > 1e-12 * np.abs(mean)) & (size > 0) & (count >= 3)
    scaled = np.where(varied, centred / np.where(varied, size, 1), 0.0)
    deviation = np.sqrt((scaled**2).sum(axis=1, keepdims=True) / np.maximum(count, 1))
    return np.where(varied, scaled / np.where(varied, deviation, 1), 0.0)


def _enough(panel: Panel, defined: NDArray[np.bool_]) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    groups = [group[defined[group]] for group in panel.groups]
    kept = [at for at, group in enumerate(groups) if len(group) >= FEWEST_RUNS]
    return np.array(kept, dtype=int), [groups[at] for at in kept]


def _scored(
    panel: Panel, predictor: Numbers, outcome: Numbers, known: Numbers
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]], list[Numbers]]:
    """Configurations in which predictor and outcome both vary at equal task and history: indices, runs, scores (variable, run, task)."""
    variables = np.concatenate([outcome[None], predictor[None], known])
    defined = ~np.isnan(variables).any(axis=0)
    kept, groups = _enough(panel, defined.sum(axis=1) >= 1)
    scored = [equal_task_variables(variables[:, group]) for group in groups]
    usable = [at for at, scores in enumerate(scored) if not math.isnan(_partial(_moments(scores).sum(axis=0)[None])[0])]
    return kept[usable], [groups[at] for at in usable], [scored[at] for at in usable]


def _weighted(moments: Numbers, weights: Numbers) -> Numbers:
    """Partial correlations of a configuration's runs, shape (draw,), with weights of shape (draw, run)."""
    return _partial(np.einsum("br,rvw->bvw", weights, moments))


def _mean_association(groups: Groups, moments: Sequence[Numbers], seed: int) -> Interval:
    placed = placed_runs(groups)

    def mean(weights: Numbers) -> Numbers:
        return np.mean([_weighted(moments[at], weights[:, own]) for at, own in enumerate(placed)], axis=0)

    return interval(mean, placed, seed)


def placed_runs(groups: Groups) -> list[NDArray[np.int64]]:
    """The groups' places once their runs stand one after the other.

    Args:
        groups: For each configuration the indices of its runs.
    """
    ends = np.cumsum([0, *map(len, groups)])
    return [np.arange(start, end) for start, end in pairwise(ends)]


def _sizes(groups: Groups) -> NDArray[np.int64]:
    return np.array([len(group) for group in groups], dtype=int)


def _moments(scores: Numbers) -> Numbers:
    """Products of the scores summed over tasks, shape (run, variable, variable)."""
    return np.einsum("vrt,wrt->rvw", scores, scores)


def _coefficients(moment: Numbers) -> Numbers:
    """Least-squares coefficients of outcome and predictor (the first two variables) on the others, shape (..., 2, known)."""
    return moment[..., :2, 2:] @ np.linalg.pinv(moment[..., 2:, 2:], rcond=1e-9, hermitian=True)


def _partial(moment: Numbers) -> Numbers:
    left = _freed(moment)
    yy, xx, yx = left[..., 0, 0], left[..., 1, 1], left[..., 0, 1]
    # What the known explains to the last digit has nothing left to correlate.
    varied = (yy > 1e-9 * moment[..., 0, 0]) & (xx > 1e-9 * moment[..., 1, 1])
    return np.where(varied, np.clip(yx / np.sqrt(np.where(varied, xx * yy, 1.0)), -1, 1), np.nan)


def _freed(moment: Numbers) -> Numbers:
    """Moments of outcome and predictor (the first two variables) once the others are swept out one by one, as in Gaussian elimination."""
    left = moment
    for at in range(2, moment.shape[-1]):
        pivot = left[..., at, at]
        # A variable that those before it explain leaves nothing to sweep out.
        new = pivot > 1e-9 * moment[..., at, at]
        row = left[..., at, :] * np.where(new, 1 / np.where(new, pivot, 1.0), 0.0)[..., None]
        left = left - left[..., :, at, None] * row[..., None, :]
    return left


def _crossed(scores: Numbers) -> Numbers:
    """Products of predictor residuals of run i with outcome residuals of run j; the diagonal's mean is the configuration's value."""
    total = _moments(scores).sum(axis=0)
    y, x = scores[:2] - np.einsum("ah,hrt->art", _coefficients(total), scores[2:])
    return len(x) * (x @ y.T) / math.sqrt(float((x**2).sum() * (y**2).sum()))


def mean_interval(values: Numbers, groups: Sequence[NDArray[np.int64]], seed: int) -> Interval:
    """Plain mean over configurations of means over runs, with bootstrap intervals over runs.

    Args:
        values: One value a run, shape (run,); NaN where a run has none.
        groups: For each configuration the indices of its runs.
        seed: Seed of the draws.
    """
    kept = [own for group in groups if len(own := group[~np.isnan(values[group])]) >= 2]
    if not kept:
        return UNKNOWN
    together, placed = np.concatenate(kept), placed_runs(kept)

    def mean(weights: Numbers) -> Numbers:
        weighted = weights * values[together]
        return np.mean([weighted[:, own].sum(axis=1) / weights[:, own].sum(axis=1) for own in placed], axis=0)

    return interval(mean, placed, seed)
