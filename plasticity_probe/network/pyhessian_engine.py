"""PyHessian (Yao, Gholami, Keutzer & Mahoney 2020) on a subject, for those who want to compare.

Everything that it computes it computes itself: the graph, the products, the power iteration, Hutchinson's estimator. What this package adds is
the mean loss of any subject in a form that PyHessian takes, a seed, and residuals of what comes back by its own products.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plasticity_probe.errors import BudgetError, SubjectError, UsageError
from plasticity_probe.linalg.dense import column_norms, vector_norm
from plasticity_probe.linalg.inspection import EigenStatus
from plasticity_probe.linalg.lanczos import Eigenpairs
from plasticity_probe.linalg.matrix_trace import TraceEstimate, mean_estimate
from plasticity_probe.linalg.random_vectors import gaussian
from plasticity_probe.network.curvature import hessian, keeps_graphs
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.subject import Subject

MAX_ITERATIONS = 100
"""Power iterations for each eigenvalue, and draws for the trace (the defaults of PyHessian)."""


def check_pyhessian_request(matrix: str, density: bool) -> None:
    """Refuses what PyHessian cannot measure before any work.

    Args:
        matrix: The curvature matrix asked for.
        density: Whether the density is asked for.

    Raises:
        UsageError: The matrix is not the Hessian, or the density is asked for: that of the released PyHessian 0.1 calls torch.eig, which torch
            no longer has.
    """
    if matrix != "hessian":
        raise UsageError(
            f"expected matrix='hessian' with engine='pyhessian', which knows no other, got {matrix!r}. Leave the engine at its default."
        )
    if density:
        raise UsageError(
            "expected density=False with engine='pyhessian': the density of PyHessian 0.1 calls torch.eig, which torch removed, so there is "
            "none (and no rank). Pass density=False for eigenvalues and trace alone, or leave the engine at its default."
        )


def pyhessian_eigenpairs(
    subject: Subject, *, k: int, tol: float, max_iterations: int = MAX_ITERATIONS, generator: torch.Generator
) -> tuple[Eigenpairs, Eigenpairs]:
    """The k eigenvalues of largest magnitude of the Hessian by PyHessian's power iteration with deflation, sorted to both ends.

    The positive ones are the largest eigenvalues there are, the negative ones the smallest, as far as they converged. An end is padded with
    NaN to k values, as nothing is known about the others. PyHessian ends an iteration where an eigenvalue changes by a small share of itself.
    That share is ``tol^2`` here, because the error of a Rayleigh quotient is of second order in that of its vector (Parlett 1980, section
    4.6). It says nothing where eigenvalues of opposite sign and equal size are mixed up, so residuals are computed here, and the status of
    an end is OK only where all of them are at most ``tol |lambda|``. No check is made that none was missed. PyHessian divides vectors by
    ``|v| + 1e-6``, so its values are off by 2e-6 of themselves, and wrong where the Hessian is that small.

    Args:
        subject: The network in eval mode, its loss and its examples.
        k: How many eigenvalues, of both signs together; at most P.
        tol: Relative residual of a converged pair.
        max_iterations: Power iterations for each eigenvalue at most, one product each (100, PyHessian's default).
        generator: Gives the seed of PyHessian's random vectors.

    Returns:
        Top (descending) and bottom (ascending). Values and residuals have shape (k,); `vectors` are those found, of unit length, orthogonal only
        as far as they converged. The products include those of the residuals.

    Raises:
        UsageError: k, tol or max_iterations is out of range.
        SubjectError: The subject is in train mode, where PyHessian would measure it in eval mode.
        BudgetError: The graph of all examples, which PyHessian keeps, does not fit the memory.
    """
    if k < 1 or max_iterations < 1 or not tol > 0:
        raise UsageError(f"expected k and max_iterations >= 1 and tol > 0, got {k}, {max_iterations} and {tol}.")
    _check_subject(subject)
    k = min(k, subject.size)
    with hessian(subject) as operator:
        length = vector_norm(operator @ gaussian(operator, generator))
    if length == 0.0:
        return _unsearched(subject, k, 0.0, EigenStatus.ZERO_OPERATOR, 1)
    if not math.isfinite(length):
        return _unsearched(subject, k, math.nan, EigenStatus.NONFINITE, 1)
    found = _power_iteration(subject, k, tol**2, max_iterations, generator)
    spent = 1 + found.products
    if not bool(found.values.isfinite().all()):
        return _unsearched(subject, k, math.nan, EigenStatus.NONFINITE, spent)
    # Only now, so that no two graphs of all examples are held at once.
    with hessian(subject) as operator:
        residuals = column_norms(operator @ found.vectors - found.vectors * found.values.to(found.vectors))
    spent += len(residuals)
    order = found.values.argsort(descending=True)
    top, bottom = order[found.values[order] >= 0], order[found.values[order] < 0].flip(0)
    return _end(found, residuals, top, k, tol, spent), _end(found, residuals, bottom, k, tol, spent)


def pyhessian_trace(subject: Subject, *, draws: int = MAX_ITERATIONS, generator: torch.Generator) -> TraceEstimate:
    """The trace of the Hessian by PyHessian's Hutchinson estimator.

    All draws are taken: PyHessian's own rule, to stop where the mean no longer moves, stops at the second draw where the trace is negative,
    and would make the standard error too small everywhere.

    Args:
        subject: The network in eval mode, its loss and its examples.
        draws: Random vectors, one product each (100, PyHessian's default for the most).
        generator: Gives the seed of PyHessian's random vectors.

    Returns:
        The mean and its standard error.

    Raises:
        UsageError: There are fewer than two draws.
        SubjectError: The subject is in train mode, where PyHessian would measure it in eval mode.
        BudgetError: The graph of all examples, which PyHessian keeps, does not fit the memory.
    """
    if draws < 2:
        raise UsageError(f"expected at least 2 draws, as one has no standard error, got {draws}.")
    _check_subject(subject)
    with _pyhessian(subject, generator) as run:
        samples = run.trace(maxIter=draws, tol=-math.inf)
    return mean_estimate([float(sample) for sample in samples], products=draws)


@dataclass(frozen=True, eq=False)
class _Found:
    """What a power iteration returned: values of shape (k,), vectors of unit length as columns, or NaN where it returned a zero vector."""

    values: Tensor
    vectors: Tensor
    products: int


def _power_iteration(subject: Subject, k: int, tol: float, max_iterations: int, generator: torch.Generator) -> _Found:
    with _pyhessian(subject, generator) as run:
        values, vectors = run.eigenvalues(maxIter=max_iterations, tol=tol, top_n=k)
        products = run.model.products
    flat = torch.stack([torch.cat([part.reshape(-1) for part in vector]) for vector in vectors], 1).detach()
    lengths = torch.linalg.vector_norm(flat, dim=0)
    return _Found(torch.tensor(values, dtype=torch.float64), (flat / lengths).to(subject.dtype), products)


def _end(found: _Found, residuals: Tensor, chosen: Tensor, k: int, tol: float, products: int) -> Eigenpairs:
    values, remaining = found.values[chosen], residuals[chosen]
    unknown = torch.full((k - len(chosen),), math.nan, dtype=torch.float64)
    converged = bool((remaining <= tol * values.abs()).all())
    return Eigenpairs(
        values=torch.cat([values, unknown]),
        vectors=found.vectors[:, chosen.to(found.vectors.device)],
        residuals=torch.cat([remaining, unknown]),
        status=EigenStatus.OK if converged else EigenStatus.NOT_CONVERGED,
        products=products,
        steps=0,
        norm=float(found.values.abs().max()),
    )


def _unsearched(
    subject: Subject, k: int, number: float, status: EigenStatus, products: int
) -> tuple[Eigenpairs, Eigenpairs]:
    """Both ends where there is nothing to search: zeros for the zero matrix, else NaN; without vectors."""
    numbers = torch.full((k,), number, dtype=torch.float64)
    none = torch.empty(subject.size, 0, dtype=subject.dtype, device=subject.device)
    end = Eigenpairs(
        values=numbers, vectors=none, residuals=numbers, status=status, products=products, steps=0, norm=number
    )
    return end, end


class _MeanLoss(nn.Module):
    """A subject's mean loss as a module of its parameters: what PyHessian takes for a model.

    Args:
        subject: The subject, which stays as it is: the parameters are leaves of their own.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.names = list(subject.parameters)
        self.weights = nn.ParameterList([nn.Parameter(p.detach()) for p in subject.parameters.values()])
        self.loss: Callable[[dict[str, Tensor], Any], tuple[Tensor, Tensor]] = subject.losses
        self.terms = subject.terms
        self.products = 0

    def forward(self, chunks: Sequence[Any]) -> Tensor:
        """The sum of all loss terms over their number."""
        parameters = dict(zip(self.names, self.weights, strict=True))
        sums = torch.cat([self.loss(parameters, chunk)[0] for chunk in chunks])
        # PyHessian needs a second derivative in every parameter, also in those that have no influence on the loss or on its gradient.
        nothing = 0.0 * torch.cat([weight.reshape(-1) for weight in self.weights]).square().sum()
        return sums.sum() / self.terms + nothing

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, which PyHessian does before each product; so they can be counted."""
        super().zero_grad(set_to_none)
        self.products += 1


@contextmanager
def _pyhessian(subject: Subject, generator: torch.Generator) -> Iterator[Any]:
    """PyHessian's object for a subject, seeded; afterwards its graphs are freed and the global random state is as before."""
    # Only who asks for this engine has to have it working.
    from pyhessian import hessian as pyhessian

    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    model = _MeanLoss(subject)
    with isolated(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True", category=UserWarning)
        torch.manual_seed(seed)
        try:
            run: Any = pyhessian(model, lambda loss, _: loss, data=(list(subject.chunks()), None), cuda=False)
            run.device = subject.device
            # A gradient that holds the graph of its own parameter is a reference cycle that no collector sees.
            model.zero_grad()
            model.products = 0
            yield run
        finally:
            model.zero_grad()


def _check_subject(subject: Subject) -> None:
    if subject.mode != "eval":
        raise SubjectError(
            f"expected a subject in eval mode with engine='pyhessian', which measures in no other, got mode={subject.mode!r}. Use mode='eval', "
            "or leave the engine at its default."
        )
    if not keeps_graphs(subject):
        raise BudgetError(
            f"expected memory for the graph of all {len(subject.examples)} examples, which PyHessian keeps, but half of the "
            f"{subject.memory / 1e9:.1f} GB allowed does not hold it. Measure on fewer examples, allow more memory, or leave the engine at its "
            "default, which recomputes graphs in chunks."
        )
