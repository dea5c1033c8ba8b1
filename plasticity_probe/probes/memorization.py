"""Noise memorization of one checkpoint: what a network knows of its training examples beyond what they have in common with others.

Four views of it: the curvature of the loss in the input (Garg et al. 2023), the distance of the losses of training and held-out examples, the
fit to labels known to be wrong, and the direction of the weights against the gradient (Shin et al. 2024, DASH).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.measurement import Labels, Measurement, Quantity, Status, measurement
from plasticity_probe.network.examples import Batch, read_examples
from plasticity_probe.network.gradients import mean_gradient
from plasticity_probe.network.input_curvature import squared_input_products
from plasticity_probe.network.isolation import isolated
from plasticity_probe.network.losses import IGNORED, Terms, check_classes, class_axis, inputs_and_targets
from plasticity_probe.network.subject import LARGEST_CHUNK, Subject, subject
from plasticity_probe.probe import Cost, Need, Probe, generator_for

NAN = float("nan")


@measurement
class Memorization(Measurement):
    """Noise memorization. The loss of an example is the mean over its terms (tokens), so that long and short ones compare.

    A number is NaN where the subject does not offer what it needs (held-out examples, known wrong labels, a floating-point input, class labels,
    trainable layers); `message` says which.

    Args:
        curvature: Per training example E_v |H_x v|^2 = tr(H_x^2), H_x the Hessian of its loss in its input, v Rademacher (Garg et al. 2023).
        median_curvature: Its median over examples.
        mean_curvature: Its mean over examples.
        mean_curvature_sem: Standard error of that mean over the draws of v; NaN for a single draw.
        training_examples: Number of training examples measured.
        held_out_examples: Number of held-out examples measured.
        training_loss: Mean loss on the training examples.
        held_out_loss: Mean loss on the held-out examples.
        loss_gap: Held-out loss minus training loss.
        training_accuracy: Share of right predictions on the training examples; NaN for regression and custom losses.
        held_out_accuracy: The same on the held-out examples.
        membership_auc: ROC-AUC of "the lower loss was trained on": the probability that a training example has a lower loss than a held-out one,
            ties counting half. 0.5: nothing memorised that shows in the loss.
        noisy_examples: Number of training examples whose labels are known to be wrong.
        noisy_fit: Share of their wrong labels that the network predicts.
        noisy_loss: Mean loss on them, under their wrong labels.
        clean_loss: Mean loss on the other training examples.
        noisy_auc: Probability that a wrongly labelled example has a higher loss than a clean one, ties counting half. Near 1 before wrong labels
            are fitted, 0.5 once they are as well fitted as right ones.
        layers: Linear and convolutional layers with trainable weights.
        layer_cosine: Per layer the mean cosine of weights and negative gradient over output neurons (linear) or kernels (convolution).
        layer_negative_fraction: Per layer the share of negative ones.
        mean_cosine: The mean over the neurons and kernels of all layers.
        negative_fraction: The share of negative ones over all layers.
        zero_vectors: Neurons and kernels left out because their weights or their gradient are zero.
    """

    curvature: Annotated[
        Float[Tensor, " example"], Quantity("input-loss curvature of a training example", units="loss^2/input^4")
    ]
    median_curvature: Annotated[
        float, Quantity("median input-loss curvature of training examples", units="loss^2/input^4")
    ]
    mean_curvature: Annotated[float, Quantity("mean input-loss curvature", units="loss^2/input^4", shown=False)]
    mean_curvature_sem: Annotated[
        float, Quantity("standard error of the mean input-loss curvature", units="loss^2/input^4", shown=False)
    ]
    training_examples: Annotated[int, Quantity("training examples measured", shown=False)]
    held_out_examples: Annotated[int, Quantity("held-out examples measured", shown=False)]
    training_loss: Annotated[float, Quantity("mean loss on training examples", units="loss", shown=False)]
    held_out_loss: Annotated[float, Quantity("mean loss on held-out examples", units="loss", shown=False)]
    loss_gap: Annotated[float, Quantity("held-out loss minus training loss", units="loss")]
    training_accuracy: Annotated[float, Quantity("accuracy on training examples", shown=False)]
    held_out_accuracy: Annotated[float, Quantity("accuracy on held-out examples", shown=False)]
    membership_auc: Annotated[float, Quantity("probability that a training loss is below a held-out loss")]
    noisy_examples: Annotated[int, Quantity("examples with labels known to be wrong", shown=False)]
    noisy_fit: Annotated[float, Quantity("share of wrong labels that the network predicts")]
    noisy_loss: Annotated[float, Quantity("mean loss on wrongly labelled examples", units="loss", shown=False)]
    clean_loss: Annotated[float, Quantity("mean loss on the other training examples", units="loss", shown=False)]
    noisy_auc: Annotated[
        float, Quantity("probability that a wrong label has a higher loss than a right one", shown=False)
    ]
    layers: Annotated[tuple[str, ...], Labels("layer")]
    layer_cosine: Annotated[Float[Tensor, " layer"], Quantity("mean cosine of weights and negative gradient")]
    layer_negative_fraction: Annotated[Float[Tensor, " layer"], Quantity("share of weights against the gradient")]
    mean_cosine: Annotated[float, Quantity("cosine of weights and negative gradient, mean over neurons and kernels")]
    negative_fraction: Annotated[float, Quantity("share of neurons and kernels whose cosine is negative")]
    zero_vectors: Annotated[int, Quantity("neurons and kernels with zero weights or gradient, left out", shown=False)]


@final
@dataclass(frozen=True)
class MemorizationProbe(Probe[Memorization]):
    """Measures noise memorization on the subject's training examples, or on its own where it knows no others.

    Input-loss curvature. Garg et al. 2023 estimate tr(H_x^2) by (1/n) sum_v |grad_x L(x + hv) - grad_x L(x)|^2 with h = 1e-3, which tends to
    h^2 E_v |H_x v|^2. Here H_x v is computed exactly by differentiating twice, which is that limit over h^2 without the rounding that a
    difference of float32 gradients at h = 1e-3 suffers. Their code averages the norm instead of its square and lets the loss divide by the batch
    size; here it is the squared norm of their formula, on each example's own loss. They also average over all epochs of training, which a
    single checkpoint cannot; at the end of training alone the curvature fades with the loss, so compare checkpoints at similar loss.

    DASH's cosine (Shin et al. 2024, their code) is taken between weights and the negative gradient of the mean loss: one per row of a linear
    layer, one per kernel (output and input channel) of a convolution. Rows and kernels of a single weight are left out, as their cosine is
    always 1 or -1; so are biases, weights computed from others (weight_norm), and zero vectors, which have no direction; tied weights count
    once. Their gradient is a moving average over chunks of data as they arrived; here it is that of all examples measured.

    Args:
        draws: Random vectors per example for the input-loss curvature; 10 as in Garg et al. 2023.
        examples: Training examples whose input-loss curvature and gradients are measured (our choice: what ten products each make
            affordable).
        compared: Training and held-out examples whose losses are compared at most (our choice: an AUC with a standard error of about 0.01).

    Raises:
        UsageError: A setting is below 1.
    """

    draws: int = 10
    examples: int = 256
    compared: int = 2000

    name: ClassVar[str] = "memorization"
    title: ClassVar[str] = "noise memorization"
    needs: ClassVar[Need] = Need.DATA | Need.LOSS
    returns: ClassVar[type[Measurement]] = Memorization

    def __post_init__(self) -> None:
        if min(self.draws, self.examples, self.compared) < 1:
            raise UsageError(
                f"expected draws, examples and compared of at least 1, got {self.draws}, {self.examples} and {self.compared}."
            )

    def cost(self, subject: Subject) -> Cost:
        """A gradient and, per draw, a curvature product for every training example, and a forward pass for all."""
        known = len(subject.training or subject.examples)
        count, compared = min(self.examples, known), min(self.compared, known)
        held_out = min(self.compared, len(subject.held_out)) if subject.held_out else 0
        return Cost(forwards=compared + held_out, gradients=2 * count, products=self.draws * count, vectors=2)

    def measure(self, subject: Subject, generator: torch.Generator) -> Memorization:
        """Measures noise memorization; the generator draws the vectors of the input-loss curvature.

        Raises:
            DataError: `subject.noisy` is no boolean tensor with an entry for every training example.
            SubjectError: Held-out examples have labels that the model has no output for.
        """
        return _measured(self, subject, generator, None)


def memorization(
    model: nn.Module,
    loader: Any,
    *,
    held_out: Any = None,
    noisy: Any = None,
    draws: int = 10,
    examples: int = 256,
    compared: int = 2000,
    seed: int = 0,
    **options: Any,
) -> Memorization:
    """Noise memorization of a model; what is measured and how, see `MemorizationProbe` and `Memorization`.

    Args:
        model: Any module; it is not changed.
        loader: Any iterable of batches of examples that the network was trained on (with the labels it was trained on).
        held_out: Batches of examples that it never saw; without them the loss gap and its AUC are NaN.
        noisy: Which labels are known to be wrong: booleans, one per example in the order of `loader`; or other batches, of wrongly labelled
            examples alone, when those of `loader` count as the clean ones. Without them the fit to noise is NaN.
        draws: Random vectors per example for the input-loss curvature.
        examples: Examples whose input-loss curvature and gradients are measured at most.
        compared: Examples of each loader whose losses are compared at most.
        seed: Seed of the random vectors.
        options: training, loss, mode, dtype, device, memory (see `plasticity_probe.network.subject.subject`).

    Raises:
        UsageError: A setting is below 1.
        DataError: A loader is empty, or `noisy` is no boolean tensor with an entry for every example.
        SubjectError: Model, loss and data do not go together.
    """
    probe = MemorizationProbe(draws=draws, examples=examples, compared=compared)
    read = max(examples, compared)
    marks = torch.as_tensor(noisy) if hasattr(noisy, "__array__") else None
    with isolated():
        made = subject(model, loader, examples=read, seed=seed, held_out=held_out, noisy=marks, **options)
        wrong = None if noisy is None or marks is not None else made.on(read_examples(noisy, read))
        return _measured(probe, made, generator_for(seed, probe.name), wrong)


def roc_auc(lower: Tensor, higher: Tensor) -> float:
    """The probability that a value of `lower` is below one of `higher`, ties counting half (Mann-Whitney U over its largest value).

    Args:
        lower: Any number of values.
        higher: Any number of values.

    Returns:
        NaN where either has none.
    """
    if not len(lower) or not len(higher):
        return NAN
    ordered = lower.sort().values
    below, up_to = (torch.searchsorted(ordered, higher, right=right) for right in (False, True))
    return float((below + up_to).double().mean() / (2 * len(lower)))


@dataclass(frozen=True, eq=False)
class _Fit:
    """How the network does on some examples: per example the sum of loss terms, their number, and how many are predicted right."""

    sums: Tensor
    counts: Tensor
    right: Tensor

    def __getitem__(self, chosen: Tensor) -> "_Fit":
        return _Fit(self.sums[chosen], self.counts[chosen], self.right[chosen])

    @property
    def finite(self) -> bool:
        return bool(self.sums.isfinite().all() and self.counts.isfinite().all())

    @property
    def loss(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    @property
    def accuracy(self) -> float:
        return float(self.right.sum() / self.counts.sum())

    @property
    def each(self) -> Tensor:
        counted = self.counts > 0
        return self.sums[counted] / self.counts[counted]


@dataclass(frozen=True)
class _Part:
    """Some fields of the measurement, what to say about them, and whether everything they come from is finite."""

    values: dict[str, Any]
    remark: str = ""
    finite: bool = True


def _measured(
    probe: MemorizationProbe, subject: Subject, generator: torch.Generator, wrong: Subject | None
) -> Memorization:
    known = subject.on(subject.training) if subject.training else subject
    trained = known.take(probe.examples)
    fit = _fit(known.take(max(probe.examples, probe.compared)))
    unseen = _fit(subject.on(subject.held_out).take(probe.compared)) if subject.held_out else None
    if wrong is not None:
        noisy, clean = _fit(wrong), fit
    else:
        noisy, clean = _split(fit, subject.noisy)
    parts = [
        _curvature(trained, fit.counts[: len(trained.examples)] > 0, probe.draws, generator),
        _gap(fit, unseen),
        _noise(noisy, clean),
        _directions(trained),
    ]
    values = {name: value for part in parts for name, value in part.values.items()}
    return Memorization(
        conditions=trained.conditions(),
        status=Status.OK if all(part.finite for part in parts) else Status.NONFINITE,
        message=" ".join(part.remark for part in parts if part.remark),
        **values,
    )


def _fit(subject: Subject) -> _Fit:
    if subject.loss.of_outputs is None:
        sums, counts = subject.each_loss()
        return _Fit(sums, counts, torch.full_like(sums, NAN))
    _check_labels(subject)
    with torch.no_grad():
        parts = [_fit_of_batch(subject, batch, subject.loss.of_outputs) for batch in subject.chunks()]
    columns = zip(*parts, strict=True)
    return _Fit(*(torch.cat(column).double().cpu() for column in columns))


def _fit_of_batch(
    subject: Subject, batch: Batch, judge: Callable[[Tensor, Tensor], Terms]
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, targets = subject.outputs(subject.parameters_or_none, batch), cast(Tensor, inputs_and_targets(batch)[1])
    if targets.is_floating_point():
        sums, counts = judge(outputs, targets)
        return sums, counts, torch.full_like(sums, NAN)
    right = (outputs.argmax(class_axis(outputs, targets)) == targets) & (targets != IGNORED)
    return *judge(outputs, targets), right.reshape(len(right), -1).sum(1)


def _check_labels(subject: Subject) -> None:
    """Refuses held-out or wrongly labelled examples with labels that the model has no output for; only its own were checked before."""
    few = next(iter(subject.examples.chunks(8)))
    targets = cast(Tensor, inputs_and_targets(few)[1])
    if targets.is_floating_point():
        return
    with torch.no_grad():
        outputs = subject.outputs(subject.parameters_or_none, few)
    classes = outputs.shape[class_axis(outputs, targets)]
    for batch in subject.examples.chunks(LARGEST_CHUNK):
        check_classes(cast(Tensor, inputs_and_targets(batch)[1]), classes)


def _split(fit: _Fit, marks: Tensor | None) -> tuple[_Fit | None, _Fit]:
    if marks is None:
        return None, fit
    if marks.dtype != torch.bool or marks.ndim != 1 or len(marks) < len(fit.sums):
        raise DataError(
            f"expected noisy to be booleans, one for each of the {len(fit.sums)} training examples in the order they are read, got shape "
            f"{tuple(marks.shape)} of {marks.dtype}. Mark wrong labels with True and do not shuffle."
        )
    marked = marks[: len(fit.sums)].cpu()
    return fit[marked], fit[~marked]


def _gap(fit: _Fit, unseen: _Fit | None) -> _Part:
    values: dict[str, Any] = dict.fromkeys(
        ("training_loss", "held_out_loss", "loss_gap", "training_accuracy", "held_out_accuracy", "membership_auc"), NAN
    )
    values |= {"training_examples": len(fit.sums), "held_out_examples": len(unseen.sums) if unseen else 0}
    if not fit.finite or not (unseen is None or unseen.finite):
        return _Part(values, "Losses are not finite: NaN or Inf in weights or inputs, or overflowing outputs.", False)
    values |= {"training_loss": fit.loss, "training_accuracy": fit.accuracy}
    if unseen is None:
        return _Part(values, "No held-out examples are known, so there is no loss gap.")
    values |= {"held_out_loss": unseen.loss, "held_out_accuracy": unseen.accuracy}
    values |= {"loss_gap": unseen.loss - fit.loss, "membership_auc": roc_auc(fit.each, unseen.each)}
    return _Part(values)


def _noise(noisy: _Fit | None, clean: _Fit) -> _Part:
    values: dict[str, Any] = dict.fromkeys(("noisy_fit", "noisy_loss", "clean_loss", "noisy_auc"), NAN)
    values |= {"noisy_examples": len(noisy.sums) if noisy else 0}
    if noisy is None or not len(noisy.sums):
        return _Part(values, "No wrong labels are known, so there is no fit to noise.")
    if not noisy.finite or not clean.finite:
        return _Part(values, "Losses of wrongly labelled or clean examples are not finite.", False)
    values |= {"noisy_fit": noisy.accuracy, "noisy_loss": noisy.loss, "clean_loss": clean.loss}
    return _Part(values | {"noisy_auc": roc_auc(clean.each, noisy.each)})


def _curvature(subject: Subject, counted: Tensor, draws: int, generator: torch.Generator) -> _Part:
    """Statistics of the squared norms |H_x v|^2 over draws, for the examples that have loss terms (`counted`)."""
    parts: list[Tensor] = []
    for batch in subject.chunks():
        found = squared_input_products(subject, batch, draws, generator)
        if isinstance(found, str):
            return _curvature_part(counted, torch.empty(0, draws), found)
        parts.append(found)
    samples = torch.cat(parts)[counted]
    if not samples.isfinite().all():
        return _curvature_part(counted, samples[:0], "The input-loss curvature is not finite.", finite=False)
    return _curvature_part(counted, samples)


def _curvature_part(counted: Tensor, samples: Tensor, remark: str = "", finite: bool = True) -> _Part:
    each = torch.full(counted.shape, NAN, dtype=torch.float64)
    if len(samples):
        each[counted] = samples.mean(1)
    draws, over_draws = samples.shape[1], samples.mean(0)
    values = {
        "curvature": each,
        "median_curvature": float(samples.mean(1).quantile(0.5)) if len(samples) else NAN,
        "mean_curvature": float(over_draws.mean()),
        "mean_curvature_sem": float(over_draws.std()) / draws**0.5 if draws > 1 else NAN,
    }
    return _Part(values, remark, finite)


def _directions(subject: Subject) -> _Part:
    """DASH's cosine per layer and over all layers."""
    cosines: dict[str, Tensor] = {}
    zeros = 0
    weights = _directed_weights(subject)
    gradient = mean_gradient(subject) if weights else {}
    finite = all(gradient[name].isfinite().all() and weight.isfinite().all() for name, weight in weights.values())
    for layer, (name, weight) in weights.items() if finite else ():
        found = _row_cosines(_rows(weight), -_rows(gradient[name]))
        cosines[layer], zeros = found[found.isfinite()], zeros + int(found.isnan().sum())
    everything = torch.cat([torch.zeros(0, dtype=torch.float64), *cosines.values()])
    values = {
        "layers": tuple(cosines),
        "layer_cosine": torch.tensor([float(each.mean()) for each in cosines.values()], dtype=torch.float64),
        "layer_negative_fraction": torch.tensor([_negative(each) for each in cosines.values()], dtype=torch.float64),
        "mean_cosine": float(everything.mean()),
        "negative_fraction": _negative(everything),
        "zero_vectors": zeros,
    }
    if not finite:
        return _Part(values, "Weights or their gradient are not finite.", False)
    return _Part(values, "" if weights else "No linear or convolutional layer has trainable weights for DASH's cosine.")


def _directed_weights(subject: Subject) -> dict[str, tuple[str, Tensor]]:
    """Weights of linear and convolutional layers by layer, tied ones once, with their parameter's name."""
    names = {id(parameter): name for name, parameter in subject.model.named_parameters() if parameter.requires_grad}
    found: dict[str, tuple[str, Tensor]] = {}
    for layer, module in subject.model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and id(module.weight) in names:
            name = names.pop(id(module.weight))
            if _rows(module.weight).shape[1] > 1:
                found[layer or type(module).__name__] = (name, module.weight.detach())
    return found


def _rows(weight: Tensor) -> Tensor:
    """Output neurons of a linear weight (out, in), or kernels of a convolution's (out, in, taps ...), one per row."""
    return weight if weight.ndim == 2 else weight.flatten(2).flatten(0, 1)


def _row_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of paired rows, float64 on the CPU; NaN where one of the two is zero."""
    a, b = a.double().cpu(), b.double().cpu()
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(lengths > 0, (a * b).sum(1) / lengths, NAN).clamp(-1, 1)


def _negative(cosines: Tensor) -> float:
    return float((cosines < 0).double().mean())
