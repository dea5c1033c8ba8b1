"""A growing orthonormal basis in which an operator is known: thick restarts, several starts, and what the basis does not hold yet.

For an orthonormal basis Q of m columns and some remainders F, orthogonal to Q,

    A Q = Q H + F C        with H = Q' A Q

(a Krylov decomposition: Stewart 2001). From one start vector this is the Lanczos recurrence: H is tridiagonal and there is a single remainder.
A further random start may join at any time, which makes it a band Lanczos recurrence (Ruhe 1979) that sees eigenvalues of higher
multiplicity; and Q may be replaced by some of its Ritz vectors at any time (thick restart: Wu & Simon 2000), which keeps memory bounded.

Symmetry says what a product must hold along the basis. That is subtracted first; the rest is projected out until a pass leaves the length as it
is (Daniel, Gragg, Kaufman & Stewart 1976), and its size shows how symmetric the operator is. Scalars are float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plasticity_probe.linalg.dense import column_norms, symmetric_eigenpairs
from plasticity_probe.linalg.krylov import ROUNDING
from plasticity_probe.linalg.operator import SymmetricOperator
from plasticity_probe.linalg.random_vectors import gaussian

REMOVED = 1.7
"""A projection that removes less than this multiple of what it leaves is not repeated: then it leaves half of the length or more, between the
1/sqrt(2) and the 1/10 of Daniel et al. 1976."""

NEGLIGIBLE = 0.25
"""Share of what rounding leaves below which a remainder is dropped (our choice: several of them still keep a residual within its margin)."""

TINY = 1e-35
"""What a length of 0 is replaced by, so that a direction of zeros comes of it instead of NaN; `settle` takes such a step back."""

BLOCK = 1 << 16
"""Entries of vectors that are combined at a time, so that no second basis is held (our choice)."""


@dataclass(frozen=True, eq=False)
class Ritz:
    """The approximate eigenpairs that a space holds.

    Args:
        values: Eigenvalues of H, descending, float64 on the CPU, shape (m,).
        coordinates: Eigenvectors of H as columns, float64 on the CPU, shape (m, m).
        residuals: |A v - theta v| of each by the decomposition, float64 on the CPU, shape (m,).
    """

    values: Tensor
    coordinates: Tensor
    residuals: Tensor


@dataclass(eq=False)
class _Remainder:
    """One column of F with its row of C; a start has none, as no product with the basis holds it."""

    vector: Tensor
    length: Tensor
    coupling: Tensor
    orthogonal: bool


class KrylovSpace:
    """The decomposition of an operator, and the steps that change it.

    A step waits for nothing that is not computed: whoever needs numbers on the CPU asks for them (`ritz`, `settle`).

    Args:
        operator: A, of size n and moderate norm.
        capacity: The most basis vectors that may be held.
        generator: The source of random starts.
        store: Device that holds the basis; None: that of the operator. With another one every projection moves the basis through.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        capacity: int,
        generator: torch.Generator,
        store: torch.device | None = None,
    ) -> None:
        self.operator = operator
        self.products = 0
        self.finite = True
        self.norm: float = 0.0
        self.asymmetry = 0.0
        self.generator = generator
        self.capacity = min(capacity, operator.size)
        self._rows = torch.empty(self.capacity, operator.size, dtype=operator.dtype, device=store or operator.device)
        self._steps: int = 0
        self._projected = torch.zeros(self.capacity, self.capacity, dtype=torch.float64, device=operator.device)
        self._remainders: list[_Remainder] = []
        self._dropped: list[Tensor] = []
        self._deviation = torch.zeros((), dtype=torch.float64, device=operator.device)
        self._left = torch.zeros(self.capacity, dtype=torch.float64, device=operator.device)
        self._settled: int = 0
        self._eps = torch.finfo(operator.dtype).eps

    @property
    def steps(self) -> int:
        """The number m of basis vectors."""
        return self._steps

    @property
    def room(self) -> int:
        """How many more basis vectors fit."""
        return self.capacity - self._steps

    @property
    def waiting(self) -> int:
        """How many remainders and starts there are to go on with."""
        return len(self._remainders)

    @property
    def waits_on_device(self) -> bool:
        """Whether asking for numbers interrupts an accelerator."""
        return self.operator.device.type != "cpu"

    def add_start(self, vector: Tensor | None = None) -> bool:
        """Puts a vector, made orthogonal to all others, at the end of the queue.

        Args:
            vector: Shape (n,); None: a random one.

        Returns:
            False where nothing of it lies outside of the basis, so that nothing was put there.
        """
        direction = self.random_unit() if vector is None else self._unit(vector)
        if direction is None:
            return False
        nothing = torch.zeros(self._steps, dtype=torch.float64, device=self.operator.device)
        self._remainders.append(_Remainder(direction, nothing.new_ones(()), nothing, orthogonal=True))
        return True

    def expand(self, product: Tensor | None = None) -> None:
        """Takes the first remainder of the queue into the basis: one product.

        Args:
            product: A times the unit vector along the remainder, if it is known.
        """
        taken = self._remainders[0]
        direction = taken.vector / taken.length.clamp(min=TINY).to(taken.vector)
        if not taken.orthogonal:
            direction = self.outside(direction)
            direction = direction / _length(direction).to(direction)
        self._remainders.remove(taken)
        expected = taken.length * taken.coupling + self._expected(direction)
        self._append(direction)
        self._absorb(direction, self.multiplied(direction) if product is None else product, expected)

    def multiplied(self, vectors: Tensor) -> Tensor:
        """A times a vector; counted.

        Args:
            vectors: Shape (n,).
        """
        self.products += 1
        return self.operator @ vectors

    def outside(self, vector: Tensor) -> Tensor:
        """The part of a vector that is orthogonal to the basis, by a projection, and another one where that removed most of it.

        Args:
            vector: Shape (n,).
        """
        for _ in range(2):
            coefficients = self._coefficients(vector)
            vector = vector - self._combined(coefficients, self._steps)
            if not self.waits_on_device and float(_length(coefficients)) < REMOVED * float(_length(vector)):
                break
        return vector

    def random_unit(self) -> Tensor | None:
        """A random unit vector orthogonal to the basis; None where that spans everything."""
        return self._unit(gaussian(self.operator, self.generator))

    def settle(self) -> None:
        """Brings norm, symmetry and finiteness up to date, and drops remainders that are only rounding.

        Steps taken since the last call beyond a remainder of that kind are taken back: they began with rounding.
        """
        fresh = self._projected[: self._steps, self._settled : self._steps]
        lengths = [float(length) for length in column_norms(fresh)]
        self.finite = all(math.isfinite(length) for length in lengths)
        if not self.finite:
            return
        self.norm = max([self.norm, *lengths])
        self.asymmetry = max(self.asymmetry, float(self._deviation))
        negligible = NEGLIGIBLE * self.floor
        left = self._left[self._settled : self._steps].cpu()
        spent = [place for place, length in enumerate(left) if float(length) <= negligible]
        if spent and self._settled + spent[0] + 1 < self._steps:
            self._steps = self._settled + spent[0] + 1
            self._remainders = []
            lost = torch.zeros(self._steps, dtype=torch.float64)
            lost[-1] = self._left[self._steps - 1].cpu()
            self._dropped.append(lost)
        self._settled = self._steps
        kept: list[_Remainder] = []
        for each in self._remainders:
            weights = each.length * each.coupling
            if bool(each.coupling.any()) and float(_length(weights)) <= negligible:
                self._dropped.append(weights.cpu())
            else:
                kept.append(each)
        self._remainders = kept

    @property
    def floor(self) -> float:
        """The length below which a vector is rounding: 64 eps(dtype) times the norm."""
        return ROUNDING * self._eps * self.norm

    @property
    def remainders(self) -> list[Tensor]:
        """The vectors F, in the order of the queue."""
        return [each.vector for each in self._remainders]

    def ritz(self) -> Ritz:
        """The approximate eigenpairs; call `settle` first."""
        projected = self._projected[: self._steps, : self._steps].cpu()
        values, coordinates = symmetric_eigenpairs(projected)
        return Ritz(values, coordinates, self.residual_lengths(coordinates))

    def leaks(self, ritz: Ritz) -> Tensor:
        """C s for the Ritz vectors s: with which weights the remainders, in the order of the queue, make up A v - theta v.

        Args:
            ritz: The Ritz pairs of the present basis.

        Returns:
            Shape (p, m), float64 on the CPU.
        """
        if not self._remainders:
            return torch.zeros(0, self._steps, dtype=torch.float64)
        return torch.stack([each.coupling for each in self._remainders]).cpu() @ ritz.coordinates

    def restart(self, ritz: Ritz, kept: Sequence[int]) -> None:
        """Replaces the basis by some of its Ritz vectors.

        Args:
            ritz: The Ritz pairs of the present basis.
            kept: Which of them to keep.
        """
        chosen = list(kept)
        rotation = ritz.coordinates[:, chosen]
        turned = rotation.to(self._rows)
        rows = self._rows[: self._steps]
        for first in range(0, rows.shape[1], BLOCK):
            columns = rows[:, first : first + BLOCK]
            columns[: len(chosen)] = turned.T @ columns
        self._steps = self._settled = len(chosen)
        self._projected.zero_()
        self._projected[: self._steps, : self._steps] = torch.diag(ritz.values[chosen]).to(self._projected)
        for remainder in self._remainders:
            remainder.coupling = rotation.T.to(remainder.coupling) @ remainder.coupling
        self._dropped = [rotation[: len(dropped)].T @ dropped for dropped in self._dropped]

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Vectors with given coordinates in the basis.

        Args:
            coordinates: Shape (m, k).

        Returns:
            Shape (n, k), each vector contiguous, on the operator's device.
        """
        return (coordinates.T.to(self._rows) @ self._rows[: self._steps]).T.to(self.operator.device)

    def residual_vectors(self, coordinates: Tensor) -> Tensor:
        """F C times coordinates: what A leaves outside of the space.

        Args:
            coordinates: Shape (m, k).

        Returns:
            Shape (n, k).
        """
        shape = self.operator.size, coordinates.shape[1]
        total = torch.zeros(shape, dtype=self.operator.dtype, device=self.operator.device)
        for each in self._remainders:
            total += torch.outer(each.vector, (each.coupling @ coordinates.to(each.coupling)).to(each.vector))
        return total

    def residual_lengths(self, coordinates: Tensor) -> Tensor:
        """The lengths of F C times coordinates, what was dropped included.

        Args:
            coordinates: Shape (m, k).

        Returns:
            Shape (k,), float64 on the CPU.
        """
        squares = self._dropped_squares(coordinates)
        if self._remainders:
            overlap = self._overlap()
            shares = torch.stack([each.coupling for each in self._remainders]).cpu() @ coordinates
            squares += (shares * (overlap @ shares)).sum(0).clamp(min=0)
        return squares.sqrt()

    def formed_residual_lengths(self, coordinates: Tensor) -> Tensor:
        """As `residual_lengths`, from the vectors themselves where there are several remainders: where these nearly cancel, only that is exact.

        Args:
            coordinates: Shape (m, k).

        Returns:
            Shape (k,), float64 on the CPU.
        """
        if len(self._remainders) < 2:
            return self.residual_lengths(coordinates)
        weights = torch.stack([each.coupling for each in self._remainders]) @ coordinates.to(self._projected)
        squares = torch.zeros(coordinates.shape[1], dtype=torch.float64, device=weights.device)
        for some in self._remainders_in_blocks():
            squares += (weights.T.to(some) @ some).square().sum(1, dtype=torch.float64)
        return (squares.cpu() + self._dropped_squares(coordinates)).sqrt()

    def _dropped_squares(self, coordinates: Tensor) -> Tensor:
        squares = torch.zeros(coordinates.shape[1], dtype=torch.float64)
        for dropped in self._dropped:
            squares += (dropped @ coordinates[: len(dropped)]).square()
        return squares

    def _overlap(self) -> Tensor:
        """F'F, float64 on the CPU. Single precision would leave its square root of short sums of long remainders."""
        if len(self._remainders) == 1:
            return self._remainders[0].length.square().cpu().reshape(1, 1)
        overlap = torch.zeros(len(self._remainders), len(self._remainders), dtype=torch.float64)
        for some in self._remainders_in_blocks():
            overlap += (some.double() @ some.double().T).cpu()
        return overlap

    def _remainders_in_blocks(self) -> Iterator[Tensor]:
        """F', some columns at a time."""
        for first in range(0, self.operator.size, BLOCK):
            yield torch.stack([each.vector[first : first + BLOCK] for each in self._remainders])

    def _expected(self, direction: Tensor) -> Tensor:
        """Q'A q by symmetry for a new basis vector q, and the remainders made orthogonal to q."""
        expected = torch.zeros(self._steps, dtype=torch.float64, device=self.operator.device)
        for each in self._remainders:
            share = _inner(each.vector, direction)
            expected += share * each.coupling
            each.vector = each.vector - share.to(direction) * direction
            each.length = _length(each.vector)
            each.orthogonal = False
        return expected

    def _append(self, direction: Tensor) -> None:
        self._rows[self._steps] = direction
        self._steps += 1
        for each in self._remainders:
            each.coupling = torch.cat([each.coupling, each.coupling.new_zeros(1)])

    def _absorb(self, direction: Tensor, product: Tensor, expected: Tensor) -> None:
        """Splits a product with the newest basis vector into H's column and a remainder."""
        last = self._steps - 1
        alpha = _inner(direction, product)
        coupled = (
            expected.nonzero().flatten() if not self.waits_on_device else torch.arange(last, device=expected.device)
        )
        left = product - alpha.to(direction) * direction
        if len(coupled) == last and last > 0:
            left -= self._combined(expected.to(left), last)
        else:
            for place in coupled:
                left -= expected[place].to(left) * self._rows[place].to(left.device)
        surplus = torch.zeros(self._steps, dtype=torch.float64, device=self.operator.device)
        length = torch.zeros_like(alpha)
        for _ in range(3):
            coefficients = self._coefficients(left)
            left = left - self._combined(coefficients, self._steps)
            length, removed = _length(left), coefficients.double()
            surplus += removed
            if not self.waits_on_device and float(_length(removed)) < REMOVED * float(length):
                break
        column = torch.cat([expected, alpha.reshape(1)]) + surplus
        self._projected[: self._steps, last] = column
        self._projected[last, : self._steps] = column
        self._deviation = torch.maximum(self._deviation, _length(surplus[:-1]))
        self._left[last] = length
        coupling = torch.zeros(self._steps, dtype=torch.float64, device=self.operator.device)
        coupling[-1] = 1.0
        self._remainders.append(_Remainder(left, length, coupling, orthogonal=True))

    def _coefficients(self, vector: Tensor) -> Tensor:
        return (self._rows[: self._steps] @ vector.to(self._rows.device)).to(vector.device)

    def _combined(self, coefficients: Tensor, count: int) -> Tensor:
        return (coefficients.to(self._rows.device) @ self._rows[:count]).to(coefficients.device)

    def _unit(self, vector: Tensor) -> Tensor | None:
        """The unit vector along the part of a vector outside of the basis; None where nothing but rounding is left."""
        direction = vector / _length(vector).to(vector)
        for _ in range(3):
            direction = direction - self._combined(self._coefficients(direction), self._steps)
            length = float(_length(direction))
            if not length > ROUNDING * self._eps or not math.isfinite(length):
                return None
            direction = direction / length
        return direction


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product, summed in float64, as a tensor on the device."""
    return (a * b).sum(dtype=torch.float64)


def _length(vector: Tensor) -> Tensor:
    """The Euclidean length, summed in float64, as a tensor on the device."""
    return _inner(vector, vector).sqrt()
