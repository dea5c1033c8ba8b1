"""Remedies that shrink the weights between two tasks: shrink and perturb in three forms, and direction-aware shrinking."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.func import functional_call

from plasticity_probe.errors import UnknownNameError, UsageError
from plasticity_probe.training.networks import Networks, Weights, example_losses
from plasticity_probe.training.remedies.affine import affine_layers
from plasticity_probe.training.remedies.remedy import Memory, Moment, Remedy
from plasticity_probe.training.remedies.resets import fresh_buffers
from plasticity_probe.training.tasks import Task

SHRINK_AND_PERTURB: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"fresh": (0.4, 0.1), "noise": (0.3, 0.01), "initial": (0.2, 0.8)}
)
"""The forms of `ShrinkPerturb` and the published `shrink` and `perturb` of each."""

DIFFERENTIATED_TOGETHER = 1024
"""Examples whose gradient is taken in one pass (our choice: bounds the memory; the mean does not depend on it)."""


@final
@dataclass(frozen=True)
class ShrinkPerturb(Remedy):
    """Shrinks the parameters before each new task and adds something: theta <- shrink * theta + perturb * other.

    Three forms are in use under this name, which differ in what is added and in which parameters they act on:

    - "fresh", the code of Ash and Adams 2020: other is a newly initialised network. All parameters take part (the scale of a BatchNorm
      becomes shrink * scale + perturb * 1), and buffers such as running statistics become those of the new network. Shrink 0 and perturb 1
      make a new network, 1 and 0 a warm start.
    - "noise", the baseline in the code of Shin et al. 2024: other is standard normal, so that perturb is the standard deviation. Only
      weights and biases of linear layers and convolutions take part.
    - "initial", the code of Lee et al. 2024: other is the network's own initialisation theta0. All parameters take part, buffers stay.

    What the optimizer remembers stays, as in Shin et al. 2024; Ash and Adams 2020 and Lee et al. 2024 start each task with a new optimizer,
    which is `FreshOptimizer` beside this remedy.

    Args:
        shrink: Factor of the parameters as they are. By default that of the source: 0.4 (fresh), 0.3 (noise), 0.2 (initial).
        perturb: Factor of what is added. By default that of the source: 0.1 (fresh), 0.01 (noise), 0.8 (initial).
        toward: "fresh", "noise" or "initial".

    Raises:
        UnknownNameError: No such form.
        UsageError: A shrink outside 0 to 1, or a negative perturb.
    """

    name: ClassVar[str] = "shrink-perturb"
    title: ClassVar[str] = "parameters shrunk and perturbed before each task"
    source: ClassVar[str] = (
        "Ash and Adams 2020 and code (fresh); Shin et al. 2024, code (noise); Lee et al. 2024, code (initial)"
    )

    shrink: float | None = None
    perturb: float | None = None
    toward: str = "fresh"

    def __post_init__(self) -> None:
        if self.toward not in SHRINK_AND_PERTURB:
            raise UnknownNameError("form of shrink and perturb", self.toward, SHRINK_AND_PERTURB)
        shrink, perturb = self.factors
        if not 0 <= shrink <= 1 or not 0 <= perturb < float("inf"):
            raise UsageError(
                f"{self.name} needs a shrink from 0 to 1 and a perturb of at least 0, got {shrink} and {perturb}; "
                f"published are {', '.join(f'{s} and {p} ({form})' for form, (s, p) in SHRINK_AND_PERTURB.items())}"
            )
        # A record of a run must say what was done also where these defaults should change one day.
        object.__setattr__(self, "shrink", shrink)
        object.__setattr__(self, "perturb", perturb)

    @property
    def factors(self) -> tuple[float, float]:
        """Shrink and perturb, those of the source where none were given."""
        shrink, perturb = SHRINK_AND_PERTURB[self.toward]
        return shrink if self.shrink is None else self.shrink, perturb if self.perturb is None else self.perturb

    def start(self, networks: Networks) -> Memory:
        """Remembers theta0 where the form needs it."""
        return {name: weight.clone() for name, weight in networks.weights.items()} if self.toward == "initial" else {}

    @torch.no_grad()
    def before_task(self, networks: Networks, memory: Memory, moment: Moment) -> None:
        """Shrinks and perturbs."""
        shrink, perturb = self.factors
        if self.toward == "initial":
            others: Weights = memory
        elif self.toward == "noise":
            others = _noise(networks, moment)
        else:
            others = networks.fresh(self.name, moment.step)
            for name, buffer in fresh_buffers(networks, self.name, moment.step).items():
                networks.buffers[name].copy_(buffer)
        for name, other in others.items():
            networks.weights[name].mul_(shrink).add_(other, alpha=perturb)


def _noise(networks: Networks, moment: Moment) -> Weights:
    """Standard normal tensors for the weights and biases of linear layers and convolutions, each network's from its own generator."""
    names = [name for layer in affine_layers(networks) for name in (layer.weight, layer.bias) if name is not None]
    generators = moment.generators(ShrinkPerturb.name)
    noise = {
        name: [torch.randn(networks.weights[name].shape[1:], generator=generator) for generator in generators]
        for name in names
    }
    return {name: torch.stack(drawn).to(networks.weights[name]) for name, drawn in noise.items()}


@final
@dataclass(frozen=True)
class Dash(Remedy):
    """Shrinks weights that do not point where the loss on all data so far wants them to go (direction-aware shrinking).

    Before each new task, with U = 0 at first, the examples are passed part by part in the order of their arrival, one mini-batch per part,
    in eval mode, and U <- (1 - alpha) U + alpha * (-gradient of the mean loss of the part). So the newest part weighs alpha, the one before
    alpha (1 - alpha), and so on; a task without parts is a single one. Then every vector w of weights is multiplied by

        clamp(cos(u, w), lam, 1),   cos(u, w) = <u, w> / (|u| |w|), 0 where either is zero,

    with u the same entries of U. A vector is, as in the published code: a row (the weights of one output unit) of a linear layer; the
    height * width taps of one pair of output and input channel of a convolution; the whole bias of either. For a 1x1 convolution, such
    as the shortcut of a ResNet, a vector is a single number and its cosine is 1 or -1, so that weights there are kept or multiplied by
    lam; this too is as in the code. Normalisations, their running statistics, embeddings and positions stay, and so does what the
    optimizer remembers.

    Args:
        alpha: Weight of the newest part, above 0 and at most 1; 0.3 in the published code.
        lam: Smallest factor (lambda), from 0 to 1; 0.3 in the published code, whose logged runs on Tiny-ImageNet take 0.05.

    Raises:
        UsageError: Settings outside these bounds.
    """

    name: ClassVar[str] = "dash"
    title: ClassVar[str] = "weights shrunk by their alignment with the negative gradient before each task"
    source: ClassVar[str] = "Shin et al. 2024 and code"

    alpha: float = 0.3
    lam: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or not 0 <= self.lam <= 1:
            raise UsageError(
                f"{self.name} needs 0 < alpha <= 1 and 0 <= lam <= 1, got alpha {self.alpha} and lam {self.lam}; the paper takes 0.3 and 0.3"
            )

    def before_task(self, networks: Networks, memory: Memory, moment: Moment) -> None:  # noqa: ARG002 -- it remembers nothing
        """Shrinks each network by the gradients of its own examples."""
        layers = affine_layers(networks)
        names = [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
        networks.module.eval()
        for index, task in enumerate(moment.tasks):
            weights = {name: weight[index] for name, weight in networks.weights.items()}
            buffers = {name: buffer[index] for name, buffer in networks.buffers.items()}
            wanted = {name: torch.zeros_like(weights[name]) for name in names}
            for gradients in _gradients_of_parts(networks, weights, buffers, names, task):
                for name, gradient in gradients.items():
                    wanted[name].lerp_(-gradient, self.alpha)
            for name in names:
                weights[name].mul_(alignment(wanted[name], weights[name]).clamp(self.lam, 1))


def alignment(wanted: Tensor, weight: Tensor) -> Tensor:
    """Cosine of each vector of a parameter with the same vector of a direction, shaped to multiply the parameter; 0 where either is zero.

    Args:
        wanted: The direction, of the parameter's shape.
        weight: (out, in), one vector per row; (out, in, height, width), one per kernel; (out,), one in all.
    """
    axes = (2, 3) if weight.ndim == 4 else (-1,)
    lengths = torch.linalg.vector_norm(wanted, dim=axes, keepdim=True) * torch.linalg.vector_norm(
        weight, dim=axes, keepdim=True
    )
    products = (wanted * weight).sum(axes, keepdim=True)
    return torch.where(lengths > 0, products / torch.where(lengths > 0, lengths, 1), 0)


def _gradients_of_parts(
    networks: Networks, weights: Weights, buffers: Weights, names: list[str], task: Task
) -> Iterator[Weights]:
    """The gradient of the mean loss of each part of a task, in the order of arrival, for some weights of one network."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    sizes = [size for size in task.arrivals if size] or [len(task.inputs)]
    for inputs, targets in zip(task.inputs.split(sizes), task.targets.split(sizes), strict=True):
        sums = {name: torch.zeros_like(weights[name]) for name in names}
        pieces = zip(inputs.split(DIFFERENTIATED_TOGETHER), targets.split(DIFFERENTIATED_TOGETHER), strict=True)
        for examples, answers in pieces:
            with torch.enable_grad():
                outputs = functional_call(networks.module, (leaves, buffers), (examples.to(networks.device),))
                loss = example_losses(outputs, answers.to(networks.device)).sum() / len(inputs)
                found = torch.autograd.grad(loss, [leaves[name] for name in names], materialize_grads=True)
            for name, gradient in zip(names, found, strict=True):
                sums[name] += gradient
        yield sums
