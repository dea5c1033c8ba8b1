"""Random vectors that fit an operator.

They are drawn in float32 on the generator's own device and then converted, so one seed gives the same vectors in every precision and
on every device.
"""

import torch
from torch import Tensor

from plasticity_probe.linalg.dense import vector_norm
from plasticity_probe.linalg.operator import SymmetricOperator


def gaussian(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """A vector of independent standard normal entries.

    Args:
        operator: What the vector will be multiplied with; gives size, dtype and device.
        generator: The source of randomness.

    Returns:
        Shape (n,).
    """
    vector = torch.randn(operator.size, generator=generator, device=generator.device, dtype=torch.float32)
    return vector.to(device=operator.device, dtype=operator.dtype)


def sphere(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """A direction that is uniform on the unit sphere.

    Args:
        operator: As for `gaussian`.
        generator: The source of randomness.

    Returns:
        Shape (n,), of length 1.
    """
    vector = gaussian(operator, generator)
    return vector / vector_norm(vector)
