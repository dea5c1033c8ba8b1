"""Spectra that eigensolvers fail on, and symmetric matrices that have them.

Every function here is a `Maker`: it gives a spectrum or a matrix of norm about 1, in float64, for any size. LAPACK's 21 types, made anew
from the description in TESTING/EIG/dchkst.f (Anderson et al. 1999), need `evenly`, `geometric`, `clustered`, `random_symmetric` and
`graded_tridiagonal`.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Maker = Callable[[int, float, int], Tensor]
"""(size, eps of the dtype, seed) -> a spectrum of shape (size,) or a matrix of shape (size, size), float64."""


def source(seed: int) -> torch.Generator:
    """Randomness of the matrix, apart from the solver's."""
    return torch.Generator().manual_seed(2**32 + seed)


def uniform(size: int, seed: int, columns: int | None = None) -> Tensor:
    """Numbers between -1 and 1."""
    shape = (size,) if columns is None else (size, columns)
    return 2 * torch.rand(shape, generator=source(seed), dtype=torch.float64) - 1


@lru_cache(maxsize=32)
def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(size, size, generator=source(seed), dtype=torch.float64))[0]


def rotated(spectrum: Maker) -> Maker:
    """Matrices with this spectrum and random eigenvectors."""

    def matrix(size: int, eps: float, seed: int) -> Tensor:
        vectors = orthogonal(size, seed)
        return (vectors * spectrum(size, eps, seed)) @ vectors.T

    return matrix


def diagonal(spectrum: Maker) -> Maker:
    """Diagonal matrices, entries in random order."""

    def matrix(size: int, eps: float, seed: int) -> Tensor:
        return torch.diag(spectrum(size, eps, seed)[torch.randperm(size, generator=source(seed))])

    return matrix


def signed(spectrum: Maker) -> Maker:
    """The spectrum with random signs."""
    return lambda size, eps, seed: spectrum(size, eps, seed) * uniform(size, seed).sign()


def evenly(size: int, eps: float, seed: int) -> Tensor:
    """From 1 to eps in equal steps."""
    return torch.linspace(1, eps, size, dtype=torch.float64)


def geometric(size: int, eps: float, seed: int) -> Tensor:
    """From 1 to eps by equal factors."""
    return torch.logspace(0, math.log10(eps), size, dtype=torch.float64)


def clustered(size: int, eps: float, seed: int) -> Tensor:
    """1 once, and eps for the rest."""
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.full((size - 1,), eps, dtype=torch.float64)])


def random_symmetric(size: int, eps: float, seed: int) -> Tensor:
    """Independent entries between -1 and 1."""
    return uniform(size, seed, size).tril() + uniform(size, seed, size).tril(-1).T


def graded_tridiagonal(size: int, eps: float, seed: int) -> Tensor:
    """A diagonal from 1 to eps by equal factors; its neighbours are at most half the geometric mean of the entries beside them."""
    entries = geometric(size, eps, seed)
    neighbours = uniform(size - 1, seed) * (entries[1:] * entries[:-1]).sqrt() / 2
    return torch.diag(entries) + torch.diag(neighbours, 1) + torch.diag(neighbours, -1)


def spread(low: float, high: float) -> Maker:
    """Equal steps between two numbers."""
    return lambda size, eps, seed: torch.linspace(low, high, size, dtype=torch.float64)


def levels(*heads: float, rest: float | Maker = 0.0) -> Maker:
    """These values, as many as fit, and a constant or another spectrum for the others."""

    def spectrum(size: int, eps: float, seed: int) -> Tensor:
        head = torch.tensor(heads[:size], dtype=torch.float64)
        left = size - head.numel()
        return torch.cat([head, rest(left, eps, seed) if callable(rest) else torch.full((left,), rest).double()])

    return spectrum


def rank(count: Callable[[int], int], low: float = 0.3) -> Maker:
    """`count(size)` values from 1 down to `low`, and zeros."""

    def spectrum(size: int, eps: float, seed: int) -> Tensor:
        values = torch.zeros(size, dtype=torch.float64)
        nonzero = min(size, count(size))
        values[:nonzero] = torch.linspace(1, low, nonzero, dtype=torch.float64)
        return values

    return spectrum


def graded_both_signs(size: int, eps: float, seed: int) -> Tensor:
    """Twelve orders of magnitude on either side of zero."""
    values = torch.logspace(0, -12, size, dtype=torch.float64)
    values[1::2] *= -1
    return values


def network(size: int, eps: float, seed: int) -> Tensor:
    """As the Hessian of a trained classifier: ten outliers, a bulk that falls off as a power law, a small negative tail."""
    outliers = 0.8 ** torch.arange(10, dtype=torch.float64)
    bulk = 0.05 / torch.arange(1, size + 1, dtype=torch.float64)
    bulk[1::3] *= -0.3
    return torch.cat([outliers, bulk])[:size]


def over_rounding(size: int, eps: float, seed: int) -> Tensor:
    """Three values and a bulk of the size of rounding, of both signs."""
    return levels(1.0, 0.6, 0.2, rest=lambda left, *_: 20 * eps * uniform(left, seed))(size, eps, seed)


def triples(size: int, eps: float, seed: int) -> Tensor:
    """Every value at either end three times, so that most cuts fall inside of a multiplicity."""
    side = min(12, size // 2)
    ends = 1 - 0.05 * torch.arange(side, dtype=torch.float64).div(3, rounding_mode="floor")
    return torch.cat([ends, -ends, 0.5 * spread(-1, 1)(size - 2 * side, eps, seed)])


def cluster(*centres: float, members: int, spacing: float, rest: Maker) -> Maker:
    """Groups of values with a relative spacing inside of each."""
    values = [centre * (1 - spacing * member) for centre in centres for member in range(members)]
    return levels(*values, rest=rest)


def hilbert(size: int, eps: float, seed: int) -> Tensor:
    """1 / (i + j + 1): eigenvalues that fall off exponentially (Hilbert 1894)."""
    index = torch.arange(size, dtype=torch.float64)
    return 1 / (index[:, None] + index + 1)


def wilkinson(size: int, eps: float, seed: int) -> Tensor:
    """|i - (n - 1) / 2| beside ones: the largest come in pairs that agree to many digits (Wilkinson 1965, chapter 5)."""
    ones = torch.ones(size - 1, dtype=torch.float64)
    entries = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2).abs()
    return torch.diag(entries) + torch.diag(ones, 1) + torch.diag(ones, -1)


def cycle(size: int, eps: float, seed: int) -> Tensor:
    """The Laplacian of a cycle: every eigenvalue twice, up to the two ends."""
    identity = torch.eye(size, dtype=torch.float64)
    return 2 * identity - identity.roll(1, 0) - identity.roll(-1, 0)


def grid(size: int, eps: float, seed: int) -> Tensor:
    """The Laplacian of a square grid: most eigenvalues twice."""
    side = math.isqrt(size)
    identity, path = torch.eye(side, dtype=torch.float64), cycle(side, eps, seed)
    path[0, -1] = path[-1, 0] = 0.0
    square = torch.kron(identity, path) + torch.kron(path, identity)
    padded = torch.zeros(size, size, dtype=torch.float64)
    padded[: side * side, : side * side] = square
    return padded


def all_ones(size: int, eps: float, seed: int) -> Tensor:
    """Rank one with products that do not round."""
    return torch.ones(size, size, dtype=torch.float64)


def exchange(size: int, eps: float, seed: int) -> Tensor:
    """Ones from corner to corner: +1 and -1, half each."""
    return torch.eye(size, dtype=torch.float64).flip(0)


def dead_rows(size: int, eps: float, seed: int) -> Tensor:
    """Half of the rows and columns are exactly zero, as with dead units."""
    living = (size + 1) // 2
    padded = torch.zeros(size, size, dtype=torch.float64)
    padded[:living, :living] = rotated(network)(living, eps, seed)
    return padded


def two_blocks(size: int, eps: float, seed: int) -> Tensor:
    """Two blocks without a link, the second a million times smaller."""
    first = (size + 1) // 2
    blocks = rotated(spread(0.1, 1))(first, eps, seed), 1e-6 * rotated(spread(-1, 1))(size - first, eps, seed)
    return torch.block_diag(*blocks)


def first_draws(size: int, seed: int, count: int) -> Tensor:
    """An orthonormal basis of the first Gaussian vectors that a solver's generator with this seed gives."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)]
    return torch.linalg.qr(torch.stack(draws, 1))[0]


def without(vectors: Tensor, directions: Tensor) -> Tensor:
    """The part of the columns that is orthogonal to an orthonormal basis."""
    return vectors - directions @ (directions.T @ vectors)


def start_in_the_null_space(size: int, eps: float, seed: int) -> Tensor:
    """The first vector that a solver draws is mapped to zero (up to rounding)."""
    draw = first_draws(size, seed, 1)
    matrix = rotated(levels(1.0, 0.9, 0.5, -0.7, rest=spread(-0.2, 0.2)))(size, eps, seed)
    return without(without(matrix, draw).T, draw)


def invisible(*hidden: float, rest: Maker) -> Maker:
    """The eigenvectors of the hidden values are orthogonal to the vector that a solver starts from, so only an independent look can see them."""

    def matrix(size: int, eps: float, seed: int) -> Tensor:
        random = orthogonal(size, seed)
        away = without(random[:, : len(hidden)], first_draws(size, seed, 1))
        basis = torch.linalg.qr(torch.cat([away, random[:, len(hidden) :]], 1))[0]
        return (basis * levels(*hidden, rest=rest)(size, eps, seed)) @ basis.T

    return matrix


def skewed(share: float) -> Maker:
    """A random matrix: its symmetric part, and its antisymmetric part of this share of the norm."""

    def matrix(size: int, eps: float, seed: int) -> Tensor:
        raw = uniform(size, seed, size)
        part, skew = raw + raw.T, raw - raw.T
        return part / part.norm() + share * skew / skew.norm()

    return matrix


def jordan(size: int, eps: float, seed: int) -> Tensor:
    """One eigenvalue, 1/2, and one eigenvector: no symmetric matrix is further from what it claims to be."""
    return torch.diag(torch.full((size,), 0.5).double()) + torch.diag(torch.ones(size - 1).double(), 1)


def one_sided_link(size: int, eps: float, seed: int) -> Tensor:
    """A symmetric matrix but for one entry of 5 % of its norm."""
    matrix = torch.diag(spread(0, 1)(size, eps, seed))
    matrix[0, -1] = 0.05
    return matrix
