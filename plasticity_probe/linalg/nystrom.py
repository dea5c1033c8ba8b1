"""The spectrum of a large Gram matrix from some of its columns, with bounds that always hold.

With G the n x P matrix whose rows are the vectors, L the rows of m landmarks among them and Pi the projection on the span of L, the Nystrom
approximation of K = GG' (Williams & Seeger 2001, NIPS 13) is

    K^ = (GL') (LL')^+ (GL')' = G Pi G'.

K - K^ = G (1 - Pi) G' is positive semidefinite, so every eigenvalue of K^ is at most that of K of the same rank (Weyl), and all of them together
fall short of those of K by exactly tr K - tr K^, which the diagonal of K tells. Both facts are certain, whatever landmarks were drawn; how much
is missing depends on the draw (Gittens & Mahoney 2016, JMLR 17, bound it for uniform draws).
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.ranks import rank

CUTOFF = 2.0**-26
"""Eigenvalues of the landmarks' own matrix below this share of the largest are left out, and so counted as missing.

Our choice, the root of float64's rounding: the products below divide what float64 has rounded by these eigenvalues.
"""


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is known of the spectrum of a positive semidefinite matrix: eigenvalue i lies between values[i] and values[i] + missing.

    Args:
        values: Lower bounds of the eigenvalues, descending, shape (count,); 0 beyond those found.
        missing: By how much all of them together are too small.
    """

    values: Tensor
    missing: float

    @property
    def steepest(self) -> Tensor:
        """The spectrum with all that is missing in the largest eigenvalue: of all possible ones it majorises every other."""
        return torch.cat([self.values[:1] + self.missing, self.values[1:]])

    @property
    def flattest(self) -> Tensor:
        """The spectrum with what is missing poured in from below: every possible one majorises it."""
        rising = self.values.flip(0)
        counts = torch.arange(1, len(rising) + 1, dtype=rising.dtype)
        levels = (rising.cumsum(0) + self.missing) / counts
        # The level stands over the lowest k values where it exceeds the k-th but not the next.
        under = int((levels > rising).sum())
        return (
            torch.cat([rising[:under].new_full((under,), float(levels[under - 1])), rising[under:]]).flip(0)
            if under
            else self.values
        )

    @property
    def plateau(self) -> Tensor:
        """The spectrum with what is missing raising one eigenvalue after the other to the largest: the one of largest stable rank."""
        gaps = self.values[0] - self.values
        given = (self.missing - (gaps.cumsum(0) - gaps)).clamp(min=0)
        return self.values + torch.minimum(given, gaps)


def nystrom(core: Tensor, squared: Tensor, trace: float, count: int) -> Sketch:
    """The sketch of K = GG' from its products with landmarks.

    Args:
        core: LL', shape (m, m), float64.
        squared: (GL')'(GL'), shape (m, m), float64: summed over blocks of rows, so that no n x m matrix is held.
        trace: The trace of K.
        count: Number of rows n.

    Returns:
        All NaN where something of it is not finite.

    Raises:
        UsageError: The shapes differ.
    """
    if core.shape != squared.shape or len(core) > count:
        raise UsageError(f"expected two (m, m) matrices with m <= {count}, got {core.shape} and {squared.shape}.")
    if not (core.isfinite().all() and squared.isfinite().all() and math.isfinite(trace)):
        return Sketch(core.new_full((count,), float("nan")), float("nan"))
    weights, directions = cast(tuple[Tensor, Tensor], torch.linalg.eigh(core))  # pyright: ignore[reportUnknownMemberType]
    kept = weights > CUTOFF * weights[-1].clamp(min=0)
    inverse_root = directions[:, kept] / weights[kept].sqrt()
    small = inverse_root.T @ squared @ inverse_root
    found = cast(Tensor, torch.linalg.eigvalsh(small)).flip(0).clamp(min=0)  # pyright: ignore[reportUnknownMemberType]
    values = torch.cat([found, found.new_zeros(count - len(found))])
    return Sketch(values, max(0.0, trace - float(found.sum())))


def rank_interval(
    sketch: Sketch, definition: str, delta: float = 0.01, epsilon: float | None = None
) -> tuple[float, float]:
    """Between which values the rank of the matrix lies; certain, as the sketch is.

    Threshold rank, effective rank and participation ratio never grow where one spectrum majorises another of the same sum (the last two
    are Schur-concave, Marshall, Olkin & Arnold 2011, chapter 3; a threshold rank reads the partial sums themselves), so the steepest and
    the flattest possible spectrum give the ends. Stable rank, numerical rank and epsilon rank have extremes of their own; the energy rank
    is bounded by the least and the largest energies.

    Args:
        sketch: What is known of the spectrum.
        definition: A key of `plasticity_probe.linalg.ranks.DEFINITIONS`; for the numerical rank pass its cut-off as epsilon.
        delta: The share that a threshold or energy rank leaves out.
        epsilon: The cut-off of the epsilon rank and the numerical rank.
    """
    if definition in ("epsilon_rank", "numerical_rank"):
        if epsilon is None:
            raise UsageError(f"the bounds of the {definition} need its cut-off, pass epsilon=.")
        return _counts_above(sketch, epsilon)
    if definition == "energy_rank":
        return _energy_ranks(sketch, delta)
    low = rank(sketch.steepest, definition, delta=delta)
    high = rank(sketch.plateau if definition == "stable_rank" else sketch.flattest, definition, delta=delta)
    return low, high


def _counts_above(sketch: Sketch, cut: float) -> tuple[float, float]:
    """Values above a cut-off: those that are, and as many more as what is missing can lift there."""
    above = int((sketch.values > cut).sum())
    lifts = (cut - sketch.values[above:]).cumsum(0)
    return float(above), float(above + int((lifts < sketch.missing).sum()))


def _energy_ranks(sketch: Sketch, delta: float) -> tuple[float, float]:
    """Least k whose tail can hold a share delta of the sum of squares, and least k whose tail must."""
    values, missing = sketch.values, sketch.missing
    energy = values.square()
    least_tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    mass = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]) + missing
    largest_tail = mass * (torch.cat([values, values.new_zeros(1)]) + missing)
    largest_tail[-1] = 0
    most, least = float(sketch.steepest.square().sum()), float(sketch.flattest.square().sum())
    low = int((least_tail > delta * most).sum())
    high = int((largest_tail > delta * least).sum())
    return float(low), float(max(low, high))
