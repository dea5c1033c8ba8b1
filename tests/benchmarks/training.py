"""Ten seeds of a small network as one program against ten runs one after the other, and one update against a bare PyTorch loop.

    python tests/benchmarks/training.py [--seeds 10] [--updates 200] [--repeats 5] [--device cuda] [--resnet18]

The network is the MLP 2x100 on 1200 images of random pixels and labels in batches of 60 with Adam, in size the setting of
lewandowski-random-label-mnist. A bare loop gathers a batch, runs it forward and backward and steps torch's default Adam;
nothing else. Every method trains the same number of updates, all of them in one process, in turn; the table has the fastest of the repeats.
With --resnet18, one update of ResNet-18 on 128 CIFAR-sized images as well.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from plasticity_probe.training.batches import Resident, resident
from plasticity_probe.training.fitting import Learner, Place, Tally, fit
from plasticity_probe.training.models import blueprint
from plasticity_probe.training.networks import ManyNetworks, Networks, OneNetwork
from plasticity_probe.training.protocols import PROTOCOLS
from plasticity_probe.training.settings import Setting, Training
from plasticity_probe.training.tasks import Task

IMAGES, BATCH = 1200, 60


def main() -> None:
    """Measures and prints one table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--resnet18", action="store_true")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}; milliseconds per update\n")
    print(
        "| network | method | seeds | ms per update of all seeds | times faster than one after the other |\n|---|---|---|---|---|"
    )
    _mlp(given.seeds, given.updates, given.repeats, device)
    if given.resnet18:
        _resnet(given.updates, given.repeats, device)


def _mlp(seeds: int, updates: int, repeats: int, device: torch.device) -> None:
    setting = PROTOCOLS["lewandowski-random-label-mnist"].setting
    assert isinstance(setting, Setting)
    setting = replace(setting, training=replace(setting.training, epochs=(max(1, updates * BATCH // IMAGES),)))
    tasks = [_task(seed, (1, 28, 28), IMAGES) for seed in range(seeds)]
    build = blueprint(setting.architecture, tasks[0].inputs[0], 10).build
    training = setting.training
    ways: dict[str, Callable[[], None]] = {
        "bare loops, one after the other": lambda: [_bare(build(), task, training, device) for task in tasks] and None,
        "our loop, one after the other": lambda: (
            [
                _ours(OneNetwork(build, seed, training.make_optimizer, device), resident([task], device), setting)
                for seed, task in enumerate(tasks)
            ]
            and None
        ),
        "our loop, all seeds as one program": lambda: _ours(
            ManyNetworks(build, range(seeds), training.make_optimizer, device), resident(tasks, device), setting
        ),
    }
    each = training.epochs[0] * (IMAGES // BATCH)
    _table("MLP 2x100", ways, seeds, each, repeats, device, "our loop, one after the other")


def _resnet(updates: int, repeats: int, device: torch.device) -> None:
    training = Training(epochs=(1,), batch=128, learning_rate=1e-3)
    setting = replace(_setting(), training=training)
    task = _task(0, (3, 32, 32), 128 * max(1, updates // 20))
    build = blueprint({"name": "resnet18"}, task.inputs[0], 10).build
    ways: dict[str, Callable[[], None]] = {
        "bare loop": lambda: _bare(build(), task, training, device),
        "our loop": lambda: _ours(
            OneNetwork(build, 0, training.make_optimizer, device), resident([task], device), setting
        ),
        "our loop, bf16 and channels last": lambda: _ours(
            OneNetwork(build, 0, training.make_optimizer, device, bf16=True, channels_last=True),
            resident([task], device),
            setting,
        ),
    }
    _table("ResNet-18, 128 images", ways, 1, len(task.targets) // 128, repeats, device, "bare loop")


def _table(
    network: str,
    ways: dict[str, Callable[[], None]],
    seeds: int,
    updates: int,
    repeats: int,
    device: torch.device,
    base: str,
) -> None:
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            _wait(device)
            start = time.perf_counter()
            way()
            _wait(device)
            best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        print(
            f"| {network} | {name} | {seeds} | {seconds / updates * 1e3:.2f} | {best[base] / seconds:.2f} |", flush=True
        )


def _bare(network: nn.Module, task: Task, training: Training, device: torch.device) -> None:
    network = network.to(device)
    inputs, targets = task.inputs.to(device), task.targets.to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=training.learning_rate)
    for _ in range(training.epochs[0]):
        for chosen in torch.randperm(len(targets)).to(device).split(training.batch):
            optimizer.zero_grad()
            functional.cross_entropy(network(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()


def _ours(networks: Networks, held: Resident, setting: Setting) -> None:
    count = len(networks.seeds)
    fit(Learner(networks, []), held, setting, range(count), Place(), Tally.empty(count, networks.device))


def _setting() -> Setting:
    setting = PROTOCOLS["berariu-two-stage"].setting
    assert isinstance(setting, Setting)
    return replace(setting, remedies=())


def _task(seed: int, shape: tuple[int, ...], count: int) -> Task:
    draws = torch.Generator().manual_seed(seed)
    inputs: Tensor = torch.randn(count, *shape, generator=draws)
    return Task(0, inputs, torch.randint(10, (count,), generator=draws), "random labels")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
