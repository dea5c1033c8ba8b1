"""What all streams share: the checks of their settings and of the data, and draws of examples."""

from dataclasses import replace

import torch
from torch import Tensor

from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.tasks import Source, Stream, Task, check_labels


def check_counts(stream: Stream, **counts: int | None) -> None:
    """Refuses numbers of things that are below 1.

    Args:
        stream: Whose settings they are.
        counts: The settings by name; None stands for "all" and is always right.

    Raises:
        UsageError: One of them is below 1.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"the stream {stream.name} needs {name} >= 1, got {name} = {count}")


def check_shares(stream: Stream, **shares: float | None) -> None:
    """Refuses shares that do not lie strictly between 0 and 1.

    Args:
        stream: Whose settings they are.
        shares: The settings by name; None is always right.

    Raises:
        UsageError: One of them is 0 or less, or 1 or more.
    """
    for name, share in shares.items():
        if share is not None and not 0 < share < 1:
            raise UsageError(f"the stream {stream.name} needs 0 < {name} < 1, got {name} = {share}")


def check_tasks(stream: Stream, tasks: int) -> None:
    """Refuses another number of tasks than the settings of a stream give.

    Args:
        stream: Whose setting it is.
        tasks: How many there are.

    Raises:
        UsageError: It says another number.
    """
    if stream.tasks != tasks:
        raise UsageError(
            f"the stream {stream.name} with these settings has {tasks} tasks, got tasks = {stream.tasks}; leave it out"
        )


def check_request(stream: Stream, index: int, seed: int, *, endless: bool) -> None:
    """Refuses a task that does not exist and a seed that is none.

    Args:
        stream: The stream asked.
        index: The task asked for.
        seed: The seed.
        endless: Whether the stream goes on beyond its last task.

    Raises:
        UsageError: No such task, or a negative seed.
    """
    stream.check_index(index, endless=endless)
    if seed < 0:
        raise UsageError(f"the seed of the stream {stream.name} must be 0 or more, got {seed}")


def check_source(source: Source | None, stream: Stream) -> Source:
    """The examples, which must be there.

    Args:
        source: The examples.
        stream: The stream that needs them.

    Raises:
        DataError: There are none.
    """
    if source is None or len(source.inputs) == 0:
        raise DataError(f"the stream {stream.name} needs examples, but there are none; name some data, such as digits")
    return source


def check_classes(source: Source | None, stream: Stream) -> Source:
    """The examples, each of which must have the label of one of the classes, test examples too.

    Args:
        source: The examples.
        stream: The stream that needs their labels.

    Raises:
        DataError: There are none, or they have no class labels, or labels outside 0 to classes - 1.
    """
    source = check_labels(source, f"the stream {stream.name}")
    for labels in (source.targets, source.test_targets):
        if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < source.classes:
            raise DataError(
                f"the stream {stream.name} needs labels from 0 to {source.classes - 1}, got labels from {int(labels.min())} to "
                f"{int(labels.max())}; remove unlabelled examples, or state the number of classes"
            )
    return source


def shuffled(count: int, seed: int, label: str, *numbers: int) -> Tensor:
    """The numbers 0 to count - 1 in a random order, (count,) int64.

    Args:
        count: How many.
        seed: Seed of the stream.
        label: What the order is for.
        numbers: Where it stands, such as a task.
    """
    return torch.randperm(count, generator=generator(seed, label, *numbers))


def subset(stream: Stream, count: int, examples: int | None, seed: int, *numbers: int) -> Tensor | slice:
    """The places of a random subset without replacement, ascending; with one seed a smaller subset lies within a larger one.

    Args:
        stream: Whose setting `examples` is.
        count: How many examples there are.
        examples: How many to take; None for all of them.
        seed: Seed of the stream.
        numbers: Where the draw stands: a task, where each has a subset of its own.

    Returns:
        (examples,) int64, or a slice where all are taken, so that nothing is copied.

    Raises:
        UsageError: There are fewer examples.
    """
    if examples is None or examples == count:
        return slice(None)
    check_enough(stream, count, "examples", examples)
    return shuffled(count, seed, "examples", *numbers)[:examples].sort().values


def check_enough(stream: Stream, count: int, name: str, wanted: int) -> None:
    """Refuses to take more examples than there are: fewer would silently be another experiment.

    Args:
        stream: Whose setting it is.
        count: How many there are.
        name: The setting.
        wanted: How many it asks for.

    Raises:
        UsageError: There are fewer.
    """
    if wanted > count:
        raise UsageError(
            f"the stream {stream.name} with {name} = {wanted} needs as many examples, but there are {count}; ask for fewer"
        )


def boundaries(count: int, parts: int) -> list[int]:
    """Where `parts` consecutive parts of `count` things begin and end, parts + 1 numbers; their sizes differ by at most one.

    Args:
        count: How many things.
        parts: How many parts.
    """
    return [count * part // parts for part in range(parts + 1)]


def task_of(source: Source, index: int, name: str, rows: Tensor | slice, arrivals: tuple[int, ...] = ()) -> Task:
    """A task of some of the examples, with the whole test set.

    Args:
        source: The examples.
        index: Place of the task in its stream.
        name: What makes it this task.
        rows: Places of its examples.
        arrivals: Sizes of the parts in which they arrived.
    """
    return Task(
        index, source.inputs[rows], source.targets[rows], name, source.test_inputs, source.test_targets, arrivals
    )


def tested_on(task: Task, inputs: Tensor | None, targets: Tensor | None) -> Task:
    """The task with other held-out examples.

    Args:
        task: The task.
        inputs: The held-out examples; none or an empty tensor where there are none.
        targets: Their targets.
    """
    if inputs is None or len(inputs) == 0:
        return replace(task, test_inputs=None, test_targets=None)
    return replace(task, test_inputs=inputs, test_targets=targets)
