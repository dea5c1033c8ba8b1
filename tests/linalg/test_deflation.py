import pytest
import torch

from plasticity_probe.linalg.deflation import DeflatedOperator
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


def test_inactive_coordinates_are_left_out():
    values, vectors, matrix = problem()
    padded = torch.zeros(100, 100, dtype=torch.float64)
    padded[:80, :80] = matrix
    active = torch.arange(100) < 80
    known = torch.zeros(100, 2, dtype=torch.float64)
    known[:80] = vectors[:, -2:]
    known[90] = 1e-6
    operator = DeflatedOperator(DenseOperator(padded), known, active)
    assert (operator.inactive, operator.dimension) == (20, 78)
    direction = operator.direction(torch.Generator().manual_seed(0))
    assert (direction[80:] == 0).all()
    assert float(direction.norm()) == pytest.approx(1.0)
    assert float((vectors[:, -2:].T @ direction[:80]).abs().max()) < 1e-12
    found = torch.linalg.eigvalsh(to_dense(operator)).sort()[0]
    truth = torch.cat([values[:-2], torch.zeros(22, dtype=torch.float64)]).sort()[0]
    torch.testing.assert_close(found, truth, rtol=0.0, atol=1e-10)


def test_deflating_twice_is_deflating_by_both():
    _, vectors, matrix = problem()
    twice = DeflatedOperator(DeflatedOperator(DenseOperator(matrix), vectors[:, :2]), vectors[:, 5:8])
    once = DeflatedOperator(DenseOperator(matrix), vectors[:, [0, 1, 5, 6, 7]])
    assert twice.dimension == once.dimension == 75
    torch.testing.assert_close(to_dense(twice), to_dense(once), rtol=0.0, atol=1e-11)
    direction = twice.direction(torch.Generator().manual_seed(0))
    assert float((vectors[:, [0, 1, 5, 6, 7]].T @ direction).abs().max()) < 1e-12
