"""Gains on left-out runs and configurations, and rankings, against explicit loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, rankdata
from simulated_studies import as_panel, linked, random_walks

from plasticity_probe.prediction.held_out import (
    gain_on_configurations,
    gain_on_runs,
    ranking_accuracy,
    ranking_accuracy_at_equal_task,
)
from plasticity_probe.prediction.panel import Numbers, history

NAN = float("nan")


def standard(values: Numbers) -> Numbers:
    return (values - values.mean(axis=0)) / values.std(axis=0)


def explicit_gain(x: Numbers, y: Numbers, known: Numbers) -> float:
    """One configuration, complete data: every run left out by hand, regressed with lstsq on the others."""
    defined = ~np.isnan(known).any(axis=(0, 1))
    x, y, known = x[:, defined], y[:, defined], known[:, :, defined]
    base = [*(standard(rankdata(k, axis=0)) for k in known), *(standard(k) for k in known)]
    full = [*base, standard(rankdata(x, axis=0))]
    errors = np.zeros(2)
    for run in range(len(x)):
        others = np.arange(len(x)) != run
        for at, used in enumerate((base, full)):
            design = np.stack(used, axis=-1)
            centre = design[others].mean(axis=0)
            target = y[others].mean(axis=0)
            columns = (design[others] - centre).reshape(-1, design.shape[-1])
            b = np.linalg.lstsq(columns, (y[others] - target).ravel(), rcond=None)[0]
            errors[at] += float(np.sum((y[run] - target - (design[run] - centre) @ b) ** 2))
    return 1 - errors[1] / errors[0]


@given(st.integers(0, 10_000))
def test_the_gain_is_that_of_leaving_out_each_run_by_hand(seed: int) -> None:
    x, y = linked(0.5)(np.random.default_rng(seed), 2, 6, 7)
    panel, known = as_panel(x, y, 2), history(y)
    expected = np.mean([explicit_gain(x[g], y[g], known[:, g]) for g in (slice(6), slice(6, 12))])
    assert gain_on_runs(panel, x, y, known, 0).value == pytest.approx(expected, abs=1e-9)


def test_a_useless_predictor_loses_a_little_and_a_good_one_gains_its_share() -> None:
    gains = {0.0: [], 0.6: []}
    for seed in range(20):
        for effect, found in gains.items():
            x, y = linked(effect)(np.random.default_rng(seed), 2, 20, 20)
            found.append(gain_on_runs(as_panel(x, y, 2), x, y, history(y), 0).value)
    assert -0.02 < np.mean(gains[0.0]) < 0
    # Ranks lose a little of the .36 that the linear link holds.
    assert 0.25 < np.mean(gains[0.6]) < 0.36


def test_outcomes_of_the_left_out_run_do_not_leak() -> None:
    """Pure noise must not gain, however many runs there are: fitted to the left-out run as well it would."""
    x, y = random_walks(np.random.default_rng(0), 1, 6, 40)
    noise = np.random.default_rng(1).standard_normal((8, *x.shape))
    known = np.concatenate([history(y), noise])
    assert gain_on_runs(as_panel(x, y, 1), x, y, known, 0).value < 0.05


def test_without_enough_runs_or_variation_there_is_no_gain() -> None:
    x, y = linked(0.5)(np.random.default_rng(0), 2, 4, 7)
    assert math.isnan(gain_on_runs(as_panel(x, y, 2), x, y, history(y), 0).value)
    x, y = linked(0.5)(np.random.default_rng(0), 1, 8, 7)
    assert math.isnan(gain_on_runs(as_panel(x, y, 1), x, np.ones_like(y), history(np.ones_like(y)), 0).value)


def test_what_holds_in_all_configurations_carries_over_and_what_flips_does_not() -> None:
    x, y = linked(0.7)(np.random.default_rng(0), 4, 10, 20)
    same = gain_on_configurations(as_panel(x, y, 4), x, y, history(y))
    assert same.gains.shape == (4,)
    assert (same.gains > 0.2).all()
    x, y = linked(np.array([0.7, 0.7, -0.7, -0.7]))(np.random.default_rng(0), 4, 10, 20)
    assert gain_on_configurations(as_panel(x, y, 4), x, y, history(y)).mean < 0


def test_one_configuration_cannot_be_left_out() -> None:
    x, y = linked(0.7)(np.random.default_rng(0), 1, 10, 20)
    found = gain_on_configurations(as_panel(x, y, 1), x, y, history(y))
    assert math.isnan(found.mean)
    assert found.gains.size == 0


def test_ranking_accuracy_is_kendalls_tau_turned_into_a_share() -> None:
    x, y = linked(0.8)(np.random.default_rng(0), 1, 6, 9)
    found = ranking_accuracy(as_panel(x, y, 1), x, y, 0)
    taus = [kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert found.value == pytest.approx((1 + np.mean(taus)) / 2)
    # A predictor that is good where it is low ranks as well: its direction comes from the other runs.
    assert ranking_accuracy(as_panel(-x, y, 1), -x, y, 0).value == pytest.approx(found.value)


def test_ties_of_the_predictor_are_guesses_and_ties_of_the_outcome_do_not_count() -> None:
    x = np.array([[1.0, 1, 2], [1, 2, 3], [1, 2, 3]])
    y = np.array([[1.0, 2, 2], [1, 2, 3], [1, 2, 3]])
    found = ranking_accuracy(as_panel(x, y, 1), x, y, 0)
    # Run 0: the pair (0, 1) is a guess, (0, 2) is right, (1, 2) does not count.
    assert found.value == pytest.approx((0.75 + 1 + 1) / 3)


def test_a_direction_that_fits_the_left_out_run_alone_does_not_help_it() -> None:
    x = np.array([[1.0, 2, 3], [3, 2, 1], [3, 2, 1]])
    y = np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3]])
    assert ranking_accuracy(as_panel(x, y, 1), x, y, 0).value == pytest.approx((0 + 0.5 + 0.5) / 3)


def test_ranking_at_equal_task_compares_runs_of_one_configuration() -> None:
    x, y = linked(0.8)(np.random.default_rng(0), 2, 5, 6)
    found = ranking_accuracy_at_equal_task(as_panel(x, y, 2), x, y, 0)
    shares = []
    for group in (range(5), range(5, 10)):
        for run in group:
            pairs = [np.sign(x[run] - x[s]) * np.sign(y[run] - y[s]) for s in group if s != run]
            shares.append((np.mean(pairs) + 1) / 2)
    assert found.value == pytest.approx(np.mean(shares))


def test_missing_places_do_not_rank() -> None:
    x, y = linked(0.8)(np.random.default_rng(0), 1, 5, 6)
    x[0] = NAN
    found = ranking_accuracy(as_panel(x, y, 1), x, y, 0)
    taus = [kendalltau(a, b).statistic for a, b in zip(x[1:], y[1:], strict=True)]
    assert found.value == pytest.approx((1 + np.mean(taus)) / 2)
