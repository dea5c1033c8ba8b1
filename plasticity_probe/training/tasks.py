"""Streams of tasks that a network learns one after the other, each a fixed set of examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plasticity_probe.data.dataset import Split
from plasticity_probe.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream.

    Args:
        index: Its place in the stream, from 0 on.
        inputs: (N, ...) floating-point examples.
        targets: (N,) int64 labels.
        name: What makes it this task, for the record.
    """

    index: int
    inputs: Tensor
    targets: Tensor
    name: str


def reshuffled_labels(
    split: Split,
    tasks: int,
    examples: int,
    seed: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Iterator[Task]:
    """The same inputs in every task, each time with fresh labels that are independent of the inputs and uniform over the classes.

    This is the random-label stream of Kumar et al. 2023 (Random Label MNIST: one fixed random subset, labels drawn anew for every task);
    the same kind of random labels are among the memorization tasks of Lyle et al. 2023. Labels are drawn, not permuted, so the classes are
    balanced only on average. All tasks are equally hard, so a fall of the accuracy they are fitted with is a loss of trainability.

    The labels of task t depend on seed and t alone: a longer stream begins with the shorter one. They are raw numbers of NumPy's PCG64, which
    NumPy promises to keep for ever, modulo the number of classes (the bias is below classes / 2^64).

    Args:
        split: Examples with class labels; of the labels only the number of classes, the largest label + 1, is used.
        tasks: Number of tasks.
        examples: Number of examples, a random subset of the split; all of it where it has no more.
        seed: Seed of the subset (`split.subset(examples, seed)`) and of the labels, from 0 on.
        mean: Per-channel mean to subtract, as in `Split.tensors`; none by default.
        std: Per-channel standard deviation to divide by.

    Yields:
        The tasks in order. All share one tensor of inputs, in the order of the split.

    Raises:
        UsageError: Fewer than one task or example, a negative seed, or only one of mean and std.
        DataError: The split has no class labels or fewer than two classes, or mean and std do not fit.
    """
    if tasks < 1:
        raise UsageError(f"a stream needs at least one task, got tasks = {tasks}")
    if split.targets.dtype != np.int64 or (classes := int(split.targets.max()) + 1) < 2:
        raise DataError(
            "random labels need a split with int64 class labels of at least two classes, got targets of type "
            f"{split.targets.dtype.name} up to {split.targets.max()}"
        )
    inputs, _ = split.subset(examples, seed).tensors(mean, std)
    return (
        Task(index, inputs, _random_labels(len(inputs), classes, seed, index), f"random labels {index} (seed {seed})")
        for index in range(tasks)
    )


def _random_labels(count: int, classes: int, seed: int, index: int) -> Tensor:
    raw = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(index,))).random_raw(count)
    return torch.from_numpy((raw % np.uint64(classes)).astype(np.int64))
