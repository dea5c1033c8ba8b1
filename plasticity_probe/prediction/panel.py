"""Predictors and outcomes lined up: who ran, on which tasks, and what was known when."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from plasticity_probe.errors import UsageError

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Panel:
    """Runs by tasks: predictors from the starts of tasks, outcomes from their ends.

    Args:
        configurations: Names of the configurations.
        configuration_of: For each run the index of its configuration, shape (run,).
        runs: Names of the runs.
        tasks: Indices of the tasks, ascending and one apart.
        predictors: For each predictor its values at the start of each task, shape (run, task); NaN where there is none.
        outcomes: For each outcome its values at the end of each task, same shape, oriented so that more is better.

    Raises:
        UsageError: Shapes that do not fit, or tasks that leave gaps.
    """

    configurations: tuple[str, ...]
    configuration_of: NDArray[np.int64]
    runs: tuple[str, ...]
    tasks: tuple[int, ...]
    predictors: Mapping[str, Numbers]
    outcomes: Mapping[str, Numbers]

    def __post_init__(self) -> None:
        shape = (len(self.runs), len(self.tasks))
        for name, values in (*self.predictors.items(), *self.outcomes.items()):
            if values.shape != shape:
                raise UsageError(f"{name!r} must have shape {shape} (run, task), got {values.shape}")
        if self.configuration_of.shape != shape[:1]:
            raise UsageError(f"configuration_of must have shape {shape[:1]}, got {self.configuration_of.shape}")
        if shape[0] and not 0 <= self.configuration_of.min() <= self.configuration_of.max() < len(self.configurations):
            raise UsageError(f"configuration_of must be indices below {len(self.configurations)}")
        if self.tasks != tuple(range(self.tasks[0], self.tasks[0] + shape[1]) if self.tasks else ()):
            raise UsageError(f"tasks must be consecutive, got {self.tasks}")

    @cached_property
    def groups(self) -> tuple[NDArray[np.int64], ...]:
        """For each configuration the indices of its runs."""
        return tuple(np.flatnonzero(self.configuration_of == at) for at in range(len(self.configurations)))


def led(values: Numbers, lead: int) -> Numbers:
    """Values of `lead` tasks before, shape (run, task): what stands at task t is the value of task t - lead.

    Args:
        values: Shape (run, task).
        lead: How many tasks before; negative for after. NaN where there is no such task.
    """
    moved = np.full_like(values, np.nan)
    tasks = values.shape[1]
    if abs(lead) >= tasks:
        return moved
    if lead >= 0:
        moved[:, lead:] = values[:, : tasks - lead]
    else:
        moved[:, :lead] = values[:, -lead:]
    return moved


def history(outcome: Numbers, lead: int = 0) -> Numbers:
    """What earlier outcomes were known when a predictor was measured `lead` tasks before task t.

    The last outcome known, that of task t - lead - 1 where every task has one, and the mean of all up to it. The last outcome alone would leave
    a predictor the credit for everything that a longer look back at the outcomes themselves tells.

    Args:
        outcome: Shape (run, task).
        lead: How many tasks before, at least 0.

    Returns:
        Shape (2, run, task): the last known outcome and the mean of the known ones; NaN where none is.
    """
    if lead < 0:
        raise UsageError(f"lead must be at least 0, got {lead}")
    known = ~np.isnan(outcome)
    counts = known.cumsum(axis=1)
    sums = np.where(known, outcome, 0.0).cumsum(axis=1)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    latest = np.maximum.accumulate(np.where(known, np.arange(outcome.shape[1]), 0), axis=1)
    last = np.take_along_axis(outcome, latest, axis=1)
    return np.stack([led(last, lead + 1), led(means, lead + 1)])
