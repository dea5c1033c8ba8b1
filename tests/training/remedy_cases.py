"""Small networks, tasks and a training loop that the tests of the remedies share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from plasticity_probe.checkpoints.networks import MLP, ConvNet
from plasticity_probe.training.networks import ManyNetworks, Networks, OneNetwork
from plasticity_probe.training.remedies.remedy import Memory, Moment, Remedy
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.tasks import Task

SEEDS = (3, 5)
CPU = torch.device("cpu")
EXAMPLES = 12

Build = Callable[[], nn.Module]


def small_mlp() -> nn.Module:
    return MLP([16, 4, 3])


def small_convnet() -> nn.Module:
    return ConvNet(channels=(2,), kernel=3, in_channels=1, image_size=4, hidden=3, classes=3)


class Normed(nn.Sequential):
    """A convolution, BatchNorm, a 1x1 convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            nn.Conv2d(2, 3, 1, bias=False),
            nn.Flatten(),
            nn.Linear(48, 3),
        )


BUILDS: dict[str, Build] = {"mlp": small_mlp, "convnet": small_convnet, "normed": Normed}


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # type: ignore[arg-type]


def adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)  # type: ignore[arg-type]


def one(build: Build, seed: int = SEEDS[0], optimizer: Callable[..., torch.optim.Optimizer] = sgd) -> Networks:
    return OneNetwork(build, seed, optimizer, CPU)


def many(build: Build, seeds: Sequence[int] = SEEDS, optimizer: Callable[..., torch.optim.Optimizer] = sgd) -> Networks:
    return ManyNetworks(build, seeds, optimizer, CPU)


def kinds(build: Build, optimizer: Callable[..., torch.optim.Optimizer] = sgd) -> list[Networks]:
    """One network alone and two at once."""
    return [one(build, optimizer=optimizer), many(build, optimizer=optimizer)]


def in_double(build: Build) -> Build:
    return lambda: build().double()


def tasks_of(seed: int, count: int = 2, arrivals: tuple[int, ...] = (5, 7)) -> list[Task]:
    """Random images with random labels, other ones for each seed."""
    drawn = generator(seed, "tasks of a test")
    return [
        Task(
            index,
            torch.randn(EXAMPLES, 1, 4, 4, generator=drawn),
            torch.randint(3, (EXAMPLES,), generator=drawn),
            "random",
            arrivals=arrivals,
        )
        for index in range(count)
    ]


def moment_of(networks: Networks, tasks: Sequence[Task] = (), *, step: int = 7, epoch: int = 0) -> Moment:
    return Moment(networks.seeds, 1, epoch, step, tasks, 4)


def learn(networks: Networks, tasks: Sequence[Task], batch: slice = slice(0, 4)) -> None:
    """Leaves the gradients of one batch of each network's task."""
    inputs = torch.stack([task.inputs[batch] for task in tasks])
    networks.learn(
        inputs.to(next(iter(networks.weights.values())).dtype), torch.stack([t.targets[batch] for t in tasks])
    )


def trained(networks: Networks, remedy: Remedy, streams: Sequence[Sequence[Task]]) -> Memory:
    """Trains through a stream of tasks per network, two epochs each, with every hook of a remedy."""
    memory, step = remedy.start(networks), 0
    for index in range(len(streams[0])):
        tasks = [stream[index] for stream in streams]
        if index:
            remedy.before_task(networks, memory, Moment(networks.seeds, index, 0, step, tasks, 4))
        for epoch in range(2):
            for first in range(0, EXAMPLES, 4):
                learn(networks, tasks, slice(first, first + 4))
                remedy.add_gradient(networks, memory)
                networks.optimizer.step()
                step += 1
                remedy.after_step(networks, memory, Moment(networks.seeds, index, epoch, step, tasks, 4), {})
            remedy.after_epoch(networks, memory, Moment(networks.seeds, index, epoch + 1, step, tasks, 4))
    return memory


def moved(networks: Networks, scale: float = 0.3) -> Networks:
    """The networks with random numbers added to their weights, each network's from its own seed."""
    for index, seed in enumerate(networks.seeds):
        drawn = generator(seed, "moved")
        for weight in networks.weights.values():
            weight[index] += scale * torch.randn(weight[index].shape, generator=drawn, dtype=weight.dtype)
    return networks


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_many_train_as_each_alone(remedy: Remedy, build: Build) -> None:
    """Two networks trained at once get the weights, buffers and memory that each gets alone."""
    together = many(build)
    remembered = trained(together, remedy, [tasks_of(seed) for seed in SEEDS])
    for index, seed in enumerate(SEEDS):
        alone = one(build, seed)
        own = trained(alone, remedy, [tasks_of(seed)])
        for all_of_them, its in (
            (together.weights, alone.weights),
            (together.buffers, alone.buffers),
            (remembered, own),
        ):
            assert all_of_them.keys() == its.keys()
            for name, tensor in its.items():
                torch.testing.assert_close(all_of_them[name][index], tensor[0], rtol=1e-4, atol=1e-5)


def assert_networks_do_not_see_each_other(remedy: Remedy, build: Build) -> None:
    """What the second network is trained on changes nothing about the first, bit for bit, but does change the second."""
    ends: list[dict[str, Tensor]] = []
    for other in (SEEDS[1], 11):
        networks = many(build)
        trained(networks, remedy, [tasks_of(SEEDS[0]), tasks_of(other)])
        ends.append({**networks.weights, **networks.buffers})
    assert all(torch.equal(ends[0][name][0], ends[1][name][0]) for name in ends[0])
    assert any(not torch.equal(ends[0][name][1], ends[1][name][1]) for name in ends[0])
