"""When a series changes its level: the onset of a loss as an event, and by how many tasks another series changed before it."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from plasticity_probe.prediction.association import mean_interval
from plasticity_probe.prediction.panel import Numbers, Panel
from plasticity_probe.prediction.resampling import Interval

SIGNIFICANT = 0.05
"""A change counts as one at this level of Pettitt's approximate p."""


@dataclass(frozen=True)
class Change:
    """The change point of a series.

    Args:
        at: Index of the first value after the change.
        direction: 1 for a rise, -1 for a fall, 0 for none.
        p: Pettitt's approximate p, which takes values for independent; a description, no test, where they are not.
    """

    at: int
    direction: int
    p: float


@dataclass(frozen=True, eq=False)
class LeadTime:
    """By how many tasks predictors changed before outcomes fell.

    Args:
        onset: For each run the task at which the outcome fell, shape (run,); NaN where it never did.
        collapse: For each run the task at which the predictor changed; NaN where it never did.
        mean: Mean of onset less collapse with intervals over runs, averaged over configurations; positive where the predictor came first.
        first: Share of the runs with both events in which the predictor came first.
        events: Number of those runs.
    """

    onset: Numbers
    collapse: Numbers
    mean: Interval
    first: float
    events: int


def change_point(values: Numbers) -> Change:
    """The place that parts a series best into two levels, where its ranks say that there are two.

    Whether: ``U_k = 2 sum_(i <= k) r_i - k (n + 1)`` for ranks r, K the largest |U_k|, ``p ~ 2 exp(-6 K^2 / (n^3 + n^2))`` (Pettitt 1979).
    Where: after the k whose two means leave the smallest sum of squares; ranks tell it only within a task or two, because a value in between
    belongs to either side.

    Args:
        values: Shape (task,); NaN does not count.

    Returns:
        No change (direction 0) where p is above .05, or with fewer than four values.
    """
    known = np.flatnonzero(~np.isnan(values))
    n = known.size
    if n < 4:
        return Change(0, 0, math.nan)
    k = np.arange(1, n)
    u = 2 * np.cumsum(rankdata(values[known]))[:-1] - k * (n + 1)
    p = min(1.0, 2 * math.exp(-6 * float(np.abs(u).max()) ** 2 / (n**3 + n**2)))
    centred = values[known] - values[known].mean()
    # Twice the largest value could be beyond the largest number.
    scaled = np.cumsum(centred / (np.abs(centred).max() or 1.0))[:-1]
    best = int(np.argmax(scaled**2 / (k * (n - k))))
    return Change(int(known[best + 1]), -int(np.sign(scaled[best])) if p <= SIGNIFICANT else 0, p)


def lead_time(panel: Panel, predictor: Numbers, outcome: Numbers, seed: int) -> LeadTime:
    """By how many tasks the predictor's change, of either direction, came before the outcome's fall.

    A predictor is measured at the start of the task whose outcome stands beside it, so a lead of 0 is a change seen before the task that fails.

    Args:
        panel: Who belongs to which configuration.
        predictor: Shape (run, task).
        outcome: Shape (run, task).
        seed: Seed of the bootstrap draws.
    """
    tasks = np.array(panel.tasks, dtype=float)
    onset, collapse = _events(outcome, tasks, (-1,)), _events(predictor, tasks, (-1, 1))
    leads = onset - collapse
    events = ~np.isnan(leads)
    first = float(np.mean(leads[events] > 0)) if events.any() else math.nan
    return LeadTime(onset, collapse, mean_interval(leads, panel.groups, seed), first, int(events.sum()))


def _events(series: Numbers, tasks: Numbers, directions: tuple[int, ...]) -> NDArray[np.float64]:
    found = [change_point(values) for values in series]
    return np.array([tasks[change.at] if change.direction in directions else math.nan for change in found])
