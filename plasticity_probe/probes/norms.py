"""Norms of weights and gradients, per tensor and in total, and how the gradient lies in the curvature."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plasticity_probe.errors import SubjectError, UsageError
from plasticity_probe.linalg.dense import symmetric_eigenpairs, vector_norm
from plasticity_probe.linalg.inspection import EigenStatus
from plasticity_probe.linalg.lanczos import Eigenpairs, ExtremeEigenpairs, extreme_eigenpairs
from plasticity_probe.measurement import Labels, Measurement, Quantity, Status, measurement
from plasticity_probe.network.curvature import curvature, eigenpairs, graph_bytes, krylov_vectors, search_cost
from plasticity_probe.network.examples import keep
from plasticity_probe.network.gradients import covariance_trace, gram, gram_plan, mean_gradient, squared_mean_norm
from plasticity_probe.network.losses import Loss, Terms, class_axis, cross_entropy_terms, inputs_and_targets
from plasticity_probe.network.private_copy import private_copy
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe, generator_for, measured

NAN = float("nan")

EXACT_SIDE = 1024
"""Matrices whose smaller side is at most this get their spectral norm from a full decomposition (our choice: about a second each)."""

PAIRS = 10
"""Eigenpairs searched at each end where no number of dimensions is given, so that this probe and the spectrum probe share their search."""

SPECTRAL_TOL = 1e-6
"""Relative residual at which the spectral norm of a larger matrix is accepted (our choice: single precision)."""


@measurement
class WeightNorms(Measurement):
    """Norms of the parameters, in float64.

    Every floating-point parameter is a tensor here, frozen ones included, tied ones once. A parametrised layer (weight_norm) shows
    the parameters it has. Empty and non-floating parameters are left out and counted.

    Args:
        tensors: Names of the parameters.
        l2: Square root of the sum of squares of each.
        mean_absolute: Mean of |w| of each (the weight magnitude of Dohare et al. 2024).
        spectral: Largest singular value of each matrix; of a convolution's weight as the matrix (out, in * kernel); of a vector its L2 norm.
        spectral_error: Upper bound of the error of `spectral`: rounding where the matrix was decomposed, the residual where iterated.
        distance: L2 distance of each from its initial value; NaN where that is unknown.
        total_l2: L2 norm of all parameters together.
        total_mean_absolute: Mean of |w| over all parameters.
        total_distance: L2 distance of all parameters from initialisation; NaN where it is unknown for any of them.
        skipped: Number of parameters left out.
    """

    tensors: Annotated[tuple[str, ...], Labels("tensor")]
    total_l2: Annotated[float, Quantity("L2 norm of all weights")]
    total_mean_absolute: Annotated[float, Quantity("mean absolute weight")]
    total_distance: Annotated[float, Quantity("L2 distance of all weights from initialisation")]
    l2: Annotated[Float[Tensor, " tensor"], Quantity("L2 norm of the tensor")]
    mean_absolute: Annotated[Float[Tensor, " tensor"], Quantity("mean absolute weight of the tensor")]
    spectral: Annotated[Float[Tensor, " tensor"], Quantity("spectral norm of the tensor", summary="max")]
    spectral_error: Annotated[
        Float[Tensor, " tensor"], Quantity("error bound of the spectral norm", role="uncertainty")
    ]
    distance: Annotated[Float[Tensor, " tensor"], Quantity("L2 distance of the tensor from initialisation")]
    skipped: Annotated[float, Quantity("empty or non-floating parameters left out", shown=False)]


@final
@dataclass(frozen=True)
class WeightNormsProbe(Probe[WeightNorms]):
    """Measures the norms of the weights; needs no data."""

    name: ClassVar[str] = "weight_norms"
    title: ClassVar[str] = "norms of the weights"
    needs: ClassVar[Need] = Need.WEIGHTS
    returns: ClassVar[type[Measurement]] = WeightNorms

    def cost(self, subject: Subject) -> Cost:
        """No pass; three float64 copies of the largest parameter at a time."""
        return Cost(bytes=3 * 8 * max((p.numel() for p in subject.model.parameters()), default=0))

    def measure(self, subject: Subject, generator: torch.Generator) -> WeightNorms:
        """Measures every parameter; the generator starts the iteration for large matrices."""
        named = dict(subject.model.named_parameters())
        tensors = {name: p.detach() for name, p in named.items() if p.is_floating_point() and p.numel()}
        rows = {name: _norms(name, t, subject.initial, generator) for name, t in tensors.items()}
        l2, absolute, spectral, errors, distance = (
            torch.tensor(list(rows.values()), dtype=torch.float64).reshape(-1, 5).T
        )
        sizes = torch.tensor([tensor.numel() for tensor in tensors.values()], dtype=torch.float64)
        status, message = _weight_status(tensors, spectral, errors)
        return WeightNorms(
            conditions=subject.conditions(),
            status=status,
            message=message,
            tensors=tuple(tensors),
            total_l2=_length(l2),
            total_mean_absolute=float((absolute * sizes).sum() / sizes.sum()) if len(sizes) else NAN,
            total_distance=_length(distance),
            l2=l2,
            mean_absolute=absolute,
            spectral=spectral,
            spectral_error=errors,
            distance=distance,
            skipped=len(named) - len(tensors),
        )


def weight_norms(
    model: nn.Module,
    *,
    initial: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> WeightNorms:
    """The norms of a model's weights, and their distance from initialisation where that is known.

    Args:
        model: Any module; it is not changed.
        initial: Weights at initialisation by parameter name, such as a state dict saved before training.
        seed: Seed of the iteration for matrices with both sides above 1024.
        device: Where to compute; by default where the model is.

    Raises:
        SubjectError: An initial weight has another shape than the parameter of its name.
    """
    subject = Subject(
        private_copy(model, device=device), Loss("none", _no_loss, None), keep([]), seed=seed, initial=initial
    )
    return WeightNormsProbe().measure(subject, generator_for(seed, WeightNormsProbe.name))


def _no_loss(*_: object) -> Terms:
    raise UsageError("expected a subject with a loss, but this one was made for its weights alone.")


class _TensorNorms(NamedTuple):
    l2: float
    mean_absolute: float
    spectral: float
    spectral_error: float
    distance: float


def _norms(name: str, tensor: Tensor, initial: Mapping[str, Tensor] | None, generator: torch.Generator) -> _TensorNorms:
    values = tensor.double()
    if not values.isfinite().all():
        return _TensorNorms(NAN, NAN, NAN, NAN, NAN)
    l2 = vector_norm(values.reshape(-1))
    spectral, error = _spectral(values, l2, generator)
    return _TensorNorms(l2, float(values.abs().mean()), spectral, error, _distance(name, values, initial))


def _distance(name: str, values: Tensor, initial: Mapping[str, Tensor] | None) -> float:
    start = (initial or {}).get(name)
    if start is None:
        return NAN
    if start.shape != values.shape:
        raise SubjectError(
            f"expected the initial {name} to have shape {tuple(values.shape)}, got {tuple(start.shape)}. Pass the initial weights of this "
            "architecture."
        )
    return vector_norm((values - start.detach().to(values)).reshape(-1))


def _spectral(values: Tensor, l2: float, generator: torch.Generator) -> tuple[float, float]:
    """The largest singular value and a bound of its error; NaN for the value where the iteration did not converge."""
    rounding = torch.finfo(torch.float64).eps
    if values.ndim < 2 or min(values.shape[0], values[0].numel()) == 1 or l2 == 0:
        return l2, rounding * l2
    matrix = values.reshape(len(values), -1) / l2
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if len(matrix) <= EXACT_SIDE:
        return l2 * math.sqrt(float(symmetric_eigenpairs(matrix @ matrix.T)[0][0])), len(matrix) * rounding * l2
    top = extreme_eigenpairs(_GramOperator(matrix), 1, 0, generator=generator, tol=SPECTRAL_TOL).top
    largest = math.sqrt(float(top.values[0]))
    return (l2 * largest if top.status is EigenStatus.OK else NAN), l2 * float(top.residuals[0]) / largest


class _GramOperator:
    """A A' of a wide matrix A by its products, for `extreme_eigenpairs`."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        return self.matrix @ (self.matrix.T @ vectors)


def _length(parts: Tensor) -> float:
    return vector_norm(parts) if len(parts) else NAN


def _weight_status(tensors: Mapping[str, Tensor], spectral: Tensor, errors: Tensor) -> tuple[Status, str]:
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        return Status.NONFINITE, _nonfinite(broken)
    open_ones = [
        name
        for name, value, error in zip(tensors, spectral, errors, strict=True)
        if value.isnan() and not error.isnan()
    ]
    if open_ones:
        return (
            Status.NOT_CONVERGED,
            f"the spectral norm of {', '.join(open_ones[:3])} did not converge to {SPECTRAL_TOL:g}.",
        )
    return Status.OK, ""


def _nonfinite(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"NaN or Inf in {', '.join(names[:3])}{more}. Likely causes: training diverged (learning rate too high, half precision without loss "
        "scaling), or a damaged checkpoint."
    )


@measurement
class GradientNorms(Measurement):
    """The gradient of the mean loss: its size, its noise, and how it lies in the Hessian's eigenspaces.

    With G the mean gradient, H the Hessian of the mean loss and V the eigenvectors of its k largest eigenvalues.

    Args:
        tensors: Names of the trainable parameters.
        l2: |G| of each tensor.
        total_l2: |G| over all parameters.
        noise_scale: tr(Sigma) / |G|^2, Sigma the covariance of the examples' gradients: the batch size at which noise and signal are equal,
            in examples (McCandlish et al. 2018, equation 2.9). Both from unbiased estimates over these examples; NaN where the
            unbiased |G|^2 is not positive, that is, where no gradient is told from noise.
        noise_trace: The unbiased tr(Sigma).
        top_energy: |V'G|^2 / |G|^2, the share of the gradient's energy in the top-k eigenspace of the Hessian (Gur-Ari, Roberts & Dyer
            2018); NaN for a zero gradient or a zero Hessian. k / P would be chance.
        subspace: k.
        curvature_cosine: G'HG / (|G| |HG|) (Gur-Ari et al. 2018); NaN where G or HG is zero.
        products: Curvature-vector products spent, those of a shared eigenvalue search included.
    """

    tensors: Annotated[tuple[str, ...], Labels("tensor")]
    total_l2: Annotated[float, Quantity("L2 norm of the mean gradient", units="loss")]
    noise_scale: Annotated[float, Quantity("gradient noise scale", units="examples")]
    noise_trace: Annotated[float, Quantity("trace of the gradients' covariance", units="loss^2", shown=False)]
    top_energy: Annotated[float, Quantity("gradient energy in the top Hessian eigenspace")]
    subspace: Annotated[float, Quantity("dimensions of that eigenspace", shown=False)]
    curvature_cosine: Annotated[float, Quantity("cosine of the gradient g and Hg")]
    l2: Annotated[Float[Tensor, " tensor"], Quantity("L2 norm of the mean gradient of the tensor", units="loss")]
    products: Annotated[float, Quantity("curvature-vector products spent", shown=False)]


@final
@dataclass(frozen=True)
class GradientNormsProbe(Probe[GradientNorms]):
    """Measures the mean gradient, its noise and its place in the curvature.

    Its defaults are those of the spectrum probe, so that one search for eigenpairs serves both; so do equal k, tol and max_products.

    Args:
        k: Dimensions of the top eigenspace; None takes the number of classes up to 10, and 10 where there are no classes (Gur-Ari et al.
            2018 take the number of classes; the limit is our choice, as each eigenpair costs products).
        tol: Relative residual of a converged eigenpair.
        examples: Examples measured on, at most (our choice, as in the spectrum probe).
        max_products: Products after which the search for eigenpairs gives up (our choice, as in the spectrum probe).
    """

    name: ClassVar[str] = "gradient_norms"
    title: ClassVar[str] = "norm and noise of the gradient"
    needs: ClassVar[Need] = Need.DATA | Need.LOSS | Need.GRADIENTS
    returns: ClassVar[type[Measurement]] = GradientNorms

    k: int | None = None
    tol: float = 1e-3
    examples: int = 128
    max_products: int = 500

    def __post_init__(self) -> None:
        if (self.k is not None and self.k < 1) or self.examples < 1 or not self.tol > 0:
            raise UsageError(f"expected k >= 1 or None, examples >= 1 and tol > 0, got {self}.")
        least = 2 * (self.k or PAIRS) + 4
        if self.max_products < least:
            raise UsageError(
                f"expected max_products >= 2 k + 4 = {least}, got {self.max_products}; raise it or ask for a smaller k."
            )

    def cost(self, subject: Subject) -> Cost:
        """All examples once forward and backward, once each by itself, and the search for eigenpairs at its longest."""
        subject = subject.take(self.examples)
        count, plan = len(subject.examples), gram_plan(subject)
        return Cost(
            gradients=count + plan.gradients,
            products=count * (self.max_products + 1),
            vectors=krylov_vectors(subject, self.k or PAIRS, self.max_products),
            graphs=max(graph_bytes(subject), plan.bytes),
            shared=search_cost(subject, "hessian", self.k or PAIRS, self.tol, self.max_products),
        )

    def measure(self, subject: Subject, generator: torch.Generator) -> GradientNorms:  # noqa: ARG002 -- the search has its own seed
        """Measures the subject's first `examples` examples."""
        subject = subject.take(self.examples)
        gradients = mean_gradient(subject)
        if not all(gradient.isfinite().all() for gradient in gradients.values()):
            return self._nonfinite(subject, gradients)
        k = min(self.k or _classes(subject), subject.size)
        found = self._eigenpairs(subject)
        gradient = subject.flatten(gradients)
        products = gram(subject)
        trace = covariance_trace(products)
        signal = squared_mean_norm(products) - trace / len(products)
        energy, cosine = _energy(gradient, found.top, k), _curvature_cosine(subject, gradient)
        status, message = _gradient_status(found, k, energy, signal)
        return GradientNorms(
            conditions=subject.conditions(),
            status=status,
            message=message,
            tensors=tuple(gradients),
            total_l2=vector_norm(gradient),
            noise_scale=trace / signal if signal > 0 else NAN,
            noise_trace=trace,
            top_energy=energy,
            subspace=k,
            curvature_cosine=cosine,
            l2=torch.tensor([vector_norm(part.reshape(-1)) for part in gradients.values()], dtype=torch.float64),
            products=found.top.products + 1,
        )

    def _eigenpairs(self, subject: Subject) -> ExtremeEigenpairs:
        return eigenpairs(
            subject,
            k=self.k or PAIRS,
            tol=self.tol,
            max_products=self.max_products,
            generator=generator_for(subject.seed, "eigenpairs"),
        )

    def _nonfinite(self, subject: Subject, gradients: Mapping[str, Tensor]) -> GradientNorms:
        broken = [name for name, p in subject.model.named_parameters() if not p.isfinite().all()]
        return GradientNorms(
            conditions=subject.conditions(),
            status=Status.NONFINITE,
            message=_nonfinite(broken)
            if broken
            else "the gradient holds NaN or Inf although all weights are finite: the loss overflows.",
            tensors=tuple(gradients),
            total_l2=NAN,
            noise_scale=NAN,
            noise_trace=NAN,
            top_energy=NAN,
            subspace=NAN,
            curvature_cosine=NAN,
            l2=torch.full((len(gradients),), NAN, dtype=torch.float64),
            products=0,
        )


def gradient_norms(
    model: nn.Module,
    loader: Any,
    *,
    k: int | None = None,
    tol: float = 1e-3,
    examples: int = 128,
    max_products: int = 500,
    seed: int = 0,
    **options: Any,
) -> GradientNorms:
    """The norm of the mean gradient, its noise scale, and its share in the top Hessian eigenspace.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches.
        k: Dimensions of the top eigenspace; None takes the number of classes up to 10, and 10 where there are no classes.
        tol: Relative residual of a converged eigenpair.
        examples: Read and measure no more than this many.
        max_products: Products after which the search for eigenpairs gives up.
        seed: Seed of the random start vectors.
        options: loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`).

    Raises:
        UsageError: A setting is out of range.
        SubjectError: Model, loss and data do not go together, or the examples of a batch influence each other.
    """
    probe = GradientNormsProbe(k, tol, examples, max_products)
    return measured(probe, model, loader, examples=examples, seed=seed, **options)


def _classes(subject: Subject) -> int:
    """The number of classes where the inferred loss is cross-entropy, up to `PAIRS`; else `PAIRS`."""
    if subject.loss.of_outputs is not cross_entropy_terms:
        return PAIRS
    batch = next(iter(subject.chunks(1)))
    targets = cast(Tensor, inputs_and_targets(batch)[1])
    with torch.no_grad():
        outputs = subject.outputs(subject.parameters_or_none, batch)
    return min(PAIRS, outputs.shape[class_axis(outputs, targets)])


def _energy(gradient: Tensor, top: Eigenpairs, k: int) -> float:
    length = vector_norm(gradient)
    if length == 0 or top.status is EigenStatus.ZERO_OPERATOR:
        return NAN
    unit = gradient / length
    return float(sum((vector.double() @ unit.double()).square() for vector in top.vectors[:, :k].unbind(1)))


def _curvature_cosine(subject: Subject, gradient: Tensor) -> float:
    with curvature(subject, "hessian") as operator:
        product = operator @ gradient
    scale = vector_norm(gradient), vector_norm(product)
    return float((gradient.double() / scale[0]) @ (product.double() / scale[1])) if min(scale) > 0 else NAN


def _gradient_status(found: ExtremeEigenpairs, k: int, energy: float, signal: float) -> tuple[Status, str]:
    top = found.top
    if top.status is EigenStatus.NONFINITE:
        return Status.NONFINITE, "a curvature-vector product holds NaN or Inf: the loss overflows near these weights."
    if top.status in (EigenStatus.ASYMMETRIC, EigenStatus.NOT_REPEATABLE):
        return (
            Status.FAILED,
            f"the Hessian's products are {top.status}: the network draws random numbers or its second derivative is wrong.",
        )
    if top.status is EigenStatus.NOT_CONVERGED:
        worst = float((top.residuals[:k] / top.values[:k].abs()).max())
        return Status.NOT_CONVERGED, (
            f"the {k} top eigenvectors did not converge within {top.products} products (largest relative residual {worst:.1e}), so top_energy "
            "is approximate. Raise max_products or tol."
        )
    if top.status is EigenStatus.ZERO_OPERATOR:
        return (
            Status.OK,
            "the Hessian is exactly zero, so no direction is its top one: top_energy and curvature_cosine are NaN.",
        )
    if math.isnan(energy):
        return Status.OK, "the gradient is exactly zero: it has no direction and no noise scale."
    return (
        Status.OK,
        ""
        if signal > 0
        else "no gradient is told from noise on these examples: noise_scale is NaN. Measure on more examples.",
    )
