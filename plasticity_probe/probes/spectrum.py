"""Measuring the spectrum of a curvature matrix: its extreme eigenvalues, its trace, its density and its ranks."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.linalg.deflation import DeflatedOperator
from plasticity_probe.linalg.dense import symmetric_eigenpairs
from plasticity_probe.linalg.distribution import Distribution, Estimate
from plasticity_probe.linalg.inspection import EigenStatus
from plasticity_probe.linalg.lanczos import Eigenpairs, ExtremeEigenpairs
from plasticity_probe.linalg.matrix_trace import TraceEstimate, hutchinson
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.linalg.spectral_density import Accuracy, SpectralEstimate, estimate_spectrum
from plasticity_probe.measurement import Measurement, Status
from plasticity_probe.network.curvature import (
    DENSE_BELOW,
    MATRICES,
    curvature,
    eigenpairs,
    graph_bytes,
    krylov_vectors,
    rank_limit,
    search_cost,
)
from plasticity_probe.network.pyhessian_engine import check_pyhessian_request, pyhessian_eigenpairs, pyhessian_trace
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe, generator_for, measured
from plasticity_probe.spectrum import DELTA, Spectrum

NAN = float("nan")

ENGINES = ("plasticity_probe", "pyhessian")
"""What can compute a spectrum."""

TRACE_DRAWS = 10
"""Random vectors for the trace where there is no density (our choice)."""

LEAST_PRODUCTS = 8
"""Products below which a density is not worth its name (our choice)."""


@final
@dataclass(frozen=True)
class HessianSpectrum(Probe[Spectrum]):
    """Measures the spectrum of a curvature matrix.

    The k largest and smallest eigenpairs come first. The rest of the spectrum is then measured on their complement, so that no random weight
    blurs what is known (deflation, as in Hutch++), by stochastic Lanczos quadrature with as many steps and draws as the accuracy needs; the same
    products give the trace. A matrix of at most 512 parameters is formed, and everything is exact.

    Args:
        matrix: "hessian", "ggn" (generalised Gauss-Newton), "fisher" (empirical, uncentred) or "true_fisher" (over the model's
            own predictions).
        k: Eigenpairs at each end (our choice: the number of classes of the usual data sets, where outliers are expected; Gur-Ari et al. 2018).
        tol: Relative residual of a converged pair (our choice: three digits, as a sampled loss has no more).
        density: Whether to measure the distribution of the rest; without it there are no ranks.
        accuracy: Wasserstein error of the density that is allowed, as a share of the distance between the k-th largest and the k-th smallest
            eigenvalue, and standard error of the trace, as a share of the sum of absolute eigenvalues (our choice: half a percent is the width
            of a line in a figure, and a trained ResNet-20 reaches it in 30 steps).
        density_products: Products that density and trace may take together; where that is not enough, `accuracy_reached` is 0. Our choice: with
            64 a trained ResNet-20 takes about 170 products in all. Steps go on to this limit also where the threshold rank is not settled, so
            that what it says at different checkpoints is made alike.
        examples: Examples measured on, at most. Our choice: with these defaults a ResNet-20 on 32x32 images takes two minutes on two CPU cores.
            Averages over more examples are better estimates of the whole data's curvature.
        max_products: Products after which the search for eigenpairs gives up (our choice: a trained ResNet-20 on 128 examples took 104, an
            MLP of 1.9 million parameters 258, and 331 on 1024).
        engine: What computes: "plasticity_probe", or "pyhessian" for PyHessian's power iteration and trace, to compare (Yao et al. 2020). That
            finds the k eigenvalues of largest magnitude, of both signs together, and has no density: pass density=False.

    Raises:
        UnknownNameError: There is no such matrix or engine.
        UsageError: A setting is out of range, or the engine does not have what is asked for.
    """

    name: ClassVar[str] = "hessian_spectrum"
    title: ClassVar[str] = "spectrum of the curvature"
    needs: ClassVar[Need] = Need.DATA | Need.LOSS | Need.GRADIENTS
    returns: ClassVar[type[Measurement]] = Spectrum

    matrix: str = "hessian"
    k: int = 10
    tol: float = 1e-3
    density: bool = True
    accuracy: float = 0.01
    density_products: int = 64
    examples: int = 128
    max_products: int = 500
    engine: str = "plasticity_probe"

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            raise UnknownNameError("curvature matrix", self.matrix, MATRICES)
        if self.engine not in ENGINES:
            raise UnknownNameError("engine", self.engine, ENGINES)
        if self.engine == "pyhessian":
            check_pyhessian_request(self.matrix, self.density)
        if min(self.k, self.examples) < 1 or not self.tol > 0 or not self.accuracy > 0:
            raise UsageError(f"expected k and examples >= 1, tol and accuracy > 0, got {self}.")
        if self.density_products < LEAST_PRODUCTS:
            raise UsageError(
                f"expected density_products >= {LEAST_PRODUCTS}, got {self.density_products}; fewer resolve nothing. Pass density=False "
                "to do without."
            )
        if self.max_products < 2 * self.k + 4:
            raise UsageError(
                f"expected max_products >= 2 k + 4 = {2 * self.k + 4}, got {self.max_products}; raise it or ask for a smaller k."
            )

    def cost(self, subject: Subject) -> Cost:
        """The search, and the trace with or without the density, at their longest; two Krylov spaces, and the graphs of the examples."""
        subject = subject.take(self.examples)
        products = self.max_products + 4 * self.k + (self.density_products if self.density else TRACE_DRAWS)
        return Cost(
            forwards=len(subject.examples),
            products=len(subject.examples) * (2 * subject.size if subject.size <= DENSE_BELOW else products),
            vectors=max(krylov_vectors(subject, self.k, self.max_products), self._vectors_of_density()),
            graphs=graph_bytes(subject, self.matrix),
            shared=search_cost(subject, self.matrix, self.k, self.tol, self.max_products),
        )

    def _vectors_of_density(self) -> int:
        """Vectors held while the density is measured: those found, twice copied, and a basis that is copied when it grows."""
        return 6 * self.k + 2 * self.density_products if self.density else 0

    def measure(self, subject: Subject, generator: torch.Generator) -> Spectrum:
        """Measures the subject's first `examples` examples.

        Raises:
            SubjectError: The loss does not allow the matrix.
            BudgetError: The eigenvectors asked for do not fit the memory.
        """
        subject = subject.take(self.examples)
        if self.engine == "pyhessian":
            return self._spectrum(subject, *self._by_pyhessian(subject, generator))
        start = generator_for(subject.seed, "eigenpairs")
        found = eigenpairs(
            subject, matrix=self.matrix, k=self.k, tol=self.tol, max_products=self.max_products, generator=start
        )
        return self._spectrum(subject, found, self._rest(subject, found, generator))

    def _spectrum(self, subject: Subject, found: ExtremeEigenpairs, rest: SpectralEstimate) -> Spectrum:
        """Puts together the ends and the rest of a spectrum."""
        if math.isnan(rest.trace.value) and found.top.status in (EigenStatus.OK, EigenStatus.NOT_CONVERGED):
            status, message = Status.NONFINITE, _NONFINITE
        else:
            status, message = _status(found, self)
        distribution, nothing = rest.distribution, torch.empty(0, 0, dtype=torch.float64)
        threshold, effective = (
            distribution.rank(name, DELTA) if self.density else Estimate.exact(NAN)
            for name in ("threshold_rank", "effective_rank")
        )
        return Spectrum(
            conditions=subject.conditions(),
            status=status,
            message=message,
            matrix=self.matrix,
            top=found.top.values,
            top_residuals=found.top.residuals,
            bottom=found.bottom.values,
            bottom_residuals=found.bottom.residuals,
            matrix_trace=rest.trace.value,
            matrix_trace_sem=rest.trace.standard_error,
            matrix_trace_lower=rest.trace.lower,
            matrix_trace_upper=rest.trace.upper,
            nodes=distribution.nodes if self.density else nothing,
            weights=distribution.weights if self.density else nothing,
            exact=distribution.exact.double() if self.density else nothing.reshape(0),
            density_error=distribution.density_error() if self.density else NAN,
            accuracy_reached=float(rest.reached),
            threshold_rank=threshold.value,
            threshold_rank_lower=threshold.lower,
            threshold_rank_upper=threshold.upper,
            effective_rank=effective.value,
            effective_rank_lower=effective.lower,
            effective_rank_upper=effective.upper,
            negative_share=distribution.negative_share() if self.density else NAN,
            ceiling=float(distribution.ceiling),
            zeros=float(distribution.zeros),
            products=float(found.top.products + rest.products),
        )

    def _by_pyhessian(self, subject: Subject, generator: torch.Generator) -> tuple[ExtremeEigenpairs, SpectralEstimate]:
        """What PyHessian finds: eigenvalues of largest magnitude, and the trace."""
        found = pyhessian_eigenpairs(
            subject,
            k=self.k,
            tol=self.tol,
            max_iterations=max(1, self.max_products // self.k),
            generator=generator_for(subject.seed, "eigenpairs"),
        )
        trace = pyhessian_trace(subject, draws=TRACE_DRAWS, generator=generator)
        nothing = torch.full((1,), NAN, dtype=torch.float64)
        empty = _of_eigenvalues(nothing, trace.products, subject, rank_limit(subject, self.matrix))
        return ExtremeEigenpairs(*found), replace(empty, trace=trace)

    def _rest(self, subject: Subject, found: ExtremeEigenpairs, generator: torch.Generator) -> SpectralEstimate:
        """Everything but the extreme eigenpairs."""
        ceiling = rank_limit(subject, self.matrix)
        if found.top.status is EigenStatus.ZERO_OPERATOR:
            return _of_eigenvalues(torch.zeros(1, dtype=torch.float64), 0, subject, ceiling)
        if found.top.status not in (EigenStatus.OK, EigenStatus.NOT_CONVERGED):
            return _of_eigenvalues(torch.full((1,), NAN, dtype=torch.float64), 0, subject, ceiling)
        with curvature(subject, self.matrix) as operator:
            if operator.size <= max(DENSE_BELOW, 2 * self.k):
                values = symmetric_eigenpairs(to_dense(operator))[0]
                return _of_eigenvalues(values, operator.size, subject, ceiling)
            smallest = found.bottom.values if self.matrix == "hessian" else found.bottom.values[:0]
            known = torch.cat([found.top.vectors, found.bottom.vectors[:, : len(smallest)]], 1)
            if not self.density:
                trace = hutchinson(DeflatedOperator(operator, known), TRACE_DRAWS, generator)
                exact = float(found.top.values.sum() + smallest.sum())
                empty = _of_eigenvalues(torch.full((1,), NAN, dtype=torch.float64), TRACE_DRAWS, subject, ceiling)
                return replace(empty, trace=trace.plus(exact, 0))
            return estimate_spectrum(
                operator,
                found.top.values,
                smallest,
                known,
                Accuracy(self.accuracy, self.density_products),
                generator=generator,
                ceiling=ceiling,
                positive=self.matrix != "hessian",
                norm=found.top.norm,
            )


def hessian_spectrum(
    model: nn.Module,
    loader: Any,
    *,
    matrix: str = "hessian",
    k: int = 10,
    tol: float = 1e-3,
    density: bool = True,
    accuracy: float = 0.01,
    density_products: int = 64,
    examples: int = 128,
    max_products: int = 500,
    engine: str = "plasticity_probe",
    seed: int = 0,
    **options: Any,
) -> Spectrum:
    """The spectrum of the Hessian, or another curvature matrix, of a model's mean loss; what and why, see `HessianSpectrum`.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches.
        matrix: "hessian", "ggn", "fisher" or "true_fisher".
        k: Eigenpairs at each end.
        tol: Relative residual of a converged pair.
        density: Whether to measure the distribution of the other eigenvalues too.
        accuracy: Error of density and trace that is allowed, as shares of the spectrum's range and of the sum of its absolute values.
        density_products: Products that density and trace may take together.
        examples: Read and measure no more than this many.
        max_products: Products after which the search for eigenpairs gives up.
        engine: What computes: "plasticity_probe" or, with density=False, "pyhessian".
        seed: Seed of all random vectors.
        options: loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`).

    Returns:
        The spectrum. Where the search gave up its status is NOT_CONVERGED, and the residuals say what each value is worth.

    Raises:
        UsageError: A setting is out of range.
        SubjectError: Model, loss and data do not go together, every parameter is frozen, or the loss does not allow the matrix.
        BudgetError: The eigenvectors asked for do not fit the memory.
    """
    probe = HessianSpectrum(matrix, k, tol, density, accuracy, density_products, examples, max_products, engine)
    return measured(probe, model, loader, examples=examples, seed=seed, **options)


def _of_eigenvalues(values: Tensor, products: int, subject: Subject, ceiling: int) -> SpectralEstimate:
    """What is known when every eigenvalue is; a single one stands for all of them."""
    nodes = values.flip(0).unsqueeze(0)
    trace, eps = float(values.sum()), torch.finfo(subject.dtype).eps
    distribution = Distribution(
        nodes,
        torch.full_like(nodes, 1 / len(values)),
        torch.ones(1, dtype=torch.float64),
        smallest=0,
        largest=0,
        size=subject.size,
        ceiling=ceiling,
        eps=eps,
    )
    estimate = TraceEstimate.of_interval(trace, trace, trace, 0, 0)
    return SpectralEstimate(distribution, estimate, products, reached=not math.isnan(trace))


_NONFINITE = (
    "a curvature-vector product holds NaN or Inf. Likely causes: NaN or Inf in the weights (training diverged, or a damaged checkpoint), or a "
    "loss that overflows."
)


def _status(found: ExtremeEigenpairs, probe: HessianSpectrum) -> tuple[Status, str]:
    ends = found.top, found.bottom
    if found.top.status is EigenStatus.NONFINITE:
        return Status.NONFINITE, _NONFINITE
    if found.top.status in (EigenStatus.ASYMMETRIC, EigenStatus.NOT_REPEATABLE):
        return Status.FAILED, (
            f"the matrix is {found.top.status.replace('_', ' ')}: the network draws random numbers between calls, or a custom operation has a "
            "wrong second derivative. Try dtype=torch.float64."
        )
    if all(end.status in (EigenStatus.OK, EigenStatus.ZERO_OPERATOR) for end in ends):
        return Status.OK, ""
    open_ends = [
        _open(end, name, probe.tol)
        for end, name in zip(ends, ("largest", "smallest"), strict=True)
        if end.status is not EigenStatus.OK
    ]
    return Status.NOT_CONVERGED, (
        f"{'; '.join(open_ends)}, after {found.top.products} products. Raise max_products (now {probe.max_products}) or tol (now "
        f"{probe.tol:g}), or ask for a smaller k; the residuals say what each value is worth."
    )


def _open(end: Eigenpairs, name: str, tol: float) -> str:
    known = end.values[~end.values.isnan()]
    relative = end.residuals[: len(known)] / known.abs()
    above = int((relative > tol).sum())
    if above == 0:
        return f"whether more eigenvalues as large as the {name} exist was not settled"
    return f"{above} of the {len(known)} {name} eigenvalues did not converge (relative residual up to {float(relative.max()):.1e})"
