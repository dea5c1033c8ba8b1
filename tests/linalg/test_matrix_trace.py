import math

import pytest
import torch

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.deflation import DeflatedOperator
from plasticity_probe.linalg.matrix_trace import hutch_plus_plus, hutchinson, mean_estimate
from plasticity_probe.linalg.operator import CountingOperator, DenseOperator

DTYPES = [torch.float32, torch.float64]
SCALES = [1e-30, 1.0, 1e30]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_multiples_of_the_identity_are_met_exactly_with_no_error(generator, dtype, scale):
    estimate = hutchinson(DenseOperator(torch.eye(300, dtype=dtype) * scale), 5, generator)
    assert estimate.value == pytest.approx(300 * scale, rel=10 * torch.finfo(dtype).eps)
    assert estimate.lower == estimate.upper == estimate.value
    assert estimate.standard_error == 0.0
    assert (estimate.draws, estimate.products) == (5, 5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", [hutchinson, hutch_plus_plus])
def test_within_four_standard_errors_at_every_scale(symmetric_matrix, generator, estimator, scale):
    spectrum = torch.linspace(-1, 3, 200, dtype=torch.float64)
    matrix = symmetric_matrix(spectrum, torch.float32, scale)
    estimate = estimator(DenseOperator(matrix), 90, generator)
    assert abs(estimate.value - float(spectrum.sum()) * scale) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.1 * abs(estimate.value)


def standard_error_ratio(estimates):
    """Mean squared standard error over the variance seen between independent runs: 1 if the standard error is honest."""
    values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
    squares = torch.tensor([estimate.standard_error for estimate in estimates], dtype=torch.float64).square()
    return float(squares.mean() / values.var())


def exact_variance(spectrum, draws):
    size = len(spectrum)
    return 2 / draws * size / (size + 2) * float((spectrum - spectrum.mean()).square().sum())


def test_mean_and_variance_over_many_seeds(symmetric_matrix):
    spectrum = torch.linspace(-1, 3, 30, dtype=torch.float64)
    operator = DenseOperator(symmetric_matrix(spectrum))
    runs = [hutchinson(operator, 10, torch.Generator().manual_seed(seed)) for seed in range(500)]
    values = torch.tensor([run.value for run in runs])
    variance = exact_variance(spectrum, 10)
    # The variance of 500 values is known to a relative standard error of sqrt(2 / 499).
    assert float(values.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 499) * 1.2)
    assert abs(float(values.mean()) - float(spectrum.sum())) < 4 * math.sqrt(variance / 500)
    # Without bounds of the eigenvalues one may hold everything, which 10 draws pay for by a longer interval, and no more.
    assert 1 < standard_error_ratio(runs) < 1.7
    assert 10 * standard_error_ratio(runs) > 5, "a standard deviation sold as a standard error would be caught"


def test_known_ends_make_the_standard_error_that_of_the_mean(symmetric_matrix):
    spectrum = torch.linspace(-1, 3, 200, dtype=torch.float64)
    operator = DenseOperator(symmetric_matrix(spectrum))
    runs = [hutchinson(operator, 10, torch.Generator().manual_seed(s), ends=(-1.0, 3.0)) for s in range(300)]
    assert standard_error_ratio(runs) == pytest.approx(1, abs=4 * math.sqrt(2 / 299) * 1.5)


def test_deflated_directions_see_the_complement_alone(symmetric_matrix, generator):
    spectrum = torch.cat([torch.full((20,), 2.0), torch.tensor([100.0, 70.0])]).double()
    matrix = symmetric_matrix(spectrum)
    known = torch.linalg.eigh(matrix)[1][:, -2:]
    estimate = hutchinson(DeflatedOperator(DenseOperator(matrix), known), 3, generator).plus(170.0, 2)
    assert estimate.value == pytest.approx(210.0)
    assert estimate.standard_error < 1e-9
    assert estimate.products == 5


@pytest.mark.parametrize("scale", SCALES)
def test_hutch_plus_plus_is_exact_for_a_low_rank(symmetric_matrix, generator, scale):
    spectrum = torch.cat([torch.tensor([5.0, 4.0, -3.0]), torch.zeros(297)])
    operator = CountingOperator(DenseOperator(symmetric_matrix(spectrum, torch.float64, scale)))
    estimate = hutch_plus_plus(operator, 30, generator)
    assert estimate.value == pytest.approx(6 * scale, rel=1e-9)
    assert estimate.standard_error < 1e-9 * scale
    assert estimate.products == operator.products == 30
    assert hutchinson(operator, 30, generator).standard_error > 0.01 * scale


@pytest.mark.parametrize("size", [1, 2, 3])
def test_hutch_plus_plus_on_matrices_smaller_than_its_sketch(symmetric_matrix, generator, size):
    matrix = symmetric_matrix(torch.arange(1.0, size + 1))
    assert hutch_plus_plus(DenseOperator(matrix), 30, generator).value == pytest.approx(size * (size + 1) / 2)


def test_zero_and_not_finite(generator):
    zero = DenseOperator(torch.zeros(9, 9))
    assert hutchinson(zero, 3, generator).value == hutch_plus_plus(zero, 6, generator).value == 0.0
    broken = DenseOperator(torch.full((9, 9), math.nan))
    for estimate in (hutchinson(broken, 3, generator), hutch_plus_plus(broken, 6, generator)):
        assert math.isnan(estimate.value)
        assert math.isnan(estimate.standard_error)


def test_impossible_requests_are_refused(generator):
    operator = DenseOperator(torch.eye(3))
    with pytest.raises(UsageError, match="at least 1 draw"):
        hutchinson(operator, 0, generator)
    with pytest.raises(UsageError, match="at least 3 products"):
        hutch_plus_plus(operator, 2, generator)


def test_mean_estimate_by_hand():
    estimate = mean_estimate([1.0, 3.0], products=2)
    assert (estimate.value, estimate.standard_error) == pytest.approx((2.0, 1.0))
    assert (estimate.lower, estimate.upper) == pytest.approx((2 - 12.706204736, 2 + 12.706204736))
    assert math.isnan(mean_estimate([1.0], products=1).standard_error)
    assert mean_estimate([1e200, 3e200], products=2).standard_error == pytest.approx(1e200)
