"""How likely it is that a Lanczos run from a random vector overlooked an eigenvalue.

After j steps from a unit vector z the spectral measure of z can hold at a point x at most the mass

    1 / (p_0(x)^2 + ... + p_j(x)^2)

where p_i are the orthonormal polynomials of the measure, which the recurrence coefficients define (the Christoffel function; Szego 1939,
section 3.41; Akhiezer 1965, section 2.5). Beyond the Ritz values the sum grows with |x|, so an eigenvalue there, with eigenvector u, has
(u'z)^2 below that. For a random z this is improbable: among n dimensions u'z has at zero a density below sqrt(n / 2 pi), so it is that
small with a probability of at most sqrt(2 n / (pi (p_0^2 + ... + p_j^2))). Unlike bounds for any matrix (Kuczynski & Wozniakowski 1992)
this one knows what the run has seen, and a few steps settle it where a gap is wide.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plasticity_probe.linalg.krylov_space import TINY, KrylovSpace

ENOUGH = 1e100
"""Where the recurrence stops growing: far beyond any use, far below overflow."""


SHORT = 0.01
"""Share of what a step removed below which what is left may be rounding, and is projected again (our choice)."""


@dataclass(frozen=True)
class Evidence:
    """What the first steps of a Lanczos run say about eigenvalues of ``sign * A`` at or beyond a point.

    Args:
        point: Where they would be.
        sign: 1 for the upper end of the spectrum, -1 for the lower.
        before: p_{j-1} at the point.
        value: p_j at the point.
        total: The sum of the squares up to p_j.
        coupling: beta_j.
        found: Whether the run holds a Ritz value there.
    """

    point: float
    sign: float
    before: float = 0.0
    value: float = 1.0
    total: float = 1.0
    coupling: float = 0.0
    found: bool = False

    def after(self, alpha: float, beta: float) -> "Evidence":
        """The evidence after one more step.

        Args:
            alpha: The next diagonal entry of the recurrence.
            beta: The next off-diagonal entry.
        """
        rise = (self.point - self.sign * alpha) * self.value - self.coupling * self.before
        if not rise > 0:
            return replace(self, found=True)
        if rise >= ENOUGH * beta:
            return replace(self, total=ENOUGH)
        value = min(rise / beta, ENOUGH)
        return replace(self, before=self.value, value=value, total=min(self.total + value**2, ENOUGH), coupling=beta)

    def chance_overlooked(self, size: int) -> float:
        """Bounds the probability that an eigenvalue beyond the point escaped the run.

        Args:
            size: The number n of dimensions that the random start was drawn from.

        Returns:
            The bound, at most 1.
        """
        return min(1.0, self._bound(size))

    def steps_to(self, chance: float, size: int) -> int:
        """About how many more steps bring `chance_overlooked` down to a chance, if it goes on falling as in the last one; at least 1."""
        growth = self.value / self.before if self.before > 0 else 1.0
        factor = self._bound(size) / chance
        return max(1, math.ceil(math.log(factor) / math.log(growth))) if growth > 1 and factor > 1 else 1

    def _bound(self, size: int) -> float:
        return math.sqrt(2 * size / (math.pi * self.total))


def run_outside(space: KrylovSpace, tilt: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs Lanczos from a random vector orthogonal to a space, with the operator ``(I - QQ') A (I - QQ') + F M F'``.

    Its vectors are kept orthogonal to the space, not to each other: that would only remove copies of eigenvalues, which neither widen the
    range of the Ritz values nor change how the measure is distributed (Greenbaum 1989). So it needs no memory. No step waits for an accelerator.

    Args:
        space: Q, and the remainders F.
        tilt: M, shape (p, p), symmetric.

    Yields:
        alpha_j and beta_j after each product, float64 on the operator's device; NaN where that was not finite. It goes on in what rounding
        leaves, since an eigenvalue above rounding shows there too, and on the CPU it ends where nothing is left: at once where Q spans
        everything.
    """
    direction, before, beta = space.random_unit(), None, torch.zeros(())
    while direction is not None:
        left = space.outside(space.multiplied(direction))
        if len(tilt):
            shares = torch.stack([_inner(each, direction) for each in space.remainders])
            for each, share in zip(space.remainders, tilt.to(shares) @ shares, strict=True):
                left = left + share.to(left) * each
        alpha = _inner(left, direction)
        left = left - alpha.to(left) * direction
        if before is not None:
            left = left - beta.to(left) * before
        left, beta = _cleaned(space, left, direction, torch.hypot(alpha, beta.to(alpha)))
        yield alpha, beta
        goes_on = space.waits_on_device or bool(beta > 0)
        before, direction = direction, left / beta.clamp(min=TINY).to(left) if goes_on else None


def _cleaned(space: KrylovSpace, left: Tensor, direction: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """What a step leaves, with its length: projected again for as long as that is much shorter than what was removed, and so mostly rounding."""
    beta = _inner(left, left).sqrt()
    for _ in range(1 if space.waits_on_device else 3):
        if not space.waits_on_device and not 0 < float(beta) < SHORT * float(length):
            break
        left = space.outside(left)
        left = left - _inner(left, direction).to(left) * direction
        beta, length = _inner(left, left).sqrt(), beta
    return left, beta


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)
