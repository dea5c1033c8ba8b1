"""The linear layers and convolutions of networks: the layers whose weights are matrices."""

from dataclasses import dataclass

from torch import nn

from plasticity_probe.training.networks import Networks


@dataclass(frozen=True)
class AffineLayer:
    """The names of the parameters of one linear layer or convolution.

    Args:
        weight: Name of its weight, (S, out, in) or (S, out, in, height, width).
        bias: Name of its bias, (S, out); None where it has none.
        linear: Whether it is a linear layer.
    """

    weight: str
    bias: str | None
    linear: bool


def affine_layers(networks: Networks) -> tuple[AffineLayer, ...]:
    """The linear layers and two-dimensional convolutions, in the order in which the network defines them.

    A layer whose weight belongs to another layer too, such as an output layer tied to an embedding, is left out.

    Args:
        networks: The networks.
    """
    found: list[AffineLayer] = []
    for path, module in networks.module.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight, bias = (f"{path}.{leaf}".lstrip(".") for leaf in ("weight", "bias"))
            if weight in networks.weights:
                own = bias if bias in networks.weights else None
                found.append(AffineLayer(weight, own, isinstance(module, nn.Linear)))
    return tuple(found)
