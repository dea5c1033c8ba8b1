"""The rank of a curvature matrix: one number with its definition, its ceiling and, where it is estimated, its interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.distribution import Estimate
from plasticity_probe.linalg.ranks import rank
from plasticity_probe.measurement import Measurement, Quantity, measurement


@measurement
class Rank(Measurement):
    """The rank of a curvature matrix of the mean loss.

    `float(rank)` is `rank.value`. Every definition is in `plasticity_probe.linalg.ranks`, under the name given here.

    Args:
        value: The rank under `definition`.
        ceiling: The largest value that this many examples (and parameters) allow: min(examples, parameters) for the empirical Fisher.
        matrix: "fisher", "hessian" or "ggn".
        definition: Which rank `value` is.
        delta: The share of the sum that a threshold rank or an energy rank may leave out.
        eigenvalues: The eigenvalues of the matrix as far as they are known, descending; of the quadrature's nodes nothing is listed.
        lower: Lower end of the 95 % interval of `value`; `value` itself where it is exact.
        upper: Upper end of that interval.
        threshold_rank: Least k whose k largest values hold a share 1 - delta of the sum (Kumar 2021; Lewandowski 2023).
        effective_rank: exp of the entropy of the normalised values (Roy & Vetterli 2007).
        stable_rank: Sum of squares over the largest square.
        participation_ratio: Squared sum over sum of squares.
        numerical_rank: Number of values above rounding error.
        validity: How well `value` is determined, and if hardly, what keeps it from being so and what would help.
    """

    value: Annotated[float, Quantity("rank under the asked definition", shown=False)]
    ceiling: Annotated[float, Quantity("largest rank this many examples allow", role="context")]
    matrix: Annotated[str, Quantity("curvature matrix")]
    definition: Annotated[str, Quantity("definition of the asked rank")]
    delta: Annotated[float, Quantity("share of the sum left out by the threshold rank", shown=False)]
    eigenvalues: Annotated[Float[Tensor, " index"], Quantity("eigenvalues, descending", units="loss")]
    lower: Annotated[float, Quantity("lower end of the 95 % interval of the asked rank", shown=False)]
    upper: Annotated[float, Quantity("upper end of the 95 % interval of the asked rank", shown=False)]
    threshold_rank: Annotated[float, Quantity("threshold rank: eigenvalues that hold 1 - delta of the sum")]
    effective_rank: Annotated[float, Quantity("effective rank: exp of the entropy of the eigenvalues")]
    stable_rank: Annotated[float, Quantity("stable rank of the matrix: sum of squares over largest square")]
    participation_ratio: Annotated[float, Quantity("participation ratio: squared sum over sum of squares")]
    numerical_rank: Annotated[float, Quantity("numerical rank: eigenvalues above rounding error")]

    validity: Annotated[str, Quantity("how well the asked rank is determined")] = "exact"

    def __float__(self) -> float:
        return float(self.value)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `value`; both ends are `value` where it is exact."""
        return self.lower, self.upper

    def sweep(self, deltas: Sequence[float], definition: str = "threshold_rank") -> "RankSweep":
        """The rank for several shares left out, where all eigenvalues are known, as those of the Fisher are.

        Args:
            deltas: Shares of the sum, each at least 0 and below 1.
            definition: "threshold_rank" or "energy_rank".

        Raises:
            UsageError: The rank was estimated, so its eigenvalues are not all there: use `Spectrum.rank_sweep`. Or a setting is out of range.
        """
        if self.lower != self.upper:
            raise UsageError(
                "expected a rank whose eigenvalues are all known, as those of matrix='fisher' are, but this one was estimated. Use "
                "rank_sweep of the spectrum (hessian_spectrum(...).rank_sweep(deltas)), which gives intervals."
            )
        return sweep(deltas, definition, lambda delta: Estimate.exact(rank(self.eigenvalues, definition, delta=delta)))


@dataclass(frozen=True, eq=False)
class RankSweep:
    """A rank over the share of the sum that it leaves out.

    Args:
        definition: "threshold_rank" or "energy_rank".
        deltas: The shares, shape (delta,).
        value: The rank for each.
        lower: Lower ends of the 95 % intervals, each for itself.
        upper: Upper ends.
    """

    definition: str
    deltas: Float[Tensor, " delta"]
    value: Float[Tensor, " delta"]
    lower: Float[Tensor, " delta"]
    upper: Float[Tensor, " delta"]


def sweep(deltas: Sequence[float], definition: str, estimate: Callable[[float], Estimate]) -> RankSweep:
    """A rank for each of several shares left out.

    Args:
        deltas: The shares, at least one.
        definition: "threshold_rank" or "energy_rank"; no other rank leaves out a share.
        estimate: The rank for one of them.

    Raises:
        UsageError: There is no share, or the definition has none.
    """
    if definition not in ("threshold_rank", "energy_rank") or len(deltas) == 0:
        raise UsageError(
            f"expected 'threshold_rank' or 'energy_rank' and at least one delta, got {definition!r} and {list(deltas)}."
        )
    found = [estimate(delta) for delta in deltas]

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(each, name) for each in found], dtype=torch.float64)

    shares = torch.tensor(list(deltas), dtype=torch.float64)
    return RankSweep(definition, shares, column("value"), column("lower"), column("upper"))
