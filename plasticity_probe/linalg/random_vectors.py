"""Random vectors that fit an operator.

They are drawn in float64 on the generator's own device and then converted, so one seed gives the same vectors in every precision and
on every device.
"""

import torch
from torch import Tensor

from plasticity_probe.linalg.operator import SymmetricOperator


def gaussian(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """A vector of independent standard normal entries.

    Args:
        operator: What the vector will be multiplied with; gives size, dtype and device.
        generator: The source of randomness.

    Returns:
        Shape (n,).
    """
    vector = torch.randn(operator.size, generator=generator, device=generator.device, dtype=torch.float64)
    return vector.to(device=operator.device, dtype=operator.dtype)


def rademacher(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """A vector of independent entries that are +1 or -1 with equal probability.

    Args:
        operator: What the vector will be multiplied with; gives size, dtype and device.
        generator: The source of randomness.

    Returns:
        Shape (n,).
    """
    signs = torch.randint(0, 2, (operator.size,), generator=generator, device=generator.device)
    return (2 * signs - 1).to(device=operator.device, dtype=operator.dtype)
