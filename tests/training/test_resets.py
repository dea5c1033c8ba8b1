import pytest
import torch
from remedy_cases import (
    BUILDS,
    adam,
    assert_many_train_as_each_alone,
    assert_networks_do_not_see_each_other,
    copied,
    kinds,
    learn,
    many,
    moment_of,
    moved,
    one,
    sgd,
    tasks_of,
)
from torch import nn

from plasticity_probe.checkpoints.networks import ResNet18
from plasticity_probe.checkpoints.transformers import CharTransformer, ViT
from plasticity_probe.errors import UsageError
from plasticity_probe.training.models import modules_from_the_top
from plasticity_probe.training.networks import Networks
from plasticity_probe.training.remedies.remedy import Remedy
from plasticity_probe.training.remedies.resets import FreshOptimizer, ResetModules, ZeroHead, fresh_buffers

REMEDIES = [ResetModules(), ResetModules(2), ZeroHead(), FreshOptimizer()]
each_remedy = pytest.mark.parametrize("remedy", REMEDIES, ids=["head", "last two", "zero", "optimizer"])


def small_resnet() -> nn.Module:
    return ResNet18(width=2, depth=1, classes=3, in_channels=1)


def small_vit() -> nn.Module:
    return ViT(patch=2, width=4, depth=2, heads=2, image_size=4, in_channels=1, classes=3)


def small_transformer() -> nn.Module:
    return CharTransformer(vocabulary=5, context=6, width=4, depth=1, heads=2)


def updated(networks: Networks) -> Networks:
    """The networks after one update, so that the optimizer remembers something, with all weights moved."""
    learn(networks, [tasks_of(seed)[0] for seed in networks.seeds])
    networks.optimizer.step()
    return moved(networks)


@pytest.mark.parametrize(
    ("last", "reset"), [(1, ["fc."]), (2, ["layer4.", "fc."]), (5, ["layer1.", "layer2.", "layer3.", "layer4.", "fc."])]
)
def test_the_last_modules_are_those_of_a_new_network_and_the_others_stay(last: int, reset: list[str]) -> None:
    for networks in kinds(small_resnet, adam):
        updated(networks)
        before, buffers = copied(networks.weights), copied(networks.buffers)
        fresh, new = networks.fresh("reset-modules", 7), dict(small_resnet().named_buffers())
        remedy = ResetModules(last)
        assert remedy.start(networks) == {}
        remedy.before_task(networks, {}, moment_of(networks))
        for name, weight in networks.weights.items():
            inside = name.startswith(tuple(reset))
            assert torch.equal(weight, fresh[name] if inside else before[name])
            assert bool(networks.moments(name)) is not inside
        for name, buffer in networks.buffers.items():
            if name.startswith(tuple(reset)):
                assert all(torch.equal(own, new[name]) for own in buffer)
            else:
                assert torch.equal(buffer, buffers[name])
        assert any((buffers[name] != networks.buffers[name]).any() for name in buffers) is (last > 1)


def test_all_modules_together_make_a_new_network() -> None:
    for build in (BUILDS["mlp"], BUILDS["convnet"], small_resnet, small_vit):
        for networks in kinds(build):
            updated(networks)
            ResetModules(len(modules_from_the_top(networks.module))).before_task(networks, {}, moment_of(networks))
            assert all(torch.equal(networks.weights[name], w) for name, w in networks.fresh("reset-modules", 7).items())


def test_another_moment_draws_another_module() -> None:
    heads = []
    for step in (7, 8):
        networks = one(BUILDS["mlp"])
        ResetModules().before_task(networks, {}, moment_of(networks, step=step))
        heads.append(networks.weights["layers.2.weight"])
    assert not torch.equal(heads[0], heads[1])


def test_the_first_update_after_a_reset_is_that_of_a_new_adam() -> None:
    networks = updated(many(BUILDS["mlp"], optimizer=adam))
    for _ in range(20):
        networks.optimizer.step()
    ResetModules().before_task(networks, {}, moment_of(networks))
    before = copied(networks.weights)
    learn(networks, [tasks_of(seed)[1] for seed in networks.seeds])
    networks.optimizer.step()
    # A new Adam steps by its learning rate against the sign of the gradient; moments of zero at an old step count would step three times as far.
    head = "layers.2.weight"
    step, gradient = networks.weights[head] - before[head], networks.gradients[head]
    steep = gradient.abs() > 1e-4
    assert steep.any()
    torch.testing.assert_close(step[steep], -0.01 * gradient[steep].sign(), rtol=1e-3, atol=0)


def test_buffers_of_new_networks_are_those_of_the_draw_that_gives_the_weights() -> None:
    class Drawn(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("twin", self.weight.detach().clone())

    networks = many(Drawn)
    assert torch.equal(fresh_buffers(networks, "any", 3)["twin"], networks.fresh("any", 3)["weight"])


def test_the_output_layer_is_set_to_zero_and_nothing_else() -> None:
    heads = {"mlp": "layers.2.", "convnet": "layers.6.", "normed": "5."}
    for name_of_build, build in BUILDS.items():
        for networks in kinds(build):
            updated(networks)
            before = copied(networks.weights)
            moments = {name: [m.clone() for m in networks.moments(name)] for name in before}
            assert ZeroHead().start(networks) == {}
            ZeroHead().before_task(networks, {}, moment_of(networks))
            inputs = torch.randn(len(networks.seeds), 5, 1, 4, 4)
            assert (networks.outputs(inputs) == 0).all()
            for name, weight in networks.weights.items():
                head = name.startswith(heads[name_of_build])
                assert torch.equal(weight, torch.zeros_like(weight) if head else before[name])
                assert all(torch.equal(*pair) for pair in zip(moments[name], networks.moments(name), strict=True))


def test_the_output_layers_of_resnets_and_transformers_are_found() -> None:
    images, tokens = torch.randn(1, 2, 1, 4, 4), torch.randint(5, (1, 2, 6))
    for build, inputs in ((small_resnet, images), (small_vit, images), (small_transformer, tokens)):
        networks = one(build)
        before = networks.outputs(inputs)
        ZeroHead().before_task(networks, {}, moment_of(networks))
        assert (before != 0).any()
        assert (networks.outputs(inputs) == 0).all()


def test_a_new_optimizer_remembers_nothing_and_changes_no_weight() -> None:
    for optimizer in (sgd, adam):
        for networks in kinds(BUILDS["mlp"], optimizer):
            updated(networks)
            before = copied(networks.weights)
            assert all(networks.moments(name) for name in before)
            FreshOptimizer().before_task(networks, {}, moment_of(networks))
            assert not any(networks.moments(name) for name in before)
            assert all(torch.equal(networks.weights[name], before[name]) for name in before)
            updated(networks)
            assert not torch.equal(networks.weights["layers.0.weight"], before["layers.0.weight"])


@each_remedy
@pytest.mark.parametrize("build", [BUILDS["mlp"], BUILDS["convnet"]], ids=["mlp", "convnet"])
def test_many_networks_train_as_each_alone(remedy: Remedy, build) -> None:
    assert_many_train_as_each_alone(remedy, build)


@each_remedy
def test_networks_do_not_see_each_other(remedy: Remedy) -> None:
    assert_networks_do_not_see_each_other(remedy, BUILDS["convnet"])


def test_more_modules_than_there_are_and_fewer_than_one_are_refused() -> None:
    with pytest.raises(UsageError, match=r"last 3 modules, but the network has 2.*give last from 1 to 2"):
        ResetModules(3).start(one(BUILDS["mlp"]))
    with pytest.raises(UsageError, match="at least 1 module, got last=0"):
        ResetModules(0)


def test_networks_whose_modules_are_unknown_are_refused_before_training() -> None:
    with pytest.raises(UsageError, match="expected one of the built-in networks"):
        ResetModules().start(one(BUILDS["normed"]))


def test_networks_without_a_linear_output_layer_are_refused() -> None:
    with pytest.raises(UsageError, match="zero-head needs a linear output layer"):
        ZeroHead().start(one(lambda: nn.Sequential(nn.Conv2d(1, 2, 3))))
