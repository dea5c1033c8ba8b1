"""Remedies that average weights over training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.training.networks import Networks
from plasticity_probe.training.remedies.remedy import Memory, Moment, Remedy


@final
@dataclass(frozen=True)
class HareTortoise(Remedy):
    """Trains one network (the hare), averages it slowly (the tortoise), and puts it back to the average every few epochs.

    After each update: tortoise <- decay * tortoise + (1 - decay) * hare, from the initialisation on, through all tasks. After every `every`
    epochs of a task: hare <- tortoise. The network that is trained, measured and written to checkpoints is the hare.

    Floating-point buffers such as running statistics are averaged and put back like weights, as in the published code; integer ones, which
    count batches, go on counting (our choice: the mean of a counter counts nothing). What the optimizer remembers stays. The published code
    puts the hare back after epochs 1, every + 1, 2 every + 1, ... of a task; here it is after epochs every, 2 every, ...
    (our choice: a reset right after the first epoch of a task would mostly undo that epoch).

    Args:
        decay: Weight of the old average, from 0 to below 1; 0.999 in Lee et al. 2024.
        every: Epochs between two resets; 10 in Lee et al. 2024.

    Raises:
        UsageError: Settings outside these bounds.
    """

    name: ClassVar[str] = "hare-tortoise"
    title: ClassVar[str] = "weights put back to their moving average every few epochs"
    source: ClassVar[str] = "Lee et al. 2024 and code"

    decay: float = 0.999
    every: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or self.every < 1:
            raise UsageError(
                f"{self.name} needs 0 <= decay < 1 and every >= 1, got decay {self.decay} and every {self.every}; the paper takes 0.999 and 10"
            )

    def start(self, networks: Networks) -> Memory:
        """Remembers the tortoise: weights and floating-point buffers by name."""
        return {name: tensor.clone() for name, tensor in _averaged(networks).items()}

    @torch.no_grad()
    def after_step(
        self,
        networks: Networks,
        memory: Memory,
        moment: Moment,  # noqa: ARG002 -- the same at any moment
        features: Mapping[str, Tensor],  # noqa: ARG002 -- weights alone are averaged
    ) -> None:
        """Moves the tortoise towards the hare."""
        for name, tensor in _averaged(networks).items():
            memory[name].lerp_(tensor, 1 - self.decay)

    @torch.no_grad()
    def after_epoch(self, networks: Networks, memory: Memory, moment: Moment) -> None:
        """Puts the hare back to the tortoise where the time has come."""
        if moment.epoch % self.every == 0:
            for name, tensor in _averaged(networks).items():
                tensor.copy_(memory[name])


def _averaged(networks: Networks) -> dict[str, Tensor]:
    buffers = {name: buffer for name, buffer in networks.buffers.items() if buffer.is_floating_point()}
    return {**networks.weights, **buffers}
