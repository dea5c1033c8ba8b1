"""The first call of a user: the rank of a curvature matrix, whichever matrix it is."""

from typing import Any

from torch import nn

from plasticity_probe.errors import UnknownNameError
from plasticity_probe.linalg.ranks import DEFINITIONS
from plasticity_probe.network.curvature import MATRICES
from plasticity_probe.probes.fisher import fisher_rank
from plasticity_probe.probes.spectrum import hessian_spectrum
from plasticity_probe.rank import Rank


def curvature_rank(
    model: nn.Module,
    loader: Any,
    *,
    matrix: str = "fisher",
    definition: str = "threshold_rank",
    delta: float = 0.01,
    epsilon: float | None = None,
    examples: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Rank:
    """The rank of a curvature matrix of the mean loss: how many directions of weight space the loss curves in.

    The empirical Fisher is the default because its rank is exact: its non-zero eigenvalues are those of the Gram matrix of per-example gradients
    (Lewandowski et al. 2023, v3, use it in place of the Hessian). That of the Hessian and the generalised Gauss-Newton matrix is estimated
    from their spectrum and comes with an interval; for networks of 512 parameters or fewer it is exact too.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches: (inputs, targets), mappings, or anything that `loss` understands.
        matrix: "fisher", "hessian", "ggn" or "true_fisher".
        definition: Which rank, a key of `plasticity_probe.linalg.ranks.DEFINITIONS`; by default the least k whose k largest absolute eigenvalues
            hold a share 1 - delta of the sum (Lewandowski et al. 2023, as srank of Kumar et al. 2021).
        delta: The share left out (0.01 as in Kumar et al. 2021).
        epsilon: Cut-off of the epsilon rank, which needs one, in units of the loss.
        examples: Read and measure no more than this many; None: 512 for the Fisher, 128 for the others (see `FisherRank`, `HessianSpectrum`).
        seed: Seed of the random vectors.
        options: loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`); for the Hessian and the Gauss-Newton
            matrix also k, tol, accuracy, density_products, max_products.

    Returns:
        The rank: `float(rank)`, `rank.interval`, `rank.ceiling`, `rank.status`, and the other definitions beside it.

    Raises:
        UnknownNameError: There is no such matrix or definition.
        UsageError: A setting is out of range.
        SubjectError: Model, loss and data do not go together, or the loss does not allow the matrix.
    """
    if matrix not in MATRICES:
        raise UnknownNameError("curvature matrix", matrix, MATRICES)
    if definition not in DEFINITIONS:
        raise UnknownNameError("rank definition", definition, DEFINITIONS)
    given = options if examples is None else {**options, "examples": examples}
    if matrix == "fisher":
        return fisher_rank(model, loader, definition=definition, delta=delta, epsilon=epsilon, seed=seed, **given)
    return hessian_spectrum(model, loader, matrix=matrix, seed=seed, **given).rank(definition, delta, epsilon=epsilon)
