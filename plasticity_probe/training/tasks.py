"""What a task is, and what a stream of tasks is: a pure function of data, a seed and the task's index.

A stream knows nothing of what was trained before, so any task of a run can be rebuilt later, for measurements too.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from plasticity_probe.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Source:
    """The examples that a stream makes its tasks of, ready for a network.

    Args:
        inputs: (N, ...) floating-point examples, or (N, T) int64 tokens.
        targets: (N,) int64 labels, (N,) or (N, K) values, or (N, T) int64 tokens; -1 where there are none.
        test_inputs: Held-out examples of the same kind; None where there are none.
        test_targets: Their targets.
        classes: Number of classes (of tokens, for text); 0 for values.
        description: Where the examples come from and what was done to them.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor | None
    test_targets: Tensor | None
    classes: int
    description: str


@dataclass(frozen=True)
class Mixture:
    """Examples drawn with growing probability from a whole set instead of from its first part (Berariu et al. 2021, smooth transition).

    At update n of N each example comes from the whole set with probability p(n) = 1 - gamma^(50 n / N), otherwise from the first part.

    Args:
        first: Size of the first part.
        gamma: In (0, 1): the smaller, the earlier the transition.
    """

    first: int
    gamma: float

    def probability(self, update: int, updates: int) -> float:
        """p(n), the probability of a draw from the whole set.

        Args:
            update: n, from 0 on.
            updates: N, all updates of the task.
        """
        return 1 - self.gamma ** (50 * update / updates)


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream.

    Args:
        index: Its place in the stream, from 0 on.
        inputs: (N, ...) floating-point examples, or (N, T) int64 tokens.
        targets: (N,) int64 labels, (N,) or (N, K) values, or (N, T) int64 tokens.
        name: What makes it this task, for the record.
        test_inputs: Held-out examples of this task; None where it has none.
        test_targets: Their targets.
        arrivals: Sizes of the parts in which the examples arrived, oldest first; their sum is N. Streams that do not grow have one part.
        mixture: How examples are drawn, where it is not in passes over all of them.
        ordered: Whether examples are seen in the order given (a time series) and not in a random one.
    """

    index: int
    inputs: Tensor
    targets: Tensor
    name: str
    test_inputs: Tensor | None = None
    test_targets: Tensor | None = None
    arrivals: tuple[int, ...] = ()
    mixture: Mixture | None = None
    ordered: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if len(self.inputs) == 0 or len(self.inputs) != len(self.targets):
            raise DataError(
                f"task {self.index} ({self.name}) needs at least one example and one target for each, got inputs of shape "
                f"{tuple(self.inputs.shape)} and targets of shape {tuple(self.targets.shape)}"
            )
        if self.arrivals and sum(self.arrivals) != len(self.inputs):
            raise DataError(
                f"the parts of task {self.index} hold {sum(self.arrivals)} of its {len(self.inputs)} examples"
            )


class Stream(ABC):
    """Tasks that a network learns one after the other. Concrete streams are final frozen dataclasses; their fields are their settings.

    Attributes:
        name: The name that a setting and a run folder know it by.
        source: Where it was defined, as author, year and section.
        equal_sizes: Whether a task has as many examples for every seed, so that many seeds can be one program.
        steady: Whether all its tasks have as many examples.
        tasks: How many tasks it has; every stream has this field.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    equal_sizes: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    tasks: int

    @abstractmethod
    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """One task. The same arguments give the same task, and a longer stream begins with the shorter one unless the stream says otherwise.

        Args:
            source: The examples; None for streams that make their own.
            index: Which task, from 0 on. Streams that draw every task anew also answer beyond the last one; others raise.
            seed: Seed of whatever is random in the stream, from 0 on.

        Raises:
            UsageError: There is no such task, or the settings do not fit the examples.
            DataError: The examples are of another kind than the stream needs.
        """

    def outputs(self, source: Source | None) -> int:
        """How many outputs a network needs for every task of this stream.

        Args:
            source: The examples.
        """
        if source is None or source.classes == 0:
            return 1
        return source.classes

    def check_index(self, index: int, *, endless: bool) -> None:
        """Refuses an index that the stream does not have.

        Args:
            index: The task asked for.
            endless: Whether the stream draws every task anew and so never ends.

        Raises:
            UsageError: No such task.
        """
        if index < 0 or (index >= self.tasks and not endless):
            raise UsageError(f"the stream {self.name} has tasks 0 to {self.tasks - 1}; there is no task {index}")


def check_labels(source: Source | None, wanted: str) -> Source:
    """The examples, which must carry one class label each.

    Args:
        source: The examples.
        wanted: What needs them, for the message.

    Raises:
        DataError: There are none, or they have no class labels, or only one class.
    """
    if source is None:
        raise DataError(f"{wanted} needs examples with class labels, but no data was given; name some, such as digits")
    if source.targets.dtype != torch.int64 or source.targets.ndim != 1 or source.classes < 2:
        raise DataError(
            f"{wanted} needs one int64 label per example and at least two classes, got targets of type {source.targets.dtype} and shape "
            f"{tuple(source.targets.shape)} with {source.classes} classes"
        )
    return source
