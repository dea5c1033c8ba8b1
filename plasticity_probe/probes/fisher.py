"""The rank of the empirical Fisher matrix, from the Gram matrix of the per-example gradients or a sketch of it."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.linalg.nystrom import Sketch, rank_interval
from plasticity_probe.linalg.ranks import (
    DEFINITIONS,
    effective_rank,
    numerical_rank,
    participation_ratio,
    rank,
    stable_rank,
    threshold_rank,
)
from plasticity_probe.measurement import Measurement, Status
from plasticity_probe.network.gradients import gram, gram_plan
from plasticity_probe.network.gram_sketch import eigenvalue_bytes, gram_fits, gram_sketch, sketch_plan
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe, measured
from plasticity_probe.rank import Rank

ROUNDING = 1024
"""Units of rounding that the computation of gradients is allowed beside one per example.

Our choice, above what was measured in float32: 1 to 4 units in MLPs and in smooth residual networks, up to 800 in a ReLU network of 20 layers,
where rounding puts units on the other side of the kink.
"""


@final
@dataclass(frozen=True)
class FisherRank(Probe[Rank]):
    """The rank of the empirical Fisher F = (1/N) sum_i g_i g_i', with g_i the gradient of example i's loss in all trainable parameters.

    F is uncentred and made of per-example gradients, never of the squared mean gradient of a batch (whose rank is 1 whatever the network). Its
    non-zero eigenvalues are those of the N x N matrix of the g_i'g_j divided by N, so the rank is exact for these examples and at most
    min(N, P): compare ranks only at the same number of examples. Lewandowski et al. 2023 (v3) count eigenvalues of F, that is squares of the
    singular values of the gradient matrix; so does `value`. Measured on the next task's data at the weights that the last task left, the
    threshold rank is their count of directions of curvature.

    Where the N x N matrix does not fit the memory, the rank comes from a sketch of it with an interval that holds for certain
    (`plasticity_probe.linalg.nystrom`), and the message says so.

    Args:
        definition: Which rank `value` is, a key of `plasticity_probe.linalg.ranks.DEFINITIONS`; by default that of Lewandowski et al. 2023, the
            least k whose k largest eigenvalues hold a share 1 - delta of the sum.
        delta: The share left out; 0.01 as in Kumar et al. 2021. We could not confirm the value of Lewandowski et al.; an independent
            re-implementation of their measure uses 0.01 too.
        epsilon: Cut-off of the epsilon rank, which needs one; no other definition uses it.
        examples: Number of examples measured; our choice, as the paper's is unknown: an eigenvalue problem of 512 costs nothing beside the
            gradients.

    Raises:
        UnknownNameError: There is no such definition.
        UsageError: A setting is out of range.
    """

    definition: str = "threshold_rank"
    delta: float = 0.01
    epsilon: float | None = None
    examples: int = 512

    name: ClassVar[str] = "fisher_rank"
    title: ClassVar[str] = "rank of the empirical Fisher"
    needs: ClassVar[Need] = Need.DATA | Need.LOSS | Need.GRADIENTS
    returns: ClassVar[type[Measurement]] = Rank

    def __post_init__(self) -> None:
        if self.definition not in DEFINITIONS:
            raise UnknownNameError("rank definition", self.definition, DEFINITIONS)
        if not 0 <= self.delta < 1:
            raise UsageError(f"expected 0 <= delta < 1, got {self.delta}.")
        if self.definition == "epsilon_rank" and not (self.epsilon is not None and self.epsilon >= 0):
            raise UsageError(
                f"the epsilon rank needs an epsilon >= 0 in units of the loss, got {self.epsilon}; pass epsilon=."
            )
        if self.examples < 1:
            raise UsageError(f"expected at least 1 example, got {self.examples}.")

    def cost(self, subject: Subject) -> Cost:
        """The per-example gradients, some of them several times where they do not fit the memory together, and then the eigenvalues."""
        subject = subject.take(self.examples)
        plan = gram_plan(subject) if gram_fits(subject) else sketch_plan(subject)
        return Cost(gradients=plan.gradients, bytes=max(plan.bytes, eigenvalue_bytes(subject)))

    def measure(self, subject: Subject, generator: torch.Generator) -> Rank:
        """Measures the rank; the generator draws the landmarks of a sketch.

        Raises:
            SubjectError: Examples influence each other (BatchNorm in train mode), so that per-example gradients are not defined.
        """
        subject = subject.take(self.examples)
        if not gram_fits(subject):
            return self._sketched(subject, generator)
        ceiling = min(len(subject.examples), subject.size)
        eigenvalues = fisher_eigenvalues(gram(subject))[:ceiling]
        if not eigenvalues.isfinite().all():
            return self._nonfinite(subject, eigenvalues)
        return self._rank(subject, eigenvalues)

    def _rank(
        self, subject: Subject, eigenvalues: Tensor, interval: tuple[float, float] | None = None, **told: Any
    ) -> Rank:
        numerical = numerical_rank(eigenvalues, tol=noise_floor(eigenvalues, len(subject.examples), subject.dtype))
        asked = rank(eigenvalues, self.definition, delta=self.delta, epsilon=self.epsilon)
        value = numerical if self.definition == "numerical_rank" else asked
        lower, upper = interval or (value, value)
        return Rank(
            conditions=subject.conditions(),
            value=value,
            ceiling=float(min(len(subject.examples), subject.size)),
            matrix="fisher",
            definition=self.definition,
            delta=self.delta,
            eigenvalues=eigenvalues,
            lower=lower,
            upper=upper,
            threshold_rank=threshold_rank(eigenvalues, self.delta),
            effective_rank=effective_rank(eigenvalues),
            stable_rank=stable_rank(eigenvalues),
            participation_ratio=participation_ratio(eigenvalues),
            numerical_rank=numerical,
            **told,
        )

    def _sketched(self, subject: Subject, generator: torch.Generator) -> Rank:
        """The rank from a sketch, with an interval that holds for certain."""
        count, found = len(subject.examples), gram_sketch(subject, generator)
        sketch = Sketch(found.values[: subject.size] / count, found.missing / count)
        values = sketch.values[: sketch_plan(subject).landmarks]
        if not values.isfinite().all():
            return self._nonfinite(subject, values)
        floor = noise_floor(values, count, subject.dtype)
        cut = floor if self.definition == "numerical_rank" else self.epsilon
        interval = rank_interval(sketch, self.definition, self.delta, cut)
        share = sketch.missing / float(values.sum() + sketch.missing) if sketch.missing else 0.0
        told = (
            f"estimated: the matrix of {count} examples does not fit the memory, so {len(values)} of them, drawn at random, stand for all. "
            f"Eigenvalues are lower bounds, together too small by {sketch.missing:.3g} ({share:.2%} of the trace); each lies at most that much "
            "higher, and the rank lies in its interval for certain"
        )
        enough = share <= self.delta
        remedy = (
            "."
            if enough
            else ". That is more than delta, so the interval is wide: allow more memory, or measure fewer examples."
        )
        status = Status.OK if enough else Status.NOT_CONVERGED
        return self._rank(subject, values, interval, status=status, message=told + remedy)

    def _nonfinite(self, subject: Subject, eigenvalues: Tensor) -> Rank:
        numbers = ("value", "lower", "upper", "threshold_rank", "effective_rank", "stable_rank", "participation_ratio")
        return Rank(
            conditions=subject.conditions(),
            status=Status.NONFINITE,
            message="the gradients are not finite: weights or inputs hold NaN or Inf, the outputs overflow, or no example has a loss term.",
            ceiling=float(len(eigenvalues)),
            matrix="fisher",
            definition=self.definition,
            delta=self.delta,
            eigenvalues=eigenvalues,
            numerical_rank=float("nan"),
            **dict.fromkeys(numbers, float("nan")),
        )


def fisher_rank(
    model: nn.Module,
    loader: Any,
    *,
    definition: str = "threshold_rank",
    delta: float = 0.01,
    epsilon: float | None = None,
    examples: int = 512,
    seed: int = 0,
    **options: Any,
) -> Rank:
    """The rank of the empirical Fisher of a model on the first examples of a loader; what and why, see `FisherRank`.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches.
        definition: Which rank `value` is.
        delta: The share of the sum of eigenvalues that a threshold or energy rank leaves out.
        epsilon: Cut-off of the epsilon rank.
        examples: Number of examples measured, and so the largest rank there can be.
        seed: Seed of the landmarks of a sketch; where the Gram matrix fits the memory nothing random happens.
        options: loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`).

    Returns:
        The rank with all its definitions, its ceiling and the eigenvalues; `float(rank)` is the asked one.

    Raises:
        UsageError: A setting is out of range.
        SubjectError: Model, loss and data do not go together, every parameter is frozen, or per-example gradients are not defined.
    """
    probe = FisherRank(definition=definition, delta=delta, epsilon=epsilon, examples=examples)
    return measured(probe, model, loader, examples=examples, seed=seed, **options)


def fisher_eigenvalues(gram: Tensor) -> Tensor:
    """The eigenvalues of the empirical Fisher that can differ from zero: those of the Gram matrix over N.

    Args:
        gram: Inner products of the per-example gradients, shape (N, N).

    Returns:
        Shape (N,), descending, float64; negative ones, which only rounding makes, are 0; all NaN where the Gram matrix is not finite.
    """
    if not gram.isfinite().all():
        return torch.full((len(gram),), float("nan"), dtype=torch.float64)
    return torch.linalg.eigvalsh(gram.double() / len(gram)).flip(0).clamp(min=0)


def noise_floor(eigenvalues: Tensor, examples: int, dtype: torch.dtype) -> float:
    """The size below which an eigenvalue of the Fisher may be rounding alone.

    With e = (N + 1024) times the unit of rounding, gradients computed in `dtype` are known up to e times the largest singular value of their
    matrix, which moves a zero eigenvalue to at most e^2 of the largest. Their products, summed in float64 over blocks that are multiplied in
    `dtype`, are known up to one unit of |g_i| |g_j|, which moves an eigenvalue by at most that unit times the trace (the matrix with these
    entries has rank one and that norm). The eigenvalue problem adds e of float64.

    Args:
        eigenvalues: The eigenvalues, descending.
        examples: Number of examples N.
        dtype: Precision of the gradients.
    """
    units = examples + ROUNDING
    unit = torch.finfo(dtype).eps
    relative = max((units * unit) ** 2, units * torch.finfo(torch.float64).eps)
    return max(relative * float(eigenvalues[0]), unit * float(eigenvalues.sum()))
