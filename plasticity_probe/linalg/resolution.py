"""What the nodes of a quadrature leave open: bounds of a rank over all spectra that would have given the same nodes.

For the measure that m Lanczos steps see, its share below a node is bounded from both sides by the weights on either side of that node (the
Chebyshev-Markov-Stieltjes inequalities; Szego 1939, section 3.41). So the mass that the quadrature puts at node i may lie anywhere between the
nodes i - 1 and i + 1, and nowhere else. A rank is largest where the mass is as level, and smallest where it is as unequal, as that allows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Rank = Callable[[Tensor, Tensor], float]
"""A rank of absolute values with multiplicities."""


class Interval(NamedTuple):
    """Both ends of an interval."""

    lower: float
    upper: float


def rank_bounds(nodes: Tensor, multiplicities: Tensor, known: Tensor, rank: Rank) -> Interval:
    """The least and the largest rank among the spectra that the nodes stand for.

    Exact for the count of values above a bound; for ranks that ignore scale and grow when values become more equal (threshold, energy, effective
    and stable rank, participation ratio) the upper end is exact and the lower one is over all ways to push the mass of the first j nodes
    by size outwards and the rest inwards.

    Args:
        nodes: Ascending, shape (m,), those at the ends first among them known or bounds of the spectrum.
        multiplicities: How many eigenvalues each node stands for, shape (m,).
        known: True for nodes that are eigenvalues themselves, shape (m,).
        rank: The rank, of absolute values and multiplicities.

    Returns:
        The interval. It covers the error of few steps, not the choice of start vectors.
    """
    lower, upper = _reach(nodes, known)
    level = [rank(upper.clamp(max=t).maximum(lower), multiplicities) for t in torch.cat([lower, upper]).unique()]
    order = nodes.abs().argsort(descending=True).argsort()
    unequal = [rank(torch.where(order < j, upper, lower), multiplicities) for j in range(len(nodes) + 1)]
    return Interval(min(unequal + level), max(unequal + level))


def _reach(nodes: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest absolute value that the mass of each node may have."""
    left = torch.where(known, nodes, torch.cat([nodes[:1], nodes[:-1]]))
    right = torch.where(known, nodes, torch.cat([nodes[1:], nodes[-1:]]))
    farthest = left.abs().maximum(right.abs())
    nearest = torch.where((left < 0) & (right > 0), 0.0, left.abs().minimum(right.abs()))
    return nearest, farthest
