"""Streams whose tasks are equally hard and differ by a random change of inputs or targets: what falls along them is trainability."""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.training.streams.drawing import (
    check_classes,
    check_counts,
    check_request,
    check_source,
    shuffled,
    subset,
    task_of,
    tested_on,
)
from plasticity_probe.training.tasks import Source, Stream, Task, check_labels


@final
@dataclass(frozen=True)
class RandomLabels(Stream):
    """The same inputs in every task, each time with labels that are independent of the inputs, of each other and uniform over the classes.

    One random subset of the examples per seed, labels drawn anew for every task: Random Label MNIST of Kumar et al. 2023 (50 tasks of 1200
    images); random labels are also among the memorization tasks of Lyle et al. 2023. Labels are drawn, not permuted, so the classes
    are balanced only on average. There is nothing to generalise to, hence no test set. The stream never ends.

    The labels of task t depend on seed and t alone. They are raw numbers of NumPy's PCG64, which NumPy promises to keep for ever, modulo the
    number of classes (the bias is below classes / 2^64).

    Args:
        tasks: Number of tasks.
        examples: Size of the subset, in the order of the source; None for all examples.

    Raises:
        UsageError: A number below 1.
    """

    name: ClassVar[str] = "random-labels"
    source: ClassVar[str] = "Kumar et al. 2023, Random Label MNIST; Lyle et al. 2023"
    steady: ClassVar[bool] = True

    tasks: int
    examples: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, tasks=self.tasks, examples=self.examples)

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; of the source's labels only the number of classes is used."""
        check_request(self, index, seed, endless=True)
        source = check_labels(source, f"the stream {self.name}")
        inputs = source.inputs[subset(self, len(source.inputs), self.examples, seed)]
        labels = _random_labels(len(inputs), source.classes, seed, index)
        return Task(index, inputs, labels, f"random labels {index} (seed {seed})")


@final
@dataclass(frozen=True)
class PermutedPixels(Stream):
    """The same classification with the pixels of every image in another order, one random order per task (Permuted MNIST).

    Dohare et al. 2024 (Online Permuted MNIST: 800 tasks of all 60 000 images, each seen once) and Kumar et al. 2023 (500 tasks of
    10 000 images, drawn anew for each task). The online variant is this stream trained for one epoch. Test images are permuted by the same
    order. Task 0 is permuted like all others, so that all tasks are alike (our choice; Kumar et al.'s code leaves it as it is). In images
    of several channels pixels move as a whole, their channels together (our choice; the papers have one channel); of examples with
    a single axis the features are permuted. The stream never ends.

    Args:
        tasks: Number of tasks.
        examples: How many examples each task has, in the order of the source; None for all.
        redraw: Whether each task draws its own subset of the examples; otherwise one subset per seed serves all tasks.

    Raises:
        UsageError: A number below 1.
    """

    name: ClassVar[str] = "permuted-pixels"
    source: ClassVar[str] = "Dohare et al. 2024, Online Permuted MNIST; Kumar et al. 2023, Permuted MNIST"
    steady: ClassVar[bool] = True

    tasks: int
    examples: int | None = None
    redraw: bool = False

    def __post_init__(self) -> None:
        check_counts(self, tasks=self.tasks, examples=self.examples)

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; inputs (N, C, ...) or (N, features), floating-point."""
        check_request(self, index, seed, endless=True)
        source = check_source(source, self)
        pixels = _pixels(source.inputs)
        order = shuffled(pixels, seed, "pixel order", index)
        rows = subset(self, len(source.inputs), self.examples, seed, *((index,) if self.redraw else ()))
        task = task_of(source, index, f"permuted pixels {index} (seed {seed})", rows)
        tested = None if source.test_inputs is None else _reordered(source.test_inputs, order)
        return tested_on(replace(task, inputs=_reordered(task.inputs, order)), tested, source.test_targets)


@final
@dataclass(frozen=True)
class PermutedLabels(Stream):
    """The same images, their classes renamed by one random permutation per task (Lewandowski et al. 2023, label-permuted tasks).

    Unlike random labels, permuted ones leave the classes together, so features that were learned stay useful. Test labels are renamed
    alike. A permutation is drawn for task 0 too. The stream never ends.

    Args:
        tasks: Number of tasks.
        examples: Size of the subset that all tasks share, in the order of the source; None for all examples.

    Raises:
        UsageError: A number below 1.
    """

    name: ClassVar[str] = "permuted-labels"
    source: ClassVar[str] = "Lewandowski et al. 2023, label-permuted tasks"
    steady: ClassVar[bool] = True

    tasks: int
    examples: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, tasks=self.tasks, examples=self.examples)

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; every example needs a class label."""
        check_request(self, index, seed, endless=True)
        source = check_classes(source, self)
        names = shuffled(source.classes, seed, "label permutation", index)
        rows = subset(self, len(source.inputs), self.examples, seed)
        task = task_of(source, index, f"permuted labels {index} (seed {seed})", rows)
        tested = None if source.test_targets is None else names[source.test_targets]
        return tested_on(replace(task, targets=names[task.targets]), source.test_inputs, tested)


@final
@dataclass(frozen=True)
class PermutedAlphabet(Stream):
    """The same text with its characters renamed by one random permutation of the vocabulary per task, inputs and targets alike.

    Our analogue, for language models, of permuted pixels and labels: the statistics of the text stay what they are, so all tasks are
    equally hard, but nothing that was learned about single characters holds. Test text is renamed alike, and so is the text of task 0. The
    stream never ends.

    Args:
        tasks: Number of tasks.
        examples: Number of sequences, one random subset per seed, in the order of the source; None for all.
        length: Only the first so many tokens of each sequence; None for all.

    Raises:
        UsageError: A number below 1.
    """

    name: ClassVar[str] = "permuted-alphabet"
    source: ClassVar[str] = (
        "our analogue for text of the permuted tasks of Dohare et al. 2024 and Lewandowski et al. 2023"
    )
    steady: ClassVar[bool] = True

    tasks: int
    examples: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, tasks=self.tasks, examples=self.examples, length=self.length)

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; inputs and targets are (N, T) int64 tokens, targets the next ones, -1 where there is none."""
        check_request(self, index, seed, endless=True)
        source = _cut(self._text(source), self.length)
        names = shuffled(source.classes, seed, "alphabet", index)
        rows = subset(self, len(source.inputs), self.examples, seed)
        task = task_of(source, index, f"permuted alphabet {index} (seed {seed})", rows)
        task = replace(task, inputs=_renamed(task.inputs, names), targets=_renamed(task.targets, names))
        if source.test_inputs is None or source.test_targets is None:
            return tested_on(task, None, None)
        return tested_on(task, _renamed(source.test_inputs, names), _renamed(source.test_targets, names))

    def _text(self, source: Source | None) -> Source:
        source = check_source(source, self)
        for tokens in (source.inputs, source.targets):
            if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.numel() == 0:
                raise DataError(
                    f"the stream {self.name} needs inputs and targets of (N, T) int64 tokens, got {tokens.dtype} of shape "
                    f"{tuple(tokens.shape)}; give a text"
                )
        held = [
            t
            for t in (source.inputs, source.targets, source.test_inputs, source.test_targets)
            if t is not None and t.numel()
        ]
        if source.classes < 2 or max(int(tokens.max()) for tokens in held) >= source.classes:
            raise DataError(
                f"the stream {self.name} needs a vocabulary of at least two tokens that covers the text, got {source.classes} tokens "
                f"and text with token {max(int(tokens.max()) for tokens in held)}"
            )
        if self.length is not None and self.length > source.inputs.shape[1]:
            raise UsageError(
                f"the stream {self.name} with length = {self.length} needs sequences of as many tokens, got {source.inputs.shape[1]}; "
                "read the text in longer sequences"
            )
        return source


def _random_labels(count: int, classes: int, seed: int, index: int) -> Tensor:
    raw = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(index,))).random_raw(count)
    return torch.from_numpy((raw % np.uint64(classes)).astype(np.int64))


def _pixels(inputs: Tensor) -> int:
    if not inputs.is_floating_point() or inputs.ndim < 2 or (pixels := inputs[0].numel() // _channels(inputs)) < 2:
        raise DataError(
            "permuted pixels need floating-point inputs (N, C, ...) or (N, features) of at least two pixels, got "
            f"{inputs.dtype} of shape {tuple(inputs.shape)}; for text there is the stream permuted-alphabet"
        )
    return pixels


def _channels(inputs: Tensor) -> int:
    return inputs.shape[1] if inputs.ndim > 2 else 1


def _reordered(inputs: Tensor, order: Tensor) -> Tensor:
    return inputs.reshape(len(inputs), _channels(inputs), -1)[:, :, order].reshape(inputs.shape)


def _renamed(tokens: Tensor, names: Tensor) -> Tensor:
    return torch.where(tokens < 0, tokens, names[tokens.clamp_min(0)])


def _cut(source: Source, length: int | None) -> Source:
    cut = [None if tokens is None else tokens[:, :length] for tokens in (source.test_inputs, source.test_targets)]
    return replace(
        source,
        inputs=source.inputs[:, :length],
        targets=source.targets[:, :length],
        test_inputs=cut[0],
        test_targets=cut[1],
    )
