"""The examples of each update: resident on the device, in an order that depends on seed, task and epoch alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from plasticity_probe.errors import UsageError
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.tasks import Task

PADDING, TURN = 4, 15.0
"""Pixels of padding before a random crop (He et al. 2016, section 4.2) and the largest turn in degrees (Dohare et al. 2024)."""


@dataclass(frozen=True, eq=False)
class Resident:
    """The examples of one task for every network, on the device.

    Args:
        inputs: (S, N, ...).
        targets: (S, N, ...).
        test_inputs: (S, M, ...); None unless every network's task has some.
        test_targets: (S, M, ...).
        tasks: The tasks they come from.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor | None
    test_targets: Tensor | None
    tasks: tuple[Task, ...]

    @property
    def size(self) -> int:
        """Number of examples of each network."""
        return self.targets.shape[1]


def resident(tasks: Sequence[Task], device: torch.device) -> Resident:
    """Puts one task of each network on the device.

    Args:
        tasks: A task per network.
        device: Where to.

    Raises:
        UsageError: They differ in size, also of their test sets, so that they cannot be one program.
    """
    if len({(task.inputs.shape, task.targets.shape) for task in tasks}) > 1:
        raise _unequal(tasks[0].index, "examples", [task.inputs for task in tasks])
    tested = [task.test_inputs for task in tasks if task.test_inputs is not None]
    answers = [task.test_targets for task in tasks if task.test_targets is not None]
    whole = len(tested) == len(answers) == len(tasks)
    if whole and len({(part.shape, answer.shape) for part, answer in zip(tested, answers, strict=True)}) > 1:
        raise _unequal(tasks[0].index, "test examples", tested)
    return Resident(
        _stacked([task.inputs for task in tasks], device),
        _stacked([task.targets for task in tasks], device),
        _stacked(tested, device) if whole else None,
        _stacked(answers, device) if whole else None,
        tuple(tasks),
    )


def batches(
    held: Resident, seeds: Sequence[int], epoch: int, epochs: int, batch: int, augmentation: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch.

    Args:
        held: The examples.
        seeds: Seed of each network's run.
        epoch: Epochs of the task that are over.
        epochs: The most epochs it may take.
        batch: Examples per update.
        augmentation: What is done to images; see `plasticity_probe.training.settings.Training`.

    Yields:
        Inputs (S, B, ...) and targets (S, B, ...), in new memory.
    """
    count, size = len(seeds), held.size
    drawn = [_order(task, seed, epoch, epochs, batch) for task, seed in zip(held.tasks, seeds, strict=True)]
    rows = torch.arange(count)[:, None] * size
    order = (torch.stack(drawn) + rows).to(held.inputs.device)
    inputs, targets = held.inputs.flatten(0, 1), held.targets.flatten(0, 1)
    changes = [generator(seed, "augmentation", held.tasks[0].index, epoch) for seed in seeds]
    for chosen in order.split(batch, dim=1):
        flat = chosen.reshape(-1)
        examples = inputs.index_select(0, flat).unflatten(0, chosen.shape)
        if augmentation != "none":
            examples = torch.stack(
                [augmented(own, augmentation, draws) for own, draws in zip(examples, changes, strict=True)]
            )
        yield examples, targets.index_select(0, flat).unflatten(0, chosen.shape)


def updates_of(size: int, batch: int) -> int:
    """Updates in a pass over `size` examples.

    Args:
        size: Number of examples.
        batch: Examples per update.
    """
    return math.ceil(size / batch)


def log_spaced(updates: int, count: int) -> frozenset[int]:
    """Up to `count` numbers between 0 and `updates`, evenly spaced on a logarithmic scale and both ends left out.

    Args:
        updates: Updates of a task.
        count: How many are wanted.
    """
    points = {round(updates ** (index / (count + 1))) for index in range(1, count + 1)}
    return frozenset(point for point in points if 0 < point < updates)


def augmented(images: Tensor, augmentation: str, draws: torch.Generator) -> Tensor:
    """Random crops, mirrorings and turns of images.

    Args:
        images: (N, C, H, W).
        augmentation: "crop-flip" or "crop-flip-rotate".
        draws: Generator on the CPU.

    Raises:
        UsageError: The examples are no images.
    """
    if images.ndim != 4:
        raise UsageError(
            f"only images (N, C, H, W) can be cropped and mirrored, got examples of shape {tuple(images.shape)}"
        )
    count, _, height, width = images.shape
    angles = torch.zeros(count)
    if augmentation == "crop-flip-rotate":
        angles = (torch.rand(count, generator=draws) * 2 - 1) * math.radians(TURN)
    mirrored = torch.where(torch.rand(count, generator=draws) < 0.5, -1.0, 1.0)
    shifts = torch.randint(-PADDING, PADDING + 1, (2, count), generator=draws)
    if augmentation == "crop-flip":
        return _cropped(images, mirrored < 0, shifts + PADDING)
    scaled = 2 * shifts / torch.tensor([[width], [height]])
    # The grid runs from -1 to 1 along both sides, so a turn by pixels is one only after stretching to their ratio.
    cos, sin, ratio = angles.cos(), angles.sin(), height / width
    rows = ([mirrored * cos, -sin * ratio, scaled[0]], [mirrored * sin / ratio, cos, scaled[1]])
    affine = torch.stack([torch.stack(row, 1) for row in rows], 1).to(images.device, images.dtype)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def _cropped(images: Tensor, mirrored: Tensor, corners: Tensor) -> Tensor:
    count, _, height, width = images.shape
    device = images.device
    padded = functional.pad(images, (PADDING,) * 4)
    rows = corners[1].to(device)[:, None] + torch.arange(height, device=device)
    columns = corners[0].to(device)[:, None] + torch.arange(width, device=device)
    columns = torch.where(mirrored.to(device)[:, None], columns.flip(1), columns)
    which = torch.arange(count, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _unequal(task: int, what: str, held: Sequence[Tensor]) -> UsageError:
    shapes = " or ".join(sorted({str(tuple(part.shape)) for part in held}))
    return UsageError(
        f"the {what} of task {task} are of shape {shapes}, depending on the seed, but networks that are trained together need as many each; "
        "train such seeds one after the other (--together 1)"
    )


def _stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return tensors[0][None].to(device) if len(tensors) == 1 else torch.stack([*tensors]).to(device)


def _order(task: Task, seed: int, epoch: int, epochs: int, batch: int) -> Tensor:
    """(N,) indices of the examples in the order in which an epoch sees them."""
    size = len(task.targets)
    if task.ordered:
        return torch.arange(size)
    draws = generator(seed, "order", task.index, epoch)
    if task.mixture is None:
        return torch.randperm(size, generator=draws)
    each = updates_of(size, batch)
    update = torch.arange(size) // batch + epoch * each
    chance = torch.tensor([task.mixture.probability(int(n), epochs * each) for n in update.unique()])
    whole = torch.rand(size, generator=draws) < chance.repeat_interleave(update.unique(return_counts=True)[1])
    anywhere = torch.randint(size, (size,), generator=draws)
    first = torch.randint(task.mixture.first, (size,), generator=draws)
    return torch.where(whole, anywhere, first)
