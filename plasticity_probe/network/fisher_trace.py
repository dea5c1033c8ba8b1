"""The trace of the true Fisher: the expected squared norm of the gradient for targets drawn from what the network itself predicts.

A term of the loss (an example's, a token's) that is a function of C outputs z has, for a target drawn from the network's own prediction, the
gradient J'e, with J the Jacobian of z and e the gradient of the term in z, random with mean 0 and covariance S. Its expected squared norm is

    E |J'e|^2 = tr(J' S J) = sum_k |J'a_k|^2          for every A = (a_1 ... a_C) with A A' = S,

and the mean over all terms is the trace of the true Fisher, which for these losses is the generalised Gauss-Newton matrix too (Martens 2020,
section 9.2; `plasticity_probe.network.curvature.true_fisher`). With p the predicted probabilities of a cross-entropy, and for a squared error
|z - t|^2 / D of D outputs,

    S = diag(p) - p p',  a_k = sqrt(p_k) (e_k - p)          S = (2 / D) I,  a_k = sqrt(2 / D) e_k.

One backward pass for each column gives the trace exactly; for a cross-entropy the columns are the gradients for each label in turn, times the
root of its probability. Where there are too many columns, random signs x mix them: E |J'A x|^2 is the same sum (Hutchinson 1989, in the
outputs of each example). Labels drawn at random have that mean too, but where a network is sure of itself nearly all of it comes from labels
that are hardly ever drawn; mixed by signs, every label has its part in every draw.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.example_gradients import output_gradients, traced_outputs
from plasticity_probe.network.examples import Batch, batch_size
from plasticity_probe.network.gradients import gradient_chunk
from plasticity_probe.network.losses import (
    IGNORED,
    class_axis,
    cross_entropy_terms,
    inputs_and_targets,
    squared_error_terms,
)
from plasticity_probe.network.outer_products import squares
from plasticity_probe.network.subject import Subject


@dataclass(frozen=True)
class FisherTrace:
    """The trace of the true Fisher.

    Args:
        value: The trace.
        standard_error: Over the random signs, given the examples; 0 where the trace is exact, NaN for a single draw.
    """

    value: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class _Root:
    """The matrices A of a batch's examples, known by their products.

    Args:
        columns: Columns that an example has: its positions times classes, or its outputs.
        product: Vectors x, shape (n, columns), to A x in the shape and type of the outputs.
    """

    columns: int
    product: Callable[[Tensor], Tensor]


def predicts_targets(subject: Subject) -> bool:
    """Whether the loss says what distribution of targets the network predicts."""
    return subject.loss.of_outputs in (cross_entropy_terms, squared_error_terms)


def fisher_trace(subject: Subject, draws: int, generator: torch.Generator) -> FisherTrace:
    """The trace of the true Fisher of the mean loss, exact where an example has at most `draws` columns, else estimated by as many draws.

    Args:
        subject: The network, cross-entropy or squared error, and its examples.
        draws: Backward passes for each example, at most.
        generator: The source of the random signs, on the CPU. What is drawn for an example does not depend on how the examples are cut.

    Returns:
        The trace; NaN where no example has a loss term.

    Raises:
        SubjectError: The loss was given by the user, so what the network predicts is unknown; or the examples of a batch influence each other.
    """
    if not predicts_targets(subject):
        raise SubjectError(
            f"expected cross-entropy or squared error for the trace of the true Fisher, but {subject.loss.name} does not say what targets the "
            "network predicts. Leave loss=None to have one of them inferred."
        )
    seeds = torch.randint(2**62, (draws,), generator=generator).tolist()
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    total, variance = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for batch in subject.examples.chunks(gradient_chunk(subject)):
        outputs = traced_outputs(subject, batch)
        root = _root(subject, outputs.detach(), batch)
        exact = root.columns <= draws
        vectors = _unit_vectors(len(outputs), root.columns) if exact else _signs(len(outputs), root.columns, sources)
        along = (root.product(vector.to(outputs.device)) for vector in vectors)
        norms = torch.stack([_squared_norms(subject, batch, outputs, direction) for direction in along])
        total += (norms.sum(0) if exact else norms.mean(0)).sum().cpu()
        variance += 0 if exact else _variance_of_mean(norms).sum().cpu()
    terms = subject.terms or float("nan")
    return FisherTrace(float(total) / terms, float(variance.sqrt()) / terms)


def fisher_trace_passes(subject: Subject, draws: int) -> int:
    """How many backward passes for each example `fisher_trace` takes, judged by the first example.

    Args:
        subject: The network, its loss and its examples.
        draws: As there.
    """
    if not predicts_targets(subject):
        return 0
    batch = next(iter(subject.examples.chunks(1)))
    with torch.no_grad():
        return min(draws, _root(subject, subject.outputs(subject.parameters, batch), batch).columns)


def _root(subject: Subject, outputs: Tensor, batch: Batch) -> _Root:
    targets = cast(Tensor, inputs_and_targets(batch)[1])
    if subject.loss.of_outputs is cross_entropy_terms:
        return _root_of_cross_entropy(outputs, targets)
    return _root_of_squared_error(outputs)


def _root_of_cross_entropy(outputs: Tensor, targets: Tensor) -> _Root:
    """A = sqrt(p) (e_k - p) at every position with a target, in float64, as the loss itself."""
    axis = class_axis(outputs, targets)
    p = outputs.movedim(axis, -1).double().softmax(-1)
    roots = p.sqrt() * (targets != IGNORED).unsqueeze(-1)

    def product(vectors: Tensor) -> Tensor:
        scaled = roots * vectors.reshape(p.shape)
        return (scaled - p * scaled.sum(-1, keepdim=True)).movedim(-1, axis).to(outputs)

    return _Root(p[0].numel(), product)


def _root_of_squared_error(outputs: Tensor) -> _Root:
    count = outputs[0].numel()
    return _Root(count, lambda vectors: (2 / count) ** 0.5 * vectors.to(outputs).reshape(outputs.shape))


def _unit_vectors(examples: int, columns: int) -> Iterator[Tensor]:
    for row in torch.eye(columns):
        yield row.expand(examples, -1)


def _signs(examples: int, columns: int, sources: list[torch.Generator]) -> Iterator[Tensor]:
    for source in sources:
        yield 2 * torch.randint(0, 2, (examples, columns), generator=source, dtype=torch.int8) - 1


def _squared_norms(subject: Subject, batch: Batch, outputs: Tensor, along: Tensor) -> Tensor:
    """|J'u|^2 for the examples of a batch, shape (n,), float64."""
    total = torch.zeros(batch_size(batch), dtype=torch.float64, device=subject.device)
    for gradients in output_gradients(subject, batch, outputs, along).values():
        total += squares(gradients)
    return total


def _variance_of_mean(draws: Tensor) -> Tensor:
    """The variance of each example's mean over draws, shape (draws, n); NaN for a single draw."""
    count = len(draws)
    return draws.var(0) / count if count > 1 else torch.full_like(draws[0], float("nan"))
