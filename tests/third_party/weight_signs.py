"""A probe of another package: the share of positive weights in every tensor. One file, one entry point, nothing else."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from plasticity_probe.measurement import Labels, Measurement, Quantity, measurement
from plasticity_probe.network.subject import Subject
from plasticity_probe.probe import Cost, Need, Probe


@measurement
class Signs(Measurement):
    """Shares of positive weights."""

    tensors: Annotated[tuple[str, ...], Labels("tensor")]
    positive: Annotated[Float[Tensor, " tensor"], Quantity("share of positive weights by tensor", summary="mean")]
    total: Annotated[float, Quantity("share of positive weights")]


@final
@dataclass(frozen=True)
class WeightSigns(Probe[Signs]):
    """Counts signs."""

    zero_is_positive: bool = False

    name: ClassVar[str] = "weight_signs"
    title: ClassVar[str] = "shares of positive weights"
    needs: ClassVar[Need] = Need.WEIGHTS
    returns: ClassVar[type[Measurement]] = Signs

    def cost(self, subject: Subject) -> Cost:
        """Nothing is run."""
        return Cost()

    def measure(self, subject: Subject, generator: torch.Generator) -> Signs:
        """Counts the signs of the trainable weights."""
        positive = {name: (p >= 0 if self.zero_is_positive else p > 0) for name, p in subject.parameters.items()}
        shares = torch.tensor([p.double().mean().item() for p in positive.values()])
        total = sum(int(p.sum()) for p in positive.values()) / subject.size
        return Signs(conditions=subject.conditions(), tensors=tuple(positive), positive=shares, total=total)
