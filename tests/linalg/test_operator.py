import pytest
import torch

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.operator import (
    CountingOperator,
    DenseOperator,
    ScaledOperator,
    ShiftedOperator,
    check_operator,
    columns,
    to_dense,
)
from plasticity_probe.linalg.random_vectors import gaussian, sphere


@pytest.fixture
def matrix(symmetric_matrix):
    return symmetric_matrix(torch.tensor([3.0, 1.0, -2.0, 0.0, 5.0]))


def test_dense_operator_multiplies_vectors_and_blocks(matrix):
    operator = DenseOperator(matrix)
    block = torch.randn(5, 3, dtype=torch.float64)
    assert operator.size == 5
    assert torch.equal(operator @ block, matrix @ block)
    assert torch.equal(operator @ block[:, 0], matrix @ block[:, 0])


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 3),
        torch.zeros(3),
        torch.tensor([[1.0, 2.0], [1.0, 1.0]]),
        torch.eye(2).half(),
        torch.eye(2).long(),
    ],
    ids=["oblong", "vector", "asymmetric", "half", "integer"],
)
def test_dense_operator_refuses_what_is_no_symmetric_matrix(bad):
    with pytest.raises(UsageError):
        DenseOperator(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rounding_is_no_asymmetry(dtype, scale):
    factor = torch.randn(300, 200, dtype=dtype, generator=torch.Generator().manual_seed(0))
    DenseOperator((factor @ factor.T) * scale)


def test_not_a_number_is_left_to_the_algorithms():
    DenseOperator(torch.full((3, 3), float("nan")))


def test_scaled_and_shifted(matrix):
    operator, vectors = DenseOperator(matrix), torch.randn(5, 2, dtype=torch.float64)
    assert torch.allclose(ScaledOperator(operator, -2.0) @ vectors, -2.0 * matrix @ vectors, rtol=1e-15)
    assert torch.allclose(to_dense(ShiftedOperator(operator, 0.5)), matrix + 0.5 * torch.eye(5, dtype=torch.float64))


def test_counting_counts_columns(matrix):
    operator = CountingOperator(DenseOperator(matrix))
    _ = operator @ torch.ones(5, dtype=torch.float64)
    _ = operator @ torch.ones(5, 4, dtype=torch.float64)
    assert operator.products == 5


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_to_dense_gives_the_matrix_back(matrix, block):
    operator = CountingOperator(DenseOperator(matrix))
    assert torch.allclose(to_dense(operator, block=block), matrix, rtol=1e-15, atol=1e-15)
    assert operator.products == 5


def test_to_dense_symmetrises_and_columns_does_not(function_operator):
    skewed = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    operator = function_operator(2, lambda vectors, _: skewed @ vectors)
    assert torch.equal(columns(operator), skewed)
    assert torch.equal(to_dense(operator), (skewed + skewed.T) / 2)


def test_to_dense_at_the_edge_of_the_range():
    matrix = torch.full((2, 2), 3e38)
    assert torch.equal(to_dense(DenseOperator(matrix)), matrix)


def test_an_empty_operator_is_refused():
    with pytest.raises(UsageError, match="at least one row"):
        check_operator(DenseOperator(torch.zeros(0, 0)))


def test_random_vectors_fit_the_operator_and_agree_between_precisions():
    single, double = DenseOperator(torch.eye(50)), DenseOperator(torch.eye(50, dtype=torch.float64))
    for draw in (gaussian, sphere):
        one = draw(single, torch.Generator().manual_seed(3))
        two = draw(double, torch.Generator().manual_seed(3))
        assert one.dtype == torch.float32
        assert two.dtype == torch.float64
        torch.testing.assert_close(one, two.float())
    assert float(sphere(double, torch.Generator().manual_seed(0)).norm()) == pytest.approx(1.0)
