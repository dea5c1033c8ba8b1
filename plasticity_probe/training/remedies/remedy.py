"""What a remedy is: something done to a network, its gradient or its optimizer so that it keeps its ability to learn.

Every remedy works on several networks at once: each tensor has a first axis over networks, of length 1 where there is one. No remedy looks
across that axis. What a remedy remembers is a dictionary of such tensors, handed in and out, so that a run can be resumed.
"""

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from plasticity_probe.training.networks import Networks
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.tasks import Task

Memory = dict[str, Tensor]
"""What a remedy remembers, by name: tensors with a first axis over networks, changed in place or replaced."""


@dataclass(frozen=True, eq=False)
class Moment:
    """Where a run stands when a remedy acts.

    Args:
        seeds: The seed of each network.
        task: Index of the task under way, or about to begin.
        epoch: Epochs of this task that are over.
        step: Updates since the run began.
        tasks: The task of each network, as many as there are seeds.
        batch: Examples per update.
    """

    seeds: tuple[int, ...]
    task: int
    epoch: int
    step: int
    tasks: Sequence[Task]
    batch: int

    def generators(self, label: str) -> list[torch.Generator]:
        """One generator on the CPU per network, for a draw that belongs to this moment.

        Args:
            label: What is drawn.
        """
        return [generator(seed, label, self.task, self.step) for seed in self.seeds]


class Remedy(ABC):
    """Acts at chosen moments of a run. Concrete remedies are final frozen dataclasses; their fields are their settings.

    The defaults of all methods do nothing, so a remedy defines only those it needs.

    Attributes:
        name: The name that a setting, a run folder and `--remedy` know it by.
        title: What it does, in a few words.
        source: Its paper, as author, year and section.
        features: Whether it needs the features that hidden units hand on, at every update.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    features: ClassVar[bool] = False

    def architecture(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The network's settings with the remedy in them, for remedies that change the network itself.

        Args:
            settings: Name and settings of the network.

        Raises:
            UsageError: That network has no such part.
        """
        return dict(settings)

    def start(self, networks: Networks) -> Memory:  # noqa: ARG002 -- the default remembers nothing
        """What the remedy remembers of the networks at their initialisation, in copies of its own.

        Args:
            networks: The networks before their first update.

        Raises:
            UsageError: The remedy cannot act on these networks.
        """
        return {}

    def before_task(self, networks: Networks, memory: Memory, moment: Moment) -> None:  # noqa: B027 -- by default it does nothing
        """Acts before the first update on every task but the first.

        Args:
            networks: The networks; changed in place.
            memory: What the remedy remembers; changed in place.
            moment: The task that begins.
        """

    def add_gradient(self, networks: Networks, memory: Memory) -> None:  # noqa: B027 -- by default it does nothing
        """Adds the gradient of a penalty to `networks.gradients`, between the backward pass and the update.

        Args:
            networks: The networks, whose gradients are changed in place.
            memory: What the remedy remembers.
        """

    def after_step(self, networks: Networks, memory: Memory, moment: Moment, features: Mapping[str, Tensor]) -> None:  # noqa: B027 -- by default it does nothing
        """Acts after an update.

        Args:
            networks: The networks; changed in place.
            memory: What the remedy remembers; changed in place.
            moment: Where the run stands after the update.
            features: What the hidden layers handed on for the batch of this update, by `HiddenLayer.name`, each (S, N, ...); empty unless
                the remedy's `features` is True.
        """

    def after_epoch(self, networks: Networks, memory: Memory, moment: Moment) -> None:  # noqa: B027 -- by default it does nothing
        """Acts after a pass over the examples of a task.

        Args:
            networks: The networks; changed in place.
            memory: What the remedy remembers; changed in place.
            moment: Where the run stands; its `epoch` counts the pass that ended.
        """
