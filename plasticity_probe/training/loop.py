"""Trains one network through a stream of tasks and writes a checkpoint at the start of each of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plasticity_probe.checkpoints.safetensors_files import write_checkpoint
from plasticity_probe.errors import CheckpointError, DataError, UnknownNameError, UsageError
from plasticity_probe.training.tasks import Task

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = MappingProxyType(
    {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
)
EVALUATED_TOGETHER = 1024
"""Examples of a pass that only evaluates (our choice: bounds the memory; the result does not depend on it)."""


@dataclass(frozen=True)
class TrainingSettings:
    """How every task of a stream is trained.

    The defaults are our choice: the smallest setting we found in which a small ReLU network on the digits loses its trainability within 15
    tasks and a minute. Kumar et al. 2023 use 400 epochs of batch 16 and Adam with 1e-3 over 50 tasks of 1200 images.

    Args:
        epochs: Passes over the examples of a task.
        batch: Examples per update; the last batch of an epoch holds what is left.
        learning_rate: Step size, the same for all tasks. 3e-3 is three times Adam's default (Kingma and Ba 2015), which speeds the loss up.
        optimizer: A name of `OPTIMIZERS`, otherwise with torch's defaults. Its state is kept from task to task, as in Kumar et al. 2023
            and Dohare et al. 2024, because the learner is not told when a task ends.
        seed: Seed of the order of the examples and of whatever is random in the network (dropout), from 0 on.

    Raises:
        UsageError: A number that cannot be, or no optimizer of that name.
    """

    epochs: int = 40
    batch: int = 60
    learning_rate: float = 3e-3
    optimizer: str = "adam"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not 0 < self.learning_rate < float("inf") or self.seed < 0:
            raise UsageError(
                f"training needs epochs >= 1, batch >= 1, a positive learning rate and a seed >= 0; got {self.epochs}, {self.batch}, "
                f"{self.learning_rate} and {self.seed}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)


@dataclass(frozen=True)
class TaskOutcome:
    """How well a task was learned.

    Args:
        task: The task's index.
        name: The task's name.
        accuracy: Share of its examples classified rightly at its end, in eval mode: the outcome of Lewandowski et al. 2023.
        online_accuracy: Share classified rightly before the update on them, over all its epochs: the average online task accuracy of Kumar
            et al. 2023. It falls also where only the start of each task becomes worse.
        first_epoch_loss: Mean cross-entropy over its first epoch, each batch before the update on it, in nats.
    """

    task: int
    name: str
    accuracy: float
    online_accuracy: float
    first_epoch_loss: float


def train(
    network: nn.Module,
    tasks: Iterable[Task],
    settings: TrainingSettings,
    out: Path,
    metadata: Mapping[str, Any],
    *,
    report: Callable[[TaskOutcome], None] | None = None,
) -> list[TaskOutcome]:
    """Trains a network through tasks, one after the other, and writes its checkpoints.

    Each task is minibatch descent on the cross-entropy, its examples in a new random order every epoch. Before the first update on a task, and
    once after the last task, the weights are written in the package's own format; the file's metadata says at which update (`step`) and before
    which task (`task`; after the last one the next index) they stand, and how the tasks before went (`outcomes`).

    On one machine the same network, tasks and settings give the same weights, bit for bit on the CPU. The global random states are as before.

    Args:
        network: The network, on the device where it is to be trained. It is changed: afterwards it holds the last weights, in the mode it had.
        tasks: The stream. The examples of the task at hand lie on the network's device as a whole.
        settings: How each task is trained.
        out: Folder of the checkpoints, made where it is missing. Files of the same name are replaced.
        metadata: What else the checkpoints should say, as JSON: `run`, and `architecture` {"name": ..., and its settings beside it}, which
            `plasticity_probe.checkpoints.architectures.identify` reads.
        report: Called after each task.

    Returns:
        How each task went, in order.

    Raises:
        UsageError: The network has no trainable parameter, or the metadata is no JSON.
        DataError: A task without examples, or whose targets are not one class label per example.
        CheckpointError: A checkpoint cannot be written.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise UsageError("the network has no trainable parameter; set requires_grad=True on those to be trained")
    device = parameters[0].device
    optimizer = OPTIMIZERS[settings.optimizer](parameters, lr=settings.learning_rate)
    # A generator on the CPU gives every device the same order.
    order = torch.Generator().manual_seed(settings.seed)
    outcomes: list[TaskOutcome] = []
    step = upcoming = 0
    _make_folder(out)

    def save() -> None:
        known = {"seed": settings.seed, "training": asdict(settings), "outcomes": [asdict(done) for done in outcomes]}
        place = {"step": step, "task": upcoming}
        write_checkpoint(checkpoint_path(out, step), network.state_dict(), {**metadata, **known, **place})

    with _reproducible(settings.seed), _mode_kept(network):
        for task in tasks:
            _check(task)
            upcoming = task.index
            save()

            inputs, targets = task.inputs.to(device), task.targets.to(device)
            # Sums stay on the device, so that a GPU need not wait for the CPU after every batch.
            right, first_loss = torch.zeros(2, device=device, dtype=torch.float64)
            network.train()
            for epoch in range(settings.epochs):
                for chosen in torch.randperm(len(targets), generator=order).to(device).split(settings.batch):
                    outputs = network(inputs[chosen])
                    losses = functional.cross_entropy(outputs, targets[chosen], reduction="none")
                    optimizer.zero_grad()
                    losses.mean().backward()
                    optimizer.step()
                    step += 1
                    right += (outputs.detach().argmax(1) == targets[chosen]).sum()
                    first_loss += losses.detach().sum() if epoch == 0 else 0.0

            outcome = TaskOutcome(
                task=task.index,
                name=task.name,
                accuracy=accuracy(network, inputs, targets),
                online_accuracy=right.item() / (settings.epochs * len(targets)),
                first_epoch_loss=first_loss.item() / len(targets),
            )
            outcomes.append(outcome)
            upcoming = task.index + 1
            if report is not None:
                report(outcome)
        save()
    return outcomes


@torch.no_grad()
def accuracy(network: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Share of examples whose own class has the highest score; the network is left in eval mode.

    Args:
        network: Maps inputs to scores (N, C).
        inputs: (N, ...) on the network's device.
        targets: (N,) labels.
    """
    network.eval()
    chunks = zip(inputs.split(EVALUATED_TOGETHER), targets.split(EVALUATED_TOGETHER), strict=True)
    right = sum((network(examples).argmax(1) == labels).sum() for examples, labels in chunks)
    return int(right) / len(targets)


def checkpoint_path(out: Path, step: int) -> Path:
    """The file of the weights after `step` updates."""
    return out / f"step_{step:08d}.safetensors"


def outcomes_in(metadata: Mapping[str, Any]) -> tuple[TaskOutcome, ...]:
    """How the tasks before a checkpoint went.

    Args:
        metadata: The metadata of a checkpoint that `train` wrote.
    """
    return tuple(TaskOutcome(**entry) for entry in metadata["outcomes"])


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"checkpoints cannot be written to {out}: {error.strerror}; choose another folder"
        ) from error


def _check(task: Task) -> None:
    if task.targets.dtype != torch.int64 or task.targets.shape != (len(task.inputs),) or len(task.inputs) == 0:
        raise DataError(
            f"task {task.index} ({task.name}) needs one int64 label per example and at least one example, but has inputs of shape "
            f"{tuple(task.inputs.shape)} and targets of shape {tuple(task.targets.shape)} and type {task.targets.dtype}"
        )


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seeds what a network may draw itself, asks cuDNN for its deterministic kernels, and puts all of it back afterwards."""
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        torch.enable_grad(),
    ):
        torch.manual_seed(seed)
        yield


@contextmanager
def _mode_kept(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
