import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.linalg.quadrature import exact_quadrature
from plasticity_probe.linalg.ranks import (
    DEFINITIONS,
    effective_rank,
    energy_rank,
    epsilon_rank,
    numerical_rank,
    participation_ratio,
    rank,
    stable_rank,
    threshold_rank,
)

SPECTRA = st.lists(st.integers(0, 1000), min_size=1, max_size=30)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def ranked(values, name, weights=None):
    return rank(values, name, epsilon=0.5, weights=weights)


def exact_threshold_rank(values, delta):
    """The definition in rational numbers."""
    total, reached = sum(values), Fraction(0)
    for count, value in enumerate(sorted(values, reverse=True), 1):
        reached += value
        if reached >= (1 - delta) * total:
            return count if total else 0
    raise AssertionError


def test_by_hand():
    values = f64(4, -2, 1, 1, 0)
    assert threshold_rank(values, 0.25) == 2
    assert threshold_rank(values, 0.2) == 3
    assert threshold_rank(values, 0.0) == 4
    assert energy_rank(values, 0.1) == 2
    assert effective_rank(values) == pytest.approx(2 ** (0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3))
    assert stable_rank(values) == 22 / 16
    assert participation_ratio(values) == pytest.approx(64 / 22)
    assert numerical_rank(values) == 4
    assert epsilon_rank(values, 1.0) == 2


def test_one_percent_is_left_out_exactly():
    assert threshold_rank(torch.ones(100), 0.01) == 99
    assert threshold_rank(0.1 * torch.ones(1000).double(), 0.01) == 990
    assert energy_rank(torch.full((100,), 0.3), 0.01) == 99


def test_a_comparison_without_care_for_rounding_would_be_caught():
    plain_is_wrong = 0
    for value in (0.1, 0.3, 0.7, 1.1):
        for size in (100, 200, 300, 700, 1000):
            values = np.full(size, value)
            reached = np.cumsum(values)
            plain_is_wrong += int((reached < (1 - 0.01) * reached[-1]).sum()) + 1 != size * 99 // 100
            assert threshold_rank(torch.from_numpy(values)) == size * 99 // 100
    assert plain_is_wrong > 0


@settings(deadline=None, max_examples=200, derandomize=True)
@given(values=SPECTRA, percent=st.integers(0, 99))
def test_threshold_and_energy_rank_are_the_definition_in_rational_numbers(values, percent):
    tensor = torch.tensor(values)
    delta = Fraction(percent, 100)
    assert threshold_rank(tensor, percent / 100) == exact_threshold_rank(values, delta)
    assert energy_rank(tensor, percent / 100) == exact_threshold_rank([value**2 for value in values], delta)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(values=SPECTRA, seed=st.integers(0, 1000), exponent=st.integers(-200, 200))
def test_order_sign_scale_and_zeros_do_not_matter(values, seed, exponent):
    tensor = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(values), generator=generator)
    signs = 2.0 * torch.randint(0, 2, (len(values),), generator=generator) - 1
    changed = torch.cat([(tensor * signs)[order] * 2.0**exponent, torch.zeros(3)])
    for name in DEFINITIONS:
        if name != "epsilon_rank":
            assert ranked(changed, name) == pytest.approx(ranked(tensor, name), rel=1e-12)
    assert epsilon_rank(changed, 0.5 * 2.0**exponent) == epsilon_rank(tensor, 0.5)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(levels=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=10))
def test_weights_are_multiplicities(levels):
    values = f64(*[value for value, _ in levels])
    weights = f64(*[count for _, count in levels])
    repeated = f64(*[value for value, count in levels for _ in range(count)])
    for name in DEFINITIONS:
        assert ranked(values, name, weights) == pytest.approx(ranked(repeated, name), rel=1e-12), name


@settings(deadline=None, max_examples=100, derandomize=True)
@given(values=SPECTRA)
def test_every_rank_lies_between_one_and_the_number_of_values_that_are_not_zero(values):
    nonzero = sum(value != 0 for value in values)
    for name in DEFINITIONS:
        found = ranked(torch.tensor(values), name)
        assert min(1, nonzero) - 1e-12 <= found <= nonzero + 1e-9, name
    assert stable_rank(torch.tensor(values)) <= participation_ratio(torch.tensor(values)) + 1e-9


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_equal_values_have_full_rank_and_zero_has_none(name, dtype):
    assert ranked(torch.full((5,), 2, dtype=dtype), name) == pytest.approx(5)
    assert ranked(torch.zeros(5, dtype=dtype), name) == 0
    assert ranked(torch.zeros(0, dtype=dtype), name) == 0
    assert ranked(f64(3, 2), name, f64(0, 0)) == 0


def test_numerical_rank_is_that_of_numpy(symmetric_matrix):
    for dtype, array in ((torch.float32, np.float32), (torch.float64, np.float64)):
        factor = torch.randn(40, 7, dtype=dtype, generator=torch.Generator().manual_seed(0))
        matrix = factor @ torch.randn(7, 25, dtype=dtype, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(matrix)
        assert numerical_rank(values, shape=(40, 25)) == np.linalg.matrix_rank(matrix.numpy().astype(array)) == 7
        assert numerical_rank(values.double(), shape=(40, 25), dtype=dtype) == 7
    assert numerical_rank(f64(5, 1, 0.1), tol=0.5) == 2
    assert numerical_rank(f64(5, 1, 0.1), tol=0.0) == 3


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(name, bad):
    with pytest.raises(UsageError, match="finite"):
        ranked(f64(1, bad), name)
    with pytest.raises(UsageError, match="finite"):
        ranked(f64(1, 2), name, f64(1, bad))


def test_impossible_settings_are_refused():
    for delta in (-0.1, 1.0, math.nan):
        with pytest.raises(UsageError, match="delta"):
            threshold_rank(f64(1), delta)
    with pytest.raises(UsageError, match="weights >= 0"):
        stable_rank(f64(1, 2), f64(1, -1))
    with pytest.raises(UsageError, match="one weight a value"):
        stable_rank(f64(1, 2), f64(1))
    with pytest.raises(UsageError, match="epsilon >= 0"):
        epsilon_rank(f64(1), math.nan)
    with pytest.raises(UsageError, match="tol >= 0"):
        numerical_rank(f64(1), tol=-1.0)
    with pytest.raises(UsageError, match="needs an epsilon"):
        rank(f64(1), "epsilon_rank")
    with pytest.raises(UnknownNameError, match="Did you mean 'stable_rank'"):
        rank(f64(1), "stabel_rank")


@pytest.mark.parametrize("name", DEFINITIONS)
def test_equal_weights_give_the_rank_of_the_list(name):
    for size in (1, 3, 49, 100):
        values = torch.logspace(1, -3, size, dtype=torch.float64)
        weights = size * exact_quadrature(values).weights[0]
        assert rank(values, name, epsilon=0.5, weights=weights) == pytest.approx(ranked(values, name), rel=1e-9)
