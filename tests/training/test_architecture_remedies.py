from typing import Any

import pytest
import torch
from remedy_cases import adam, one
from torch import nn

from plasticity_probe.errors import UsageError
from plasticity_probe.training.models import blueprint
from plasticity_probe.training.remedies.architecture import CReLURemedy, LayerNormRemedy
from plasticity_probe.training.remedies.remedy import Remedy

IMAGE = torch.zeros(1, 8, 8)
SETTINGS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp-tanh", "hidden": [5, 4]},
    "convnet": {"name": "convnet", "channels": [2, 3], "hidden": 4},
}
each_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def drawn(settings: dict[str, Any]) -> nn.Module:
    return blueprint(settings, IMAGE, 3).build()


def affine(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@each_settings
def test_layer_norm_adds_one_norm_to_every_hidden_layer_and_nothing_else(settings: dict[str, Any]) -> None:
    given = dict(settings)
    network = drawn(LayerNormRemedy().architecture(settings))
    assert settings == given
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)]
    assert len(norms) == len(affine(network)) - 1
    plain = affine(drawn(settings))
    assert [layer.weight.shape for layer in affine(network)] == [layer.weight.shape for layer in plain]


@each_settings
def test_crelu_doubles_what_layers_read_and_keeps_what_they_make(settings: dict[str, Any]) -> None:
    given = dict(settings)
    network = drawn(CReLURemedy().architecture(settings))
    assert settings == given
    layers, plain = affine(network), affine(drawn(settings))
    assert [len(layer.weight) for layer in layers] == [len(layer.weight) for layer in plain]
    assert [layer.weight[0].numel() for layer in layers] == [
        layer.weight[0].numel() * (2 if index else 1) for index, layer in enumerate(plain)
    ]


def test_a_crelu_unit_passes_gradient_on_either_side() -> None:
    settings = {"name": "mlp-relu", "hidden": [1]}
    for name, dead in (("relu", True), ("crelu", False)):
        network = drawn(CReLURemedy().architecture(settings) if name == "crelu" else settings)
        first = affine(network)[0]
        with torch.no_grad():
            first.weight.zero_()
            first.bias.fill_(-1.0)
        network(IMAGE[None]).sum().backward()
        assert bool((first.bias.grad == 0).all()) is dead


@pytest.mark.parametrize("remedy", [LayerNormRemedy(), CReLURemedy()])
def test_both_can_be_had_together_and_nothing_is_remembered(remedy: Remedy) -> None:
    settings = LayerNormRemedy().architecture(CReLURemedy().architecture(SETTINGS["mlp"]))
    assert settings == CReLURemedy().architecture(LayerNormRemedy().architecture(SETTINGS["mlp"]))
    networks = one(lambda: drawn(settings), optimizer=adam)
    assert any(isinstance(module, nn.LayerNorm) for module in networks.module.modules())
    assert remedy.start(networks) == {}


@pytest.mark.parametrize("remedy", [LayerNormRemedy(), CReLURemedy()])
def test_a_resnet_is_refused(remedy: Remedy) -> None:
    with pytest.raises(UsageError, match="resnet18"):
        remedy.architecture({"name": "resnet18"})
