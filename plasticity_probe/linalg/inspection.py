"""Whether an operator is fit to be measured at all: finite, symmetric, the same each time, and not zero."""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from plasticity_probe.linalg.dense import vector_norm
from plasticity_probe.linalg.operator import SymmetricOperator, check_operator
from plasticity_probe.linalg.random_vectors import gaussian


class EigenStatus(StrEnum):
    """How far numbers about an operator can be trusted."""

    OK = "ok"
    """Every pair meets the tolerance and none was missed."""
    NOT_CONVERGED = "not_converged"
    """The allowed products did not suffice; the residuals say what each value is worth."""
    ZERO_OPERATOR = "zero_operator"
    """Every product is exactly zero, and so are the eigenvalues."""
    NONFINITE = "nonfinite"
    """A product holds NaN or Inf; the values are NaN."""
    ASYMMETRIC = "asymmetric"
    """The operator is not symmetric; the values are NaN."""
    NOT_REPEATABLE = "not_repeatable"
    """The same product came out differently the second time; the values are NaN."""


@dataclass(frozen=True)
class Inspection:
    """What three products say about an operator.

    Args:
        status: OK, ZERO_OPERATOR, NONFINITE, ASYMMETRIC or NOT_REPEATABLE.
        norm: A lower bound of the norm, mostly within a small factor of it; NaN where a product was not finite.
    """

    status: EigenStatus
    norm: float


def first_product(operator: SymmetricOperator, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random unit vector and its product, of a second one where the first is zero: a single vector may lie in the null space.

    Args:
        operator: A.
        generator: The source of the vectors.

    Returns:
        v and A v.
    """
    check_operator(operator)
    start, product = _random_product(operator, generator)
    return (start, product) if bool(product.any()) else _random_product(operator, generator)


def _random_product(operator: SymmetricOperator, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    start = gaussian(operator, generator)
    start = start / vector_norm(start)
    return start, operator @ start


def inspect_operator(operator: SymmetricOperator, generator: torch.Generator) -> Inspection:
    """Looks for what would make every later number meaningless, by three products.

    With a random unit vector v and ``u = A v / |A v|``: a second ``A v`` must repeat the first, and ``v' A u`` must be ``u' A v = |A v|``,
    both up to ``sqrt(eps(dtype)) |A v|`` (our choice: far above rounding, below the usual tolerance of an eigenvalue). An asymmetry that
    is small or confined to few directions can pass.

    Args:
        operator: A.
        generator: The source of v.

    Returns:
        A status and a norm estimate.
    """
    start, product = first_product(operator, generator)
    length = vector_norm(product)
    if not math.isfinite(length):
        return Inspection(EigenStatus.NONFINITE, math.nan)
    if length == 0.0:
        return Inspection(EigenStatus.ZERO_OPERATOR, 0.0)
    image, again = operator @ (product / length), operator @ start
    if not bool(image.isfinite().all() & again.isfinite().all()):
        return Inspection(EigenStatus.NONFINITE, math.nan)
    norm = max(length, vector_norm(image))
    visible = math.sqrt(torch.finfo(operator.dtype).eps)
    if vector_norm(again - product) > visible * length:
        return Inspection(EigenStatus.NOT_REPEATABLE, norm)
    if abs(float(start.double() @ image.double()) - length) > visible * norm:
        return Inspection(EigenStatus.ASYMMETRIC, norm)
    return Inspection(EigenStatus.OK, norm)
