import pytest
import torch

from plasticity_probe.linalg.deflation import DeflatedOperator, deflated_quadrature
from plasticity_probe.linalg.operator import DenseOperator, to_dense


def problem(n: int = 80, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = torch.cat([torch.tensor([100.0, 50.0]), torch.randn(n - 3), torch.tensor([-30.0])]).double().sort()[0]
    vectors = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    matrix = vectors @ torch.diag(values) @ vectors.T
    return values, vectors, ((matrix + matrix.T) / 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deflated_eigenvalues_become_zero_and_the_rest_stays(dtype):
    values, vectors, matrix = problem(dtype=dtype)
    known = vectors[:, [-1, -2, 0]].to(dtype)
    found = torch.linalg.eigvalsh(to_dense(DeflatedOperator(DenseOperator(matrix), known)).double())
    truth = torch.cat([values[1:-2], torch.zeros(3, dtype=torch.float64)]).sort()[0]
    torch.testing.assert_close(found, truth, rtol=0.0, atol=100 * 100 * torch.finfo(dtype).eps)


def test_rows_are_distributions_with_the_right_moments():
    values, vectors, matrix = problem()
    operator = DeflatedOperator(DenseOperator(matrix), vectors[:, [-1, -2, 0]])
    drawn = deflated_quadrature(
        operator, values[[-1, -2]], values[[0]], draws=200, steps=6, generator=torch.Generator().manual_seed(0)
    )
    assert drawn.nodes.shape == drawn.weights.shape == (200, 9)
    assert drawn.products == 1200
    assert not drawn.exhausted.any()
    assert (drawn.nodes.diff(dim=1) >= -1e-9).all()
    torch.testing.assert_close(drawn.weights.sum(1), torch.ones(200, dtype=torch.float64))
    for power in (1, 2, 3):
        estimates = 80 * (drawn.weights * drawn.nodes**power).sum(1)
        truth = float((values**power).sum())
        error = float(estimates.std()) / 200**0.5
        assert abs(float(estimates.mean()) - truth) < 4 * error
        assert error < 0.02 * abs(truth), "known eigenvalues must add no variance"


def test_an_exhausted_space_is_said_and_gives_eigenvalues():
    values = torch.cat([torch.tensor([9.0, 5.0, 5.0, 2.0]), torch.zeros(60)]).double()
    operator = DeflatedOperator(DenseOperator(torch.diag(values)), torch.eye(64, dtype=torch.float64)[:, :1])
    drawn = deflated_quadrature(
        operator, values[:1], values[:0], draws=3, steps=20, generator=torch.Generator().manual_seed(0), norm=9.0
    )
    assert drawn.exhausted.all()
    assert drawn.nodes.shape == (3, 4)
    truth = torch.tensor([0.0, 2.0, 5.0, 9.0], dtype=torch.float64).expand(3, -1)
    torch.testing.assert_close(drawn.nodes, truth, rtol=1e-12, atol=1e-12)


def test_rows_of_different_length_are_filled_with_weight_zero_before_the_known_end():
    values = torch.cat([torch.tensor([9.0]), torch.randn(63) * 1e-3]).double()
    values[40:] = 0.0
    operator = DeflatedOperator(DenseOperator(torch.diag(values)), torch.eye(64, dtype=torch.float64)[:, :1])
    one = deflated_quadrature(
        operator, values[:1], values[:0], draws=1, steps=50, generator=torch.Generator().manual_seed(0), norm=9.0
    )
    assert float(one.nodes[0, -1]) == 9.0
    assert float(one.weights[0, -1]) == 1 / 64


def test_a_product_that_is_not_finite_gives_nan():
    class Broken(DenseOperator):
        def __matmul__(self, vectors):
            return super().__matmul__(vectors) * torch.nan

    operator = DeflatedOperator(Broken(torch.eye(30)), torch.eye(30)[:, :2])
    drawn = deflated_quadrature(
        operator, torch.ones(1), torch.ones(1), draws=2, steps=4, generator=torch.Generator().manual_seed(0)
    )
    assert drawn.nodes.isnan().all()
    assert drawn.weights.isnan().all()
