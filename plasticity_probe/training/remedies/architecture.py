"""Remedies that change the network itself, before it is initialised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from plasticity_probe.training.models import with_activation, with_layer_norm
from plasticity_probe.training.remedies.remedy import Remedy


@final
@dataclass(frozen=True)
class LayerNormRemedy(Remedy):
    """Normalises the pre-activations of every hidden layer over its units (layer normalisation, with learned scale and shift)."""

    name: ClassVar[str] = "layer-norm"
    title: ClassVar[str] = "layer normalisation in every hidden layer"
    source: ClassVar[str] = "Lyle et al. 2023; Kumar et al. 2023 (baseline Layer Norm)"

    def architecture(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The network's settings with layer normalisation.

        Args:
            settings: Name and settings of the network.

        Raises:
            UsageError: That network cannot have it, such as a ResNet, which has BatchNorm.
        """
        return with_layer_norm(settings)


@final
@dataclass(frozen=True)
class CReLURemedy(Remedy):
    """Gives every hidden unit two outputs, max(z, 0) and max(-z, 0), one of which always passes gradient (concatenated ReLU).

    Hidden layers keep their units, so the layers that read them have twice as many inputs and the network more weights.
    """

    name: ClassVar[str] = "crelu"
    title: ClassVar[str] = "concatenated ReLU in every hidden layer"
    source: ClassVar[str] = "Abbas et al. 2023; Shang et al. 2016"

    def architecture(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The network's settings with concatenated ReLU.

        Args:
            settings: Name and settings of the network.

        Raises:
            UsageError: That network has no choice of activation.
        """
        return with_activation(settings, "crelu")
