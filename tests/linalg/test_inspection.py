import math

import pytest
import torch

from plasticity_probe.linalg.inspection import EigenStatus, inspect_operator
from plasticity_probe.linalg.operator import CountingOperator, DenseOperator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_symmetric_operator_passes_at_every_scale(symmetric_matrix, generator, dtype, scale):
    operator = CountingOperator(DenseOperator(symmetric_matrix(torch.linspace(-1, 3, 200), dtype, scale)))
    found = inspect_operator(operator, generator)
    assert found.status is EigenStatus.OK
    assert 0.2 * 3 * scale < found.norm <= 3 * scale * 1.0001
    assert operator.products == 3


def test_zero(generator):
    found = inspect_operator(DenseOperator(torch.zeros(5, 5)), generator)
    assert found.status is EigenStatus.ZERO_OPERATOR
    assert found.norm == 0.0


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_in_any_product(function_operator, generator, call, value):
    operator = function_operator(5, lambda vector, calls: vector * (value if calls == call else 1.0))
    assert inspect_operator(operator, generator).status is EigenStatus.NONFINITE


@pytest.mark.parametrize("share", [0.015, 0.3, 1.0])
def test_asymmetric(function_operator, generator, share):
    raw = torch.randn(100, 100, dtype=torch.float64, generator=generator)
    matrix = (raw + raw.T) / 2 + share * (raw - raw.T) / 2
    operator = function_operator(100, lambda vector, _: matrix @ vector)
    assert inspect_operator(operator, generator).status is EigenStatus.ASYMMETRIC


def test_not_repeatable(function_operator, generator):
    noise = torch.Generator().manual_seed(5)
    operator = function_operator(
        100, lambda vector, _: vector * (1 + 1e-3 * torch.randn(100, dtype=torch.float64, generator=noise))
    )
    assert inspect_operator(operator, generator).status is EigenStatus.NOT_REPEATABLE
