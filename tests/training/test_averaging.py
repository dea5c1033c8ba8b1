import pytest
import torch
from remedy_cases import (
    BUILDS,
    assert_many_train_as_each_alone,
    assert_networks_do_not_see_each_other,
    copied,
    kinds,
    learn,
    moment_of,
    one,
    tasks_of,
)

from plasticity_probe.checkpoints.networks import MLP
from plasticity_probe.errors import UsageError
from plasticity_probe.training.networks import Networks
from plasticity_probe.training.remedies.averaging import HareTortoise

WEIGHT = "layers.0.weight"


def update(networks: Networks) -> None:
    learn(networks, [tasks_of(seed)[0] for seed in networks.seeds])
    networks.optimizer.step()


def test_the_tortoise_is_the_moving_average_of_the_hare_by_hand() -> None:
    networks = one(lambda: MLP([1, 1]))
    networks.weights[WEIGHT].fill_(8.0)
    remedy = HareTortoise(decay=0.75, every=2)
    memory = remedy.start(networks)
    seen = []
    for value in (0.0, 4.0, 1.0):
        networks.weights[WEIGHT].fill_(value)
        remedy.after_step(networks, memory, moment_of(networks), {})
        seen.append(memory[WEIGHT].item())
    assert seen == [6.0, 5.5, 4.375]


def test_the_hare_is_put_back_every_few_epochs_of_a_task_and_goes_its_own_way_afterwards() -> None:
    networks = one(lambda: MLP([1, 1]))
    remedy = HareTortoise(decay=0.5, every=2)
    memory = remedy.start(networks)
    ends = []
    for epoch in (1, 2, 3, 4):
        memory[WEIGHT].fill_(float(epoch))
        networks.weights[WEIGHT].fill_(0.0)
        remedy.after_epoch(networks, memory, moment_of(networks, epoch=epoch))
        ends.append(networks.weights[WEIGHT].item())
    assert ends == [0, 2, 0, 4]
    networks.weights[WEIGHT].fill_(7.0)
    assert memory[WEIGHT].item() == 4


def test_weights_and_running_statistics_are_averaged_and_put_back_and_counters_go_on() -> None:
    for networks in kinds(BUILDS["normed"]):
        remedy = HareTortoise(decay=0.9, every=1)
        memory = remedy.start(networks)
        expected = {name: tensor.clone() for name, tensor in memory.items()}
        assert "1.running_var" in expected
        for _ in range(3):
            update(networks)
            remedy.after_step(networks, memory, moment_of(networks), {})
            current = {**networks.weights, **networks.buffers}
            expected = {name: 0.9 * slow + 0.1 * current[name] for name, slow in expected.items()}
        remedy.after_epoch(networks, memory, moment_of(networks, epoch=1))
        current = {**networks.weights, **networks.buffers}
        assert current.keys() - expected.keys() == {"1.num_batches_tracked"}
        for name, slow in expected.items():
            torch.testing.assert_close(current[name], slow)
        assert (networks.buffers["1.num_batches_tracked"] == 3).all()


def test_what_is_remembered_is_a_copy_and_the_optimizer_keeps_its_own() -> None:
    networks = one(BUILDS["mlp"])
    remedy = HareTortoise()
    memory = remedy.start(networks)
    before = copied(memory)
    update(networks)
    assert all(torch.equal(memory[name], before[name]) for name in before)
    moments = [m.clone() for m in networks.moments(WEIGHT)]
    remedy.after_epoch(networks, memory, moment_of(networks, epoch=10))
    assert torch.equal(networks.weights[WEIGHT], before[WEIGHT])
    assert all(torch.equal(*pair) for pair in zip(moments, networks.moments(WEIGHT), strict=True))
    assert moments


@pytest.mark.parametrize(
    "build", [BUILDS["mlp"], BUILDS["convnet"], BUILDS["normed"]], ids=["mlp", "convnet", "normed"]
)
def test_many_networks_train_as_each_alone_and_do_not_see_each_other(build) -> None:
    assert_many_train_as_each_alone(HareTortoise(decay=0.7, every=2), build)
    assert_networks_do_not_see_each_other(HareTortoise(decay=0.7, every=2), build)


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}, {"decay": float("nan")}])
def test_settings_outside_their_bounds_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="0 <= decay < 1 and every >= 1"):
        HareTortoise(**settings)  # type: ignore[arg-type]


def test_the_defaults_are_the_published_ones() -> None:
    assert (HareTortoise().decay, HareTortoise().every) == (0.999, 10)
