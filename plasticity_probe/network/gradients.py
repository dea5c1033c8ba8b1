"""Gradients of the mean loss and of every single example's loss, and the matrix of inner products of the latter.

With N examples the mean loss is L = (1/N) sum_i l_i, where l_i = (N / number of loss terms) * (sum of example i's terms); g_i is the gradient
of l_i in the trainable parameters. So the gradient of L is the mean of the g_i, and the empirical Fisher is (1/N) sum_i g_i g_i'. Its non-zero
eigenvalues are those of the Gram matrix K_ij = g_i'g_j divided by N, which is why nothing here ever needs a matrix of parameters squared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plasticity_probe.network.example_gradients import example_gradients, pieces, route_of
from plasticity_probe.network.examples import Batch, batch_size
from plasticity_probe.network.outer_products import Gradients, add_inner, as_rows, gathered, mirror, moments, part
from plasticity_probe.network.position_vectors import SLAB
from plasticity_probe.network.subject import Subject

PASS_BYTES = {"cpu": 24 * 2**20}
"""Activations of the examples whose gradients are taken at once, at most, by device.

Our choice: near the size of a processor's caches, where a residual network was as fast as with more; an accelerator wants larger pieces.
"""

PLENTY = 2**27
"""Bytes of gradients kept at once before less than a quarter of the n x P numbers is, for the price of further passes (our choice: 128 MB)."""

LARGEST_CHUNK = 512
"""Examples whose gradients are taken at once, at most (our choice: more gain nothing)."""

TRIAL_COPIES = 5
"""Tensors of the size of all weights that the trial of the ways to per-example gradients holds (counted). The C library's allocator keeps what
they leave, so they count beside all else."""

RIGHT_ANGLE = 1e-6
"""Cosines this close to zero count as zero (our choice: what rounding of float32 gradients leaves of a right angle)."""


@dataclass(frozen=True)
class GramPlan:
    """How the Gram matrix is computed within the subject's memory.

    Args:
        groups: Parameters whose gradients are kept at the same time, and of how many examples.
        gradients: Examples run forward and backward in all: their number where all gradients are kept at once, more where it takes several
            passes.
        multiplications: Multiplications of all inner products.
        peak: Bytes at the most: the gradients kept, the matrix, what a pass or the products work with, and what the trial leaves.
        bytes: What of it is beyond an ordinary forward and backward pass of `Subject.chunk` examples.
    """

    groups: tuple[tuple[tuple[str, ...], int], ...]
    gradients: int
    multiplications: int
    peak: int
    bytes: int


@dataclass(frozen=True, eq=False)
class GradientMoments:
    """Moments of the examples' gradients g_i in every single parameter, over the N examples.

    Args:
        mean: (1/N) sum_i g_i, the gradient of the mean loss, shape (P,), float64, in the order of `Subject.flatten`.
        mean_square: (1/N) sum_i g_i^2, entry by entry, likewise.
    """

    mean: Tensor
    mean_square: Tensor


def mean_gradient(subject: Subject) -> dict[str, Tensor]:
    """The gradient of the mean loss by parameter name; zero for a parameter that the loss does not use.

    Every term of the loss weighs the same, however the examples are cut. It is computed once per subject and remembered: do not change it.

    Raises:
        SubjectError: Every parameter is frozen.
    """
    return subject.once("mean_gradient", lambda: _mean_gradient(subject))


def per_example_gradients(subject: Subject, batch: Batch) -> Tensor:
    """The gradients g_i of the examples of a batch, as rows.

    Args:
        subject: The network and its loss.
        batch: Some of its examples, on its device.

    Returns:
        Shape (n, P), columns in the order of `subject.flatten`.

    Raises:
        SubjectError: The examples of a batch influence each other (BatchNorm with batch statistics, a contrastive loss), so that an example has
            no gradient of its own; or every parameter is frozen.
    """
    rows = []
    for piece in pieces(batch, gradient_chunk(subject)) if subject.examples.sliceable else [batch]:
        found = example_gradients(subject, piece)
        zero = torch.zeros(batch_size(piece), 1, dtype=subject.dtype, device=subject.device)
        each = [
            as_rows(found[name]) if name in found else zero.expand(-1, parameter.numel())
            for name, parameter in subject.parameters.items()
        ]
        rows.append(torch.cat(each, 1))
    return gradient_scale(subject) * torch.cat(rows)


def gradient_moments(subject: Subject) -> GradientMoments:
    """Mean and mean square of the examples' gradients in every parameter, by one pass, summed in float64.

    Nothing of the size of examples times parameters is held. Computed once per subject and remembered: do not change it.

    Raises:
        SubjectError: As `per_example_gradients`.
    """
    return subject.once("gradient_moments", lambda: _gradient_moments(subject))


def moments_bytes(subject: Subject) -> int:
    """Bytes that a pass over per-example gradients and their moments take beyond an ordinary pass of `Subject.chunk` examples."""
    chunk, size = gradient_chunk(subject), subject.dtype.itemsize
    of_a_pass = chunk * _bytes_of_a_pass(subject) + 16 * min(SLAB, chunk * subject.size)
    vectors = (TRIAL_COPIES * size + 4 * 8) * subject.size
    return max(0, of_a_pass + vectors - subject.chunk * subject.activation_bytes)


def gradient_chunk(subject: Subject) -> int:
    """Examples whose gradients are taken at once: their graph, its gradients and what is kept of them fit a quarter of the memory."""
    fits = subject.memory // (4 * _bytes_of_a_pass(subject))
    fast = PASS_BYTES.get(subject.device.type, subject.memory) // subject.activation_bytes
    return int(min(LARGEST_CHUNK, max(1, min(fits, fast))))


def gram(subject: Subject) -> Tensor:
    """The inner products K_ij = g_i'g_j of the gradients of all examples, without the matrix of all gradients.

    One backward pass of a chunk of examples gives what their gradients are made of; it is kept as such or as the gradients themselves, layer
    by layer, whichever is smaller, and multiplied in whichever way is less work (`plasticity_probe.network.outer_products`). With n examples,
    P parameters of which layer k has r_k x c_k used at T_k positions, that is one gradient pass and

        n^2 sum_k min(r_k c_k, T_k^2 (r_k + c_k)) / 2  multiplications,

    instead of n^2 P. Where what is kept does not fit, the parameters are taken in groups, each in a pass of its own, and in the last resort
    blocks of examples, with others recomputed against them (`gram_plan` says which). Sums are kept in float64; products of gradients that
    are formed are taken in their own precision, block by block, which leaves K_ij an error of about eps |g_i| |g_j| (measured: 0.4 eps on a
    residual network of 20 layers).

    Returns:
        Shape (N, N), float64, on the CPU. Computed once per subject and remembered: do not change it.

    Raises:
        SubjectError: As `per_example_gradients`.
    """
    return subject.once("gram", lambda: _gram(subject))


def gram_plan(subject: Subject) -> GramPlan:
    """What `gram` will keep and compute, from a trial on a few examples."""
    count, kept, size = len(subject.examples), route_of(subject).kept, subject.dtype.itemsize
    room = min(subject.memory // 2, max(PLENTY, count * subject.size * size // 4))
    groups = tuple(
        (names, _rows(count, sum(kept[name] for name in names) * size, room, gradient_chunk(subject)))
        for names in _groups(kept, room // (count * size))
    )
    gradients = sum(count - first for _, rows in groups for first in range(0, count, rows))
    held = max(min(count, 2 * rows) * sum(kept[name] for name in names) * size for names, rows in groups)
    working = max(2 * gradient_chunk(subject) * subject.activation_bytes, 16 * min(SLAB, count * subject.size))
    multiplications = count * (count + 1) // 2 * route_of(subject).multiplications
    matrices = 8 * count**2 * (1 if subject.device.type == "cpu" else 2)
    peak = held + matrices + working + TRIAL_COPIES * subject.size * size
    return GramPlan(groups, gradients, multiplications, peak, max(0, peak - subject.chunk * subject.activation_bytes))


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
        loss = subject.losses(subject.parameters, batch)[0].sum()
        if not loss.requires_grad:
            continue
        found = torch.autograd.grad(loss, list(subject.parameters.values()), allow_unused=True)
        for name, gradient in zip(total, found, strict=True):
            if gradient is not None:
                total[name] += gradient
    return {name: gradient / subject.terms for name, gradient in total.items()}


def _gradient_moments(subject: Subject) -> GradientMoments:
    totals = torch.zeros(2, subject.size, dtype=torch.float64, device=subject.device)
    places = [dict(zip(subject.parameters, half.split(_sizes(subject)), strict=True)) for half in totals]
    for batch in subject.examples.chunks(gradient_chunk(subject)):
        for name, gradients in example_gradients(subject, batch).items():
            for place, part_of_it in zip(places, moments(gradients), strict=True):
                place[name] += part_of_it
    count, scale = len(subject.examples), gradient_scale(subject)
    return GradientMoments(totals[0].mul_(scale / count), totals[1].mul_(scale**2 / count))


def _sizes(subject: Subject) -> list[int]:
    return [parameter.numel() for parameter in subject.parameters.values()]


def gradient_scale(subject: Subject) -> float:
    """What the gradient of an example's summed terms is multiplied by to be g_i: examples over loss terms."""
    return len(subject.examples) / subject.terms if subject.terms else float("nan")


def _groups(kept: Mapping[str, int], room: int) -> list[tuple[str, ...]]:
    """The parameters in as few groups of about equally many numbers per example as fit the room; one each where nothing else does."""
    total = sum(kept.values())
    for parts in range(max(1, -(-total // max(1, room))), len(kept)):
        groups: dict[int, list[str]] = {}
        before = 0
        for name, numbers in kept.items():
            place = min(parts - 1, int((before + numbers / 2) * parts / max(1, total)))
            groups.setdefault(place, []).append(name)
            before += numbers
        if max(sum(kept[name] for name in group) for group in groups.values()) <= room:
            return [tuple(group) for group in groups.values()]
    return [(name,) for name in kept]


def _rows(count: int, each: int, room: int, chunk: int) -> int:
    """Examples kept at the same time: all, or half of what there is room for, as two blocks of them meet; whole chunks of them."""
    fits = room // max(1, each)
    if fits >= count:
        return count
    rows = max(1, fits // 2)
    return rows - rows % chunk if rows > chunk else rows


def _bytes_of_a_pass(subject: Subject) -> int:
    """Bytes per example of a pass: the graph, gradients and temporary values of its size, and what is kept."""
    return 3 * subject.activation_bytes + route_of(subject).numbers * subject.dtype.itemsize


def _gram(subject: Subject) -> Tensor:
    count = len(subject.examples)
    products = torch.zeros(count, count, dtype=torch.float64)
    for names, rows in gram_plan(subject).groups:
        _add_group(products, subject, names, rows)
    mirror(products)
    return products.mul_(gradient_scale(subject) ** 2)


def _add_group(products: Tensor, subject: Subject, names: Sequence[str], rows: int) -> None:
    """Adds the products of some parameters' gradients, on and below the diagonal, block by block of examples."""
    first = 0
    while first < len(products):
        blocks = _blocks(subject, names, first, rows)
        size, kept = next(blocks)
        last = first + size
        _add_block(products[first:last, first:last], kept, kept, subject.device)
        start = last
        for others_size, others in blocks:
            _add_block(products[start : start + others_size, first:last], others, kept, subject.device)
            start += others_size
        first = last


def _add_block(
    block: Tensor, left: Mapping[str, Gradients], right: Mapping[str, Gradients], device: torch.device
) -> None:
    """Adds products that are computed on a device to a block of a matrix, on and below the diagonal where both sides are the same."""
    total = block.to(device)
    add_products(total, left, right)
    if total is not block:
        block.copy_(total)


def add_products(total: Tensor, left: Mapping[str, Gradients], right: Mapping[str, Gradients]) -> None:
    """Adds the inner products of two blocks of examples over all parameters, as `add_inner` does for one."""
    for name in left:
        if name in right:
            add_inner(total, left[name], right[name])


def _blocks(
    subject: Subject, names: Sequence[str], first: int, rows: int
) -> Iterator[tuple[int, dict[str, Gradients]]]:
    """Blocks of at most `rows` examples from example `first` on: how many there are, and their gradients by parameter."""
    kept, filled, start = {}, 0, 0
    for batch in subject.examples.chunks(min(rows, gradient_chunk(subject))):
        size = batch_size(batch)
        start += size
        if start <= first:
            continue
        if filled and filled + size > rows:
            yield filled, filled_part(kept, filled)
            kept, filled = {}, 0
        keep_also(kept, filled, example_gradients(subject, batch, names), max(rows, size))
        filled += size
    if filled:
        yield filled, filled_part(kept, filled)


def keep_also(kept: dict[str, Gradients], filled: int, new: Mapping[str, Gradients], capacity: int) -> None:
    """Puts the gradients of further examples behind those of the first `filled`, parameter by parameter."""
    for name, gradients in new.items():
        kept[name] = gathered(kept.get(name), filled, gradients, capacity)


def filled_part(kept: Mapping[str, Gradients], filled: int) -> dict[str, Gradients]:
    """The gradients of the examples that were put in."""
    return {name: part(gradients, 0, filled) for name, gradients in kept.items()}
