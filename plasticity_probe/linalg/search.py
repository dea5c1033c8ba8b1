"""The search for extreme eigenpairs in a Krylov space, in steps that stop for a reason.

The space grows until the pairs of an end have converged. Then a Lanczos run from an independent random vector looks at what the space lacks.
What it finds is taken in with further random starts, whose number doubles each time, and the search goes on. At the end, for either end of
the spectrum, a product with a random combination of its pairs tests what the search says of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from plasticity_probe.linalg.completeness import Evidence, run_outside
from plasticity_probe.linalg.dense import vector_norm
from plasticity_probe.linalg.inspection import EigenStatus
from plasticity_probe.linalg.krylov_space import NEGLIGIBLE, KrylovSpace, Ritz

MISSED = 1e-4
"""Probability with which an eigenvalue that was missed may be declared absent (our choice)."""

MARGIN = 0.5
"""Share of the margin of the last value beyond which nothing may be missing (our choice: the other half is for the error of that value)."""

INDISTINCT = 4.0
"""Multiples of what rounding leaves up to which a limit is not told from rounding (our choice: twice the margin of a value that is rounding)."""

STARTS = 16
"""The most random starts that join at once after something was missed (our choice); their number doubles each time."""

UNASKED = 8
"""Most steps between looks at the numbers where looking interrupts an accelerator (our choice)."""

FIRST_UNASKED = 3
"""Steps of a run outside of the space before the first look at its numbers (our choice: they tell how many it will take)."""


@dataclass(frozen=True)
class End:
    """One end of a spectrum, as the largest values of ``sign * A``: so many of them, or where `count` is None all beyond a limit."""

    sign: float
    count: int | None
    limit: float = 0.0

    def order(self, values: Tensor) -> list[int]:
        """The places of descending values, from this end."""
        places = list(range(values.numel()))
        return places if self.sign > 0 else places[::-1]

    def wanted(self, values: Tensor) -> list[int]:
        """The places of the values asked for, the outermost first."""
        order = self.order(values)
        if self.count is not None:
            return order[: self.count]
        return [place for place in order if self.sign * float(values[place]) >= self.limit]

    @property
    def asked(self) -> bool:
        """Whether anything is asked for at this end."""
        return self.count != 0


@dataclass(frozen=True, eq=False)
class Solution:
    """The pairs of the normalised operator, outermost first at each end, and what the products gave away."""

    values: tuple[Tensor, Tensor]
    vectors: tuple[Tensor, Tensor]
    residuals: tuple[Tensor, Tensor]
    overlooked: tuple[float, float]
    flaw: EigenStatus | None
    norm: float
    steps: int


@dataclass(frozen=True, eq=False)
class Search:
    """A space and the rules that every step of the search keeps to."""

    space: KrylovSpace
    ends: tuple[End, End]
    tol: float
    max_products: int

    def allowed(self, values: Tensor) -> Tensor:
        """The largest residual of a converged pair, for each value."""
        return (self.tol * values.abs()).clamp(min=self.space.floor)

    @property
    def spent(self) -> bool:
        """Whether no step may begin any more."""
        return self.left <= 0

    @property
    def left(self) -> int:
        """How many products are left."""
        return self.max_products - self.space.products

    def wanted(self, ritz: Ritz) -> list[int]:
        """The places of the values that either end asks for."""
        return sorted({place for end in self.ends for place in end.wanted(ritz.values)})

    def converged(self, end: End, ritz: Ritz) -> bool:
        """Whether all pairs that an end asks for are there, with small residuals."""
        wanted = end.wanted(ritz.values)
        if sum(each.count or 0 for each in self.ends) > len(ritz.values) < self.space.operator.size:
            return False
        return bool((ritz.residuals[wanted] <= self.allowed(ritz.values[wanted])).all())

    def kept(self, ritz: Ritz) -> list[int]:
        """What a restart keeps: the wanted pairs, and the next ones up to half of what else there is room for."""
        wanted = self.wanted(ritz)
        asked = [end for end in self.ends if end.asked]
        spare = max(0, self.space.capacity - len(wanted)) // (2 * len(asked))
        kept = set(wanted)
        for end in asked:
            kept |= set([place for place in end.order(ritz.values) if place not in kept][:spare])
        return sorted(kept)[: self.space.capacity - 1]

    def limit(self, end: End, ritz: Ritz) -> float:
        """The point beyond which nothing may be missing, seen from an end."""
        if end.count is None:
            return end.limit
        last = ritz.values[end.wanted(ritz.values)[-1:]]
        return float(end.sign * last + MARGIN * self.allowed(last))

    def tilt(self, end: End, ritz: Ritz) -> Tensor:
        """M of the operator outside of the space, ``B + F M F'``, whose eigenvalues beyond the limit are those that the space lacks."""
        limit = self.limit(end, ritz)
        inside = end.sign * ritz.values < limit
        leaks = self.space.leaks(ritz)[:, inside]
        return end.sign * (leaks / (limit - end.sign * ritz.values[inside])) @ leaks.T


def searched(search: Search) -> Solution:
    """Solves in a Krylov space: until the pairs of an end have converged and an independent look finds nothing else, for each end."""
    space, starts, least = search.space, 1, 0
    overlooked = {end: 0.0 if not end.asked else math.nan for end in search.ends}
    while ready := _grown(search, [end for end in search.ends if not overlooked[end] <= MISSED], least):
        least = 0
        for end in ready:
            before = space.products
            chance = _chance_beyond(search, end)
            if chance is None:
                joined = sum(space.add_start() for _ in range(min(starts, space.room - space.waiting)))
                # A fresh start needs about as many steps to show what is there as the run that found it.
                least = max(1, joined, space.products - before)
                starts = min(2 * starts, STARTS)
                break
            overlooked[end] = chance
    if not space.finite:
        return flawed(EigenStatus.NONFINITE, space.norm)
    return _judged(search, (overlooked[search.ends[0]], overlooked[search.ends[1]]))


def _grown(search: Search, ends: Sequence[End], least: int) -> list[End]:
    """Extends the space by at least so many steps, and until some of these ends have converged: which. None where it may not grow any more."""
    space, before, checked = search.space, search.space.products, search.space.steps
    while ends:
        space.settle()
        if not space.finite or _is_asymmetric(space):
            return []
        due = space.steps - checked >= space.steps // 16 or space.waiting == 0 or search.spent or space.room == 0
        if due and space.products - before >= least:
            ritz, checked = space.ritz(), space.steps
            if ready := [end for end in ends if search.converged(end, ritz)]:
                return [] if search.spent else ready
        if search.spent or (space.waiting == 0 and not space.add_start()):
            return []
        if space.room == 0:
            ritz = space.ritz()
            space.restart(ritz, search.kept(ritz))
            checked = space.steps
            if space.room == 0:
                return []
        together = UNASKED if space.waits_on_device and space.waiting == 1 else 1
        for _ in range(min(together, space.room, search.left)):
            space.expand()
    return []


def _is_asymmetric(space: KrylovSpace) -> bool:
    """Whether products deviate visibly from symmetry; a fresh vector may show a norm beside which they do not."""
    limit = visible(space.operator.dtype)
    if space.asymmetry <= limit * space.norm:
        return False
    direction = space.random_unit()
    if direction is not None:
        space.norm = max(space.norm, vector_norm(space.multiplied(direction)))
    return space.asymmetry > limit * space.norm


def _chance_beyond(search: Search, end: End) -> float | None:
    """Runs Lanczos from a random vector outside of the space: the chance of having overlooked something, or None where something is there."""
    space = search.space
    ritz = space.ritz()
    limit, tilt = search.limit(end, ritz), search.tilt(end, ritz)
    size, evidence = space.operator.size, Evidence(limit, end.sign)
    chance, together = evidence.chance_overlooked(size), FIRST_UNASKED if space.waits_on_device else 1
    run = run_outside(space, tilt)
    while numbers := [torch.stack(pair) for pair in islice(run, max(1, min(together, search.left)))]:
        for alpha, beta in [(float(a), float(b)) for a, b in torch.stack(numbers).cpu()]:
            space.finite = math.isfinite(alpha) and math.isfinite(beta)
            evidence = evidence.after(alpha, beta)
            if evidence.found:
                return None
            chance = evidence.chance_overlooked(size)
            if abs(limit) <= INDISTINCT * space.floor and beta <= NEGLIGIBLE * space.floor:
                return 0.0
            if chance <= MISSED:
                return chance
        if search.spent:
            return chance
        together = min(evidence.steps_to(MISSED, size), UNASKED) if space.waits_on_device else 1
    return 0.0


def _judged(search: Search, overlooked: tuple[float, float]) -> Solution:
    """The pairs of a space, those of each end tested by a product with a random combination of them."""
    space = search.space
    ritz = space.ritz()
    places = [end.wanted(ritz.values) for end in search.ends]
    together = search.wanted(ritz)
    vectors = _orthonormalised(space.vectors(ritz.coordinates[:, together]))
    column = {place: index for index, place in enumerate(together)}
    chosen = [[column[place] for place in each] for each in places]
    ends = [_columns(vectors, each) for each in chosen]
    # Each end by itself: what rounding leaves of the largest eigenvalues would hide what it leaves of the smallest.
    tests = [_deviation(search, ritz, *end) for end in zip(places, ends, strict=True)]
    left = space.formed_residual_lengths(ritz.coordinates[:, together])
    residuals = [torch.sqrt(left[each].square() + test[0] ** 2) for each, test in zip(chosen, tests, strict=True)]
    return Solution(
        values=(ritz.values[places[0]], ritz.values[places[1]]),
        vectors=(ends[0], ends[1]),
        residuals=(residuals[0], residuals[1]),
        overlooked=overlooked,
        flaw=next((flaw for _, flaw in tests if flaw is not None), None),
        norm=max(space.norm, float(ritz.values.abs().max())),
        steps=space.steps,
    )


def _columns(matrix: Tensor, places: list[int]) -> Tensor:
    """Some columns; the matrix itself where these are all."""
    return matrix if places == list(range(matrix.shape[1])) else matrix[:, places]


def _orthonormalised(vectors: Tensor) -> Tensor:
    """Nearly orthonormal columns made orthonormal to rounding, each next to where it was (one Newton step for the polar factor)."""
    rows = vectors.T
    overlap = rows @ vectors
    return ((1.5 * torch.eye(len(overlap), dtype=rows.dtype, device=rows.device) - 0.5 * overlap) @ rows).T


def _deviation(search: Search, ritz: Ritz, places: Sequence[int], vectors: Tensor) -> tuple[float, EigenStatus | None]:
    """By how much a product with a random combination of pairs differs from what the space predicts, and what is wrong if that is visible."""
    space, count = search.space, len(places)
    if count == 0:
        return 0.0, None
    limit = visible(space.operator.dtype) * space.norm
    signs = 2 * torch.randint(0, 2, (count,), generator=space.generator, device=space.generator.device) - 1
    sizes = 0.5 + torch.rand(count, generator=space.generator, device=space.generator.device, dtype=torch.float64)
    shares = (signs * sizes).cpu()
    shares = shares / vector_norm(shares)
    combined = vectors @ shares.to(vectors)
    product = space.operator @ combined
    coordinates = ritz.coordinates[:, list(places)] @ shares
    predicted = (
        vectors @ (shares * ritz.values[list(places)]).to(vectors)
        + space.residual_vectors(coordinates.unsqueeze(1))[:, 0]
    )
    deviation = vector_norm(product - predicted)
    if not math.isfinite(deviation):
        return deviation, EigenStatus.NONFINITE
    if max(space.asymmetry, math.sqrt(count) * deviation) <= limit:
        return deviation, None
    again = vector_norm(space.operator @ combined - product)
    symmetric = space.asymmetry <= limit
    return deviation, EigenStatus.NOT_REPEATABLE if symmetric or again > limit else EigenStatus.ASYMMETRIC


def flawed(flaw: EigenStatus, norm: float) -> Solution:
    """What is left to say where the operator is not fit to be searched."""
    nothing = torch.empty(0)
    pair = (nothing, nothing)
    return Solution(pair, pair, pair, (math.nan, math.nan), flaw, norm, 0)


def visible(dtype: torch.dtype) -> float:
    """Relative size of a flaw that is no rounding (our choice: far above it, below the usual tolerance of an eigenvalue)."""
    return math.sqrt(torch.finfo(dtype).eps)
