"""Whether the gradient at these weights promises progress: its size against the loss, its noise, and its size under predicted targets."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from torch import nn

from plasticity_probe.errors import UsageError
from plasticity_probe.measurement import Measurement, Quantity, Status, measurement, schema
from plasticity_probe.network.fisher_trace import fisher_trace, fisher_trace_passes, predicts_targets
from plasticity_probe.network.gradients import GradientMoments, gradient_moments, moments_bytes
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe, measured

NAN = float("nan")

ROUNDING = 64
"""Units of rounding up to which a gradient's standard deviation over examples, against its root mean square, is rounding alone (our choice)."""


@measurement
class Readiness(Measurement):
    """What the gradient at these weights promises, on N examples.

    With l_i = (N / number of loss terms) * (sum of example i's terms), the mean loss is L = (1/N) sum_i l_i; g_i is the gradient of l_i in the
    trainable parameters, g = (1/N) sum_i g_i that of L, and g_B the mean of the g_i of a mini-batch B of b examples, drawn without
    replacement. Where examples hold different numbers of terms (sequences and their tokens), all are thus divided by one number, as in the
    gradient noise scale, so that g_B is right on average; divided by the batch's own number of terms it would not be.

    Args:
        optimization_readiness: strength * reliability = |g|^4 / (L E_B|g_B|^2) (Wang et al. 2026, arXiv 2605.09044; its formulas are known to us
            from a secondary source). 0 where L or g is 0; NaN where L is negative.
        strength: |g|^2 / L: by how much, relative to the loss, a small step of plain gradient descent lowers it, per unit of step size.
        reliability: |g|^2 / E_B|g_B|^2, between 0 and 1: which part of a mini-batch gradient's squared length is signal. The expectation over
            batches is exact. Noise alone gives about b / N, so compare at one N; it is 1 by necessity where N <= b.
        gradient_signal_to_noise: Mean over parameters of |mean| / standard deviation (N - 1) of the parameter's gradient over examples: the
            ratio of Rainforth et al. 2018, the root of that of Liu et al. 2020. Unlike in the noise scale and `reliability`, where the
            largest gradients decide, every parameter counts the same. Noise alone gives about sqrt(2 / (pi N)). Parameters whose gradient is
            the same on all examples have no such ratio and are left out; NaN where all are.
        zero_gradient_fraction: Share of the parameters whose gradient is exactly zero on every example.
        local_redundancy: Trace of the true Fisher of the mean loss: the expected squared norm of the gradient of a loss term whose target is
            drawn from what the network itself predicts (Cheng 2026, arXiv 2607.13432, known from a secondary source), see
            `OptimizationReadiness`. NaN for a loss that was given, as it does not say what the network predicts.
        local_redundancy_sem: Its standard error over random signs, given the examples; 0 where it is exact, NaN for a single draw.
        loss: L.
        squared_norm: |g|^2.
        batch_squared_norm: E_B|g_B|^2.
    """

    optimization_readiness: Annotated[
        float, Quantity("optimization readiness: strength times reliability", units="loss")
    ]
    strength: Annotated[float, Quantity("strength: squared gradient norm over the loss", units="loss")]
    reliability: Annotated[float, Quantity("reliability: signal in the squared norm of a mini-batch gradient")]
    gradient_signal_to_noise: Annotated[float, Quantity("gradient signal-to-noise, mean over parameters")]
    zero_gradient_fraction: Annotated[float, Quantity("share of parameters without gradient on any example")]
    local_redundancy: Annotated[
        float, Quantity("local redundancy: squared gradient norm under predicted targets", units="loss^2")
    ]
    local_redundancy_sem: Annotated[
        float, Quantity("standard error of the local redundancy", units="loss^2", shown=False, role="uncertainty")
    ]
    loss: Annotated[float, Quantity("mean loss", units="loss", shown=False, role="context")]
    squared_norm: Annotated[float, Quantity("squared norm of the mean gradient", units="loss^2", shown=False)]
    batch_squared_norm: Annotated[
        float, Quantity("expected squared norm of a mini-batch gradient", units="loss^2", shown=False)
    ]


@final
@dataclass(frozen=True)
class OptimizationReadiness(Probe[Readiness]):
    """Measures optimization readiness, the gradient's signal-to-noise ratio and local redundancy.

    Wang et al. average |g_B|^2 over 128 random mini-batches. Drawn without replacement from N examples its expectation is known,

        E_B|g_B|^2 = |g|^2 + (tr C / b) (N - b) / (N - 1),    tr C = (1/N) sum_i |g_i|^2 - |g|^2

    (the variance of a mean of b out of a finite population: Cochran 1977, theorem 2.2, where the variance is N / (N - 1) times C), so nothing is
    drawn here. A b above N counts as N, where there is no noise.

    Local redundancy is the trace of the true Fisher (`plasticity_probe.network.fisher_trace`). For cross-entropy that is the mean over loss
    terms of sum_c p_c |grad -log p_c|^2. The squared error |z - t|^2 / D of D outputs is, up to a constant, the negative logarithm of a
    Gaussian around z of variance D / 2 per output, so for it that is (1/N) sum_i (2 / D) |J_i|_F^2, with J_i the Jacobian of z. (A Gaussian
    of unit variance, with its own negative logarithm as the loss, would give D / 2 times the value; our loss under targets of unit variance
    2 / D times.) It is a mean over single targets: the gradient of a batch of N terms with targets drawn independently is 0 on average, and
    its squared norm 1 / N of the value.

    Args:
        batch: Size b of the mini-batches; 4 as in Wang et al. 2026.
        draws: Backward passes for each example that local redundancy may take: with no more classes (or outputs) than that it is exact, else
            it is estimated by so many draws of random signs (our choice: exact for ten classes).
        examples: Examples measured (our choice: what ten passes make affordable; Wang et al. take 10 000).

    Raises:
        UsageError: A setting is below 1.
    """

    batch: int = 4
    draws: int = 10
    examples: int = 256

    name: ClassVar[str] = "readiness"
    title: ClassVar[str] = "readiness of the gradient to make progress"
    needs: ClassVar[Need] = Need.DATA | Need.LOSS | Need.GRADIENTS
    returns: ClassVar[type[Measurement]] = Readiness

    def __post_init__(self) -> None:
        if min(self.batch, self.draws, self.examples) < 1:
            raise UsageError(
                f"expected batch, draws and examples of at least 1, got {self.batch}, {self.draws} and {self.examples}."
            )

    def cost(self, subject: Subject) -> Cost:
        """A forward pass for the loss, one pass of per-example gradients, and one for each target that the network may predict."""
        subject = subject.take(self.examples)
        count, passes = len(subject.examples), fisher_trace_passes(subject, self.draws)
        return Cost(forwards=count, gradients=count * (1 + passes), bytes=moments_bytes(subject))

    def measure(self, subject: Subject, generator: torch.Generator) -> Readiness:
        """Measures the subject's first `examples` examples; the generator draws signs where local redundancy is estimated.

        Raises:
            SubjectError: Examples influence each other (BatchNorm in train mode), so that per-example gradients are not defined.
        """
        subject = subject.take(self.examples)
        count, moments = len(subject.examples), gradient_moments(subject)
        # Without any loss term the scale of the gradients is unknown and they are NaN.
        if not moments.mean_square.isfinite().all():
            return _nonfinite(subject)
        progress = _progress(subject.mean_loss, moments, count, self.batch)
        noise = _noise(moments, count, subject.dtype)
        redundancy = _redundancy(subject, self.draws, generator)
        finite = all(part.finite for part in (progress, redundancy))
        return Readiness(
            conditions=subject.conditions(),
            status=Status.OK if finite else Status.NONFINITE,
            message=" ".join(part.remark for part in (progress, noise, redundancy) if part.remark),
            loss=subject.mean_loss,
            **progress.values,
            **noise.values,
            **redundancy.values,
        )


def readiness(
    model: nn.Module,
    loader: Any,
    *,
    batch: int = 4,
    draws: int = 10,
    examples: int = 256,
    seed: int = 0,
    **options: Any,
) -> Readiness:
    """Optimization readiness, gradient signal-to-noise and local redundancy; what and how, see `Readiness` and `OptimizationReadiness`.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches; for what a network can still learn, those of the task that comes next.
        batch: Size of the mini-batches whose noise counts; its own, not that of the loader.
        draws: Backward passes for each example that local redundancy may take.
        examples: Read and measure no more than this many.
        seed: Seed of the random signs; nothing is random where no example has more than `draws` classes or outputs.
        options: loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`).

    Raises:
        UsageError: A setting is below 1.
        SubjectError: Model, loss and data do not go together, every parameter is frozen, or per-example gradients are not defined.
    """
    probe = OptimizationReadiness(batch=batch, draws=draws, examples=examples)
    return measured(probe, model, loader, examples=examples, seed=seed, **options)


def batch_squared_norm(squared_norm: float, mean_square: float, examples: int, batch: int) -> float:
    """E_B|g_B|^2, the expected squared norm of the mean of `batch` out of some gradients, drawn without replacement.

    Args:
        squared_norm: |g|^2 of the mean of all gradients.
        mean_square: The mean of all |g_i|^2, at least |g|^2.
        examples: Number N of gradients.
        batch: Number b drawn; more than N count as N.
    """
    batch = min(batch, examples)
    # As a weighted mean of the two, no small difference of large numbers is taken.
    noisy = (examples - batch) / (batch * (examples - 1)) if batch < examples else 0.0
    return (1 - noisy) * squared_norm + noisy * mean_square


@dataclass(frozen=True)
class _Part:
    """Some fields of the measurement, what to say about them, and whether all of them are finite that should be."""

    values: dict[str, float]
    remark: str = ""
    finite: bool = True


def _progress(loss: float, moments: GradientMoments, count: int, batch: int) -> _Part:
    """Optimization readiness and its factors."""
    squared = float(moments.mean.square().sum())
    # Rounding must not make the mean of the squares less than the square of the mean.
    mean_square = max(squared, float(moments.mean_square.sum()))
    of_batch = batch_squared_norm(squared, mean_square, count, batch)
    reliability = squared / of_batch if of_batch > 0 else 0.0
    strength, remark, finite = _strength(squared, loss)
    if not remark and count <= batch and squared > 0:
        remark = f"{count} examples make no more than one batch of {batch}, so reliability is 1 whatever the noise: measure on more."
    values = {
        "optimization_readiness": strength * reliability,
        "strength": strength,
        "reliability": reliability,
        "squared_norm": squared,
        "batch_squared_norm": of_batch,
    }
    return _Part(values, remark, finite)


def _strength(squared_norm: float, loss: float) -> tuple[float, str, bool]:
    """|g|^2 / L, what to say about it, and whether the loss is finite."""
    if not math.isfinite(loss):
        return NAN, "The mean loss is not finite: weights or inputs hold NaN or Inf, or the outputs overflow.", False
    if loss < 0:
        return NAN, "The mean loss is negative, so no progress is relative to it: strength is NaN.", True
    return squared_norm / loss if loss else 0.0, "", True


def _noise(moments: GradientMoments, count: int, dtype: torch.dtype) -> _Part:
    """Gradient signal-to-noise ratio, and the share of parameters without gradient."""
    variance = moments.mean_square - moments.mean.square()
    # Gradients are known up to rounding in their own precision, their squares are summed in float64.
    floor = max((ROUNDING * torch.finfo(dtype).eps) ** 2, ROUNDING * torch.finfo(torch.float64).eps)
    zero, varies = moments.mean_square == 0, variance > floor * moments.mean_square
    ratios = moments.mean[varies].abs() / (variance[varies] * count / max(count - 1, 1)).sqrt()
    values = {"gradient_signal_to_noise": float(ratios.mean()), "zero_gradient_fraction": float(zero.double().mean())}
    return _Part(values, _remark_on_noise(count, len(zero), int(zero.sum()), int(varies.sum())))


def _remark_on_noise(count: int, parameters: int, zero: int, varying: int) -> str:
    if zero == parameters:
        return "Every gradient is exactly zero: gradient_signal_to_noise is NaN."
    if count == 1:
        return "One example has no spread: gradient_signal_to_noise is NaN. Measure on more."
    if still := parameters - zero - varying:
        return f"{still} of {parameters} parameters have one and the same gradient on every example, and so no signal-to-noise ratio."
    return ""


def _redundancy(subject: Subject, draws: int, generator: torch.Generator) -> _Part:
    if not predicts_targets(subject):
        values = {"local_redundancy": NAN, "local_redundancy_sem": NAN}
        return _Part(
            values, "A loss that was given does not say what targets the network predicts: local_redundancy is NaN."
        )
    found = fisher_trace(subject, draws, generator)
    finite = math.isfinite(found.value)
    return _Part(
        {"local_redundancy": found.value, "local_redundancy_sem": found.standard_error},
        "" if finite else "local_redundancy is not finite: gradients of the outputs overflow.",
        finite,
    )


def _nonfinite(subject: Subject) -> Readiness:
    numbers = [field.name for field in schema(Readiness)]
    return Readiness(
        conditions=subject.conditions(),
        status=Status.NONFINITE,
        message="the gradients are not finite: weights or inputs hold NaN or Inf, the outputs overflow, or no example has a loss term.",
        **dict.fromkeys(numbers, NAN),
    )
