"""The eigenvalues of a matrix as nodes and weights, and what can be said of them: ranks, traces of functions, the density, each with its error.

Two errors are kept apart. Few Lanczos steps: nodes and weights stand for all measures with the same moments, and `moment_bounds` says what those
have in common. Few draws: the weights are not those of the eigenvalues, and `sampling_error` says how far off they are. An interval is the
widest that the steps leave open, each end moved outwards by what the draws leave open there.

Every rank comes down to integrals. A threshold rank is a largest one, by linear duality of "the k largest hold the share 1 - delta":

    rank = max over t > 0 of  sum_i min((1 - delta) |v_i| / t, 1 - delta |v_i| / t)

so bounds of the integrals of these tents are bounds of the rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.krylov import ROUNDING
from plasticity_probe.linalg.moment_bounds import Array, MomentBounds, moment_bounds, rule_with_zero
from plasticity_probe.linalg.sampling_error import sampling_offsets, skewed_offsets

SPAN = 8.0
"""The squared sum over the sum of squares is sought between its estimate over this and its estimate times this (our choice)."""

LEVELS = 64
"""Values of t tried for a threshold rank, evenly spaced in size (our choice: the bounds between them are of one piece, so none is missed)."""

ROUNDS = 3
"""How often the polynomial of a bound is fitted anew (our choice: more changes the third digit)."""

DETERMINED = 2.0
"""Ratio of the ends of an interval up to which a rank counts as determined (our choice)."""


class Estimate(NamedTuple):
    """A number and its 95 % interval.

    Attributes:
        value: The estimate.
        lower: Lower end.
        upper: Upper end.
        steps: The interval that few Lanczos steps alone leave open, were the draws without error.
    """

    value: float
    lower: float
    upper: float
    steps: tuple[float, float]

    @classmethod
    def exact(cls, value: float) -> "Estimate":
        """A number without error."""
        return cls(value, value, value, (value, value))


@dataclass(frozen=True, eq=False)
class Distribution:
    """The eigenvalues of a matrix as Gauss nodes and weights, one row a draw, of which some at either end are known one by one.

    Args:
        nodes: Ascending in each row, shape (draws, nodes). A single row of `size` nodes is the whole spectrum.
        weights: Share of the eigenvalues at each node, of the same shape.
        exact: Per draw True (or 1) where its nodes are eigenvalues themselves.
        smallest: How many nodes at the lower end are known eigenvalues, between which and the `largest` the others lie; without any, between the
            outer nodes and 0 if `positive`.
        largest: How many at the upper end are.
        size: The number of eigenvalues.
        ceiling: The largest rank that the matrix can have; what exceeds it is cut.
        eps: Relative rounding of the products they were made from; values below it, relative to the largest, count as 0.
        positive: Whether no eigenvalue is negative.
        zeros: How many eigenvalues are known to be exactly 0; if any, they are a node of their own behind the `smallest` ones.
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
    zeros: int = 0

    def rank(self, definition: str, delta: float = 0.01, epsilon: float | None = None) -> Estimate:
        """A rank of the absolute values.

        The value is that of the quadrature with a node at 0 (`moment_bounds.rule_with_zero`): on Hessians of small trained networks the
        threshold rank of Gauss nodes came out up to eleven times too large and on average 1.4 times, this one between half and 1.05 times, on
        average 0.85.

        Args:
            definition: A key of `plasticity_probe.linalg.ranks.DEFINITIONS`. The numerical rank counts what exceeds 64 roundings of the largest.
            delta: Share of the sum that a threshold or energy rank leaves out.
            epsilon: Cut-off of the epsilon rank.

        Returns:
            The rank and its interval, cut to what is possible. All NaN where nodes are.

        Raises:
            UnknownNameError: There is no such definition.
            UsageError: A setting is out of range.
        """
        values, counts = self._whole_rule
        # Asked first, so that a wrong setting is refused also where there is nothing to rank.
        if math.isnan(self._floor):
            ranks.rank(torch.zeros(1), definition, delta=delta, epsilon=epsilon)
            return Estimate.exact(math.nan)
        if definition == "numerical_rank":
            definition, epsilon = "epsilon_rank", ROUNDING * self._floor
        counted = torch.where(values.abs() > self._floor, values, 0.0)
        value = ranks.rank(counted, definition, delta=delta, epsilon=epsilon, weights=None if self.whole else counts)
        if self.whole:
            return Estimate.exact(value)
        if definition in ("threshold_rank", "energy_rank"):
            found = self._threshold(value, delta, 1 if definition == "threshold_rank" else 2)
        elif definition == "epsilon_rank":
            found = self._count(value, epsilon or 0.0)
        else:
            found = {"effective_rank": self._effective, "stable_rank": self._stable}.get(
                definition, self._participation
            )(value)
        return self._cut(found)

    def matrix_function_trace(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimates ``tr f(A)`` (Ubaru, Chen & Saad 2017): what is known exactly, and n times the mean of the weighted sums of the rest.

        Args:
            function: f, elementwise on a float64 tensor; monotone between neighbouring ones of some hundred points, close to each other around
                0.
        """

        def values(points: Array) -> Array:
            return function(torch.tensor(points)).double().numpy()[:, None]

        zeros = self.zeros * float(function(torch.zeros(1, dtype=torch.float64))) if self.zeros else 0.0
        known = zeros + (float(function(self._known).sum()) if self._known.numel() else 0.0)
        if self.whole or math.isnan(self._floor):
            return Estimate.exact(float((self.size * self.weights[0] * function(self.nodes[0])).sum()))
        rest = self._rest
        gauss = rest.size * float(np.mean([row.weights @ values(row.nodes)[:, 0] for row in rest.rows]))
        low, high, under, over = (float(part[0]) for part in rest.sums(values, ROUNDS))
        value = known + min(max(gauss, low), high)
        return Estimate(value, known + low + under, known + high + over, (known + low, known + high))

    def trace(self) -> Estimate:
        """The sum of all eigenvalues. The steps leave nothing open: the first moment of each draw is exact."""
        return self.matrix_function_trace(lambda values: values)

    def absolute_sum(self) -> float:
        """The sum of the absolute values."""
        values, counts = self._whole_rule
        return float((counts * values.abs()).sum())

    def density_error(self) -> float:
        """A 95 % bound of the Wasserstein distance (in units of the eigenvalues) between the mean of the rows and the eigenvalues.

        Of the steps: the mean over draws of the area that the moment bounds leave, which no measure with these moments exceeds (after Chen,
        Trogdon & Ubaru 2021, section 4). Of the draws: the area between the distributions reaches its 95 % quantile where the shares below all
        points err together, so the longer sides of the intervals of these shares are integrated.
        """
        if self.whole:
            return 0.0
        return self.step_error() + self.draw_error() + self._floor

    def step_error(self) -> float:
        """The part of `density_error` that more steps reduce."""
        return (
            self._rest.share * float(np.mean([row.distance() for row in self._rest.rows]))
            if not self._nan
            else math.nan
        )

    def draw_error(self) -> float:
        """The part of `density_error` that more draws reduce, by the square root of their number."""
        if self._nan:
            return math.nan
        rest = self._rest
        return rest.share * float(np.mean([_deviation(row, rest.size, len(rest.rows)) for row in rest.rows]))

    def negative_share(self) -> float:
        """Sum of the negative eigenvalues' absolute values over that of all; NaN where all are 0."""
        total = float((self.weights * self.nodes.abs()).sum())
        return float((self.weights * -self.nodes.clamp(max=0)).sum()) / total if total else math.nan

    def known_eigenvalues(self) -> Tensor:
        """The eigenvalues that are known one by one, descending: all of them, or the largest and the smallest."""
        if not self.whole:
            return self._known.flip(0)
        others = self.nodes[0] if self.nodes.shape[1] != 1 else self.nodes[0].expand(self.size)
        return torch.cat([others, others.new_zeros(max(0, self.zeros - 1))]).sort(descending=True)[0]

    @property
    def whole(self) -> bool:
        """Whether every eigenvalue is known."""
        draws, nodes = self.nodes.shape
        listed = draws == 1 and nodes - (self.zeros > 0) + self.zeros == self.size
        return (listed and bool(self.exact.all())) or bool((self.nodes == 0).all())

    @property
    def _nan(self) -> bool:
        return not bool(self.nodes.isfinite().all())

    @cached_property
    def _floor(self) -> float:
        return math.nan if self._nan else self.eps * float(self.nodes.abs().max())

    @cached_property
    def _known(self) -> Tensor:
        row = self.nodes[0]
        return torch.cat([row[: self.smallest], row[len(row) - self.largest :]])

    @cached_property
    def _rest(self) -> "_Rest":
        ends = slice(self.smallest + (self.zeros > 0), self.nodes.shape[1] - self.largest)
        inner = self.nodes[:, ends].clamp(min=0.0) if self.positive else self.nodes[:, ends]
        low = float(self._known[self.smallest - 1]) if self.smallest else 0.0 if self.positive else float(inner.min())
        high = float(self._known[self.smallest]) if self.largest else float(inner.max())
        interval = min(low, float(inner.min())), max(high, float(inner.max()))
        resolution = max(self._floor, np.finfo(np.float64).tiny)
        rows: list[MomentBounds] = []
        rules: list[tuple[Array, Array]] = []
        for nodes, weights, flag in zip(inner, self.weights[:, ends], self.exact, strict=True):
            held, exact = weights > 0, bool(flag)
            points, shares = nodes[held].numpy(), weights[held].numpy() / float(weights.sum())
            rows.append(moment_bounds(points, shares, interval, exact=exact, resolution=resolution))
            rules.append((points, shares) if exact else rule_with_zero(points, shares, interval, resolution))
        size = self.size - self.smallest - self.largest - self.zeros
        return _Rest(
            rows,
            np.concatenate([points for points, _ in rules]),
            np.concatenate([shares for _, shares in rules]) * (size / len(rules)),
            size,
            size / self.size,
            interval,
            resolution,
        )

    @cached_property
    def _whole_rule(self) -> tuple[Tensor, Tensor]:
        """Values and multiplicities of all eigenvalues, with a node at 0."""
        if self.whole or self._nan:
            return self.nodes[0], self.size * self.weights[0]
        values = torch.cat([self._known, torch.tensor(self._rest.nodes)])
        return values, torch.cat([torch.ones_like(self._known), torch.tensor(self._rest.counts)])

    def _threshold(self, value: float, delta: float, power: int) -> Estimate:
        known = np.abs(self._known.numpy())
        top = max(float(known.max(initial=0.0)), *(abs(end) for end in self._rest.ends))
        levels = np.geomspace(self._rest.resolution, top, LEVELS)
        starts, stops = levels[:-1] ** power, levels[1:] ** power
        # Between two levels a tent is nowhere above the one that takes from each the side on which it is higher.
        peaks = (starts * stops / ((1 - delta) * stops + delta * starts)) ** (1 / power)

        def tents(points: Array) -> Array:
            sizes = np.abs(points)[:, None] ** power
            return np.minimum((1 - delta) * sizes / levels**power, 1 - delta * sizes / levels**power)

        def wide_tents(points: Array) -> Array:
            sizes = np.abs(points)[:, None] ** power
            return np.minimum((1 - delta) * sizes / starts, 1 - delta * sizes / stops)

        rest = self._rest.with_edges(np.concatenate([levels, peaks]))
        least, _, under, _ = rest.sums(tents, 0)
        _, most, _, over = rest.sums(wide_tents, 0)
        least, most = least + tents(known).sum(0), most + wide_tents(known).sum(0)
        best = int(least.argmax())
        steps = math.ceil(float(least[best]) - 1e-6), math.ceil(float(most.max()) - 1e-6)
        lower = math.ceil(float(least[best] + under[best]) - 1e-6)
        return Estimate(value, float(max(lower, 1)), float(math.ceil(float((most + over).max()) - 1e-6)), steps)

    def _count(self, value: float, epsilon: float) -> Estimate:
        known, rest = float((self._known.abs() > epsilon).sum()), self._rest
        outside = [_shares_outside(row, epsilon) for row in rest.rows]
        low, high = (rest.size * float(np.mean([pair[end] for pair in outside])) for end in (0, 1))
        under, over = (
            float(part[0])
            for part in rest.offsets(lambda points: (np.abs(points)[:, None] > epsilon).astype(np.float64))
        )
        seen = max(float((np.abs(row.nodes) > epsilon).sum()) if row.exact else 0.0 for row in rest.rows)
        return Estimate(
            value,
            known + max(seen, low + under),
            known + min(rest.size, high + over),
            (known + low, known + high),
        )

    def _effective(self, value: float) -> Estimate:
        values, counts = self._whole_rule
        total = float((counts * values.abs()).sum())
        entropy = math.log(value) if value > 0 else 0.0

        # ln(rank) = ln S - E / S with S the sum of the sizes y and E that of y ln y; linear in S and G = (1 - entropy) S - E around S = 1.
        def functions(points: Array) -> Array:
            sizes = np.abs(points) / total
            logarithm = np.log(sizes, out=np.zeros_like(sizes), where=sizes > 0)
            return np.stack([sizes, (1 - entropy) * sizes - sizes * logarithm], 1)

        known = functions(self._known.numpy()).sum(0)
        low, high, under, over = self._rest.sums(functions, ROUNDS)
        low, high = low + known, high + known

        def logarithm(size: float, tangent: float) -> float:
            return math.log(size) + tangent / size - (1 - entropy)

        def ends(low: Array, high: Array) -> tuple[float, float]:
            sizes = max(float(low[0]), 1e-300), float(high[0])
            at = min(max(float(low[1]), sizes[0]), sizes[1])
            most = max(logarithm(size, float(high[1])) for size in sizes)
            return math.exp(min(logarithm(at, float(low[1])), 700.0)), math.exp(min(most, 700.0))

        both = ends(low + under, high + over)
        return Estimate(value, max(1.0, both[0]), both[1], ends(low, high))

    def _participation(self, value: float) -> Estimate:
        values, counts = self._whole_rule
        total = float((counts * values.abs()).sum())
        # S^2 / Q is the largest of 2 c S - c^2 Q over c, reached at c = S / Q, which is the rank where S is the unit.
        factors = value * np.geomspace(1 / SPAN, SPAN, LEVELS)

        def parabolas(points: Array) -> Array:
            scaled = np.abs(points)[:, None] / total * factors
            return 2 * scaled - scaled**2

        known = parabolas(self._known.numpy()).sum(0)
        low, high, under, over = self._rest.sums(parabolas, 0)
        best = int((low + known).argmax())
        steps = float((low + known)[best]), float((high + known).max())
        return Estimate(value, max(1.0, steps[0] + float(under[best])), float((high + known + over).max()), steps)

    def _stable(self, value: float) -> Estimate:
        top = float(self.nodes.abs().max())
        found = self.matrix_function_trace(lambda values: (values / top).square())
        return Estimate(value, max(1.0, found.lower), found.upper, found.steps)

    def _cut(self, found: Estimate) -> Estimate:
        """To what is possible; the value itself always is."""

        def cut(end: float) -> float:
            return min(max(0.0, end), float(self.ceiling))

        value = cut(found.value)
        steps = min(value, cut(found.steps[0])), max(value, cut(found.steps[1]))
        return Estimate(value, min(value, cut(found.lower)), max(value, cut(found.upper)), steps)


@dataclass(frozen=True, eq=False)
class _Rest:
    """The eigenvalues that are not known one by one: bounds for each draw, and the pooled quadrature with a node at 0."""

    rows: list[MomentBounds]
    nodes: Array
    counts: Array
    size: int
    share: float
    ends: tuple[float, float]
    resolution: float

    def sums(self, function: Callable[[Array], Array], rounds: int) -> tuple[Array, Array, Array, Array]:
        """Bounds of sums over the eigenvalues (lower, upper) from the steps, and what the draws add to each."""
        bounds = [row.integrals(function(row.edges), rounds=rounds) for row in self.rows]
        low, high = (self.size * np.mean([getattr(b, end) for b in bounds], 0) for end in ("lower", "upper"))
        rounding = self._rounding(function)
        return low - rounding, high + rounding, *self.offsets(function)

    def offsets(self, function: Callable[[Array], Array]) -> tuple[Array, Array]:
        """What the draws leave open around a sum over the eigenvalues, below and above."""
        places = function(np.concatenate([self.rows[0].edges, self.nodes]))
        extremes = np.stack([places.min(0), places.max(0)])
        return sampling_offsets(function(self.nodes), self.counts, extremes, len(self.rows))

    def with_edges(self, sizes: Array) -> "_Rest":
        """With cells that end at these absolute values."""
        rows = [row.split(np.concatenate([sizes, -sizes])) for row in self.rows]
        return _Rest(rows, self.nodes, self.counts, self.size, self.share, self.ends, self.resolution)

    def _rounding(self, function: Callable[[Array], Array]) -> Array:
        """What the values that rounding hides may add or take."""
        within = float(np.mean([_share_within(row, self.resolution) for row in self.rows]))
        at = function(np.array([-self.resolution, 0.0, self.resolution]))
        return self.size * within * np.abs(at - at[1]).max(0)


def validity(found: Estimate, ceiling: float, steps: int, draws: int) -> str:
    """Says in words how well a rank is determined, and what keeps it from being so.

    Args:
        found: The rank.
        ceiling: The largest that it can be.
        steps: Nodes of each draw.
        draws: Their number.
    """
    if math.isnan(found.value):
        return "not determined: the matrix is not finite"
    limit = f"; no rank can exceed {ceiling:.0f} here" if found.value >= ceiling else ""
    if found.lower == found.upper:
        return f"exact{limit}"
    wide = max(found.upper, 1.0) / max(found.lower, 1.0)
    if wide <= DETERMINED:
        return f"determined: the ends of the interval differ by a factor of {wide:.2g}{limit}"
    if found.steps[1] > DETERMINED * max(found.steps[0], 1.0):
        return (
            f"hardly determined: {steps} Lanczos steps alone leave {found.steps[0]:.0f} to {found.steps[1]:.0f} open, as they do not tell the "
            "smallest eigenvalues from 0. Take a larger delta (rank_sweep), more products (density_products), or the Fisher, whose rank is exact"
        )
    vectors = "1 random start vector leaves" if draws == 1 else f"{draws} random start vectors leave"
    return f"hardly determined: {vectors} it open. Allow more products (density_products)"


def _deviation(row: MomentBounds, size: int, draws: int) -> float:
    """The integral of the error of the share below x, taking in each cell the share within the bounds that is most uncertain."""
    share = np.clip(np.clip(0.5, row.lower, row.upper), 0.0, 1.0)
    spread = size * share * (1 - share)
    third = (2 / draws) ** 2 * spread * (1 - 2 * share)
    second = (2 / draws) * size / (size + 2) * spread
    offsets = skewed_offsets(second, (third, third), (-share, 1 - share), draws)
    return float(np.maximum(-offsets.lower, offsets.upper) @ np.diff(row.edges)) / size


def _shares_outside(row: MomentBounds, epsilon: float) -> tuple[float, float]:
    above, below = row.share_below(epsilon), row.share_below(-np.nextafter(epsilon, np.inf))
    return max(0.0, 1 - above[1] + below[0]), min(1.0, 1 - above[0] + below[1])


def _share_within(row: MomentBounds, epsilon: float) -> float:
    return max(0.0, row.share_below(epsilon)[1] - row.share_below(-epsilon)[0])
