"""Remedies that begin anew in part: modules, the output layer, or the optimizer."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from plasticity_probe.errors import UsageError
from plasticity_probe.network.fresh import fresh_network
from plasticity_probe.training.models import modules_from_the_top
from plasticity_probe.training.networks import Networks, Weights
from plasticity_probe.training.remedies.affine import AffineLayer, affine_layers
from plasticity_probe.training.remedies.remedy import Memory, Moment, Remedy
from plasticity_probe.training.seeding import derived_seed


@final
@dataclass(frozen=True)
class ResetModules(Remedy):
    """Draws the last modules of the network anew before each task and keeps those nearer to the input.

    What a module is, `plasticity_probe.training.models.modules_from_the_top` says: the stem, the four residual modules and the output layer
    of a ResNet-18, as in Berariu et al. 2021. Parameters come from a newly initialised network, buffers such as running statistics as well,
    and the optimizer forgets these parameters as though it had never updated them (our choice; in Berariu et al. 2021 the whole optimizer
    is new in the second stage, which is `FreshOptimizer`).

    Args:
        last: How many modules, counted from the output. 1 (the default, our choice) resets the output layer alone, as the baseline `reset`
            in the code of Shin et al. 2024; Berariu et al. 2021 need the last 4 or 5 of 6 to reach the accuracy of training from scratch.

    Raises:
        UsageError: Fewer than one module.
    """

    name: ClassVar[str] = "reset-modules"
    title: ClassVar[str] = "last modules drawn anew before each task"
    source: ClassVar[str] = "Berariu et al. 2021, appendix A.5"

    last: int = 1

    def __post_init__(self) -> None:
        if self.last < 1:
            raise UsageError(f"{self.name} needs to reset at least 1 module, got last={self.last}")

    def start(self, networks: Networks) -> Memory:
        """Remembers nothing.

        Raises:
            UsageError: The networks have fewer modules, or are none of the built-in ones, whose modules are known.
        """
        modules = modules_from_the_top(networks.module)
        if self.last > len(modules):
            listed = ", ".join("+".join(module) for module in modules)
            raise UsageError(
                f"{self.name} was asked for the last {self.last} modules, but the network has {len(modules)}: {listed}; "
                f"give last from 1 to {len(modules)}"
            )
        return {}

    @torch.no_grad()
    def before_task(self, networks: Networks, memory: Memory, moment: Moment) -> None:  # noqa: ARG002 -- it remembers nothing
        """Resets the modules."""
        prefixes = [prefix for module in modules_from_the_top(networks.module)[-self.last :] for prefix in module]
        trained = dict(zip(networks.weights, networks.trained, strict=True))
        for name, fresh in networks.fresh(self.name, moment.step).items():
            if _within(name, prefixes):
                networks.weights[name].copy_(fresh)
                networks.optimizer.state.pop(trained[name], None)
        for name, fresh in fresh_buffers(networks, self.name, moment.step).items():
            if _within(name, prefixes):
                networks.buffers[name].copy_(fresh)


@final
@dataclass(frozen=True)
class ZeroHead(Remedy):
    """Sets the weights and the bias of the output layer to zero before each task but the first, so that no class is preferred at its start.

    The output layer is the last linear layer. What the optimizer remembers of it stays, as in the code of Dohare et al. 2024, which zeroes
    the layer before the first task as well; here that one starts from the initialisation (our choice: the first task then shows what the
    network does without the remedy).
    """

    name: ClassVar[str] = "zero-head"
    title: ClassVar[str] = "output layer set to zero before each task"
    source: ClassVar[str] = "Dohare et al. 2024, methods (Continual ImageNet)"

    def start(self, networks: Networks) -> Memory:
        """Remembers nothing.

        Raises:
            UsageError: The networks have no linear layer whose weight is its own.
        """
        _head(networks)
        return {}

    @torch.no_grad()
    def before_task(self, networks: Networks, memory: Memory, moment: Moment) -> None:  # noqa: ARG002 -- the same at any moment
        """Sets the output layer to zero."""
        head = _head(networks)
        for name in (head.weight, head.bias):
            if name is not None:
                networks.weights[name].zero_()


@final
@dataclass(frozen=True)
class FreshOptimizer(Remedy):
    """Begins each task with a new optimizer: neither momentum nor second moments nor step counts of the tasks before.

    Weights stay as they are. Beside another remedy it turns that one into its variant with a new optimizer; alone it is "Warm ReM" in
    Shin et al. 2024.
    """

    name: ClassVar[str] = "fresh-optimizer"
    title: ClassVar[str] = "new optimizer at each task"
    source: ClassVar[str] = "Berariu et al. 2021; Shin et al. 2024 (Warm ReM)"

    def before_task(self, networks: Networks, memory: Memory, moment: Moment) -> None:  # noqa: ARG002 -- the same at any moment
        """Makes a new optimizer."""
        networks.restart_optimizer()


def fresh_buffers(networks: Networks, label: str, number: int) -> Weights:
    """Buffers of newly initialised networks, (S, ...) each, of the very draw whose weights `Networks.fresh` gives.

    Args:
        networks: The networks.
        label: What they are drawn for.
        number: Where that stands, such as a step.
    """
    if not networks.buffers:
        return {}
    drawn = [fresh_network(networks.build, derived_seed(seed, label, number)) for seed in networks.seeds]
    each = [dict(network.named_buffers()) for network in drawn]
    return {name: torch.stack([found[name] for found in each]).to(buffer) for name, buffer in networks.buffers.items()}


def _within(name: str, prefixes: list[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _head(networks: Networks) -> AffineLayer:
    linear = [layer for layer in affine_layers(networks) if layer.linear]
    if not linear:
        raise UsageError(
            f"{ZeroHead.name} needs a linear output layer with a weight of its own, but the network has none; choose another remedy"
        )
    return linear[-1]
