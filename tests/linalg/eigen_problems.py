"""Eigenproblems of symmetric operators whose answer is known.

A `Problem` is one request to a solver, from which matrix, truth and operator follow, so its printed form is enough to repeat it. The truth
is a dense float64 decomposition of the matrix *after* it was rounded to the problem's dtype.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from eigen_families import FAMILIES, FAULTY, Fault
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SIZES = (1, 2, 3, 10, 33, 100, 400)
COUNTS = ((1, 0), (3, 3), (8, 0), (0, 4), (10, 10), (40, 40))
ROUNDS = 2
TOLERANCES = {"float32": (1e-3, 1e-6), "float64": (1e-3, 1e-6, 1e-10)}


@dataclass(frozen=True)
class Problem:
    """One request to a solver.

    Args:
        family: A key of FAMILIES.
        size: n.
        dtype: A key of DTYPES.
        scale: What the matrix is multiplied with.
        k_top: How many of the largest eigenvalues are asked for.
        k_bottom: How many of the smallest.
        tol: Relative residual asked for.
        seed: Of the matrix, and of the solver's generator.
        dense_below: Size up to which the solver may form the matrix.
    """

    family: str
    size: int
    dtype: str
    scale: float
    k_top: int
    k_bottom: int
    tol: float
    seed: int
    dense_below: int

    @property
    def matrix_free(self) -> bool:
        """Whether the solver has to live with products alone."""
        return self.size > max(self.dense_below, min(self.size, self.k_top) + min(self.size, self.k_bottom))

    def matrix(self) -> Tensor:
        """The matrix behind the operator, in the problem's dtype; asymmetric in some families with a fault."""
        return _matrix(self.family, self.size, self.dtype, self.scale, self.seed)

    def operator(self) -> "KnownOperator":
        """The operator that the solver gets."""
        return KnownOperator(self.matrix(), FAMILIES[self.family].fault)

    def truth(self) -> "Truth":
        """What a right answer has to agree with."""
        return _truth(self.family, self.size, self.dtype, self.scale, self.seed)

    def generator(self) -> torch.Generator:
        """The solver's source of randomness."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, eq=False)
class Truth:
    """The symmetric part of a matrix and its spectrum, both divided by a power of two near the norm.

    Args:
        matrix: Shape (n, n), float64.
        values: Its eigenvalues, ascending, shape (n,), float64.
        unit: What both were divided by.
        eps: Of the dtype that the solver works in.
        healthy: Whether the operator is what it should be: this matrix, at every call.
    """

    matrix: Tensor
    values: Tensor
    unit: float
    eps: float
    healthy: bool

    @property
    def norm(self) -> float:
        """The spectral norm of `matrix`."""
        return float(self.values.abs().max())


class KnownOperator:
    """Products with a matrix, as they come or with a fault.

    Args:
        matrix: Shape (n, n).
        fault: What is done to each product.
    """

    def __init__(self, matrix: Tensor, fault: Fault | None) -> None:
        self.size, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device
        self.matrix, self.fault = matrix, fault
        self.calls = self.products = 0

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        image = self.matrix @ vectors
        if vectors.numel() == 0:
            return image
        self.calls += 1
        self.products += vectors.numel() // self.size
        return self.fault(image, self.calls) if self.fault else image


def problems(names: tuple[str, ...] = tuple(FAMILIES)) -> Iterator[Problem]:
    """The battery: each family in all sizes and dtypes, ROUNDS matrices each; once with and twice without leave to form the matrix.

    Scale, seed, tolerance and counts are drawn, from a source of its own per family, so that a subset of the families gives the same problems.

    Args:
        names: The families to take.
    """
    for name in names:
        yield from dict.fromkeys(_of_family(name))


def quick_problems(name: str) -> list[Problem]:
    """A part of one family's problems: all sizes up to 100, one of each with products alone where there is one."""
    every = [problem for problem in problems((name,)) if problem.size < 400]
    free = {(problem.size, problem.dtype): problem for problem in every if problem.dense_below == 0}
    formed = next(problem for problem in reversed(every) if problem.dense_below)
    return [*free.values(), formed]


def _of_family(name: str) -> Iterator[Problem]:
    family, draw = FAMILIES[name], random.Random(name)
    sizes = [size for size in SIZES if size >= family.least]
    for size, dtype, _ in itertools.product(sizes, DTYPES, range(ROUNDS)):
        scale, seed = draw.choice(family.scales(DTYPES[dtype])), draw.randrange(4)
        for dense_below in (512, 0, 0):
            k_top, k_bottom = draw.choice(_counts(size, dense_below))
            tol = draw.choice(TOLERANCES[dtype])
            yield Problem(name, size, dtype, scale, k_top, k_bottom, tol, seed, dense_below)


def _counts(size: int, dense_below: int) -> list[tuple[int, int]]:
    """What may be asked for: without leave to form the matrix, less than would make the solver form it anyway, if that can be."""
    if dense_below:
        return [*COUNTS, (size, size)]
    return [counts for counts in (*COUNTS, (0, 1), (size - 1, 0)) if 0 < sum(counts) < min(size, 200)] or [
        (1, 0),
        (1, 1),
    ]


@lru_cache(maxsize=4)
def _matrix(name: str, size: int, dtype: str, scale: float, seed: int) -> Tensor:
    family = FAMILIES[name]
    matrix = family.matrix(size, torch.finfo(DTYPES[dtype]).eps, seed)
    if name not in FAULTY:
        matrix = matrix / 2 + matrix.T / 2
    return (matrix * scale).to(DTYPES[dtype])


@lru_cache(maxsize=4)
def _truth(name: str, size: int, dtype: str, scale: float, seed: int) -> Truth:
    return truth_of(_matrix(name, size, dtype, scale, seed), healthy=name not in FAULTY)


def truth_of(matrix: Tensor, *, healthy: bool = True) -> Truth:
    """Decomposes a matrix as it is stored.

    Args:
        matrix: Shape (n, n), in the dtype that the solver works in.
        healthy: Whether every product is one with this matrix.
    """
    largest = float(matrix.abs().max())
    unit = math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0
    half = matrix.double() / unit / 2
    return Truth(half + half.T, torch.linalg.eigvalsh(half + half.T), unit, torch.finfo(matrix.dtype).eps, healthy)
