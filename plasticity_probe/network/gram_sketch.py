"""The spectrum of the Gram matrix of so many per-example gradients that the matrix itself does not fit the memory."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from plasticity_probe.linalg.nystrom import Sketch, nystrom
from plasticity_probe.network.example_gradients import example_gradients, route_of
from plasticity_probe.network.examples import Batch, batch_size, map_tensors
from plasticity_probe.network.gradients import add_products, gradient_chunk, gradient_scale, keep_also
from plasticity_probe.network.outer_products import Gradients, as_rows, mirror, squares
from plasticity_probe.network.subject import Subject

MATRICES = 4
"""Square float64 matrices that an eigenvalue problem holds: the matrix, its symmetric half, a copy and LAPACK's work space (counted)."""


@dataclass(frozen=True)
class SketchPlan:
    """How a sketch is computed within the subject's memory.

    Args:
        landmarks: Examples that all others are compared with.
        gradients: Per-example gradients computed in all.
        bytes: Memory of the landmarks' gradients and of the matrices between them.
    """

    landmarks: int
    gradients: int
    bytes: int


def gram_fits(subject: Subject) -> bool:
    """Whether the eigenvalue problem of the whole Gram matrix fits half the subject's memory."""
    return _bytes_of(len(subject.examples)) <= subject.memory // 2


def eigenvalue_bytes(subject: Subject) -> int:
    """What the eigenvalue problem takes, of the whole Gram matrix or of the sketch."""
    return _bytes_of(len(subject.examples) if gram_fits(subject) else sketch_plan(subject).landmarks)


def sketch_plan(subject: Subject) -> SketchPlan:
    """As many landmarks as memory allows: their gradients in half of it, the matrices between them in a quarter."""
    count, row = len(subject.examples), route_of(subject).numbers * subject.dtype.itemsize
    fits = min(subject.memory // (2 * row), math.isqrt(subject.memory // (4 * 8 * MATRICES)))
    landmarks = int(min(count, max(1, fits)))
    return SketchPlan(landmarks, count + landmarks, landmarks * row + _bytes_of(landmarks))


def _bytes_of(rows: int) -> int:
    return MATRICES * 8 * rows**2


def gram_sketch(subject: Subject, generator: torch.Generator) -> Sketch:
    """Lower bounds of the eigenvalues of K_ij = g_i'g_j and by how much all of them together are too small (`plasticity_probe.linalg.nystrom`).

    Some examples are drawn as landmarks; all others are compared with them in one pass, of which m x m matrices are kept.

    Args:
        subject: The network, its loss and its examples.
        generator: Draws the landmarks.

    Raises:
        SubjectError: As `plasticity_probe.network.gradients.per_example_gradients`.
    """
    count, chosen = len(subject.examples), sketch_plan(subject).landmarks
    landmarks = torch.randperm(count, generator=generator)[:chosen].sort().values
    kept = _gradients_of(subject, landmarks)
    zeros = partial(torch.zeros, dtype=torch.float64, device=subject.device)
    core, squared, trace = zeros(chosen, chosen), zeros(chosen, chosen), 0.0
    add_products(core, kept, kept)
    mirror(core)
    for batch in subject.examples.chunks(gradient_chunk(subject)):
        gradients = example_gradients(subject, batch)
        products = zeros(batch_size(batch), chosen)
        add_products(products, gradients, kept)
        squared.addmm_(products.T, products)
        trace += sum(float(squares(part).sum()) for part in gradients.values())
    scale = gradient_scale(subject) ** 2
    return nystrom((scale * core).cpu(), (scale**2 * squared).cpu(), scale * trace, count)


def _gradients_of(subject: Subject, wanted: Tensor) -> dict[str, Gradients]:
    """The gradients of some examples, given by their numbers in ascending order."""
    kept: dict[str, Gradients] = {}
    chunk = gradient_chunk(subject)
    start = filled = 0
    for batch in subject.examples.chunks(max(1, chunk * len(subject.examples) // len(wanted))):
        inside = wanted[(wanted >= start) & (wanted < start + batch_size(batch))] - start
        start += batch_size(batch)
        for some in inside.split(chunk) if len(inside) else ():
            keep_also(kept, filled, _some(subject, batch, some.to(subject.device)), len(wanted))
            filled += len(some)
    return kept


def _some(subject: Subject, batch: Batch, rows: Tensor) -> dict[str, Gradients]:
    if subject.examples.sliceable:
        return example_gradients(subject, map_tensors(lambda tensor: tensor[rows], batch))
    return {name: as_rows(part)[rows] for name, part in example_gradients(subject, batch).items()}
