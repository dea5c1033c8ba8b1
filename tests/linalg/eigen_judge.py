"""Whether a solver's answer to a known eigenproblem is right, an honest refusal, or a silent error."""

from dataclasses import dataclass

import numpy as np
import torch
from eigen_problems import Problem, Truth
from torch import Tensor

from plasticity_probe.linalg.lanczos import Eigenpairs, EigenStatus, extreme_eigenpairs

ROUNDING = 64
"""The contract's share of eps(dtype) times the norm that rounding may leave in any pair."""

RAISED = "raised"
WITHOUT_NUMBERS = (EigenStatus.NONFINITE, EigenStatus.ASYMMETRIC, EigenStatus.NOT_REPEATABLE)


@dataclass(frozen=True)
class Result:
    """What came of one problem.

    Args:
        problem: The request.
        statuses: Of the ends that were asked for.
        complaints: What is wrong with the answer although its status does not say so; empty for a right answer or an honest refusal.
        products: Vectors that the operator was multiplied with.
        exception: What the solver raised instead of an answer, if anything.
    """

    problem: Problem
    statuses: tuple[EigenStatus, ...]
    complaints: tuple[str, ...]
    products: int
    exception: str | None = None

    @property
    def silent(self) -> bool:
        """Whether the answer is wrong and does not say so."""
        return bool(self.complaints)

    @property
    def refusal(self) -> str | None:
        """The first status other than OK; None for an answer to everything that was asked."""
        if self.exception is not None:
            return RAISED
        return next((status.value for status in self.statuses if status is not EigenStatus.OK), None)


def solve(problem: Problem) -> Result:
    """Lets the solver answer and judges what it says.

    Args:
        problem: The request.

    Returns:
        The result; an exception of the solver is part of it, so that one crash does not hide the rest of a battery.
    """
    operator = problem.operator()
    try:
        found = extreme_eigenpairs(
            operator,
            problem.k_top,
            problem.k_bottom,
            generator=problem.generator(),
            tol=problem.tol,
            dense_below=problem.dense_below,
        )
    except Exception as error:  # every kind of crash is counted, by name
        return Result(problem, (), (), operator.products, f"{type(error).__name__}: {error}")
    truth = problem.truth()
    asked = [
        (name, pairs, count)
        for name, pairs, count in (("top", found.top, problem.k_top), ("bottom", found.bottom, problem.k_bottom))
        if count
    ]
    complaints = [
        f"{name}: {complaint}"
        for name, pairs, count in asked
        for complaint in judge(pairs, truth, count, problem.tol, largest=name == "top")
    ]
    return Result(problem, tuple(pairs.status for _, pairs, _ in asked), tuple(complaints), operator.products)


def judge(pairs: Eigenpairs, truth: Truth, count: int, tol: float, *, largest: bool) -> tuple[str, ...]:
    """What is wrong with the pairs of one end although their status does not say so.

    OK promises: as many values as were asked for, each next to the true one of the same place in the order (so a copy that is not there
    and one that is left out both show), residuals within ``max(tol |lambda|, 64 eps norm)``, orthonormal vectors.
    ZERO_OPERATOR promises zeros, for the zero operator. NOT_CONVERGED promises that the residuals tell the truth. NONFINITE, ASYMMETRIC
    and NOT_REPEATABLE promise nothing, and give no numbers. Residuals with an operator that has a fault are not judged, because a solver
    can know them up to the fault only; there the values alone count.

    Args:
        pairs: The answer.
        truth: The problem's truth.
        count: How many pairs were asked for.
        tol: The relative residual that was asked for.
        largest: Whether the largest eigenvalues were asked for, or the smallest.

    Returns:
        One sentence for each thing that is wrong.
    """
    if pairs.status in WITHOUT_NUMBERS:
        return () if bool(pairs.values.isnan().all()) else (f"numbers beside the status {pairs.status}",)
    size = truth.values.numel()
    expected = (truth.values.flip(0) if largest else truth.values)[:count]
    if pairs.values.shape != expected.shape or pairs.vectors.shape != (size, expected.numel()):
        return (f"{tuple(pairs.values.shape)} values instead of {tuple(expected.shape)}",)
    if pairs.status is EigenStatus.ZERO_OPERATOR:
        return _wrong_zeros(pairs, truth)
    if pairs.status is EigenStatus.NOT_CONVERGED:
        return _wrong_residuals(pairs, truth) if truth.healthy else ()
    if not bool(pairs.values.isfinite().all() & pairs.vectors.isfinite().all() & pairs.residuals.isfinite().all()):
        return ("ok beside numbers that are not finite",)
    if truth.norm == 0:
        return ("the zero operator is not called so",)
    return (
        *_wrong_values(pairs, truth, expected, tol, largest=largest),
        *((*_too_long_residuals(pairs, truth, tol), *_wrong_residuals(pairs, truth)) if truth.healthy else ()),
        *_not_orthonormal(pairs, truth),
    )


def slack(truth: Truth) -> float:
    """What the rounding of a product in the solver's dtype leaves in a residual: ``2 sqrt(n) eps norm``, errors adding up at random."""
    return 2 * truth.values.numel() ** 0.5 * truth.eps * truth.norm


def true_residuals(pairs: Eigenpairs, truth: Truth) -> Tensor:
    """``|A v - lambda v|`` in float64, in the truth's unit, shape (k,)."""
    vectors = pairs.vectors.double()
    return (truth.matrix @ vectors - vectors * (pairs.values / truth.unit)).norm(dim=0)


def _allowed(values: Tensor, truth: Truth, tol: float) -> Tensor:
    return (tol * values.abs()).clamp(min=ROUNDING * truth.eps * truth.norm) + slack(truth)


def _wrong_values(pairs: Eigenpairs, truth: Truth, expected: Tensor, tol: float, *, largest: bool) -> tuple[str, ...]:
    values = pairs.values / truth.unit
    steps = values.diff() if largest else -values.diff()
    order = ("the values are not in order",) if bool((steps > 0).any()) else ()
    errors = (values - expected).abs()
    wrong = errors > _allowed(torch.maximum(values.abs(), expected.abs()), truth, tol)
    return order + tuple(
        f"value {place} is {float(pairs.values[place]):.9g}, not {float(expected[place]) * truth.unit:.9g}"
        for place in wrong.nonzero().flatten().tolist()
    )


def _too_long_residuals(pairs: Eigenpairs, truth: Truth, tol: float) -> tuple[str, ...]:
    residuals = true_residuals(pairs, truth)
    allowed = _allowed(pairs.values / truth.unit, truth, tol)
    return tuple(
        f"the residual of value {place} is {float(residuals[place] / allowed[place]):.3g} times what is allowed"
        for place in (residuals > allowed).nonzero().flatten().tolist()
    )


def _wrong_residuals(pairs: Eigenpairs, truth: Truth) -> tuple[str, ...]:
    residuals, reported = true_residuals(pairs, truth), pairs.residuals / truth.unit
    short = residuals - reported > 0.01 * residuals + slack(truth)
    long = reported - residuals > 0.01 * residuals + ROUNDING * truth.eps * truth.norm + slack(truth)
    wrong = (short | long) & reported.isfinite()
    return tuple(
        f"residual {place} is said to be {float(reported[place]):.3g} and is {float(residuals[place]):.3g}"
        for place in wrong.nonzero().flatten().tolist()
    )


def _not_orthonormal(pairs: Eigenpairs, truth: Truth) -> tuple[str, ...]:
    # In extended precision, as a float64 sum of 400 equal terms is itself off by 64 eps.
    vectors = pairs.vectors.numpy().astype(np.longdouble)
    defect = float(abs(vectors.T @ vectors - np.eye(vectors.shape[1])).max(initial=0.0))
    return (f"the vectors are orthonormal up to {defect:.2g} only",) if defect > ROUNDING * truth.eps else ()


def _wrong_zeros(pairs: Eigenpairs, truth: Truth) -> tuple[str, ...]:
    if truth.norm > 0 or not truth.healthy:
        return ("an operator is called zero and is not",)
    zeros = bool((pairs.values == 0).all() & (pairs.residuals == 0).all())
    return (() if zeros else ("the eigenvalues of zero are not zero",)) + _not_orthonormal(pairs, truth)
