import math

import pytest
import torch

from plasticity_probe.linalg.dense import column_norms, orthonormal_columns, symmetric_eigenpairs, vector_norm


def test_eigenpairs_descend(symmetric_matrix):
    values, vectors = symmetric_eigenpairs(symmetric_matrix(torch.tensor([1.0, -3.0, 2.0])))
    assert torch.allclose(values, torch.tensor([2.0, 1.0, -3.0], dtype=torch.float64))
    assert torch.allclose(vectors.T @ vectors, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-200), (torch.float64, 1e200)]
)
def test_length_neither_overflows_nor_underflows(dtype, scale):
    vector = torch.tensor([3.0, 4.0, 0.0], dtype=dtype) * scale
    assert vector_norm(vector) == pytest.approx(5 * scale, rel=8 * torch.finfo(dtype).eps)


def test_length_of_nothing_and_of_no_number():
    assert vector_norm(torch.zeros(3)) == 0.0
    assert vector_norm(torch.tensor([1.0, -math.inf])) == math.inf
    assert math.isnan(vector_norm(torch.tensor([1.0, math.nan])))


def test_column_norms():
    assert torch.equal(
        column_norms(torch.tensor([[3.0, 0.0], [4.0, 2.0]])), torch.tensor([5.0, 2.0], dtype=torch.float64)
    )


def test_orthonormal_columns_are_complete_where_columns_depend_on_each_other():
    tall = torch.ones(6, 3, dtype=torch.float64)
    basis = orthonormal_columns(tall)
    assert torch.allclose(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    assert torch.allclose(basis @ (basis.T @ tall), tall)
