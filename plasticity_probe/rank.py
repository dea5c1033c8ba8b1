"""The rank of a curvature matrix: one number with its definition, its ceiling and, where it is estimated, its interval."""

from typing import Annotated

from jaxtyping import Float
from torch import Tensor

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

    def __float__(self) -> float:
        return float(self.value)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `value`; both ends are `value` where it is exact."""
        return self.lower, self.upper
