"""Gradients of the mean loss and of every single example's loss, and the matrix of inner products of the latter.

With N examples the mean loss is L = (1/N) sum_i l_i, where l_i = (N / number of loss terms) * (sum of example i's terms); g_i is the gradient
of l_i in the trainable parameters. So the gradient of L is the mean of the g_i, and the empirical Fisher is (1/N) sum_i g_i g_i'. Its non-zero
eigenvalues are those of the Gram matrix K_ij = g_i'g_j divided by N, which is why nothing here ever needs a matrix of parameters squared.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from plasticity_probe.errors import SubjectError
from plasticity_probe.network.examples import Batch, batch_size, map_tensors
from plasticity_probe.network.subject import Subject

Route = Callable[[Subject, Batch], Tensor]

LARGEST_CHUNK = 32
"""Examples whose gradients are taken at once, at most (our choice: on a CPU 32 were the fastest for a residual network)."""

TRIAL = 8
"""Examples on which the routes to per-example gradients are tried once (our choice: enough for a coupling to show)."""

AGREEMENT = 1e-3
"""Relative difference at which two computations of a gradient count as different: far above rounding, far below a coupling's effect."""

RIGHT_ANGLE = 1e-6
"""Cosines this close to zero count as zero (our choice: what rounding of float32 gradients leaves of a right angle)."""


@dataclass(frozen=True)
class GramPlan:
    """How the Gram matrix is computed within the subject's memory.

    Args:
        rows: Examples whose gradients are held at the same time.
        gradients: Per-example gradients computed in all: the number of examples where all are held, more where some are recomputed.
        bytes: Memory of the gradients held and of the matrix.
    """

    rows: int
    gradients: int
    bytes: int


def mean_gradient(subject: Subject) -> dict[str, Tensor]:
    """The gradient of the mean loss by parameter name; zero for a parameter that the loss does not use.

    Every term of the loss weighs the same, however the examples are cut. It is computed once per subject and remembered: do not change it.

    Raises:
        SubjectError: Every parameter is frozen.
    """
    return subject.once("mean_gradient", lambda: _mean_gradient(subject))


def per_example_gradients(subject: Subject, batch: Batch) -> Tensor:
    """The gradients g_i of the examples of a batch.

    Taken for many examples at once by torch.func where the model allows it, else (recurrent networks, control flow that depends on the data)
    one example at a time; which of the two is tried once per subject on a few examples and checked against the gradient of their summed loss.

    Args:
        subject: The network and its loss.
        batch: Some of its examples, on its device.

    Returns:
        Shape (n, P), columns in the order of `subject.flatten`.

    Raises:
        SubjectError: The examples of a batch influence each other (BatchNorm with batch statistics, a contrastive loss), so that an example has
            no gradient of its own; or every parameter is frozen.
    """
    route = _route(subject)
    scale = len(subject.examples) / subject.terms if subject.terms else float("nan")
    pieces = _pieces(batch, gradient_chunk(subject)) if subject.examples.sliceable else [batch]
    return scale * torch.cat([route(subject, piece) for piece in pieces])


def gradient_chunk(subject: Subject) -> int:
    """Examples whose gradients are taken at once: three copies of them and four of their activations fit a quarter of the memory."""
    each = 3 * subject.size * subject.dtype.itemsize + 4 * subject.activation_bytes
    return int(min(LARGEST_CHUNK, max(1, subject.memory // (4 * each))))


def gram(subject: Subject) -> Tensor:
    """The inner products K_ij = g_i'g_j of the gradients of all examples.

    Where the N x P gradients do not fit half the memory, as many as do are held at a time and the others recomputed against them
    (`gram_plan` says how many). Products are summed in float64, so that the small eigenvalues of K are those of the gradients.

    Returns:
        Shape (N, N), float64, on the CPU. Computed once per subject and remembered: do not change it.

    Raises:
        SubjectError: As `per_example_gradients`.
    """
    return subject.once("gram", lambda: _gram(subject))


def gram_plan(subject: Subject) -> GramPlan:
    """What `gram` will hold and compute; runs nothing."""
    count, row = len(subject.examples), subject.size * subject.dtype.itemsize
    rows = int(min(count, max(1, subject.memory // (2 * row))))
    gradients = sum(count - first for first in range(0, count, rows))
    return GramPlan(rows, gradients, rows * row + 8 * count**2)


def squared_mean_norm(gram: Tensor) -> float:
    """The squared norm of the mean gradient, |(1/N) sum_i g_i|^2, from the Gram matrix."""
    return float(gram.mean())


def covariance_trace(gram: Tensor) -> float:
    """The trace of the unbiased covariance of the gradients, (1/(N-1)) sum_i |g_i - mean|^2, from the Gram matrix.

    What the simple noise scale of McCandlish et al. 2018 (equation 2.9) divides by the squared norm of the mean gradient.

    Returns:
        NaN for fewer than two examples.
    """
    count = len(gram)
    return float((gram.trace() - count * gram.mean()) / (count - 1)) if count > 1 else float("nan")


def pairwise_cosines(gram: Tensor) -> Tensor:
    """The cosines between the gradients of all pairs of examples, from the Gram matrix; examples with a zero gradient are left out.

    Negative ones are interference: a step that helps one example harms the other (gradient covariance of Lyle et al. 2023).

    Returns:
        One value per unordered pair.
    """
    norms = gram.diagonal().sqrt()
    kept = norms > 0
    cosines = gram[kept][:, kept] / norms[kept].outer(norms[kept])
    first, second = torch.triu_indices(len(cosines), len(cosines), 1).unbind()
    return cosines[first, second]


def mean_cosine(cosines: Tensor) -> float:
    """The mean of pairwise cosines; NaN where there are none."""
    return float(cosines.mean())


def negative_fraction(cosines: Tensor) -> float:
    """The share of cosines that are negative beyond rounding (`RIGHT_ANGLE`); NaN where there are none."""
    return float((cosines < -RIGHT_ANGLE).to(cosines).mean())


def _mean_gradient(subject: Subject) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(parameter) for name, parameter in subject.parameters.items()}
    for batch in subject.chunks():
        for name, part in subject.unflatten(
            _gradient(subject, subject.losses(subject.parameters, batch)[0].sum())
        ).items():
            total[name] += part
    return {name: gradient / subject.terms for name, gradient in total.items()}


def _gradient(subject: Subject, loss: Tensor, retain: bool = False) -> Tensor:
    """The gradient of one number as a vector; zero where the number does not depend on a parameter."""
    if not loss.requires_grad:
        return torch.zeros(subject.size, dtype=subject.dtype, device=subject.device)
    leaves = list(subject.parameters.values())
    found = torch.autograd.grad(loss, leaves, retain_graph=retain, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in found])


def _route(subject: Subject) -> Route:
    return subject.once("per_example_route", lambda: _working_route(subject))


def _working_route(subject: Subject) -> Route:
    _check_independent(subject.model)
    if not subject.examples.sliceable:
        return _one_at_a_time
    few = next(iter(subject.examples.chunks(TRIAL)))
    together = _gradient(subject, subject.losses(subject.parameters, few)[0].sum())
    try:
        if _adds_up(_vectorised(subject, few), together):
            return _vectorised
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError):
        # What torch.func cannot vectorise it refuses with one of these. A mistake of the model or the loss comes up again just below.
        pass
    if _adds_up(_one_at_a_time(subject, few), together):
        return _one_at_a_time
    raise SubjectError(
        "expected the loss of an example to depend on that example alone, but the gradients of single examples do not add up to the gradient "
        "of their batch. Likely causes: a loss that compares the examples of a batch, a normalisation over the batch, or a model that treats "
        "a batch of one differently. Per-example gradients are not defined there."
    )


def _check_independent(model: nn.Module) -> None:
    coupled = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    if coupled:
        raise SubjectError(
            f"expected the loss of an example to depend on that example alone, but BatchNorm uses the statistics of the batch "
            f"({', '.join(coupled[:3])}), so no example has a gradient of its own. Measure with mode='eval', where BatchNorm uses its running "
            "statistics."
        )


def _adds_up(each: Tensor, together: Tensor) -> bool:
    """Whether per-example gradients sum to the gradient of the summed loss; vacuously where that is not finite."""
    difference = (each.sum(0) - together).norm()
    return not together.isfinite().all() or bool(difference <= AGREEMENT * each.norm(dim=1).sum())


def _vectorised(subject: Subject, batch: Batch) -> Tensor:
    def loss(parameters: dict[str, Tensor], example: Batch) -> Tensor:
        return subject.losses(parameters, map_tensors(lambda tensor: tensor.unsqueeze(0), example))[0].sum()

    parameters = {name: parameter.detach() for name, parameter in subject.parameters.items()}
    with warnings.catch_warnings():
        # Where torch.func lacks a batching rule it loops and says so; that is no slower than what would be done instead.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = vmap(grad(loss), in_dims=(None, 0))(parameters, batch)
    return torch.cat([found[name].flatten(1) for name in parameters], 1)


def _one_at_a_time(subject: Subject, batch: Batch) -> Tensor:
    """One forward pass per example, or one in all for a batch that cannot be cut, and one backward pass per example."""
    rows = []
    for piece in _pieces(batch, 1) if subject.examples.sliceable else [batch]:
        sums, _ = subject.losses(subject.parameters, piece)
        if len(sums) != batch_size(piece):
            raise SubjectError(
                f"expected one loss per example, {batch_size(piece)} for this batch, got {len(sums)}. Sum the terms of each example."
            )
        rows += [_gradient(subject, each, retain=len(sums) > 1) for each in sums]
    return torch.stack(rows)


def _pieces(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, batch_size(batch), size):
        yield map_tensors(lambda tensor, start=start: tensor[start : start + size], batch)


def _gram(subject: Subject) -> Tensor:
    _route(subject)  # refuses what has no per-example gradients before anything is run on single examples
    count, rows = len(subject.examples), gram_plan(subject).rows
    products = torch.zeros(count, count, dtype=torch.float64)
    first = 0
    while first < count:
        first += _fill(products, subject, first, rows)
    return products.tril() + products.tril(-1).T


def _fill(products: Tensor, subject: Subject, first: int, rows: int) -> int:
    """Fills the lower triangle of the columns of up to `rows` examples from `first` on; returns how many examples these were."""
    held = torch.empty(0)
    filled, filling = 0, True
    for start, batch in _located(subject, min(rows, gradient_chunk(subject))):
        stop = start + batch_size(batch)
        if start < first:
            continue
        gradients = per_example_gradients(subject, batch)
        if not filled:
            held = gradients.new_empty(max(rows, len(gradients)), subject.size)
        filling = filling and filled + len(gradients) <= len(held)
        if filling:
            held[filled : filled + len(gradients)] = gradients
            filled += len(gradients)
        products[start:stop, first : first + filled] = _inner(gradients, held[:filled]).cpu()
    return filled


def _located(subject: Subject, size: int) -> Iterator[tuple[int, Batch]]:
    start = 0
    for batch in subject.examples.chunks(size):
        yield start, batch
        start += batch_size(batch)


def _inner(a: Tensor, b: Tensor, width: int = 4096) -> Tensor:
    """The product ab' in float64, slab by slab, so that no float64 copy of the gradients is held."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(width, 1), b.split(width, 1), strict=True):
        total += left.double() @ right.double().T
    return total
