"""The whole spectrum of an operator of which the ends are known one by one: density, ranks and trace to an accuracy that is asked for.

Eigenvalues that are known need no random estimate: taken out, they add no variance to what is estimated of the rest (the idea of Hutch++, Meyer,
Musco, Musco & Woodruff 2021). And where parameters are inactive, that is where a product with a random vector is exactly 0, the rows of the
matrix are 0 and so many eigenvalues are: a layer that died is not estimated either.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.linalg.deflation import DeflatedOperator
from plasticity_probe.linalg.dense import vector_norm
from plasticity_probe.linalg.distribution import DETERMINED, Distribution
from plasticity_probe.linalg.krylov import ROUNDING, Krylov, extended, lanczos
from plasticity_probe.linalg.matrix_trace import TraceEstimate, hutchinson
from plasticity_probe.linalg.operator import SymmetricOperator
from plasticity_probe.linalg.quadrature import Quadrature, quadrature_from_krylov
from plasticity_probe.linalg.random_vectors import gaussian

FIRST_STEPS = 8
"""Lanczos steps before the first look at the accuracy; the number grows by half from look to look (our choice: a look costs 0.1 s)."""

TRACE_SHARE = 8
"""One in so many products is kept for the trace, where the draws do not give it (our choice: see `_better_trace`)."""


MARGIN = 1.3
"""Products for the trace, over what its variance asks for (our choice: the interval is longer than that of a normal law)."""


@dataclass(frozen=True, eq=False)
class SpectralEstimate:
    """All that was estimated of a spectrum.

    Args:
        distribution: Nodes and weights, with their errors.
        trace: The sum of all eigenvalues.
        products: Products that were spent.
        reached: Whether density and trace have the accuracy that was asked for.
    """

    distribution: Distribution
    trace: TraceEstimate
    products: int
    reached: bool


@dataclass(frozen=True)
class Accuracy:
    """What is asked of an estimate of a spectrum, and what it may cost.

    Args:
        share: Largest 95 % bound of the density's Wasserstein error, as a share of the distance between the known ends, and largest standard
            error of the trace, as a share of the sum of the absolute eigenvalues.
        max_products: Products to spend at most.
    """

    share: float
    max_products: int


def estimate_spectrum(
    operator: SymmetricOperator,
    largest: Tensor,
    smallest: Tensor,
    vectors: Tensor,
    accuracy: Accuracy,
    *,
    generator: torch.Generator,
    ceiling: int,
    positive: bool = False,
    norm: float = 0.0,
) -> SpectralEstimate:
    """Measures the part of a spectrum between known eigenvalues, by as many products as the accuracy needs.

    A first Krylov space grows until its steps leave open half of the density's error that is allowed, and the threshold rank within a factor of
    two; where that is not to be had, until the products are spent, less those that draws and trace need, so that ranks which stay undetermined
    are at least made alike at every checkpoint. Further draws of as many steps are added while the draws' part of the error is too large. For a
    large operator a single draw does (Chen, Trogdon & Ubaru 2021), as its sampling error is known without a second one. The trace comes last.

    Where the space is exhausted and a product with a direction outside of it is 0, nothing is left but zeros, and everything is exact.

    Args:
        operator: A, of size n.
        largest: Known eigenvalues at the upper end, descending.
        smallest: Known eigenvalues at the lower end, ascending.
        vectors: Their eigenvectors as columns, shape (n, k).
        accuracy: What is asked for.
        generator: The source of all directions.
        ceiling: The largest rank that A can have.
        positive: Whether no eigenvalue is negative.
        norm: A lower bound of the norm of A, to which rounding is relative.

    Returns:
        The spectrum. NaN where a product was not finite.

    Raises:
        UsageError: No eigenvalue is known at the upper end, fewer than 4 products are allowed, or the accuracy is not positive.
    """
    if len(largest) == 0 or accuracy.max_products < 4 or not accuracy.share > 0:
        raise UsageError(
            "expected at least one known eigenvalue at the upper end, max_products >= 4 and an accuracy > 0, "
            f"got {len(largest)}, {accuracy.max_products} and {accuracy.share}."
        )
    looked = operator @ gaussian(operator, generator)
    deflated = _without_inactive(operator, vectors, looked, torch.cat([largest, smallest]), norm)
    spectrum = _Known(deflated, largest.flip(0), smallest, ceiling, positive, accuracy, norm)
    if not bool(looked.isfinite().all()):
        return spectrum.nothing(1)
    first = spectrum.first(generator)
    spent = 1 + first.products
    if first.finite and first.following is None and spent < accuracy.max_products:
        spent += 1
        if spectrum.complete(first, generator):
            return spectrum.whole(first, spent)
    draws = spectrum.with_more(first, spent, generator)
    spent += sum(draw.products for draw in draws[1:])
    if not all(draw.finite for draw in draws):
        return spectrum.nothing(spent)
    distribution = spectrum.distribution(draws)
    trace = _better_trace(spectrum, distribution, draws[0], accuracy.max_products - spent, generator)
    if math.isnan(trace.value):
        return spectrum.nothing(spent + trace.products)
    precise = trace.standard_error <= accuracy.share * distribution.absolute_sum()
    return SpectralEstimate(distribution, trace, spent + trace.products, precise and spectrum.done(distribution))


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of a spectrum, to which draws are added."""

    operator: DeflatedOperator
    largest: Tensor
    smallest: Tensor
    ceiling: int
    positive: bool
    accuracy: Accuracy
    norm: float

    @property
    def ends(self) -> tuple[float, float]:
        """Between which the other eigenvalues lie."""
        low = float(self.smallest[-1]) if len(self.smallest) else 0.0
        return low, float(self.largest[0])

    @property
    def allowed(self) -> float:
        """The part of the density's error that the steps may have, and the draws."""
        return self.accuracy.share / 2 * (self.ends[1] - self.ends[0])

    def done(self, distribution: Distribution) -> bool:
        """Whether the density is as accurate as was asked for."""
        return max(distribution.step_error(), distribution.draw_error()) <= self.allowed

    @property
    def room(self) -> int:
        """Products for the density: all but the first look and what is kept for the trace."""
        return self.accuracy.max_products - 1 - max(1, self.accuracy.max_products // TRACE_SHARE)

    def first(self, generator: torch.Generator) -> Krylov:
        """A Krylov space with as many steps as the accuracy needs or as there is room for."""
        krylov = self._space(generator, min(FIRST_STEPS, self.room))
        while krylov.following is not None and (steps := self._steps(krylov)) > krylov.steps:
            krylov = extended(self.operator, krylov, steps - krylov.steps)
        return krylov

    def with_more(self, first: Krylov, spent: int, generator: torch.Generator) -> list[Krylov]:
        """As many Krylov spaces as the density needs, or as the products allow."""
        draws = [first]
        while draws[-1].finite and spent + first.steps <= self.room + 1:
            if self.distribution(draws).draw_error() <= self.allowed:
                break
            draws.append(self._space(generator, first.steps))
            spent += draws[-1].products
        return draws

    def complete(self, krylov: Krylov, generator: torch.Generator) -> bool:
        """Whether a random direction outside of all that is known is taken to 0, up to rounding."""
        if self.operator.dimension <= krylov.steps:
            return True
        outside = DeflatedOperator(self.operator, krylov.basis)
        image = outside @ outside.direction(generator)
        return vector_norm(image) <= ROUNDING * torch.finfo(image.dtype).eps * max(self.norm, krylov.norm)

    def _space(self, generator: torch.Generator, steps: int) -> Krylov:
        return lanczos(self.operator, self.operator.direction(generator), steps, norm=self.norm)

    def _steps(self, krylov: Krylov) -> int:
        """How many steps are to be taken next, in all; as many as there are if those suffice."""
        distribution = self.distribution([krylov])
        settled = distribution.step_error() <= self.allowed
        if settled:
            least, most = distribution.rank("threshold_rank").steps
            if most <= DETERMINED * least:
                return krylov.steps
        draws = max(1, math.ceil((distribution.draw_error() / self.allowed) ** 2))
        # Draws that will not fit anyway are no reason for fewer steps.
        limit = self.room // draws if settled and draws * krylov.steps <= self.room else self.room
        return min(limit, krylov.steps + max(FIRST_STEPS, krylov.steps // 2))

    def distribution(self, draws: list[Krylov]) -> Distribution:
        """Rows of known eigenvalues, smallest first, then 0 for the inactive parameters, the nodes of a draw, and the largest known ones."""
        rules = [quadrature_from_krylov(draw) for draw in draws]
        width = max(rule.nodes.shape[1] for rule in rules)
        rows = [self._row(rule, width) for rule in rules]
        return self._distribution(
            torch.stack([nodes for nodes, _ in rows]),
            torch.stack([weights for _, weights in rows]),
            torch.cat([draw.offdiagonal[-1:] == 0.0 for draw in draws]),
            self.operator.inactive,
        )

    def whole(self, krylov: Krylov, products: int) -> SpectralEstimate:
        """The whole spectrum, where nothing but zeros is left beside what is known and what a Krylov space holds."""
        values = quadrature_from_krylov(krylov).nodes[0]
        zeros = self.operator.inactive + self.operator.dimension - len(values)
        nothing = torch.zeros(1 if zeros else 0, dtype=torch.float64)
        nodes = torch.cat([self.smallest, nothing, values, self.largest])
        weights = torch.full_like(nodes, 1 / self.operator.size)
        weights[len(self.smallest) : len(self.smallest) + len(nothing)] *= zeros
        distribution = self._distribution(nodes[None], weights[None], torch.ones(1), zeros)
        total = float(nodes.sum())
        return SpectralEstimate(
            distribution, TraceEstimate.of_interval(total, total, total, 0, 0), products, reached=True
        )

    def nothing(self, products: int) -> SpectralEstimate:
        """NaN throughout."""
        nodes = torch.full((1, len(self.smallest) + len(self.largest) + 1), math.nan, dtype=torch.float64)
        trace = TraceEstimate.of_interval(math.nan, math.nan, math.nan, 0, 0)
        return SpectralEstimate(self._distribution(nodes, nodes, torch.zeros(1), 0), trace, products, reached=False)

    def _row(self, rule: Quadrature, width: int) -> tuple[Tensor, Tensor]:
        each = 1 / self.operator.size
        inactive = torch.zeros(1 if self.operator.inactive else 0, dtype=torch.float64)
        filler = rule.nodes[0, -1:].expand(width - rule.nodes.shape[1])
        nodes = torch.cat([self.smallest, inactive, rule.nodes[0], filler, self.largest])
        weights = torch.cat(
            [
                torch.full_like(self.smallest, each),
                inactive + each * self.operator.inactive,
                each * self.operator.dimension * rule.weights[0],
                torch.zeros_like(filler),
                torch.full_like(self.largest, each),
            ]
        )
        return nodes, weights

    def _distribution(self, nodes: Tensor, weights: Tensor, exact: Tensor, zeros: int) -> Distribution:
        return Distribution(
            nodes,
            weights,
            exact,
            smallest=len(self.smallest),
            largest=len(self.largest),
            size=self.operator.size,
            ceiling=min(self.ceiling, self.operator.size - zeros),
            eps=torch.finfo(self.operator.dtype).eps,
            positive=self.positive,
            zeros=zeros,
        )


def _without_inactive(
    operator: SymmetricOperator, vectors: Tensor, product: Tensor, known: Tensor, norm: float
) -> DeflatedOperator:
    """Leaves out coordinates where a product with a random vector is exactly 0; none where known eigenvalues may themselves be 0."""
    active = product != 0
    distinct = bool((known.abs() > 64 * torch.finfo(operator.dtype).eps * norm).all())
    fewer = vectors.shape[1] + 2 <= int(active.sum()) < operator.size
    return DeflatedOperator(operator, vectors, active if distinct and fewer else None)


def _better_trace(
    spectrum: _Known,
    distribution: Distribution,
    krylov: Krylov,
    room: int,
    generator: torch.Generator,
) -> TraceEstimate:
    """The trace from the draws, or where that is not accurate enough from single products outside of the Krylov space, whichever is better.

    Inside the space of the basis Q the trace is that of T, exact and paid for; outside it the squares of the eigenvalues sum to
    ``|A|_F^2 - |T|_F^2 - 2 beta^2``, which is known beforehand, so the number of products that are needed is too. This is Hutch++ with the
    Krylov space as its sketch (Chen & Hallman 2023), and it wins over more draws of the whole wherever Q takes any of ``|A|_F^2``.
    """
    value, lower, upper, _ = distribution.trace()
    drawn = TraceEstimate.of_interval(value, lower, upper, len(distribution.nodes), 0)
    wanted = spectrum.accuracy.share * distribution.absolute_sum()
    if drawn.standard_error <= wanted or spectrum.operator.dimension < krylov.steps + 2:
        return drawn
    known = float(spectrum.largest.sum() + spectrum.smallest.sum() + krylov.diagonal.sum())
    outer = _squares(distribution) - float(krylov.diagonal.square().sum() + 2 * krylov.offdiagonal.square().sum())
    needed = min(room, math.ceil(MARGIN * 2 * max(outer, 0.0) / wanted**2) + 2) if wanted > 0 else min(room, 1)
    if needed < 1 or 2 * max(outer, 0.0) / needed >= drawn.standard_error**2:
        return drawn
    outer_part = DeflatedOperator(spectrum.operator, krylov.basis)
    return hutchinson(outer_part, needed, generator, ends=spectrum.ends).plus(known, 0)


def _squares(distribution: Distribution) -> float:
    """The sum of the squared eigenvalues that are not known."""
    squares = float((distribution.weights * distribution.nodes.square()).sum(1).mean()) * distribution.size
    return squares - float(distribution.known_eigenvalues().square().sum())
