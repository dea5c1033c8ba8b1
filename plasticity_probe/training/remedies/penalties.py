"""Penalties on the weights, whose gradient joins the gradient of the loss before every update.

The penalty is part of the loss (coupled), so that Adam rescales its gradient along with the rest, as in Kumar et al. 2023 and
Lewandowski et al. 2023; it is not the decoupled weight decay of AdamW.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.training.networks import Networks
from plasticity_probe.training.remedies.affine import affine_layers
from plasticity_probe.training.remedies.remedy import Memory, Remedy


class Penalty(Remedy):
    """A term added to the loss of each network.

    Attributes:
        coefficient: lambda, the weight of the term.

    Raises:
        UsageError: The coefficient is no positive number.
    """

    coefficient: float

    def __post_init__(self) -> None:
        if not (self.coefficient > 0 and math.isfinite(self.coefficient)):
            raise UsageError(
                f"the coefficient of {self.name} must be a positive number, got {self.coefficient}; leave the remedy out to train without it"
            )

    @abstractmethod
    def penalty(self, networks: Networks, memory: Memory) -> Tensor:
        """The term of each network, (S,), coefficient included. It is differentiable in `networks.weights`.

        Args:
            networks: The networks.
            memory: What the remedy remembers.
        """


@final
@dataclass(frozen=True)
class L2(Penalty):
    """Pulls every parameter towards zero: lambda * sum theta^2 over weights, biases and the scales and shifts of normalisations.

    Gradient 2 lambda theta. Kumar et al. 2023 compare with it; in their code the sum is halved and leaves LayerNorm out.

    Args:
        coefficient: lambda. Our choice: that of `L2Init`, so that the two differ only in where they pull to.
    """

    name: ClassVar[str] = "l2"
    title: ClassVar[str] = "squared L2 norm of all parameters added to the loss"
    source: ClassVar[str] = "Kumar et al. 2023, section 5 (baseline L2)"

    coefficient: float = 5e-3

    def penalty(self, networks: Networks, memory: Memory) -> Tensor:  # noqa: ARG002 -- it remembers nothing
        """Lambda * sum theta^2 of each network, (S,)."""
        return self.coefficient * _total(weight.square() for weight in networks.weights.values())

    @torch.no_grad()
    def add_gradient(self, networks: Networks, memory: Memory) -> None:  # noqa: ARG002 -- it remembers nothing
        """Adds 2 lambda theta."""
        for name, gradient in networks.gradients.items():
            gradient.add_(networks.weights[name], alpha=2 * self.coefficient)


@final
@dataclass(frozen=True)
class L2Init(Penalty):
    """Pulls every parameter towards its own initial value: lambda * sum (theta - theta0)^2, theta0 being the sampled initialisation.

    Gradient 2 lambda (theta - theta0). In the code of Kumar et al. 2023 the sum is halved and leaves LayerNorm out; here it is the formula
    of the text, over all parameters.

    Args:
        coefficient: lambda. Kumar et al. 2023 sweep 1e-5 to 1e-2 and find 1e-2 best across their problems with Adam (appendix A.2.5), which
            their halved sum makes 5e-3 here.
    """

    name: ClassVar[str] = "l2-init"
    title: ClassVar[str] = "squared distance of all parameters from their initial values added to the loss"
    source: ClassVar[str] = "Kumar et al. 2023, section 3"

    coefficient: float = 5e-3

    def start(self, networks: Networks) -> Memory:
        """Remembers theta0."""
        return {name: weight.clone() for name, weight in networks.weights.items()}

    def penalty(self, networks: Networks, memory: Memory) -> Tensor:
        """Lambda * sum (theta - theta0)^2 of each network, (S,)."""
        return self.coefficient * _total((weight - memory[name]).square() for name, weight in networks.weights.items())

    @torch.no_grad()
    def add_gradient(self, networks: Networks, memory: Memory) -> None:
        """Adds 2 lambda (theta - theta0)."""
        for name, gradient in networks.gradients.items():
            gradient.add_(networks.weights[name] - memory[name], alpha=2 * self.coefficient)


@final
@dataclass(frozen=True)
class Wasserstein(Penalty):
    """Pulls the distribution of each parameter tensor towards its initial one: lambda * sum_i (theta_(i) - theta0_(i))^2 of sorted values.

    The sum over i is that of a squared 2-Wasserstein distance between the values of a tensor now and at initialisation, both sorted. A value
    is pulled towards the initial value of equal rank, whichever parameter had it: gradient 2 lambda (theta - theta0 of equal rank). Values
    that merely changed places cost nothing. Lewandowski et al. 2023 take the distance per layer; that weights and biases are sorted apart
    is our choice, because they are drawn from different distributions in most initialisations.

    Args:
        coefficient: lambda. Our choice: that of `L2Init`, which the penalty equals as long as no two values of a tensor change places.
        every: Updates between two sorts; in between each value is pulled towards the initial value of its latest rank. 1 is the paper's;
            more saves most of the time where sorting is what takes it.

    Raises:
        UsageError: The coefficient is no positive number, or `every` is below 1.
    """

    name: ClassVar[str] = "wasserstein"
    title: ClassVar[str] = (
        "squared Wasserstein distance of each tensor's values from their initial distribution added to the loss"
    )
    source: ClassVar[str] = "Lewandowski et al. 2023 (distributional regularizer)"

    coefficient: float = 5e-3
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UsageError(f"values are sorted every so many updates, at least every one; got every = {self.every}")

    def start(self, networks: Networks) -> Memory:
        """Remembers the sorted values of theta0, (S, size of the tensor) each, and what every value is pulled towards: itself, at first."""
        held = {f"{name}/sorted": weight.flatten(1).sort(dim=1).values for name, weight in networks.weights.items()}
        held |= {f"{name}/target": weight.clone() for name, weight in networks.weights.items()}
        return held | {"updates": torch.zeros(len(networks.seeds), dtype=torch.int64)}

    def penalty(self, networks: Networks, memory: Memory) -> Tensor:
        """Lambda * sum_i (theta_(i) - theta0_(i))^2 of each network over its tensors, (S,)."""
        ordered = {name: weight.flatten(1).sort(dim=1).values for name, weight in networks.weights.items()}
        return self.coefficient * _total(
            (values - memory[f"{name}/sorted"]).square() for name, values in ordered.items()
        )

    @torch.no_grad()
    def add_gradient(self, networks: Networks, memory: Memory) -> None:
        """Adds 2 lambda (theta - theta0 of equal rank)."""
        updates = memory["updates"]
        for name, gradient in networks.gradients.items():
            weight, target = networks.weights[name], memory[f"{name}/target"]
            if int(updates[0]) % self.every == 0:
                target.flatten(1).scatter_(1, ascending(weight.flatten(1)), memory[f"{name}/sorted"])
            gradient.add_(weight - target, alpha=2 * self.coefficient)
        updates += 1


def ascending(values: Tensor) -> Tensor:
    """The indices that sort each row of a matrix, (S, n) int64.

    float32 values are sorted as whole numbers, each carrying its index, which is several times faster on a CPU: as two's complement
    numbers, their bits have the order of the values once those of negative numbers are turned round.

    Args:
        values: (S, n), finite.
    """
    if values.dtype != torch.float32 or values.device.type != "cpu":
        return values.argsort(dim=1)
    bits = values.contiguous().view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return ((keys << 32) | torch.arange(values.shape[1])).sort(dim=1).values & 0xFFFFFFFF


@final
@dataclass(frozen=True)
class Spectral(Penalty):
    """Keeps the largest singular value of each weight matrix near one: lambda * sum over layers of (sigma^power - 1)^2.

    sigma = |W v|, where v is an estimate of the leading right singular vector, held fixed in the gradient
    2 lambda (sigma^power - 1) power sigma^(power - 1) u v^T with u = W v / sigma. After each gradient v becomes W^T u / |W^T u|: one power
    iteration per update, from where the last one ended. It starts at the exact vector of the initial weights (our choice: no update works
    with an estimate that has not converged).

    The matrices are the weights of linear layers and convolutions, these as (out, in * height * width). Biases, normalisations,
    embeddings and positions are left alone (our choice: they are no matrices that act on units).

    Args:
        coefficient: lambda. Our choice: of 1e-4, 1e-3 and 1e-2 the one with which a ReLU network (64-100-100-10, Adam with 3e-3) stays best at
            ten random-label tasks on 600 digits. A layer whose sigma has grown to 3 then costs 0.06 nats.
        power: The exponent of sigma; 2 in Lewandowski et al. 2024.

    Raises:
        UsageError: The coefficient is no positive number, or the power is below 1.
    """

    name: ClassVar[str] = "spectral"
    title: ClassVar[str] = "distance of each layer's spectral norm from one added to the loss"
    source: ClassVar[str] = "Lewandowski et al. 2024 (spectral regularization)"

    coefficient: float = 1e-3
    power: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power < 1:
            raise UsageError(f"the power of {self.name} must be at least 1, got {self.power}; the paper takes 2")

    def start(self, networks: Networks) -> Memory:
        """Remembers the leading right singular vector of each weight matrix, (S, in) or (S, in * height * width).

        Raises:
            UsageError: The networks have neither linear layers nor convolutions.
        """
        names = [layer.weight for layer in affine_layers(networks)]
        if not names:
            raise UsageError(
                f"{self.name} needs linear layers or convolutions, but the network has none; choose another remedy"
            )
        matrices = {name: networks.weights[name].flatten(2) for name in names}
        return {
            name: torch.linalg.svd(matrix, full_matrices=False).Vh[:, 0].clone() for name, matrix in matrices.items()
        }

    def penalty(self, networks: Networks, memory: Memory) -> Tensor:
        """Lambda * sum (sigma^power - 1)^2 of each network, (S,), with sigma by the remembered vectors."""
        norms = [_times(networks.weights[name].flatten(2), vector).norm(dim=1) for name, vector in memory.items()]
        return self.coefficient * _total((norm**self.power - 1).square()[:, None] for norm in norms)

    @torch.no_grad()
    def add_gradient(self, networks: Networks, memory: Memory) -> None:
        """Adds the gradient at the remembered vectors, and moves these on by one power iteration."""
        gradients = networks.gradients
        for name, right in memory.items():
            weight = networks.weights[name]
            matrix = weight.flatten(2)
            image = _times(matrix, right)
            norm = image.norm(dim=1, keepdim=True)
            left = _divided(image, norm, instead=image)
            slope = 2 * self.coefficient * (norm**self.power - 1) * self.power * norm ** (self.power - 1)
            if name in gradients:
                gradients[name].add_(((slope * left).unsqueeze(2) * right.unsqueeze(1)).view(weight.shape))
            back = _times(matrix.mT, left)
            # A matrix of zeros has no direction of its own; the next one starts from the old vector.
            right.copy_(_divided(back, back.norm(dim=1, keepdim=True), instead=right))


def _total(terms: Iterable[Tensor]) -> Tensor:
    """The sum over all elements of all tensors of each network, (S,)."""
    return torch.stack([term.flatten(1).sum(1) for term in terms]).sum(0)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return torch.bmm(matrices, vectors.unsqueeze(2)).squeeze(2)


def _divided(vectors: Tensor, norms: Tensor, *, instead: Tensor) -> Tensor:
    """The vectors over their norms, and others in place of those of norm 0."""
    return torch.where(norms > 0, vectors / torch.where(norms > 0, norms, 1), instead)
