from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from plasticity_probe.checkpoints.networks import MLP, ConvNet
from plasticity_probe.network.fresh import fresh_network
from plasticity_probe.training.networks import ManyNetworks, OneNetwork, example_losses
from plasticity_probe.training.side_by_side import side_by_side

BUILDS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: MLP([6, 5, 4, 3]).double(),
    "leaky_relu": lambda: MLP([6, 5, 3], "leaky_relu").double(),
    "tanh": lambda: MLP([6, 5, 3], "tanh").double(),
    "identity": lambda: MLP([6, 5, 3], "identity").double(),
    "crelu": lambda: MLP([6, 5, 4, 3], "crelu").double(),
    "no bias": lambda: MLP([6, 5, 3], bias=False).double(),
    "layer norm": lambda: MLP([6, 5, 4, 3], layer_norm=True).double(),
    "own names": lambda: MLP([6, 5, 3], names=["net.fc1", "net.fc2"]).double(),
    "linear": lambda: MLP([6, 3]).double(),
}


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]


def many(build: Callable[[], nn.Module], seeds: int = 3) -> ManyNetworks:
    return ManyNetworks(build, range(seeds), sgd, torch.device("cpu"))


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("kind", ["labels", "values"])
def test_losses_outputs_features_and_gradients_are_those_of_vmap(build: Callable[[], nn.Module], kind: str) -> None:
    networks = many(build)
    assert networks._stacked is not None
    inputs = torch.randn(3, 7, 2, 3, dtype=torch.float64)
    targets = torch.randint(3, (3, 7)) if kind == "labels" else torch.randn(3, 7, 3, dtype=torch.float64)
    for _ in range(2):  # The second time gradients are written over those of the first.
        learned = networks.learn(inputs, targets, features=True)

    def mean_loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return example_losses(functional_call(networks.module, weights, (x,)), y).mean()

    expected = vmap(grad(mean_loss))(networks.weights, inputs, targets)
    for name, gradient in networks.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14)
    for index in range(3):
        alone = OneNetwork(build, index, sgd, torch.device("cpu"))
        own = alone.learn(inputs[index : index + 1], targets[index : index + 1], features=True)
        torch.testing.assert_close(learned.losses[index], own.losses[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(learned.outputs[index], own.outputs[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(networks.outputs(inputs)[index], alone.outputs(inputs[index : index + 1])[0])
        assert set(learned.features) == set(own.features) == {layer.name for layer in networks.hidden}
        for name, feature in own.features.items():
            torch.testing.assert_close(learned.features[name][index], feature[0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(networks.features(inputs)[name][index], feature[0], rtol=1e-12, atol=1e-14)


def test_gradients_stay_in_their_memory_so_that_none_is_allocated_anew() -> None:
    networks = many(BUILDS["layer norm"])
    places = {name: gradient.data_ptr() for name, gradient in networks.gradients.items()}
    for _ in range(3):
        networks.learn(torch.randn(3, 7, 6, dtype=torch.float64), torch.randint(3, (3, 7)))
        networks.optimizer.step()
    assert {name: gradient.data_ptr() for name, gradient in networks.gradients.items()} == places


def test_no_network_looks_at_another() -> None:
    networks = many(BUILDS["crelu"])
    inputs, targets = torch.randn(3, 7, 6, dtype=torch.float64), torch.randint(3, (3, 7))
    networks.learn(inputs, targets)
    before = {name: gradient.clone() for name, gradient in networks.gradients.items()}
    inputs[1] += 1
    networks.learn(inputs, targets)
    for name, gradient in networks.gradients.items():
        assert torch.equal(gradient[[0, 2]], before[name][[0, 2]])
        assert not torch.equal(gradient[1], before[name][1])


def test_layers_of_other_kinds_are_left_to_vmap() -> None:
    class Doubled(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    others = (
        nn.Linear(3, 2),
        ConvNet((4,), image_size=8),
        nn.Sequential(nn.Flatten(), nn.GELU()),
        Doubled(nn.Linear(3, 2)),
    )
    for network in others:
        assert side_by_side(network, {}) is None
    networks = many(lambda: ConvNet((4,), image_size=8, hidden=4, in_channels=1))
    assert networks._stacked is None


def test_the_network_that_was_given_stays_as_it_is() -> None:
    network = fresh_network(BUILDS["own names"], 0)
    text = str(network)
    weights = {name: p.detach()[None].clone().requires_grad_() for name, p in network.named_parameters()}
    assert side_by_side(network, weights) is not None
    assert str(network) == text
