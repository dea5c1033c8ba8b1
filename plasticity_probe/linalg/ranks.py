"""Every rank of a spectrum, each under one name.

In the literature the same words mean different things: the "stable rank" of one paper is the threshold rank of another. Here each
definition has a single name, and the caller says which numbers it is taken of: singular values of a feature matrix, eigenvalues of a
curvature matrix. Signs are dropped (absolute values are taken), so an indefinite matrix has a rank too.

All of them: `values` of any shape, read as a flat list; `weights`, of the same shape, are multiplicities, so that a quadrature (share of
the spectrum times the size of the matrix) is ranked by the same code as a list. The rank of a zero or an empty spectrum is 0. NaN and Inf
are refused with a `UsageError`, as no rank of theirs would mean anything.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from plasticity_probe.errors import UnknownNameError, UsageError


def threshold_rank(values: Tensor, delta: float = 0.01, weights: Tensor | None = None) -> float:
    """Least k whose k largest values hold a share of at least ``1 - delta`` of the sum.

    On singular values of features this is srank (Kumar, Agarwal, Ghosh & Levine 2021, with delta = 0.01), on absolute eigenvalues of a
    curvature matrix the effective rank of Lewandowski, Tanaka, Schuurmans & Machado 2023. Equality counts, up to the rounding of the sum.

    Args:
        values: The spectrum.
        delta: The share that may be left out, at least 0 and below 1.
        weights: Multiplicities. Then k is the least whole number of eigenvalues, and the one that crosses the threshold counts in part.

    Returns:
        A whole number.

    Raises:
        UsageError: If delta is out of range, values or weights are not finite, or the weights are negative or of another shape.
    """
    _check_delta(delta)
    sizes, counts, _ = _spectrum(values, weights)
    return _least_count(sizes, counts, delta, whole=weights is None)


def energy_rank(values: Tensor, delta: float = 0.01, weights: Tensor | None = None) -> float:
    """The threshold rank of the squared values (Yang, Zhang, Chen, Zhang & Katabi 2019, "approximate rank").

    Args:
        values: The spectrum.
        delta: The share of the sum of squares that may be left out, at least 0 and below 1 (0.01 as in the threshold rank).
        weights: Multiplicities.

    Returns:
        A whole number.

    Raises:
        UsageError: As `threshold_rank`.
    """
    _check_delta(delta)
    sizes, counts, _ = _spectrum(values, weights)
    return _least_count(sizes.square(), counts, delta, whole=weights is None)


def effective_rank(values: Tensor, weights: Tensor | None = None) -> float:
    """``exp(-sum p_i ln p_i)`` with ``p_i = |v_i| / sum |v|`` (Roy & Vetterli 2007, definition 1).

    Args:
        values: The spectrum.
        weights: Multiplicities.

    Returns:
        Between 1 and the number of values that are not 0; 0 for a zero spectrum.

    Raises:
        UsageError: If values or weights are not finite, or the weights are negative or of another shape.
    """
    sizes, counts, _ = _spectrum(values, weights)
    if sizes.numel() == 0:
        return 0.0
    shares = sizes / (counts * sizes).sum()
    return math.exp(-float((counts * torch.xlogy(shares, shares)).sum()))


def stable_rank(values: Tensor, weights: Tensor | None = None) -> float:
    """``sum v_i^2 / max v^2``; on singular values ``|A|_F^2 / |A|_2^2`` (Rudelson & Vershynin 2007).

    Args:
        values: The spectrum.
        weights: Multiplicities.

    Returns:
        Between 1 and the number of values that are not 0; 0 for a zero spectrum.

    Raises:
        UsageError: As `effective_rank`.
    """
    sizes, counts, _ = _spectrum(values, weights)
    return float((counts * sizes.square()).sum())


def participation_ratio(values: Tensor, weights: Tensor | None = None) -> float:
    """``(sum |v_i|)^2 / sum v_i^2`` (Gao et al. 2017).

    It is meant for the eigenvalues of a covariance or curvature matrix; for a feature matrix pass its squared singular values.

    Args:
        values: The spectrum.
        weights: Multiplicities.

    Returns:
        Between 1 and the number of values that are not 0; 0 for a zero spectrum.

    Raises:
        UsageError: As `effective_rank`.
    """
    sizes, counts, _ = _spectrum(values, weights)
    if sizes.numel() == 0:
        return 0.0
    return float((counts * sizes).sum().square() / (counts * sizes.square()).sum())


def numerical_rank(
    values: Tensor,
    tol: float | None = None,
    dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
    weights: Tensor | None = None,
) -> float:
    """The number of values above rounding error.

    Args:
        values: The spectrum.
        tol: Values up to this size count as 0. None: ``max |v| * max(shape) * eps(dtype)``, the default of numpy.linalg.matrix_rank.
        dtype: The precision that the matrix was held in; None: that of `values`, or float64 if they are integers.
        shape: The shape of the matrix; None: square, with as many rows as there are values (their total weight).
        weights: Multiplicities.

    Returns:
        A count, or with weights the total weight above `tol`.

    Raises:
        UsageError: If `tol` is negative or NaN, or as `effective_rank`.
    """
    if tol is not None and not tol >= 0:
        raise UsageError(f"expected tol >= 0, got {tol}.")
    sizes, counts, largest = _spectrum(values, weights)
    if tol is None:
        held = dtype or (values.dtype if values.dtype.is_floating_point else torch.float64)
        total = values.numel() if weights is None else float(weights.sum())
        relative = max(shape or (total,)) * torch.finfo(held).eps
    else:
        relative = tol / largest
    return float(counts[sizes > relative].sum())


def epsilon_rank(values: Tensor, epsilon: float, weights: Tensor | None = None) -> float:
    """The number of values with ``|v| > epsilon`` (Prakash et al. 2025, there as a share of the spectrum).

    Args:
        values: The spectrum.
        epsilon: The cut-off, at least 0, in the units of the values.
        weights: Multiplicities; with a quadrature's weights times n this is its mass beyond epsilon, times n.

    Returns:
        A count, or with weights the total weight beyond epsilon.

    Raises:
        UsageError: If epsilon is negative or NaN, or as `effective_rank`.
    """
    if not epsilon >= 0:
        raise UsageError(f"expected epsilon >= 0, got {epsilon}.")
    sizes, counts, largest = _spectrum(values, weights)
    return float(counts[sizes > epsilon / largest].sum())


DEFINITIONS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {
        "threshold_rank": threshold_rank,
        "energy_rank": energy_rank,
        "effective_rank": effective_rank,
        "stable_rank": stable_rank,
        "participation_ratio": participation_ratio,
        "numerical_rank": numerical_rank,
        "epsilon_rank": epsilon_rank,
    }
)
"""Every definition by its name."""

_SETTINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"threshold_rank": ("delta",), "energy_rank": ("delta",), "epsilon_rank": ("epsilon",)}
)


def rank(
    values: Tensor,
    definition: str,
    *,
    delta: float = 0.01,
    epsilon: float | None = None,
    weights: Tensor | None = None,
) -> float:
    """A rank by the name of its definition.

    Args:
        values: The spectrum.
        definition: A key of `DEFINITIONS`.
        delta: For the threshold rank and the energy rank; others have no use for it.
        epsilon: For the epsilon rank, which needs it; others have no use for it.
        weights: Multiplicities.

    Returns:
        The rank.

    Raises:
        UnknownNameError: If there is no such definition.
        UsageError: If the epsilon rank is asked for without an epsilon, or as the definition itself.
    """
    if definition not in DEFINITIONS:
        raise UnknownNameError("rank definition", definition, DEFINITIONS)
    if definition == "epsilon_rank" and epsilon is None:
        raise UsageError("the epsilon rank needs an epsilon, got none; pass epsilon= in the units of the eigenvalues.")
    given = {"delta": delta, "epsilon": epsilon}
    settings = {name: given[name] for name in _SETTINGS.get(definition, ())}
    return DEFINITIONS[definition](values, weights=weights, **settings)


def _spectrum(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Absolute values over the largest one, descending and without zeros; their multiplicities; and the largest (1 where there is none)."""
    sizes = values.detach().double().cpu().flatten().abs()
    counts = torch.ones_like(sizes) if weights is None else weights.detach().double().cpu().flatten()
    if counts.shape != sizes.shape:
        raise UsageError(f"expected one weight a value ({sizes.numel()}), got {counts.numel()}.")
    if not bool(sizes.isfinite().all() & counts.isfinite().all()):
        raise UsageError("expected finite values and weights, got NaN or Inf; a spectrum that holds them has no rank.")
    if bool((counts < 0).any()):
        raise UsageError(f"expected weights >= 0, got {float(counts.min()):.3g}.")
    kept = (sizes > 0) & (counts > 0)
    sizes, order = sizes[kept].sort(descending=True)
    largest = float(sizes[0]) if sizes.numel() else 1.0
    return sizes / largest, counts[kept][order], largest


def _least_count(sizes: Tensor, counts: Tensor, delta: float, *, whole: bool) -> float:
    """How many of the largest it takes to hold a share 1 - delta of the sum; `whole` says that every multiplicity is 1."""
    if sizes.numel() == 0:
        return 0.0
    reached = (counts * sizes).cumsum(0)
    # A sum of N terms is off by up to N eps of itself, so a share that is met exactly may look missed by as much.
    slack = (8 + sizes.numel()) * torch.finfo(torch.float64).eps
    target = (1 - delta) * float(reached[-1]) * (1 - slack)
    crossing = int((reached < target).sum())
    if whole:
        return float(crossing + 1)
    before = float(reached[crossing - 1]) if crossing else 0.0
    partly = min((target - before) / float(sizes[crossing]), float(counts[crossing]))
    # Multiplicities such as n * (1 / n) are whole up to rounding; a millionth of an eigenvalue is no eigenvalue.
    return float(max(1, math.ceil(float(counts[:crossing].sum()) + partly - 1e-6)))


def _check_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise UsageError(f"expected 0 <= delta < 1, got {delta}.")
