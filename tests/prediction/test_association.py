"""Associations against SciPy, plain regressions and hand-made cases."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr
from simulated_studies import as_panel, follows_last, follows_mean, linked

from plasticity_probe.prediction.association import (
    at_equal_history,
    between_configurations,
    equal_task_scores,
    moving_together,
    rank_correlations,
)
from plasticity_probe.prediction.panel import Numbers, Panel, history
from plasticity_probe.prediction.verdict import SMALLEST

RNG = np.random.default_rng(0)
NAN = float("nan")


def study(configurations: int = 2, runs: int = 6, tasks: int = 8, seed: int = 0) -> tuple[Panel, Numbers, Numbers]:
    x, y = linked(0.5)(np.random.default_rng(seed), configurations, runs, tasks)
    return as_panel(x, y, configurations), x, y


def plain_partial(x: Numbers, y: Numbers, known: Numbers) -> float:
    """One configuration, complete data: ranks at each task, regressed with lstsq, residuals correlated."""
    defined = ~np.isnan(known).any(axis=(0, 1))

    def scores(v: Numbers) -> Numbers:
        ranks = rankdata(v[:, defined], axis=0)
        return ((ranks - ranks.mean(axis=0)) / ranks.std(axis=0)).ravel()

    def values(v: Numbers) -> Numbers:
        own = v[:, defined]
        return ((own - own.mean(axis=0)) / own.std(axis=0)).ravel()

    h = np.column_stack([*(scores(k) for k in known), *(values(k) for k in known)])
    left = [s - h @ np.linalg.lstsq(h, s, rcond=None)[0] for s in (scores(x), scores(y))]
    return float(left[0] @ left[1] / math.sqrt((left[0] @ left[0]) * (left[1] @ left[1])))


def test_rank_correlations_are_scipys() -> None:
    x, y = RNG.standard_normal((2, 5, 9))
    x[1, 3], y[2, 4] = NAN, NAN
    x[3] = np.round(x[3])
    for run, found in enumerate(rank_correlations(x, y)):
        known = ~np.isnan(x[run]) & ~np.isnan(y[run])
        assert found == pytest.approx(spearmanr(x[run][known], y[run][known]).statistic, abs=1e-12)


def test_rank_correlations_of_series_that_do_not_vary_or_are_too_short_are_unknown() -> None:
    x = np.array([[1.0, 1, 1, 1], [1, 2, NAN, NAN], [1, 2, 3, 4]])
    y = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 1]])
    assert np.array_equal(rank_correlations(x, y), [NAN, NAN, -1], equal_nan=True)


def test_moving_together_is_the_mean_over_configurations_of_means_over_runs() -> None:
    panel, x, y = study()
    found = moving_together(panel, x, y, 0)
    own = np.array([spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    assert found.values == pytest.approx([own[:6].mean(), own[6:].mean()])
    assert found.estimate.value == pytest.approx(own.reshape(2, 6).mean())
    assert found.errors == pytest.approx([own[g].std(ddof=1) / math.sqrt(6) for g in (slice(6), slice(6, 12))])
    assert found.runs.tolist() == [6, 6]


def test_at_equal_history_is_a_plain_partial_correlation_of_ranks() -> None:
    panel, x, y = study()
    known = history(y)
    found = at_equal_history(panel, x, y, known, 0)
    expected = [plain_partial(x[g], y[g], known[:, g]) for g in (slice(6), slice(6, 12))]
    assert found.values == pytest.approx(expected, abs=1e-10)
    assert found.estimate.value == pytest.approx(np.mean(expected), abs=1e-10)


def test_at_equal_history_without_history_is_the_mean_correlation_at_equal_task() -> None:
    panel, x, y = study(configurations=1)
    found = at_equal_history(panel, x, y, np.zeros((0, *x.shape)), 0)
    each = [spearmanr(x[:, task], y[:, task]).statistic for task in range(8)]
    assert found.estimate.value == pytest.approx(np.mean(each))


@given(st.integers(0, 1000), st.sampled_from(["cubed", "exponential", "shifted at each task", "runs reordered"]))
def test_what_must_not_matter_does_not(seed: int, change: str) -> None:
    panel, x, y = study(seed=seed)
    known = history(y)
    before = at_equal_history(panel, x, y, known, 0)
    changed = {
        "cubed": lambda: x**3,
        "exponential": lambda: np.exp(x),
        "shifted at each task": lambda: x + np.arange(8) ** 2.0,
        "runs reordered": lambda: x,
    }[change]()
    order = np.r_[5:-1:-1, 6:12] if change == "runs reordered" else np.arange(12)
    after = at_equal_history(panel, changed[order], y[order], known[:, order], 0)
    assert after.values == pytest.approx(before.values, abs=1e-9)
    assert after.errors == pytest.approx(before.errors, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_the_scale_of_outcomes_does_not_matter(scale: float) -> None:
    panel, x, y = study()
    small = at_equal_history(panel, x, y * scale, history(y * scale), 0)
    assert small.values == pytest.approx(at_equal_history(panel, x, y, history(y), 0).values, abs=1e-9)


@pytest.mark.parametrize("make", [follows_last, follows_mean])
def test_a_copy_of_earlier_outcomes_has_no_association_at_equal_history(make) -> None:
    found, naive = [], []
    for seed in range(30):
        x, y = make(np.random.default_rng(seed), 4, 10, 20)
        panel = as_panel(x, y, 4)
        found.append(at_equal_history(panel, x, y, history(y), 0).estimate.value)
        naive.append(at_equal_history(panel, x, y, np.zeros((0, *x.shape)), 0).estimate.value)
    assert abs(np.mean(found)) < 0.03
    # The same without the history would be called a predictor.
    assert np.mean(naive) > SMALLEST


def test_missing_places_do_not_count() -> None:
    panel, x, y = study(configurations=1)
    known = history(y)
    holes = x.copy()
    holes[2, 3:6] = NAN
    found = at_equal_history(panel, holes, y, known, 0)
    assert not math.isnan(found.estimate.value)
    # Whatever stands behind a hole, in the outcome, plays no part.
    other = y.copy()
    other[2, 3:6] += 100
    again = at_equal_history(panel, holes, other, np.where(np.isnan(known), NAN, known), 0)
    assert again.values == pytest.approx(found.values, abs=1e-12)


def test_configurations_with_few_runs_or_no_variation_do_not_count() -> None:
    panel, x, y = study(configurations=3)
    x[:2], x[12:] = NAN, 1.0
    found = at_equal_history(panel, x, y, history(y), 0)
    assert found.configurations.tolist() == [1]
    assert math.isnan(found.flip_p)


def test_between_configurations_goes_through_all_orders() -> None:
    panel, x, y = study(configurations=5)
    x += np.repeat([3.0, 1, 2, 5, 4], 6)[:, None]
    y += np.repeat([10.0, 20, 30, 50, 40], 6)[:, None]
    means = [(x[g].mean(), y[g].mean()) for g in panel.groups]
    a, b = np.array(means).T
    expected = spearmanr(a, b).statistic
    every = [spearmanr(a[list(order)], b).statistic for order in permutations(range(5))]
    correlation, p, count = between_configurations(panel, x, y)
    assert correlation == pytest.approx(expected)
    assert p == pytest.approx(np.mean(np.abs(every) >= abs(expected) - 1e-12))
    assert count == 5


def test_two_configurations_have_no_correlation() -> None:
    panel, x, y = study()
    correlation, p, count = between_configurations(panel, x, y)
    assert math.isnan(correlation)
    assert math.isnan(p)
    assert count == 2


def test_scores_have_no_mean_and_unit_variance_at_each_task() -> None:
    values = RNG.standard_normal((2, 7, 4)).round(0)
    values[0, 0, 0] = NAN
    scores = equal_task_scores(values)
    assert scores.mean(axis=1) == pytest.approx(0, abs=1e-12)
    assert (scores[:, :, 1] ** 2).mean(axis=1) == pytest.approx(1)
    assert scores[1, 0, 0] == 0
