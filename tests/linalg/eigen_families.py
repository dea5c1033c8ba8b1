"""The families of the eigen battery: LAPACK's test types, spectra that break Lanczos, and operators with faults."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from eigen_spectra import (
    Maker,
    all_ones,
    cluster,
    clustered,
    cycle,
    dead_rows,
    diagonal,
    evenly,
    exchange,
    geometric,
    graded_both_signs,
    graded_tridiagonal,
    grid,
    hilbert,
    invisible,
    jordan,
    levels,
    network,
    one_sided_link,
    over_rounding,
    random_symmetric,
    rank,
    rotated,
    signed,
    skewed,
    source,
    spread,
    start_in_the_null_space,
    triples,
    two_blocks,
    wilkinson,
)
from torch import Tensor

Fault = Callable[[Tensor, int], Tensor]
"""(true product, number of the call) -> the product that the operator gives."""

SCALES = (1e-30, 1e-12, 1.0, 1e12, 1e30)
UNIT, LARGE, SMALL = "unit", "large", "small"


@dataclass(frozen=True)
class Family:
    """Matrices of one kind, for every size from `least` on.

    Args:
        matrix: Makes the matrix.
        magnitude: UNIT for norms around 1, to be multiplied with any of SCALES; LARGE and SMALL for norms around the square roots of
            the largest and of the smallest normal number of the dtype, as in LAPACK.
        least: The smallest size that makes sense.
        fault: What the operator does to its products; None for an honest one.
    """

    matrix: Maker
    magnitude: str = UNIT
    least: int = 1
    fault: Fault | None = None

    def scales(self, dtype: torch.dtype) -> tuple[float, ...]:
        """The factors that the matrix may be multiplied with."""
        limits = torch.finfo(dtype)
        return {UNIT: SCALES, LARGE: (math.sqrt(limits.max),), SMALL: (math.sqrt(limits.tiny),)}[self.magnitude]


def every(period: int, value: float) -> Fault:
    """One entry of every `period`-th product is this value."""

    def fault(image: Tensor, call: int) -> Tensor:
        if call % period == 0:
            image[-1] = value
        return image

    return fault


def after(calls: int, value: float) -> Fault:
    """From then on, one entry of every product is this value."""

    def fault(image: Tensor, call: int) -> Tensor:
        if call > calls:
            image[0] = value
        return image

    return fault


def noise(level: float) -> Fault:
    """Fresh random errors at every call, on average of this share of the product's length."""

    def fault(image: Tensor, call: int) -> Tensor:
        errors = torch.randn(image.shape, generator=source(call), dtype=torch.float64) / math.sqrt(image.shape[0])
        return (image + level * image.double().norm(dim=0) * errors).to(image)

    return fault


def shifted(share: float) -> Fault:
    """The same vector added to every product, of this share of the product's largest entry: repeatable, but not linear."""
    return lambda image, call: image + share * image.abs().amax(0)


def in_bfloat16(image: Tensor, call: int) -> Tensor:
    """The product rounded to eight bits, as under autocast: repeatable, hardly asymmetric."""
    return image.to(torch.bfloat16).to(image)


def factor(rule: Callable[[int], float]) -> Fault:
    """The product times a number that depends on the call."""
    return lambda image, call: image * rule(call)


LAPACK = {
    "LAPACK 1: zero": Family(lambda size, *_: torch.zeros(size, size, dtype=torch.float64)),
    "LAPACK 2: identity": Family(lambda size, *_: torch.eye(size, dtype=torch.float64)),
    "LAPACK 3: diagonal, evenly spaced": Family(diagonal(signed(evenly))),
    "LAPACK 4: diagonal, geometric": Family(diagonal(signed(geometric))),
    "LAPACK 5: diagonal, clustered": Family(diagonal(signed(clustered))),
    "LAPACK 6: diagonal, large": Family(diagonal(signed(evenly)), LARGE),
    "LAPACK 7: diagonal, small": Family(diagonal(signed(evenly)), SMALL),
    "LAPACK 8: evenly spaced": Family(rotated(signed(evenly))),
    "LAPACK 9: geometric": Family(rotated(signed(geometric))),
    "LAPACK 10: clustered": Family(rotated(signed(clustered))),
    "LAPACK 11: evenly spaced, large": Family(rotated(signed(evenly)), LARGE),
    "LAPACK 12: evenly spaced, small": Family(rotated(signed(evenly)), SMALL),
    "LAPACK 13: random": Family(random_symmetric),
    "LAPACK 14: random, large": Family(random_symmetric, LARGE),
    "LAPACK 15: random, small": Family(random_symmetric, SMALL),
    "LAPACK 16: positive, evenly spaced": Family(rotated(evenly)),
    "LAPACK 17: positive, geometric": Family(rotated(geometric)),
    "LAPACK 18: positive, clustered": Family(rotated(clustered)),
    "LAPACK 19: positive, large": Family(rotated(evenly), LARGE),
    "LAPACK 20: positive, small": Family(rotated(evenly), SMALL),
    "LAPACK 21: graded tridiagonal": Family(graded_tridiagonal),
}
SPECTRA = {
    "minus identity": Family(lambda size, *_: -torch.eye(size, dtype=torch.float64)),
    "all equal, rotated": Family(rotated(levels(rest=0.7))),
    "uniform": Family(rotated(spread(-1, 1))),
    "rank 1": Family(rotated(rank(lambda size: 1))),
    "rank 1, negative": Family(rotated(levels(-1.0))),
    "rank 3": Family(rotated(rank(lambda size: 3)), least=3),
    "rank 5": Family(rotated(rank(lambda size: 5)), least=3),
    "rank 5: 5, 4, 3, 2, 1": Family(rotated(levels(5.0, 4.0, 3.0, 2.0, 1.0))),
    "rank n/2": Family(rotated(rank(lambda size: size // 2)), least=2),
    "all ones": Family(all_ones),
    "top value twice": Family(rotated(levels(1.0, 1.0, rest=spread(-0.3, 0.5)))),
    "top value three times": Family(rotated(levels(*[1.0] * 3, rest=spread(0, 0.2)))),
    "top value sixteen times": Family(rotated(levels(*[1.0] * 16, rest=spread(-0.5, 0.6))), least=10),
    "bottom value three times": Family(rotated(levels(*[-1.0] * 3, 0.9, rest=spread(-0.4, 0.4)))),
    "both ends three times": Family(rotated(levels(1.0, -1.0, 1.0, -1.0, 1.0, -1.0, rest=spread(-0.6, 0.6)))),
    "triples across every cut": Family(rotated(triples), least=3),
    "dead layer": Family(rotated(levels(0.337, 0.320, 0.246, 0.239, *[0.161] * 16))),
    "+1 and -1, half each": Family(exchange),
    "+1 and -1, a tie": Family(rotated(levels(1.0, -1.0, 0.1, rest=spread(-0.05, 0.05)))),
    "tight cluster at the top": Family(rotated(cluster(1.0, members=8, spacing=1e-7, rest=spread(-0.5, 0.5)))),
    "loose cluster at the top": Family(rotated(cluster(1.0, members=6, spacing=1e-3, rest=spread(0, 0.98)))),
    "clusters at both ends": Family(rotated(cluster(1.0, -1.0, 0.9, members=4, spacing=1e-5, rest=spread(-0.4, 0.6)))),
    "long cluster at the top": Family(rotated(cluster(1.0, members=30, spacing=4e-4, rest=spread(-0.5, 0.9)))),
    "one value above a tight bulk": Family(rotated(levels(1.004, rest=spread(0.9995, 1.0005)))),
    "values around a tight bulk": Family(rotated(levels(5.0, 1.006, 1.004, 0.996, rest=spread(0.9995, 1.0005)))),
    "values around a very tight bulk": Family(
        rotated(levels(2.0, 1 + 6e-6, 1 - 6e-6, rest=spread(1 - 5e-7, 1 + 5e-7)))
    ),
    "graded, both signs": Family(rotated(graded_both_signs)),
    "Hilbert": Family(hilbert),
    "Wilkinson": Family(wilkinson, least=2),
    "Laplacian of a cycle": Family(cycle, least=3),
    "Laplacian of a grid": Family(grid, least=10),
    "one outlier, bulk at zero": Family(rotated(levels(1.0, rest=lambda left, *_: 1e-4 * spread(-1, 1)(left, 0, 0)))),
    "identity plus rank one": Family(rotated(levels(5.0, rest=1.0))),
    "outliers over rounding": Family(rotated(over_rounding)),
    "network": Family(rotated(network)),
    "dead rows": Family(dead_rows),
    "two blocks": Family(two_blocks),
    "start in the null space": Family(start_in_the_null_space, least=2),
    "invisible values": Family(invisible(1.0, 1.0, 0.9, -1.0, -0.9, rest=spread(-0.5, 0.5)), least=10),
    "invisible values, far larger than the rest": Family(invisible(1.0, 0.9, -1.0, rest=spread(-1e-5, 1e-5)), least=10),
    "invisible values around a tight bulk": Family(
        invisible(1.004, 1.004, 0.996, rest=spread(0.9995, 1.0005)), least=10
    ),
}
FAULTY = {
    "NaN in every product": Family(rotated(network), fault=every(1, math.nan)),
    "NaN in every third product": Family(rotated(network), fault=every(3, math.nan)),
    "NaN after five products": Family(rotated(network), fault=after(5, math.nan)),
    "NaN after twenty products": Family(rotated(network), fault=after(20, math.nan)),
    "infinity in every product": Family(rotated(network), fault=every(1, math.inf)),
    "infinity after five products": Family(rotated(network), fault=after(5, -math.inf)),
    "asymmetric by 100 %": Family(skewed(1.0), least=2),
    "asymmetric by 1 %": Family(skewed(0.01), least=2),
    "asymmetric by 0.01 %": Family(skewed(1e-4), least=2),
    "asymmetric in one entry": Family(one_sided_link, least=2),
    "Jordan block": Family(jordan, least=2),
    "noise of 1e-3": Family(rotated(network), least=2, fault=noise(1e-3)),
    "noise of 1e-4": Family(rotated(network), least=2, fault=noise(1e-4)),
    "noise of 1e-6": Family(rotated(network), least=2, fault=noise(1e-6)),
    "noise of 1e-6 on rank 5": Family(rotated(rank(lambda size: 5)), least=2, fault=noise(1e-6)),
    "second product doubled": Family(rotated(network), fault=factor(lambda call: 1.0 + (call == 2))),
    "every second product doubled": Family(rotated(network), fault=factor(lambda call: 1.0 + (call % 2 == 0))),
    "one product 5 % too long": Family(rotated(network), fault=factor(lambda call: 1.0 + 0.05 * (call == 7))),
    "products in bfloat16": Family(rotated(network), least=10, fault=in_bfloat16),
    "a constant added": Family(rotated(network), least=2, fault=shifted(0.01)),
    "slow drift": Family(rotated(network), fault=factor(lambda call: 1.0 + 2e-4 * call)),
    "zero after ten products": Family(rotated(network), fault=factor(lambda call: float(call <= 10))),
}
FAMILIES = LAPACK | SPECTRA | FAULTY
