"""Matrices with a chosen spectrum, and draws of what Lanczos sees of them, for tests of estimates."""

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from plasticity_probe.linalg.distribution import Distribution
from plasticity_probe.linalg.krylov import lanczos
from plasticity_probe.linalg.operator import DenseOperator
from plasticity_probe.linalg.quadrature import quadrature_from_krylov

KNOWN = 3
"""Eigenvalues known at each end."""


def spectra(size: int = 120) -> dict[str, Tensor]:
    """Sorted ascending, by name."""
    index = torch.arange(1.0, size + 1, dtype=torch.float64)
    alternating = torch.where(index % 2 == 0, 1.0, -1.0).double()
    made = {
        "flat": torch.linspace(-1, 1, size, dtype=torch.float64),
        "power law": index**-1.5,
        "outliers": torch.cat([torch.tensor([9.0, 7, 5, 4, 3, -2]).double(), 1e-6 * alternating[: size - 6]]),
        "indefinite": index**-1.0 * alternating,
        "rank deficient": torch.cat([torch.linspace(0.5, 1, 14), torch.zeros(size - 14)]).double(),
        "clustered": torch.cat(
            [torch.full((size // 4,), 1.0), torch.full((size // 4,), 0.3), torch.full((size - 2 * (size // 4),), -0.1)]
        ).double(),
    }
    return {name: values.sort()[0] for name, values in made.items()}


def drawn(
    values: Tensor, generator: torch.Generator, *, draws: int, steps: int, start: Tensor | None = None
) -> Distribution:
    """What some draws of some Lanczos steps show of a spectrum whose ends are known, as `estimate_spectrum` would put it.

    The directions are uniform on the sphere, so the diagonal matrix stands for every one with these eigenvalues.
    """
    size, inner = len(values), values[KNOWN:-KNOWN]
    operator = DenseOperator(torch.diag(inner))
    norm = float(values.abs().max())

    def direction() -> Tensor:
        return torch.randn(len(inner), generator=generator, dtype=torch.float64) if start is None else start

    spaces = [lanczos(operator, direction(), steps, norm=norm) for _ in range(draws)]
    rules = [quadrature_from_krylov(space) for space in spaces]
    width = max(rule.nodes.shape[1] for rule in rules)
    share, each = len(inner) / size, torch.full((KNOWN,), 1 / size, dtype=torch.float64)

    def row(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        filler = nodes[-1:].expand(width - len(nodes))
        return (
            torch.cat([values[:KNOWN], nodes, filler, values[-KNOWN:]]),
            torch.cat([each, share * weights, torch.zeros_like(filler), each]),
        )

    rows = [row(rule.nodes[0], rule.weights[0]) for rule in rules]
    return Distribution(
        torch.stack([nodes for nodes, _ in rows]),
        torch.stack([weights for _, weights in rows]),
        torch.tensor([float(space.offdiagonal[-1] == 0.0) for space in spaces]),
        smallest=KNOWN,
        largest=KNOWN,
        size=size,
        ceiling=size,
        eps=torch.finfo(torch.float64).eps,
    )


def wasserstein(distribution: Distribution, values: Tensor) -> float:
    """The area between the cumulative distributions of the mean row and of the eigenvalues."""
    nodes, weights = distribution.nodes.flatten(), distribution.weights.flatten()
    return float(wasserstein_distance(nodes, values, weights))
