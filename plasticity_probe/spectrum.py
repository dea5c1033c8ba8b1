"""The spectrum of a curvature matrix, as it was measured: ends, trace, density and the ranks that follow."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.distribution import Distribution, validity
from plasticity_probe.linalg.krylov import ROUNDING
from plasticity_probe.linalg.quadrature import Quadrature, density
from plasticity_probe.measurement import Measurement, Quantity, measurement
from plasticity_probe.rank import Rank, RankSweep, sweep

BANDWIDTH = math.sqrt(1e-5)
"""Width of a node in the density, as a share of the spectrum's range (Ghorbani, Krishnan & Xiao 2019, the default of their code)."""

DELTA = 0.01
"""Share of the sum that the threshold rank in the table leaves out (Kumar et al. 2021)."""


RANKS = ("threshold_rank", "effective_rank", "stable_rank", "participation_ratio", "numerical_rank")
"""The ranks that every `Rank` lists."""


@measurement
class Spectrum(Measurement):
    """The spectrum of a curvature matrix A of the mean loss, with P trainable parameters.

    Args:
        matrix: "hessian", "ggn", "fisher" or "true_fisher".
        top: The k largest eigenvalues (algebraic), descending.
        top_residuals: |A v - lambda v| of each; an eigenvalue lies within this distance.
        bottom: The k smallest eigenvalues (algebraic), ascending.
        bottom_residuals: The same of each of those.
        matrix_trace: Sum of all eigenvalues: that of the pairs above exactly, of the rest from the same products as the density (as in Hutch++,
            Meyer et al. 2021).
        matrix_trace_sem: Its standard error; 0 where it is exact.
        matrix_trace_lower: Lower end of its 95 % interval.
        matrix_trace_upper: Upper end.
        nodes: Where the eigenvalues are, ascending, one row a draw: the pairs above (of a Fisher or Gauss-Newton matrix the largest alone), 0
            for the known zeros, and Gauss nodes for the rest.
        weights: Share of all P eigenvalues at each node; each row sums to 1. Rows are filled up with nodes of weight 0.
        density_error: 95 % bound of the Wasserstein distance between the mean of the rows and the eigenvalues: by how much an eigenvalue is off
            on average.
        accuracy_reached: 1 where density and trace are as accurate as was asked for, 0 where the products did not suffice; then `density_error`
            and `matrix_trace_sem` say what there is.
        exact: Per draw 1 where its nodes are eigenvalues themselves, so that more steps would change nothing; else 0.
        threshold_rank: Least k whose k largest |eigenvalues| hold 99 % of their sum (Lewandowski et al. 2023), the mean over draws.
        threshold_rank_lower: Lower end of its interval, see `rank`.
        threshold_rank_upper: Upper end.
        effective_rank: exp of the entropy of the normalised |eigenvalues| (Roy & Vetterli 2007), the mean over draws.
        effective_rank_lower: Lower end of its interval.
        effective_rank_upper: Upper end.
        negative_share: Sum of the negative eigenvalues' absolute values over that of all; NaN for the zero matrix.
        ceiling: The largest rank that the matrix can have: P for the Hessian, less the known zeros, fewer where the examples limit it.
        zeros: Eigenvalues known to be exactly 0: one for each parameter whose row of the matrix is 0, such as those of units that never fire;
            all that are left where a Krylov space held everything else.
        products: Curvature-vector products spent, those of a shared eigenvalue search included.
    """

    matrix: Annotated[str, Quantity("curvature matrix")]
    top: Annotated[Float[Tensor, " pair"], Quantity("largest eigenvalue", units="loss", summary="first")]
    top_residuals: Annotated[
        Float[Tensor, " pair"], Quantity("residuals of the largest eigenvalues", units="loss", role="uncertainty")
    ]
    bottom: Annotated[Float[Tensor, " pair"], Quantity("smallest eigenvalue", units="loss", summary="first")]
    bottom_residuals: Annotated[
        Float[Tensor, " pair"], Quantity("residuals of the smallest eigenvalues", units="loss", role="uncertainty")
    ]
    matrix_trace: Annotated[float, Quantity("sum of all eigenvalues", units="loss")]
    matrix_trace_sem: Annotated[float, Quantity("standard error of that sum", units="loss", role="uncertainty")]
    matrix_trace_lower: Annotated[
        float,
        Quantity("sum of all eigenvalues, lower end of its interval", units="loss", shown=False, role="uncertainty"),
    ]
    matrix_trace_upper: Annotated[
        float,
        Quantity("sum of all eigenvalues, upper end of its interval", units="loss", shown=False, role="uncertainty"),
    ]
    nodes: Annotated[Float[Tensor, "draw node"], Quantity("quadrature nodes", units="loss")]
    weights: Annotated[Float[Tensor, "draw node"], Quantity("share of the eigenvalues at each node")]
    exact: Annotated[Float[Tensor, " draw"], Quantity("whether the nodes are eigenvalues")]
    density_error: Annotated[
        float, Quantity("Wasserstein error of the density, 95 % bound", units="loss", shown=False, role="uncertainty")
    ]
    accuracy_reached: Annotated[
        float, Quantity("whether density and trace have the asked accuracy", shown=False, role="context")
    ]
    threshold_rank: Annotated[float, Quantity("threshold rank: eigenvalues that hold 99 % of the sum")]
    threshold_rank_lower: Annotated[float, Quantity("threshold rank, lower end of its interval", role="uncertainty")]
    threshold_rank_upper: Annotated[float, Quantity("threshold rank, upper end of its interval", role="uncertainty")]
    effective_rank: Annotated[float, Quantity("effective rank: exp of the entropy of the eigenvalues")]
    effective_rank_lower: Annotated[
        float, Quantity("effective rank, lower end of its interval", shown=False, role="uncertainty")
    ]
    effective_rank_upper: Annotated[
        float, Quantity("effective rank, upper end of its interval", shown=False, role="uncertainty")
    ]
    negative_share: Annotated[float, Quantity("share of negative eigenvalues in the sum of absolute values")]
    ceiling: Annotated[float, Quantity("largest rank the matrix can have", shown=False, role="context")]
    zeros: Annotated[float, Quantity("eigenvalues known to be exactly 0", shown=False, role="context")]
    products: Annotated[float, Quantity("curvature-vector products spent", shown=False, role="context")]

    def grid(self, points: int = 1000) -> Tensor:
        """Evenly spaced eigenvalues from just below the smallest to just above the largest node, for `density`; float64, shape (points,)."""
        margin = 4 * self.bandwidth
        return torch.linspace(
            float(self._nodes.min()) - margin, float(self._nodes.max()) + margin, points, dtype=torch.float64
        )

    def density(self, grid: Tensor | None = None, bandwidth: float | None = None) -> Tensor:
        """The density of the eigenvalues, each node a normal distribution (Ghorbani et al. 2019); it integrates to 1.

        Args:
            grid: Where to evaluate, shape (g,); None: `grid()`.
            bandwidth: Standard deviation of a node; None: `bandwidth`.

        Returns:
            Shape (g,), float64, in 1 / loss.

        Raises:
            UsageError: The spectrum was measured with density=False.
        """
        quadrature = Quadrature(self._nodes, self.weights)
        return density(quadrature, self.grid() if grid is None else grid, bandwidth or self.bandwidth)

    @property
    def bandwidth(self) -> float:
        """The density's default width: sqrt(1e-5) of the range of the nodes (Ghorbani et al. 2019), or of their size where all are equal."""
        low, high = float(self._nodes.min()), float(self._nodes.max())
        size = max(abs(low), abs(high))
        rounding = ROUNDING * torch.finfo(getattr(torch, self.conditions.dtype)).eps * size
        return BANDWIDTH * (high - low if high - low > rounding else size or 1.0)

    def rank(self, definition: str = "threshold_rank", delta: float = DELTA, *, epsilon: float | None = None) -> Rank:
        """A rank of the matrix, from the absolute values of its eigenvalues.

        The interval holds the ranks of all spectra that would have given the same nodes, and the 95 % interval of the start vectors
        (`plasticity_probe.linalg.distribution`). With millions of eigenvalues near zero it can be wide: then these many products do not settle
        the rank, whatever the value says, and `validity` says so. Eigenvalues below eps(dtype) times the largest count as 0.

        Args:
            definition: A key of `plasticity_probe.linalg.ranks.DEFINITIONS`.
            delta: Share of the sum that a threshold or energy rank leaves out (0.01 as in Kumar et al. 2021).
            epsilon: Cut-off of the epsilon rank.

        Returns:
            The rank. Its `eigenvalues` are those known one by one: all of them, or the largest and the smallest.

        Raises:
            UnknownNameError: There is no such definition.
            UsageError: The spectrum was measured with density=False, or a setting is out of range.
        """
        if definition not in ranks.DEFINITIONS:
            raise UnknownNameError("rank definition", definition, ranks.DEFINITIONS)
        distribution = self._distribution
        found = {name: distribution.rank(name, delta, epsilon) for name in (*RANKS, definition)}
        asked = found[definition]
        draws, nodes = self.nodes.shape
        return Rank(
            conditions=self.conditions,
            status=self.status,
            message=self.message,
            value=asked.value,
            ceiling=self.ceiling,
            matrix=self.matrix,
            definition=definition,
            delta=delta,
            eigenvalues=distribution.known_eigenvalues(),
            lower=asked.lower,
            upper=asked.upper,
            validity=validity(asked, self.ceiling, nodes - len(distribution.known_eigenvalues()), draws),
            **{name: found[name].value for name in RANKS},
        )

    def rank_sweep(self, deltas: Sequence[float], definition: str = "threshold_rank") -> RankSweep:
        """The threshold rank or the energy rank for several shares left out, each with its interval.

        A rank that is hardly determined at delta = 0.01, because the last hundredth of the sum may be spread over any number of eigenvalues near
        zero, can be sharp at 0.1.

        Args:
            deltas: Shares of the sum, each at least 0 and below 1.
            definition: "threshold_rank" or "energy_rank".

        Raises:
            UsageError: The spectrum was measured with density=False, or a setting is out of range.
        """
        distribution = self._distribution
        return sweep(deltas, definition, lambda delta: distribution.rank(definition, delta))

    @property
    def _distribution(self) -> Distribution:
        positive = self.matrix != "hessian"
        return Distribution(
            self._nodes,
            self.weights,
            self.exact,
            # Of the others only the largest are nodes: their smallest are mostly zero, and many.
            smallest=0 if positive else len(self.top),
            largest=len(self.top),
            size=self.conditions.parameters,
            ceiling=int(self.ceiling),
            eps=torch.finfo(getattr(torch, self.conditions.dtype)).eps,
            positive=positive,
            zeros=int(self.zeros),
        )

    @property
    def _nodes(self) -> Tensor:
        if self.nodes.numel() == 0:
            raise UsageError(
                "expected a spectrum with a density, but it was measured with density=False. Measure it again with density=True."
            )
        return self.nodes
