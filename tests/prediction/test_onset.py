"""Change points against Pettitt's double sum and hand-made series."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_studies import as_panel

from plasticity_probe.prediction.onset import change_point, lead_time

NAN = float("nan")


@given(st.lists(st.integers(-5, 5), min_size=4, max_size=30))
def test_p_is_that_of_pettitts_double_sum_and_the_place_leaves_the_smallest_sum_of_squares(values: list[int]) -> None:
    x = np.array(values, dtype=float)
    n = x.size
    u = [sum(np.sign(x[i] - x[j]) for i in range(k) for j in range(k, n)) for k in range(1, n)]
    left = [x[:k].var() * k + x[k:].var() * (n - k) for k in range(1, n)]
    found = change_point(x)
    assert found.p == pytest.approx(min(1.0, 2 * math.exp(-6 * max(np.abs(u)) ** 2 / (n**3 + n**2))))
    assert left[found.at - 1] == pytest.approx(min(left), abs=1e-9)
    assert (found.direction == 0) == (found.p > 0.05)


def test_a_fall_is_found_where_it_is() -> None:
    found = change_point(np.array([9.0, 8, 9, 8, 9, 8, 9, 2, 1, 2, 1, 2, 1, 2]))
    assert (found.at, found.direction) == (7, -1)
    assert change_point(-np.array([9.0, 8, 9, 8, 9, 8, 9, 2, 1, 2, 1, 2, 1, 2])).direction == 1


def test_unknown_values_are_passed_over() -> None:
    found = change_point(np.array([NAN, 9.0, 8, 9, 8, NAN, 9, 8, 9, 2, NAN, 1, 2, 1, 2, 1, 2]))
    assert (found.at, found.direction) == (9, -1)


def test_noise_constants_and_short_series_have_no_change() -> None:
    assert change_point(np.random.default_rng(0).standard_normal(20)).direction == 0
    assert change_point(np.ones(10)).direction == 0
    assert change_point(np.array([3.0, 2, 1])).direction == 0


def test_lead_time_counts_tasks_from_the_predictors_change_to_the_outcomes_fall() -> None:
    tasks = np.arange(20)
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (6, 20))
    x = np.where(tasks < 8, 0.0, 5.0) + noise
    y = np.where(tasks < 12, 1.0, 0.0) + noise[::-1]
    y[0] = 0.5 + 0.001 * noise[0]
    found = lead_time(as_panel(x, y, 1), x, y, 0)
    assert found.events == 5
    assert math.isnan(found.onset[0])
    assert found.onset[1:].tolist() == [12] * 5
    assert found.collapse[1:].tolist() == [8] * 5
    assert found.mean.value == 4
    assert found.first == 1


def test_a_rise_of_the_outcome_is_no_loss() -> None:
    y = np.where(np.arange(20) < 12, 0.0, 1.0) + np.random.default_rng(0).uniform(-0.1, 0.1, (5, 20))
    found = lead_time(as_panel(y, y, 1), y, y, 0)
    assert found.events == 0
    assert math.isnan(found.mean.value)
