"""Ranks of a spectrum that is known as nodes and weights, and how far nodes and weights settle them.

For the measure that m Lanczos steps see, its share below a node is bounded from both sides by the weights on either side of that node (the
Chebyshev-Markov-Stieltjes inequalities; Szego 1939, section 3.41). So the mass that the quadrature puts at node i may lie anywhere between the
nodes i - 1 and i + 1, and nowhere else. A rank is largest where the mass is as level, and smallest where it is as unequal, as that allows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.krylov import ROUNDING
from plasticity_probe.linalg.quadrature import Quadrature

Array = NDArray[np.float64]
Rank = Callable[[Tensor, Tensor], float]
"""A rank of absolute values with multiplicities."""


class Interval(NamedTuple):
    """Both ends of an interval."""

    lower: float
    upper: float


class Estimate(NamedTuple):
    """A number and its interval."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class Distribution:
    """The eigenvalues of a matrix as nodes and weights, one row a draw, of which some at either end are known one by one.

    Args:
        nodes: Ascending in each row, shape (draws, nodes). A single row of `size` nodes is the whole spectrum.
        weights: Share of the eigenvalues at each node, of the same shape.
        exact: Per draw True (or 1) where its nodes are eigenvalues themselves.
        smallest: How many nodes at the lower end are known eigenvalues.
        largest: How many at the upper end are.
        size: The number of eigenvalues.
        ceiling: The largest rank that the matrix can have; what exceeds it is cut.
        eps: Relative rounding of the products they were made from; values below it, relative to the largest, count as 0.
        positive: Whether no eigenvalue is negative.
    """

    nodes: Tensor
    weights: Tensor
    exact: Tensor
    smallest: int
    largest: int
    size: int
    ceiling: int
    eps: float
    positive: bool = False

    def rank(self, definition: str, delta: float, epsilon: float | None = None) -> Estimate:
        """A rank of the absolute values, with the interval of draws and steps together.

        Args:
            definition: A key of `plasticity_probe.linalg.ranks.DEFINITIONS`. The numerical rank counts what exceeds 64 roundings of the largest.
            delta: Share of the sum that a threshold or energy rank leaves out.
            epsilon: Cut-off of the epsilon rank.

        Returns:
            The mean over draws; the hull of its 95 % Student-t interval and of each draw's `rank_bounds`, cut to what is possible. All NaN where
            nodes are.
        """
        if not self.nodes.isfinite().all():
            return Estimate(math.nan, math.nan, math.nan)
        largest = float(self.nodes.abs().max())
        if definition == "numerical_rank":
            definition, epsilon = "epsilon_rank", ROUNDING * self.eps * largest

        def rank(values: Tensor, multiplicities: Tensor) -> float:
            return ranks.rank(values, definition, delta=delta, epsilon=epsilon, weights=multiplicities)

        nodes = torch.where(self.nodes.abs() > self.eps * largest, self.nodes, 0.0)
        mean, (lower, upper) = ranks.rank_of_quadrature(
            Quadrature(nodes, self.weights), self.size, definition, delta, epsilon=epsilon
        )
        if self._whole:
            return Estimate(mean, mean, mean)
        steps = [self._bounds(row, counts, known, definition, rank) for row, counts, known in self._rows(nodes)]
        lower, upper = (
            min([lower, *(bounds.lower for bounds in steps)]),
            max([upper, *(bounds.upper for bounds in steps)]),
        )
        return Estimate(*(min(max(0.0, end), float(self.ceiling)) for end in (mean, lower, upper)))

    def negative_share(self) -> float:
        """Sum of the negative eigenvalues' absolute values over that of all; NaN where all are 0."""
        total = float((self.weights * self.nodes.abs()).sum())
        return float((self.weights * -self.nodes.clamp(max=0)).sum()) / total if total else math.nan

    def known_eigenvalues(self) -> Tensor:
        """The eigenvalues that are known one by one, descending."""
        row = self.nodes[0].flip(0)
        return row if self._whole else torch.cat([row[: self.largest], row[len(row) - self.smallest :]])

    @property
    def _whole(self) -> bool:
        return self.nodes.shape == (1, self.size) or bool((self.nodes == 0).all())

    def _bounds(self, nodes: Tensor, counts: Tensor, known: Tensor, definition: str, rank: Rank) -> Interval:
        if definition != "epsilon_rank":
            return rank_bounds(nodes, counts, known, rank, positive=self.positive)
        least, largest = reach(nodes, known, positive=self.positive)
        return Interval(rank(least, counts), rank(largest, counts))

    def _rows(self, nodes: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        places = torch.arange(nodes.shape[1])
        ends = (places < self.smallest) | (places >= nodes.shape[1] - self.largest)
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        for row, weights, exact in zip(nodes, self.weights, self.exact.bool(), strict=True):
            order = row.argsort()
            order = order[weights[order] > 0]
            rows.append((row[order], self.size * weights[order], (ends | exact)[order]))
        return rows


def rank_bounds(
    nodes: Tensor, multiplicities: Tensor, known: Tensor, rank: Rank, *, positive: bool = False
) -> Interval:
    """The least and the largest rank among the spectra that the nodes stand for.

    For ranks that ignore scale and grow when values become more equal (Schur-concave ones: threshold, energy, effective and stable rank,
    participation ratio). The upper end is that of the most level spectrum. The lower end is that of a spectrum whose k largest values hold, for
    each k, at least the share that they can hold in any spectrum (it majorises them all), so it may be lower than what can be.

    Args:
        nodes: Ascending, shape (m,). Nothing lies beyond the first and the last.
        multiplicities: How many eigenvalues each node stands for, shape (m,).
        known: True for nodes that are eigenvalues themselves, shape (m,).
        rank: The rank, of absolute values and multiplicities.
        positive: Whether no eigenvalue is negative; then the mass of the first node may lie anywhere down to 0.

    Returns:
        The interval. It covers the error of few steps, not the choice of start vectors.
    """
    nearest, farthest = reach(nodes, known, positive=positive)
    if bool((nearest == farthest).all()):
        exact = rank(nodes.abs(), multiplicities)
        return Interval(exact, exact)
    level = [rank(nearest.maximum(farthest.clamp(max=t)), multiplicities) for t in _levels(nearest, farthest)]
    return Interval(rank(*_majorant(nearest, farthest, multiplicities)), max(level))


def reach(nodes: Tensor, known: Tensor, *, positive: bool = False) -> tuple[Tensor, Tensor]:
    """The least and the largest absolute value that the mass of each node may have.

    Args:
        nodes: Ascending, shape (m,).
        known: True for nodes that are eigenvalues themselves, shape (m,).
        positive: Whether no eigenvalue is negative.

    Returns:
        Both, shape (m,).
    """
    first = nodes[:1].clamp(max=0.0) if positive else nodes[:1]
    left = torch.where(known, nodes, torch.cat([first, nodes[:-1]]))
    right = torch.where(known, nodes, torch.cat([nodes[1:], nodes[-1:]]))
    farthest = left.abs().maximum(right.abs())
    nearest = torch.where((left < 0) & (right > 0), 0.0, left.abs().minimum(right.abs()))
    return nearest, farthest


def _levels(nearest: Tensor, farthest: Tensor) -> list[float]:
    """Values to which a spectrum may be levelled: all ends, and a hundred evenly spaced in size between them."""
    ends = torch.cat([nearest, farthest])
    ends = ends[ends > 0]
    between = torch.logspace(float(ends.min().log10()), float(ends.max().log10()), 100, dtype=torch.float64)
    return [float(t) for t in torch.cat([ends, between])]


def _majorant(nearest: Tensor, farthest: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """A spectrum that majorises all: values (as shares of the sum) and multiplicities.

    The k largest values sum to at most U(k), taking every mass at its farthest, and the others to at least L(k), taking every mass at its
    nearest. So the k largest hold at most U / (U + L), and the least concave function above that is the share curve of the spectrum sought.
    """
    masses, total = counts.numpy(), float(counts.sum())
    high, low = farthest.argsort(descending=True).numpy(), nearest.argsort().numpy()
    upper_at, lower_at = (np.concatenate([[0.0], np.cumsum(masses[order])]) for order in (high, low))
    upper = np.concatenate([[0.0], np.cumsum((farthest.numpy() * masses)[high])])
    lower = np.concatenate([[0.0], np.cumsum((nearest.numpy() * masses)[low])])
    knots = np.unique(np.clip(np.concatenate([[1.0], upper_at, total - lower_at]), min(1.0, total), total))
    shares_between = np.linspace(0.0, 1.0, 16, endpoint=False)
    at = np.append((knots[:-1, None] + np.diff(knots)[:, None] * shares_between).ravel(), total)
    leading, rest = np.interp(at, upper_at, upper), np.interp(total - at, lower_at, lower)
    places, shares = _concave_hull(np.concatenate([[0.0], at]), np.concatenate([[0.0], leading / (leading + rest)]))
    widths = np.diff(places)
    return torch.tensor(np.diff(shares) / widths), torch.tensor(widths)


def _concave_hull(places: Array, heights: Array) -> tuple[Array, Array]:
    """The corners of the least concave function above the points (Andrew's monotone chain)."""
    kept: list[tuple[float, float]] = []
    for x, y in zip(places.tolist(), heights.tolist(), strict=True):
        while len(kept) > 1 and (kept[-1][1] - kept[-2][1]) * (x - kept[-1][0]) <= (y - kept[-1][1]) * (
            kept[-1][0] - kept[-2][0]
        ):
            kept.pop()
        kept.append((x, y))
    corners = np.array(kept)
    return corners[:, 0], corners[:, 1]
