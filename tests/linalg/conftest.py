"""Oracles for matrix-free algorithms: matrices with a chosen spectrum, and operators that misbehave."""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor


class FunctionOperator:
    """An operator that is whatever a function does to a vector; the function also gets the number of the call."""

    def __init__(
        self, size: int, function: Callable[[Tensor, int], Tensor], dtype: torch.dtype = torch.float64
    ) -> None:
        self.size, self.dtype, self.device = size, dtype, torch.device("cpu")
        self.function, self.calls = function, 0

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        self.calls += 1
        return self.function(vectors, self.calls)


@lru_cache(maxsize=8)
def _orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


def symmetric_matrix(
    eigenvalues: Tensor, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """A dense matrix with the given eigenvalues (times a scale) and random eigenvectors."""
    vectors = _orthogonal(eigenvalues.numel(), seed)
    matrix = (vectors * eigenvalues.double()) @ vectors.T
    return ((matrix / 2 + matrix.T / 2) * scale).to(dtype)


@pytest.fixture(scope="session", name="symmetric_matrix")
def _symmetric_matrix() -> Callable[..., Tensor]:
    return symmetric_matrix


@pytest.fixture(scope="session", name="function_operator")
def _function_operator() -> type[FunctionOperator]:
    return FunctionOperator


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
