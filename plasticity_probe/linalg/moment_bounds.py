"""What the nodes and weights of a Gauss quadrature settle about the measure that they came from, and what they leave open.

m Lanczos steps know 2m - 1 moments of a measure. Its share below a point x is then bounded by the quadrature that has a node at x: by its
weights left of x from below, and with the weight at x from above, and no bound from these moments is sharper (Chebyshev, Markov & Stieltjes;
Szego 1939, section 3.41; Chen, Trogdon & Ubaru 2021, section 4, take the nodes of the Gauss quadrature as the points x). Here the points are the
nodes of some ten to a hundred quadratures, so the bounds are three times as close as those at the Gauss nodes alone.

An integral of f follows by parts. A polynomial p that the quadrature integrates exactly is taken off first, so what counts is the integral of
the gap between the bounds times |f' - p'|: little where f is smooth.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]  (scipy ships none)

Array = NDArray[np.float64]

POINTS = 600
"""Points at which the bounds are kept, about (our choice: twice as many make the bounds a twentieth closer)."""

DEGREE = 60
"""Largest degree of the polynomial that is taken off (our choice: the least squares problem stays below some milliseconds)."""

BREAKDOWN = 1e-14
"""Coupling below which a recurrence of numbers of size 1 has ended (rounding of float64, with room for a hundred steps)."""


@dataclass(frozen=True, eq=False)
class Bounds:
    """An interval for each of some functions: both ends of shape (functions,)."""

    lower: Array
    upper: Array


@dataclass(frozen=True, eq=False)
class MomentBounds:
    """All measures on an interval that share the moments of a Gauss quadrature.

    Args:
        nodes: The nodes of the Gauss quadrature, ascending, shape (m,).
        weights: Its weights, summing to 1, shape (m,).
        edges: Ends of the cells between which the bounds do not change, ascending, shape (c + 1,).
        lower: Least share of the mass below any point inside each cell, shape (c,).
        upper: Largest such share, shape (c,).
    """

    nodes: Array
    weights: Array
    edges: Array
    lower: Array
    upper: Array

    def share_below(self, point: float) -> tuple[float, float]:
        """The least and the largest share of the mass at or below a point."""
        inside = int(np.searchsorted(self.edges, point, side="right")) - 1
        if inside < 0:
            return 0.0, 0.0
        if inside == len(self.upper):
            return 1.0, 1.0
        before = inside - (point == self.edges[inside])
        return float(self.lower[before]) if before >= 0 else 0.0, float(self.upper[inside])

    @property
    def exact(self) -> bool:
        """Whether nothing is open."""
        return not bool(np.any(self.upper > self.lower))

    def split(self, points: Array) -> "MomentBounds":
        """The same with cells that end at these points too, as far as they are inside."""
        inside = points[(points > self.edges[0]) & (points < self.edges[-1])]
        edges = np.concatenate([self.edges, np.setdiff1d(inside, self.edges)])
        edges.sort()
        cell = np.searchsorted(self.edges, edges[:-1], side="right") - 1
        return MomentBounds(self.nodes, self.weights, edges, self.lower[cell], self.upper[cell])

    def distance(self) -> float:
        """The largest Wasserstein distance that the measure can have from the Gauss quadrature: the area between cumulative distributions."""
        middle = (self.edges[:-1] + self.edges[1:]) / 2
        reached = np.concatenate([[0.0], np.cumsum(self.weights)])
        below = reached[np.searchsorted(self.nodes, middle, side="right")]
        return float(np.maximum(self.upper - below, below - self.lower) @ np.diff(self.edges))

    def integrals(self, values: Array, *, rounds: int = 0) -> Bounds:
        """Bounds of integrals over the measure.

        Args:
            values: The functions at `edges`, shape (c + 1, functions); each is taken to be monotone within a cell.
            rounds: How often the polynomial is fitted anew, with weights that turn the squares of the residuals into their sizes.

        Returns:
            The closer of two intervals, with and without a polynomial.
        """
        steps = np.diff(values, axis=0)
        plain = self._by_parts(steps, values[-1])
        if self.exact:
            return plain
        weights = np.sqrt(self._gap / np.diff(self.edges).clip(min=BREAKDOWN * self._size))[:, None]
        best = _closer(plain, self._without_polynomial(weights, steps, values[-1]))
        for _ in range(rounds):
            each = [self._refitted(steps[:, [j]], values[-1, [j]], weights) for j in range(steps.shape[1])]
            best = _closer(
                best, Bounds(*(np.concatenate([getattr(b, end) for b in each]) for end in ("lower", "upper")))
            )
        return best

    def _refitted(self, steps: Array, last: Array, weights: Array) -> Bounds:
        coefficients = _fitted(weights, self._polynomials, steps)
        residual = np.abs(steps - self._polynomials @ coefficients)
        again = np.sqrt(self._gap[:, None] / (residual + 1e-6 * residual.max() + np.finfo(np.float64).tiny))
        return self._without_polynomial(again, steps, last)

    def _without_polynomial(self, weights: Array, steps: Array, last: Array) -> Bounds:
        coefficients = _fitted(weights, self._polynomials, steps)
        exact, at_end = self._moments @ coefficients, self._at_end @ coefficients
        rest = self._by_parts(steps - self._polynomials @ coefficients, last - at_end)
        return Bounds(exact + rest.lower, exact + rest.upper)

    def _by_parts(self, steps: Array, last: Array) -> Bounds:
        """The integral of f is f at the upper end, less that of the cumulative distribution over the steps of f."""
        middle = last - ((self.lower + self.upper) / 2) @ steps
        half = ((self.upper - self.lower) / 2) @ np.abs(steps)
        return Bounds(middle - half, middle + half)

    @cached_property
    def _gap(self) -> Array:
        return self.upper - self.lower + np.finfo(np.float64).eps

    @cached_property
    def _size(self) -> float:
        return float(self.edges[-1] - self.edges[0])

    @cached_property
    def _polynomials(self) -> Array:
        """The steps of Chebyshev polynomials over the cells, shape (c, degree)."""
        return np.diff(self._chebyshev(self.edges), axis=0)

    @cached_property
    def _moments(self) -> Array:
        return self.weights @ self._chebyshev(self.nodes)

    @cached_property
    def _at_end(self) -> Array:
        return self._chebyshev(self.edges[-1:])[0]

    def _chebyshev(self, points: Array) -> Array:
        degrees = np.arange(1, min(2 * len(self.nodes) - 1, DEGREE) + 1)
        middle, half = (self.edges[0] + self.edges[-1]) / 2, self._size / 2
        angle = np.arccos(np.clip((points - middle) / half, -1.0, 1.0))
        return np.cos(angle[:, None] * degrees)


def moment_bounds(
    nodes: Array, weights: Array, ends: tuple[float, float], *, exact: bool, resolution: float
) -> MomentBounds:
    """Bounds from a Gauss quadrature.

    Args:
        nodes: Ascending, shape (m,).
        weights: Positive, summing to 1, shape (m,).
        ends: Between which the measure lies, at least the outer nodes.
        exact: Whether the nodes are all points where mass is, so that nothing is open.
        resolution: Distance from 0 down to which the bounds are to be fine.
    """
    low, high = min(ends[0], float(nodes[0])), max(ends[1], float(nodes[-1]))
    if exact or high <= low:
        reached = np.concatenate([[0.0], np.cumsum(weights)])
        return _cells(nodes, weights, np.concatenate([[low], nodes, [high]]), reached, reached)
    scale = max(abs(low), abs(high))
    diagonal, coupling = jacobi_matrix(nodes / scale, weights)
    corners = _corners(diagonal, coupling, (low / scale, high / scale), resolution / scale)
    rules = [canonical_rule(diagonal, coupling, corner) for corner in corners]
    points, before, after = _merged([*rules, (nodes / scale, weights)])
    inside = (points > low / scale) & (points < high / scale)
    edges = np.concatenate([[low], scale * points[inside], [high]])
    lower, upper = np.concatenate([[0.0], before[inside]]), np.concatenate([after[inside], [1.0]])
    return _cells(nodes, weights, edges, lower, upper)


def _cells(nodes: Array, weights: Array, edges: Array, lower: Array, upper: Array) -> MomentBounds:
    """Without cells of no length."""
    held = np.diff(edges) > 0
    return MomentBounds(nodes, weights, np.append(edges[:-1][held], edges[-1]), lower[held], upper[held])


def rule_with_zero(nodes: Array, weights: Array, ends: tuple[float, float], resolution: float) -> tuple[Array, Array]:
    """The quadrature with the same moments, but the last, that has a node at 0 (Gauss & Radau; Golub 1973).

    Mass that no node resolves from 0 is at 0 then, not at a chance place beside it, where it would be counted as rank.

    Args:
        nodes: Of the Gauss quadrature, ascending, shape (m,).
        weights: Positive, summing to 1, shape (m,).
        ends: Between which the measure lies; a node beyond them is put onto them.
        resolution: Where a Gauss node is as close to 0 as this, the Gauss quadrature itself is returned.

    Returns:
        Nodes, ascending, and weights.
    """
    scale = float(np.abs(nodes).max())
    if len(nodes) < 2 or np.abs(nodes).min() <= resolution or scale == 0.0:
        return nodes, weights
    diagonal, coupling = jacobi_matrix(nodes / scale, weights)
    corner = _corner(diagonal, coupling, np.zeros(1))
    if not np.isfinite(corner).all():
        return nodes, weights
    points, shares = canonical_rule(diagonal, coupling, float(corner[0]))
    points[np.abs(points).argmin()] = 0.0
    return np.clip(scale * points, *ends), shares


def jacobi_matrix(nodes: Array, weights: Array) -> tuple[Array, Array]:
    """The tridiagonal matrix of a quadrature, by Lanczos on the nodes (Golub & Meurant 2010, section 5.2), without its last diagonal entry.

    Args:
        nodes: Of size about 1, shape (m,).
        weights: Shape (m,).

    Returns:
        The diagonal, shape (k - 1,), and the couplings, shape (k - 1,), where k <= m is fewer where nodes coincide or weigh nothing.
    """
    basis = [np.sqrt(weights / weights.sum())]
    diagonal: list[float] = []
    coupling: list[float] = []
    for _ in range(len(nodes) - 1):
        image = nodes * basis[-1]
        diagonal.append(float(basis[-1] @ image))
        known = np.array(basis)
        for _ in range(2):
            image = image - known.T @ (known @ image)
        length = float(np.sqrt(image @ image))
        if length <= BREAKDOWN:
            diagonal.pop()
            break
        coupling.append(length)
        basis.append(image / length)
    return np.array(diagonal), np.array(coupling)


def canonical_rule(diagonal: Array, coupling: Array, corner: float) -> tuple[Array, Array]:
    """The quadrature whose tridiagonal matrix ends with `corner`: nodes, ascending, and weights, shape (k,)."""
    nodes, vectors = cast("tuple[Array, Array]", cast(Any, eigh_tridiagonal)(np.append(diagonal, corner), coupling))
    return nodes, np.square(vectors[0])


def _eigenvalues(diagonal: Array, coupling: Array) -> Array:
    return canonical_rule(diagonal[:-1], coupling, float(diagonal[-1]))[0] if len(diagonal) else diagonal


def _corner(diagonal: Array, coupling: Array, points: Array) -> Array:
    """The last diagonal entry that gives the quadrature a node at each point; infinite or NaN at a node of the shorter one."""
    if len(diagonal) == 0:
        return points
    nodes, vectors = cast("tuple[Array, Array]", cast(Any, eigh_tridiagonal)(diagonal, coupling[:-1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        return points - (np.square(coupling[-1] * vectors[-1]) / (points[:, None] - nodes)).sum(1)


def _corners(diagonal: Array, coupling: Array, ends: tuple[float, float], resolution: float) -> Array:
    """Corners whose quadratures lie close around 0 and fill the gaps between the Gauss nodes."""
    low, high = ends
    near = np.geomspace(resolution, max(abs(low), abs(high)), 16)
    around = np.concatenate([-near[::-1], [0.0], near])
    inner = _eigenvalues(diagonal, coupling[:-1])
    nodes = np.concatenate([[low], inner[(inner > low) & (inner < high)], [high]])
    filling = np.concatenate([nodes[:-1] + share * np.diff(nodes) for share in (0.1, 0.3, 0.5, 0.7, 0.9)])
    count = max(8, POINTS // (len(diagonal) + 1) - len(around) // 2)
    filled = _corner(diagonal, coupling, filling)
    filled = filled[np.isfinite(filled)]
    chosen = np.quantile(filled, np.linspace(0.02, 0.98, count)) if len(filled) else filled
    close = _corner(diagonal, coupling, around[(around > low) & (around < high)])
    corners = np.unique(np.concatenate([close, chosen]))
    return corners[np.isfinite(corners)]


def _merged(rules: list[tuple[Array, Array]]) -> tuple[Array, Array, Array]:
    """All nodes in order, with the mass left of each and the mass up to each, made monotone."""
    points = np.concatenate([nodes for nodes, _ in rules])
    after = np.concatenate([np.cumsum(weights) for _, weights in rules])
    before = after - np.concatenate([weights for _, weights in rules])
    order = np.argsort(points)
    before = np.maximum.accumulate(before[order])
    after = np.minimum.accumulate(after[order][::-1])[::-1]
    return points[order], np.clip(before, 0.0, 1.0), np.clip(after, before, 1.0)


def _fitted(weights: Array, polynomials: Array, steps: Array) -> Array:
    return cast(Array, np.linalg.lstsq(weights * polynomials, weights * steps, rcond=1e-12)[0])


def _closer(some: Bounds, others: Bounds) -> Bounds:
    return Bounds(np.maximum(some.lower, others.lower), np.minimum(some.upper, others.upper))
