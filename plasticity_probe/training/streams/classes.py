"""Streams whose tasks differ by their classes: more and more of them, other ones every time, or parts that hold some of them only."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor

from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.streams.drawing import (
    boundaries,
    check_classes,
    check_counts,
    check_enough,
    check_request,
    check_source,
    shuffled,
    task_of,
    tested_on,
)
from plasticity_probe.training.tasks import Source, Stream, Task

WINDOW = 64
ATTEMPTS = 20
"""Passes that larger tuples must not repeat each other in, and draws of each: they bound the cost of a single task (our choice)."""


@final
@dataclass(frozen=True)
class ClassIncremental(Stream):
    """Tasks that bring new classes, in a random order of the classes per seed (Dohare et al. 2024, class-incremental CIFAR-100: 20 times 5).

    Classes are numbered in the order in which they appear, so that task t's labels lie below (t + 1) classes_per_task and the network
    needs no more outputs than there are classes in the stream (our choice). Test examples are those of the task's classes.

    Args:
        tasks: Number of tasks.
        classes_per_task: New classes in each task.
        cumulative: Whether a task holds the classes of all tasks so far (as in the paper), in order of arrival, or its new ones alone.

    Raises:
        UsageError: A number below 1.
    """

    name: ClassVar[str] = "class-incremental"
    source: ClassVar[str] = "Dohare et al. 2024, class-incremental CIFAR-100"
    equal_sizes: ClassVar[bool] = False

    tasks: int
    classes_per_task: int
    cumulative: bool = True

    def __post_init__(self) -> None:
        check_counts(self, tasks=self.tasks, classes_per_task=self.classes_per_task)

    def outputs(self, source: Source | None) -> int:  # noqa: ARG002 -- the stream itself decides
        """As `Stream.outputs`: all classes that ever appear."""
        return self.tasks * self.classes_per_task

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; every example needs a class label."""
        check_request(self, index, seed, endless=False)
        source = check_classes(source, self)
        if self.outputs(source) > source.classes:
            raise UsageError(
                f"the stream {self.name} with {self.tasks} tasks of {self.classes_per_task} classes needs {self.outputs(source)} classes, "
                f"but there are {source.classes}"
            )
        names = shuffled(source.classes, seed, "class order").argsort()
        labels, size = names[source.targets], self.classes_per_task
        first = 0 if self.cumulative else index
        parts = [(labels // size == number).nonzero().squeeze(1) for number in range(first, index + 1)]
        _check_present(self, labels, range(first * size, (index + 1) * size), names)
        arrivals = tuple(map(len, parts)) if self.cumulative else ()
        task = task_of(source, index, f"classes of task {index} (seed {seed})", rows := torch.cat(parts), arrivals)
        tested = _of_labels(source, names, range(first * size, (index + 1) * size))
        return tested_on(replace(task, targets=labels[rows]), *tested)


@final
@dataclass(frozen=True)
class ClassPairs(Stream):
    """Tasks that each tell a fresh random pair of classes apart, labelled 0 and 1 (Continual ImageNet, Dohare et al. 2024).

    The classes are gone through in passes: within a pass no class comes twice; what is left over where the classes do not divide evenly sits
    out that pass. Every pass draws new pairs, and no pair comes again before all pairs have come: a cycle of passes is a round-robin
    tournament (circle method) of randomly ordered classes with its rounds in random order, and the next cycle is drawn anew. The
    official code draws one order of the 1000 classes and repeats it. Of larger tuples, a pass is drawn again, up to 20 times, while it
    repeats one of up to 63 passes before it. The stream never ends.

    Args:
        tasks: Number of tasks.
        train_per_class: Training examples of each class, the same random ones whenever the class comes; None for all (paper: 600).
        test_per_class: Test examples likewise (paper: 100).
        classes: Classes of each task.

    Raises:
        UsageError: A number below 1, or fewer than two classes.
    """

    name: ClassVar[str] = "class-pairs"
    source: ClassVar[str] = "Dohare et al. 2024, Continual ImageNet"
    equal_sizes: ClassVar[bool] = False

    tasks: int
    train_per_class: int | None = None
    test_per_class: int | None = None
    classes: int = 2

    def __post_init__(self) -> None:
        check_counts(self, tasks=self.tasks, train_per_class=self.train_per_class, test_per_class=self.test_per_class)
        if self.classes < 2:
            raise UsageError(f"the stream {self.name} tells at least two classes apart, got classes = {self.classes}")

    def outputs(self, source: Source | None) -> int:  # noqa: ARG002 -- the stream itself decides
        """As `Stream.outputs`: the classes of one task."""
        return self.classes

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; every example needs a class label."""
        check_request(self, index, seed, endless=True)
        source = check_classes(source, self)
        if self.classes > source.classes:
            raise UsageError(
                f"the stream {self.name} with classes = {self.classes} needs as many classes, but there are {source.classes}"
            )
        number, place = divmod(index, source.classes // self.classes)
        drawn = (
            _pairs(seed, source.classes, number)
            if self.classes == 2
            else _tuples(seed, source.classes, self.classes, number)
        )
        chosen = drawn[place]
        _check_present(self, source.targets, chosen, torch.arange(source.classes))
        inputs, targets = self._drawn(
            source.inputs, source.targets, chosen, self.train_per_class, "train_per_class", seed
        )
        task = Task(index, inputs, targets, f"classes {', '.join(map(str, chosen))} (task {index}, seed {seed})")
        if source.test_inputs is None or source.test_targets is None:
            if self.test_per_class is not None:
                raise UsageError(
                    f"there is no test set to take test_per_class = {self.test_per_class} examples from; leave it out"
                )
            return task
        tested = self._drawn(
            source.test_inputs, source.test_targets, chosen, self.test_per_class, "test_per_class", seed
        )
        return tested_on(task, *tested)

    def _drawn(
        self, inputs: Tensor, targets: Tensor, chosen: tuple[int, ...], count: int | None, setting: str, seed: int
    ) -> tuple[Tensor, Tensor]:
        rows: list[Tensor] = []
        for label in chosen:
            members = (targets == label).nonzero().squeeze(1)
            if count is not None:
                check_enough(self, len(members), setting, count)
                members = members[shuffled(len(members), seed, setting, label)[:count].sort().values]
            rows.append(members)
        labels = [torch.full((len(members),), place) for place, members in enumerate(rows)]
        return inputs[torch.cat(rows)], torch.cat(labels)


@final
@dataclass(frozen=True)
class MultiStage(Stream):
    """Tasks that grow into the whole training set, each by a share of every class and by some classes of their own (Berariu et al. 2021, A.3).

    With n = tasks - 1: the classes are partitioned into n + 1 groups C_1, ..., C_{n+1}; the data is split into D_c and D_u with
    |D_u| = r |D|; D_u is partitioned into n + 1 equal random parts; and with D_0 empty

        D_i = D_{i-1} ∪ D_{u,i} ∪ {(x, c) in D_c: c in C_i},    D_{n+1} = D.

    r = 1 gives growing random subsets, r = 0 class-incremental growth. Groups are random and their sizes, like those of the parts, differ by at
    most one (our choice; the paper leaves open how classes are grouped). Labels stay as they are, and every task has the whole test set.
    Another number of tasks is another stream, which does not begin with this one.

    Args:
        tasks: n + 1, the stages and the final tuning on everything.
        iid_fraction: r, in [0, 1].

    Raises:
        UsageError: No task, or r outside [0, 1].
    """

    name: ClassVar[str] = "multi-stage"
    source: ClassVar[str] = "Berariu et al. 2021, appendix A.3"
    equal_sizes: ClassVar[bool] = False

    tasks: int
    iid_fraction: float

    def __post_init__(self) -> None:
        check_counts(self, tasks=self.tasks)
        if not 0 <= self.iid_fraction <= 1:
            raise UsageError(
                f"the stream {self.name} needs 0 <= iid_fraction <= 1, got iid_fraction = {self.iid_fraction}"
            )

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; every example needs a class label unless r = 1."""
        check_request(self, index, seed, endless=False)
        source = check_source(source, self) if self.iid_fraction == 1 else check_classes(source, self)
        parts = self._parts(source, seed)
        arrivals = tuple(map(len, parts))
        if min(arrivals) == 0:
            raise UsageError(
                f"the stream {self.name} adds examples in each of its {self.tasks} tasks, but of these {len(source.inputs)} examples task "
                f"{arrivals.index(0)} would add none; ask for fewer tasks"
            )
        rows = torch.cat(parts[: index + 1])
        return task_of(source, index, f"stage {index} of {self.tasks} (seed {seed})", rows, arrivals[: index + 1])

    def _parts(self, source: Source, seed: int) -> list[Tensor]:
        order = shuffled(len(source.inputs), seed, "arrival order")
        uniform, by_class = order.split([common := round(self.iid_fraction * len(order)), len(order) - common])
        ends = boundaries(common, self.tasks)
        parts = [uniform[begin:end] for begin, end in pairwise(ends)]
        if self.iid_fraction == 1:
            return parts
        if source.classes < self.tasks:
            raise UsageError(
                f"the stream {self.name} with iid_fraction < 1 needs a group of classes for each of its {self.tasks} tasks, but there are "
                f"{source.classes} classes; ask for fewer tasks, or for iid_fraction = 1"
            )
        limits = torch.tensor(boundaries(source.classes, self.tasks)[1:])
        place = shuffled(source.classes, seed, "class order").argsort()
        groups = torch.bucketize(place, limits, right=True)[source.targets[by_class]]
        return [torch.cat([part, by_class[groups == number]]) for number, part in enumerate(parts)]


def _check_present(stream: Stream, labels: Tensor, wanted: range | tuple[int, ...], names: Tensor) -> None:
    counts = labels.bincount(minlength=len(names))
    if missing := [label for label in wanted if counts[label] == 0]:
        own = [int((names == label).nonzero()) for label in missing]
        raise DataError(
            f"the stream {stream.name} needs examples of every class, but of class {', '.join(map(str, own))} there are none"
        )


def _of_labels(source: Source, names: Tensor, wanted: range) -> tuple[Tensor | None, Tensor | None]:
    if source.test_inputs is None or source.test_targets is None:
        return None, None
    labels = names[source.test_targets]
    among = (labels >= wanted.start) & (labels < wanted.stop)
    return source.test_inputs[among], labels[among]


def _pairs(seed: int, classes: int, number: int) -> list[tuple[int, ...]]:
    """One round of a round-robin tournament: the last seat stays, the others turn; with an odd number of classes that seat is empty."""
    turning = classes - 1 + classes % 2
    cycle, round_ = divmod(number, turning)
    seats = shuffled(classes, seed, "class pairs", cycle).tolist()
    turn = int(shuffled(turning, seed, "rounds", cycle)[round_])
    pairs = [((turn + step) % turning, (turn - step) % turning) for step in range(1, (turning + 1) // 2)]
    if classes % 2 == 0:
        pairs.append((turn, turning))
    sides = torch.randint(2, (len(pairs),), generator=generator(seed, "sides", number)).tolist()
    order = shuffled(len(pairs), seed, "order of pairs", number).tolist()
    return [(seats[pairs[i][sides[i]]], seats[pairs[i][1 - sides[i]]]) for i in order]


def _tuples(seed: int, classes: int, size: int, number: int) -> list[tuple[int, ...]]:
    seen: set[frozenset[int]] = set()
    found: list[tuple[int, ...]] = []
    for earlier in range(number - number % WINDOW, number + 1):
        for attempt in range(ATTEMPTS):
            order = shuffled(classes, seed, "class tuples", earlier, attempt).tolist()
            found = [tuple(order[begin : begin + size]) for begin in range(0, classes - size + 1, size)]
            if seen.isdisjoint(map(frozenset, found)):
                break
        seen.update(map(frozenset, found))
    return found
