"""Bootstrap, exchanges and signs of whole runs, against SciPy, full enumeration and published tables."""

import math
from itertools import permutations, product

import numpy as np
import pytest
from scipy.stats import bootstrap, chi2
from scipy.stats import t as student

from plasticity_probe.prediction.panel import Numbers
from plasticity_probe.prediction.resampling import (
    exchange_p,
    interval,
    jackknife_error,
    sign_flip_p,
    turning_p,
)


def mean_of(values: Numbers):
    return lambda weights: weights @ values / weights.sum(axis=1)


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = np.random.default_rng(1).exponential(size=25)
    ours = interval(mean_of(values), [np.arange(25)], 0, draws=20_000)
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0))
    spread = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02 * spread)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02 * spread)
    assert ours.low < ours.narrow_low < ours.value < ours.narrow_high < ours.high
    assert ours.error == pytest.approx(values.std(ddof=1) / 5, rel=1e-9)


def test_the_jackknife_error_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(2).standard_normal(11)
    assert jackknife_error(mean_of(values), 11) == pytest.approx(values.std(ddof=1) / math.sqrt(11))


def test_runs_are_drawn_within_their_configuration() -> None:
    # Two configurations far apart: were runs drawn over both, the mean would move by whole units.
    values = np.concatenate([np.full(6, -100.0), np.full(6, 100.0)])
    groups = [np.arange(6), np.arange(6, 12)]
    found = interval(lambda w: np.mean([w[:, g] @ values[g] / w[:, g].sum(axis=1) for g in groups], axis=0), groups, 0)
    assert (found.low, found.high, found.error) == (0, 0, 0)


def test_a_statistic_that_is_undefined_has_no_interval() -> None:
    found = interval(lambda w: np.full(len(w), math.nan), [np.arange(5)], 0)
    assert math.isnan(found.value)
    assert math.isnan(found.low)


@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_of_a_mean_over_two_configurations_cover(skewed: bool) -> None:
    rng = np.random.default_rng(3)
    groups, covered, studies = [np.arange(12), np.arange(12, 24)], 0, 400
    for study in range(studies):
        values = rng.exponential(size=24) - 1 if skewed else rng.standard_normal(24)
        found = interval(
            lambda w, v=values: np.mean([w[:, g] @ v[g] / w[:, g].sum(axis=1) for g in groups], axis=0),
            groups,
            study,
            500,
        )
        covered += found.low <= 0 <= found.high
    # Twelve runs a configuration: the bootstrap is known to fall a little short of 95 %.
    assert 0.88 <= covered / studies <= 0.98


def studentised(columns: list[Numbers]) -> float:
    spread = sum(column.var(ddof=1) / column.size for column in columns)
    return sum(column.mean() for column in columns) / math.sqrt(spread)


def test_exchanges_agree_with_all_of_them() -> None:
    rng = np.random.default_rng(4)
    crossed = [rng.standard_normal((5, 5)), rng.standard_normal((4, 4))]
    at = [np.arange(5), np.arange(4)]
    observed = abs(studentised([c[i, i] for c, i in zip(crossed, at, strict=True)]))
    every = [
        abs(studentised([crossed[0][list(a), at[0]], crossed[1][list(b), at[1]]]))
        for a in permutations(range(5))
        for b in permutations(range(4))
    ]
    exact = np.mean(np.array(every) >= observed - 1e-12)
    assert exchange_p(crossed, 0, 20_000) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))


def test_turned_signs_agree_with_all_of_them() -> None:
    rng = np.random.default_rng(5)
    values = [rng.standard_normal(5) + 0.4, rng.standard_normal(4) + 0.4]
    observed = abs(studentised(values))
    every = [
        abs(studentised([values[0] * np.array(s[:5]), values[1] * np.array(s[5:])])) for s in product([-1, 1], repeat=9)
    ]
    exact = np.mean(np.array(every) >= observed - 1e-12)
    assert turning_p(values, 0, 20_000) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))


def test_p_is_never_zero() -> None:
    assert turning_p([np.full(8, 2.0) + np.arange(8) / 100], 0, 99) >= 1 / 100
    assert exchange_p([np.eye(8) * 10 + np.arange(8)], 0, 99) >= 1 / 100


@pytest.mark.parametrize(("configurations", "critical"), [(2, 2.71), (3, 4.23), (4, 5.43), (5, 6.50)])
def test_sign_flips_have_the_published_critical_values(configurations: int, critical: float) -> None:
    # Gail and Simon 1985, table 1: the smaller sum of squares that is significant at 5 %.
    one = math.sqrt(critical)
    estimates = np.array([one, -one, *[one] * (configurations - 2)])
    assert sign_flip_p(estimates, np.ones(configurations), np.full(configurations, 10**9)) == pytest.approx(
        0.05, abs=0.001
    )


def test_one_sign_is_no_flip_and_one_configuration_tells_nothing() -> None:
    assert sign_flip_p(np.array([3.0, 0.1, 5.0]), np.ones(3), np.full(3, 9)) == 1
    assert math.isnan(sign_flip_p(np.array([3.0]), np.ones(1), np.full(1, 9)))
    assert sign_flip_p(np.array([1.0, -1.0]), np.zeros(2), np.full(2, 9)) < 1e-50


def test_two_configurations_flip_like_two_one_sided_t_tests() -> None:
    found = sign_flip_p(np.array([2.0, -3.0]), np.ones(2), np.array([6, 6]))
    # The smaller of the two decides, and one of two directions is that of the other.
    assert found == pytest.approx(student.sf(2.0, 5))
    assert sign_flip_p(np.array([2.0, -3.0]), np.ones(2), np.full(2, 10**9)) == pytest.approx(chi2.sf(4.0, 1) / 2)


def test_few_runs_that_scatter_around_nothing_seldom_flip() -> None:
    rng, flips = np.random.default_rng(0), 0
    for _ in range(1000):
        values = rng.standard_normal((2, 5))
        flips += sign_flip_p(values.mean(axis=1), values.std(axis=1, ddof=1) / math.sqrt(5), np.full(2, 5)) <= 0.05
    assert flips / 1000 < 0.05
