"""Intervals of proportions against published values and the equation that defines them."""

import math

import pytest

from plasticity_probe.prediction.proportions import difference_interval, wilson_interval


def test_the_interval_is_that_of_newcombes_examples() -> None:
    # Newcombe 1998, table II, method 10: (a) 56/70 - 48/80, (b) 9/10 - 3/10, (d) 5/56 - 0/29, (g) 10/10 - 0/20, (h) 10/10 - 0/10.
    cases = {
        (56, 70, 48, 80): (0.0524, 0.3339),
        (9, 10, 3, 10): (0.1705, 0.8090),
        (5, 56, 0, 29): (-0.0381, 0.1926),
        (10, 10, 0, 20): (0.6791, 1.0000),
        (10, 10, 0, 10): (0.6075, 1.0000),
    }
    for (a, m, b, n), (low, high) in cases.items():
        found = difference_interval(a / m, m, b / n, n)
        assert [float(end) for end in found] == pytest.approx([low, high], abs=5e-5)


def test_a_score_interval_solves_its_equation() -> None:
    for successes, trials in ((0, 7), (3, 7), (7, 7), (40, 1000)):
        share = successes / trials
        for end in wilson_interval(share, trials):
            at = float(end)
            assert abs(share - at) == pytest.approx(1.959964 * math.sqrt(at * (1 - at) / trials), abs=1e-6)


def test_without_trials_nothing_is_known() -> None:
    assert all(math.isnan(end) for end in map(float, wilson_interval(math.nan, 0)))
    assert all(math.isnan(end) for end in map(float, difference_interval(0.5, 4, math.nan, 0)))
