"""Studies whose truth is known: predictors and outcomes that drift without a link, with one, or with links of both signs."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from plasticity_probe.prediction.panel import Panel

Numbers = NDArray[np.float64]
MEMORY = 0.8
"""Autocorrelation of noise from task to task."""


def autoregressive(rng: np.random.Generator, runs: int, tasks: int, memory: float = MEMORY) -> Numbers:
    """Stationary noise of unit variance, e_t = m e_(t-1) + sqrt(1 - m^2) n_t; shape (run, task)."""
    noise = rng.standard_normal((runs, tasks))
    found = noise.copy()
    for t in range(1, tasks):
        found[:, t] = memory * found[:, t - 1] + np.sqrt(1 - memory**2) * noise[:, t]
    return found


def as_panel(x: Numbers, y: Numbers, configurations: int) -> Panel:
    runs, tasks = x.shape
    return Panel(
        tuple(f"configuration {c}" for c in range(configurations)),
        np.repeat(np.arange(configurations), runs // configurations),
        tuple(f"run {r}" for r in range(runs)),
        tuple(range(tasks)),
        {"x": x},
        {"y": y},
    )


Maker = Callable[[np.random.Generator, int, int, int], tuple[Numbers, Numbers]]


def own_trends(rng: np.random.Generator, configurations: int, runs: int, tasks: int) -> tuple[Numbers, Numbers]:
    """Each run has a slope of its own in both; nothing links them."""
    n, t = configurations * runs, np.linspace(0, 1, tasks)
    x, y = (rng.normal(0, 3, (n, 1)) * t + autoregressive(rng, n, tasks) for _ in range(2))
    return x, y


def shared_trends(rng: np.random.Generator, configurations: int, runs: int, tasks: int) -> tuple[Numbers, Numbers]:
    """Both fall in every run, as curvature and accuracy do; around the fall nothing links them."""
    n, t = configurations * runs, np.linspace(0, 1, tasks)
    x, y = (-rng.uniform(3, 6) * t**power + autoregressive(rng, n, tasks) for power in (1, 2))
    return x, y


def configuration_trends(
    rng: np.random.Generator, configurations: int, runs: int, tasks: int
) -> tuple[Numbers, Numbers]:
    """Each configuration has trends of its own in both, unrelated to each other."""
    t = np.linspace(0, 1, tasks)
    slopes = rng.normal(0, 4, (2, configurations))
    x, y = (np.repeat(slope, runs)[:, None] * t + autoregressive(rng, configurations * runs, tasks) for slope in slopes)
    return x, y


def random_walks(rng: np.random.Generator, configurations: int, runs: int, tasks: int) -> tuple[Numbers, Numbers]:
    """Two random walks a run, the classic case of a spurious regression."""
    x, y = (rng.standard_normal((configurations * runs, tasks)).cumsum(axis=1) for _ in range(2))
    return x, y


def pools(rng: np.random.Generator, configurations: int, runs: int, tasks: int) -> tuple[Numbers, Numbers]:
    """Simpson: configurations with high levels of the one have high levels of the other; within them nothing links the two."""
    levels = np.repeat(rng.normal(0, 5, configurations), runs)[:, None]
    x, y = (levels + autoregressive(rng, configurations * runs, tasks) for _ in range(2))
    return x, y


def common_spread(rng: np.random.Generator, configurations: int, runs: int, tasks: int) -> tuple[Numbers, Numbers]:
    """Runs that vary much in the one vary much in the other, with signs that have no link: dependent, but not associated."""
    n = configurations * runs
    spread = np.exp(rng.normal(0, 1, (n, 1)))
    x, y = (spread * autoregressive(rng, n, tasks) for _ in range(2))
    return x, y


def follows_last(rng: np.random.Generator, configurations: int, runs: int, tasks: int) -> tuple[Numbers, Numbers]:
    """The predictor is a noisy copy of the outcome before; the outcome remembers itself."""
    n = configurations * runs
    y = autoregressive(rng, n, tasks)
    x = np.concatenate([np.zeros((n, 1)), y[:, :-1]], axis=1) + 0.5 * rng.standard_normal((n, tasks))
    return x, y


def follows_mean(rng: np.random.Generator, configurations: int, runs: int, tasks: int) -> tuple[Numbers, Numbers]:
    """Runs differ for good, and the predictor is a noisy copy of the mean of all outcomes before."""
    n = configurations * runs
    y = rng.standard_normal((n, 1)) + rng.standard_normal((n, tasks))
    means = y.cumsum(axis=1) / np.arange(1, tasks + 1)
    x = np.concatenate([np.zeros((n, 1)), means[:, :-1]], axis=1) + 0.3 * rng.standard_normal((n, tasks))
    return x, y


NULLS: dict[str, Maker] = {
    "own trends": own_trends,
    "shared trends": shared_trends,
    "configurations' trends": configuration_trends,
    "random walks": random_walks,
    "Simpson pools": pools,
    "common spread": common_spread,
    "follows the last outcome": follows_last,
    "follows the mean outcome": follows_mean,
}


def linked(effects: Numbers | float, memory: float = MEMORY) -> Maker:
    """A maker of studies in which the predictor sees what is about to happen: at equal task and history they correlate by `effects`.

    The outcome's step away from its own past, ``sqrt(1 - m^2) n_t``, is what task and history leave open; the predictor is
    ``effect n_t + sqrt(1 - effect^2) noise_t`` around the shared fall of both, with noise that remembers itself.

    Args:
        effects: One correlation for all configurations, or one for each.
        memory: Autocorrelation of the outcome.
    """

    def make(rng: np.random.Generator, configurations: int, runs: int, tasks: int) -> tuple[Numbers, Numbers]:
        n, t = configurations * runs, np.linspace(0, 1, tasks)
        effect = np.repeat(np.broadcast_to(np.asarray(effects, dtype=float), configurations), runs)[:, None]
        news = rng.standard_normal((n, tasks))
        y = news.copy()
        for task in range(1, tasks):
            y[:, task] = memory * y[:, task - 1] + np.sqrt(1 - memory**2) * news[:, task]
        x = effect * news + np.sqrt(1 - effect**2) * autoregressive(rng, n, tasks)
        return x - 4 * t, y - 5 * t**2

    return make
