"""The spectrum of a curvature matrix: its extreme eigenvalues, its trace, its density and its ranks."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.linalg import ranks
from plasticity_probe.linalg.deflation import DeflatedOperator, deflated_quadrature
from plasticity_probe.linalg.dense import symmetric_eigenpairs
from plasticity_probe.linalg.inspection import EigenStatus
from plasticity_probe.linalg.lanczos import Eigenpairs, ExtremeEigenpairs
from plasticity_probe.linalg.matrix_trace import hutchinson
from plasticity_probe.linalg.operator import to_dense
from plasticity_probe.linalg.quadrature import Quadrature, density
from plasticity_probe.linalg.resolution import Distribution, Estimate
from plasticity_probe.measurement import Conditions, Measurement, Quantity, Status, measurement
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
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe, generator_for, measured
from plasticity_probe.rank import Rank

NAN = float("nan")

TRACE_DRAWS = 10
"""Random vectors for the trace (our choice: the standard error itself is then known to a quarter)."""

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
        matrix: "hessian", "ggn" or "fisher".
        top: The k largest eigenvalues (algebraic), descending.
        top_residuals: |A v - lambda v| of each; an eigenvalue lies within this distance.
        bottom: The k smallest eigenvalues (algebraic), ascending.
        bottom_residuals: The same of each of those.
        matrix_trace: Sum of all eigenvalues: that of the pairs above exactly, of the rest from random
            vectors (as in Hutch++, Meyer et al. 2021).
        matrix_trace_sem: Its standard error; 0 where it is exact.
        nodes: Where the eigenvalues are, ascending, one row a draw: the pairs above (of a Fisher or Gauss-Newton matrix the largest alone), and
            Gauss nodes for the rest.
        weights: Share of all P eigenvalues at each node; each row sums to 1. Rows are filled up with nodes of weight 0.
        exact: Per draw 1 where its nodes are eigenvalues themselves, so that more steps would change nothing; else 0.
        threshold_rank: Least k whose k largest |eigenvalues| hold 99 % of their sum (Lewandowski et al. 2023), the mean over draws.
        threshold_rank_lower: Lower end of its interval, see `rank`.
        threshold_rank_upper: Upper end.
        effective_rank: exp of the entropy of the normalised |eigenvalues| (Roy & Vetterli 2007), the mean over draws.
        effective_rank_lower: Lower end of its interval.
        effective_rank_upper: Upper end.
        negative_share: Sum of the negative eigenvalues' absolute values over that of all; NaN for the zero matrix.
        ceiling: The largest rank that the matrix can have: P for the Hessian, fewer where the examples limit it.
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
    nodes: Annotated[Float[Tensor, "draw node"], Quantity("quadrature nodes", units="loss")]
    weights: Annotated[Float[Tensor, "draw node"], Quantity("share of the eigenvalues at each node")]
    exact: Annotated[Float[Tensor, " draw"], Quantity("whether the nodes are eigenvalues")]
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
        return BANDWIDTH * ((high - low) or abs(high) or 1.0)

    def rank(self, definition: str = "threshold_rank", delta: float = DELTA, *, epsilon: float | None = None) -> Rank:
        """A rank of the matrix, from the absolute values of its eigenvalues.

        The interval holds the ranks of all spectra that would have given the same nodes (`plasticity_probe.linalg.resolution`) and the 95 %
        Student-t interval of the mean over draws. With millions of eigenvalues near zero it can be wide: then these many products do not settle
        the rank, whatever the value says. Eigenvalues below eps(dtype) times the largest count as 0.

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
        distribution = _distribution(
            self._nodes, self.weights, self.exact, self.matrix, len(self.top), int(self.ceiling), self.conditions
        )
        found = {name: distribution.rank(name, delta, epsilon) for name in (*RANKS, definition)}
        asked = found[definition]
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
            **{name: found[name].value for name in RANKS},
        )

    @property
    def _nodes(self) -> Tensor:
        if self.nodes.numel() == 0:
            raise UsageError(
                "expected a spectrum with a density, but it was measured with density=False. Measure it again with density=True."
            )
        return self.nodes


def _distribution(
    nodes: Tensor, weights: Tensor, exact: Tensor, matrix: str, pairs: int, ceiling: int, conditions: Conditions
) -> Distribution:
    """Only the Hessian's smallest eigenvalues are known nodes: those of the others are mostly zero, and many."""
    positive = matrix != "hessian"
    return Distribution(
        nodes,
        weights,
        exact,
        size=conditions.parameters,
        smallest=0 if positive else pairs,
        largest=pairs,
        ceiling=ceiling,
        eps=torch.finfo(getattr(torch, conditions.dtype)).eps,
        positive=positive,
    )


@final
@dataclass(frozen=True)
class HessianSpectrum(Probe[Spectrum]):
    """Measures the spectrum of a curvature matrix.

    The k largest and smallest eigenpairs come first. The rest of the spectrum is then measured on their complement, so that no random weight
    blurs what is known (deflation, as in Hutch++): its trace by Hutchinson's estimator, its distribution by stochastic Lanczos quadrature. A
    matrix of at most 512 parameters is formed, and everything is exact.

    Args:
        matrix: "hessian", "ggn" (generalised Gauss-Newton) or "fisher" (empirical, uncentred).
        k: Eigenpairs at each end (our choice: the number of classes of the usual data sets, where outliers are expected; Gur-Ari et al. 2018).
        tol: Relative residual of a converged pair (our choice: three digits, as a sampled loss has no more).
        density: Whether to measure the distribution of the rest; without it there are no ranks.
        draws: Random vectors of the quadrature (our choice: the least that gives an interval over draws with more than one degree of freedom).
        steps: Lanczos steps of each (our choice, with `draws` and `examples`: see below).
        examples: Examples measured on, at most. Our choice: with these defaults a ResNet-20 on 32x32 images takes about 230 products, two
            minutes on two CPU cores. Averages over more examples are better estimates of the whole data's curvature.
        max_products: Products after which the search for eigenpairs gives up (our choice: a trained ResNet-20 took 160, a fresh convolutional
            network 215).

    Raises:
        UnknownNameError: There is no such matrix.
        UsageError: A setting is out of range.
    """

    name: ClassVar[str] = "hessian_spectrum"
    title: ClassVar[str] = "spectrum of the curvature"
    needs: ClassVar[Need] = Need.DATA | Need.LOSS | Need.GRADIENTS
    returns: ClassVar[type[Measurement]] = Spectrum

    matrix: str = "hessian"
    k: int = 10
    tol: float = 1e-3
    density: bool = True
    draws: int = 3
    steps: int = 20
    examples: int = 128
    max_products: int = 300

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            raise UnknownNameError("curvature matrix", self.matrix, MATRICES)
        if min(self.k, self.draws, self.steps, self.examples) < 1 or not self.tol > 0:
            raise UsageError(f"expected k, draws, steps and examples >= 1 and tol > 0, got {self}.")
        if self.max_products < 2 * self.k + 4:
            raise UsageError(
                f"expected max_products >= 2 k + 4 = {2 * self.k + 4}, got {self.max_products}; raise it or ask for a smaller k."
            )

    def cost(self, subject: Subject) -> Cost:
        """The search at its longest, the trace and the quadrature; two Krylov spaces, and the graphs of the examples."""
        subject = subject.take(self.examples)
        products = self.max_products + 4 * self.k + TRACE_DRAWS + (self.draws * self.steps if self.density else 0)
        return Cost(
            forwards=len(subject.examples),
            products=len(subject.examples) * (2 * subject.size if subject.size <= DENSE_BELOW else products),
            vectors=krylov_vectors(subject, self.k, self.max_products),
            bytes=graph_bytes(subject),
            shared=search_cost(subject, self.matrix, self.k, self.tol, self.max_products),
        )

    def measure(self, subject: Subject, generator: torch.Generator) -> Spectrum:
        """Measures the subject's first `examples` examples.

        Raises:
            SubjectError: The loss does not allow the matrix.
            BudgetError: The eigenvectors asked for do not fit the memory.
        """
        subject = subject.take(self.examples)
        start = generator_for(subject.seed, "eigenpairs")
        found = eigenpairs(
            subject, matrix=self.matrix, k=self.k, tol=self.tol, max_products=self.max_products, generator=start
        )
        rest = self._rest(subject, found, generator)
        if rest.broken and found.top.status in (EigenStatus.OK, EigenStatus.NOT_CONVERGED):
            status, message = Status.NONFINITE, _NONFINITE
        else:
            status, message = _status(found, self)
        conditions, ceiling = subject.conditions(), rank_limit(subject, self.matrix)
        distribution = _distribution(
            rest.nodes, rest.weights, rest.exact, self.matrix, len(found.top.values), ceiling, conditions
        )
        measured_density = rest.nodes.numel() > 0
        threshold, effective = (
            distribution.rank(name, DELTA) if measured_density else Estimate(NAN, NAN, NAN)
            for name in ("threshold_rank", "effective_rank")
        )
        return Spectrum(
            conditions=conditions,
            status=status,
            message=message,
            matrix=self.matrix,
            top=found.top.values,
            top_residuals=found.top.residuals,
            bottom=found.bottom.values,
            bottom_residuals=found.bottom.residuals,
            matrix_trace=rest.trace,
            matrix_trace_sem=rest.trace_sem,
            nodes=rest.nodes,
            weights=rest.weights,
            exact=rest.exact,
            threshold_rank=threshold.value,
            threshold_rank_lower=threshold.lower,
            threshold_rank_upper=threshold.upper,
            effective_rank=effective.value,
            effective_rank_lower=effective.lower,
            effective_rank_upper=effective.upper,
            negative_share=distribution.negative_share() if measured_density else NAN,
            ceiling=float(ceiling),
            products=float(found.top.products + rest.products),
        )

    def _rest(self, subject: Subject, found: ExtremeEigenpairs, generator: torch.Generator) -> "_Rest":
        """Everything but the extreme eigenpairs."""
        if found.top.status is EigenStatus.ZERO_OPERATOR:
            return _Rest.of_eigenvalues(torch.zeros(1, dtype=torch.float64), 0, self.density)
        if found.top.status not in (EigenStatus.OK, EigenStatus.NOT_CONVERGED):
            return _Rest.of_eigenvalues(torch.full((1,), NAN, dtype=torch.float64), 0, self.density)
        with curvature(subject, self.matrix) as operator:
            if operator.size <= max(DENSE_BELOW, 2 * self.k):
                return _Rest.of_eigenvalues(symmetric_eigenpairs(to_dense(operator))[0], operator.size, self.density)
            smallest = found.bottom.values if self.matrix == "hessian" else found.bottom.values[:0]
            known = torch.cat([found.top.vectors, found.bottom.vectors[:, : len(smallest)]], 1)
            complement = DeflatedOperator(operator, known)
            estimate = hutchinson(complement, TRACE_DRAWS, generator)
            trace = float(found.top.values.sum() + smallest.sum()) + estimate.value
            if not self.density:
                nothing = torch.empty(0, 0, dtype=torch.float64)
                return _Rest(trace, estimate.standard_error, nothing, nothing, nothing.reshape(0), TRACE_DRAWS)
            drawn = deflated_quadrature(
                complement,
                found.top.values,
                smallest,
                draws=self.draws,
                steps=self.steps,
                generator=generator,
                norm=found.top.norm,
            )
        products = TRACE_DRAWS + drawn.products
        return _Rest(trace, estimate.standard_error, drawn.nodes, drawn.weights, drawn.exhausted.double(), products)


def hessian_spectrum(
    model: nn.Module,
    loader: Any,
    *,
    matrix: str = "hessian",
    k: int = 10,
    tol: float = 1e-3,
    density: bool = True,
    draws: int = 3,
    steps: int = 20,
    examples: int = 128,
    max_products: int = 300,
    seed: int = 0,
    **options: Any,
) -> Spectrum:
    """The spectrum of the Hessian, or another curvature matrix, of a model's mean loss; what and why, see `HessianSpectrum`.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches.
        matrix: "hessian", "ggn" or "fisher".
        k: Eigenpairs at each end.
        tol: Relative residual of a converged pair.
        density: Whether to measure the distribution of the other eigenvalues too.
        draws: Random vectors of the quadrature.
        steps: Lanczos steps of each.
        examples: Read and measure no more than this many.
        max_products: Products after which the search for eigenpairs gives up.
        seed: Seed of all random vectors.
        options: loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`).

    Returns:
        The spectrum. Where the search gave up its status is NOT_CONVERGED, and the residuals say what each value is worth.

    Raises:
        UsageError: A setting is out of range.
        SubjectError: Model, loss and data do not go together, every parameter is frozen, or the loss does not allow the matrix.
        BudgetError: The eigenvectors asked for do not fit the memory.
    """
    probe = HessianSpectrum(matrix, k, tol, density, draws, steps, examples, max_products)
    return measured(probe, model, loader, examples=examples, seed=seed, **options)


@dataclass(frozen=True, eq=False)
class _Rest:
    """Trace and distribution of a spectrum."""

    trace: float
    trace_sem: float
    nodes: Tensor
    weights: Tensor
    exact: Tensor
    products: int

    @classmethod
    def of_eigenvalues(cls, values: Tensor, products: int, density: bool) -> "_Rest":
        """What is known when every eigenvalue is; a single one stands for all of them."""
        nodes = values.flip(0).unsqueeze(0) if density else values.new_empty(0, 0)
        weights = torch.full_like(nodes, 1 / len(values))
        trace = float(values.sum())
        return cls(
            trace, 0.0 if math.isfinite(trace) else NAN, nodes, weights, torch.ones(len(nodes)).double(), products
        )

    @property
    def broken(self) -> bool:
        """Whether a product was not finite."""
        return not (math.isfinite(self.trace) and bool(self.nodes.isfinite().all()))


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
    relative = end.residuals / end.values.abs()
    above = int((relative > tol).sum())
    if above == 0:
        return f"whether more eigenvalues as large as the {name} exist was not settled"
    return f"{above} of the {len(end.values)} {name} eigenvalues did not converge (relative residual up to {float(relative.max()):.1e})"
