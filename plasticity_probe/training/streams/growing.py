"""Streams whose training set grows while the problem stays what it is: what falls along them is how well the network generalises."""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.streams.drawing import (
    boundaries,
    check_classes,
    check_counts,
    check_enough,
    check_request,
    check_shares,
    check_source,
    check_tasks,
    shuffled,
    task_of,
)
from plasticity_probe.training.tasks import Mixture, Source, Stream, Task


@final
@dataclass(frozen=True)
class GrowingChunks(Stream):
    """The training set arrives in random chunks of equal size; task t holds the first t + 1 of them (Shin et al. 2024, stationary growing data).

    Examples are in order of arrival, so each task begins with the one before. Sizes of chunks differ by at most one. Another number of
    chunks is another stream, which does not begin with this one.

    Args:
        tasks: Number of chunks (paper: 50).
        examples: Size of a random subset of the examples that is all there is; None for all of them.

    Raises:
        UsageError: A number below 1, or fewer examples than chunks.
    """

    name: ClassVar[str] = "growing-chunks"
    source: ClassVar[str] = "Shin et al. 2024 (DASH), stationary growing data"

    tasks: int = 50
    examples: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, tasks=self.tasks, examples=self.examples)
        if self.examples is not None and self.examples < self.tasks:
            raise UsageError(
                f"the stream {self.name} cannot split {self.examples} examples into {self.tasks} chunks; ask for fewer chunks"
            )

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; any examples will do."""
        check_request(self, index, seed, endless=False)
        source = check_source(source, self)
        order = _arrival_order(self, source, self.examples, seed)
        if len(order) < self.tasks:
            raise UsageError(
                f"the stream {self.name} cannot split {len(order)} examples into {self.tasks} chunks; ask for fewer chunks"
            )
        ends = boundaries(len(order), self.tasks)[: index + 2]
        return task_of(
            source, index, f"{index + 1} of {self.tasks} chunks (seed {seed})", order[: ends[-1]], _sizes(ends)
        )


@final
@dataclass(frozen=True)
class TwoStage(Stream):
    """First a random part of the training set, then all of it: warm starting (Ash and Adams 2020; Berariu et al. 2021: half, then all).

    Task 1 is also what a newly initialised network is compared on. Its examples are in order of arrival and begin with those of task 0.

    Args:
        fraction: Share of the training set in the first stage, in (0, 1) (both papers: one half).
        examples: Size of a random subset of the training set that is all there is; None for all of it.
        held_out: Share of the source's training set that is split off at random as the test set, which then replaces the source's (Ash and
            Adams 2020: one third); None to test on the source's test set.
        tasks: 2; there for uniformity, and no other number will do.

    Raises:
        UsageError: A share outside (0, 1), a number below 1, or another number of tasks.
    """

    name: ClassVar[str] = "two-stage"
    source: ClassVar[str] = "Ash and Adams 2020; Berariu et al. 2021, two-stage protocol"

    fraction: float = 0.5
    examples: int | None = None
    held_out: float | None = None
    tasks: int = 2

    def __post_init__(self) -> None:
        check_shares(self, fraction=self.fraction, held_out=self.held_out)
        check_counts(self, examples=self.examples)
        check_tasks(self, 2)

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; any examples will do."""
        check_request(self, index, seed, endless=False)
        source = check_source(source, self)
        order = shuffled(len(source.inputs), seed, "arrival order")
        kept = order
        if self.held_out is not None:
            kept, tested = order.split([count := len(order) - round(self.held_out * len(order)), len(order) - count])
            if len(tested) == 0:
                raise UsageError(
                    f"the stream {self.name} with held_out = {self.held_out} holds out none of {len(order)} examples"
                )
            source = replace(source, test_inputs=source.inputs[tested], test_targets=source.targets[tested])
        kept = _limited(self, kept, self.examples)
        ends = [0, _first_part(self, len(kept), self.fraction), len(kept)][: index + 2]
        return task_of(source, index, f"stage {index} of 2 (seed {seed})", kept[: ends[-1]], _sizes(ends))


@final
@dataclass(frozen=True)
class SmoothTransition(Stream):
    """One task in which examples come from a part of the training set first and more and more from all of it (Berariu et al. 2021).

    At update n of N an example is drawn from the whole set with probability p(n) = 1 - gamma^(50 n / N), otherwise from the first part,
    which the first `fraction` of the task's examples are. A gap that appears even so is no matter of an abrupt switch.

    Args:
        gamma: In (0, 1) (paper: 0.1 to 0.9).
        fraction: Share of the first part, in (0, 1) (paper: one half).
        examples: Size of a random subset of the training set that is all there is; None for all of it.
        tasks: 1; there for uniformity, and no other number will do.

    Raises:
        UsageError: A share outside (0, 1), a number below 1, or another number of tasks.
    """

    name: ClassVar[str] = "smooth-transition"
    source: ClassVar[str] = "Berariu et al. 2021, smooth transition"

    gamma: float
    fraction: float = 0.5
    examples: int | None = None
    tasks: int = 1

    def __post_init__(self) -> None:
        check_shares(self, gamma=self.gamma, fraction=self.fraction)
        check_counts(self, examples=self.examples)
        check_tasks(self, 1)

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; any examples will do."""
        check_request(self, index, seed, endless=False)
        source = check_source(source, self)
        order = _arrival_order(self, source, self.examples, seed)
        mixture = Mixture(_first_part(self, len(order), self.fraction), self.gamma)
        return replace(task_of(source, index, f"smooth transition (seed {seed})", order), mixture=mixture)


@final
@dataclass(frozen=True)
class NoisyStages(Stream):
    """A training set that arrives in stages, the early ones with wrong labels.

    Lee et al. 2024: for warm starting, 10 % with half of the labels wrong, then 90 % with none. Stage i adds a share s_i of all examples, and
    exactly the share e_i of its labels (rounded) is replaced by a label drawn uniformly from the other classes, as in the official code; the
    drawn label is never the true one, so that e_i is the share of wrong labels. Whose labels those are is a choice of `noise_on`. The test
    set is clean. Stage i depends on the shares and noises up to it alone.

    Args:
        shares: s_i, positive, with a sum of at most 1.
        label_noise: e_i, in [0, 1], one for each share.
        cumulative: Whether a task holds all that has arrived, in order of arrival, or its new part alone.
        noise_on: "arrivals": the labels of the part that is new in the stage; they stay wrong in later stages. "all": the labels of all
            examples of the stage, drawn anew in each stage, so that a last stage with e_i = 0 is clean, as in the official code.
        tasks: As many as there are shares, which 0 stands for; no other number will do.

    Raises:
        UsageError: Shares and noises of different numbers or outside their ranges, an unknown `noise_on`, or another number of tasks.
    """

    name: ClassVar[str] = "noisy-stages"
    source: ClassVar[str] = "Lee et al. 2024 (Hare & Tortoise), warm-start protocol"

    shares: tuple[float, ...] = (0.1, 0.9)
    label_noise: tuple[float, ...] = (0.5, 0.0)
    cumulative: bool = True
    noise_on: Literal["arrivals", "all"] = "arrivals"
    tasks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        object.__setattr__(self, "label_noise", tuple(self.label_noise))
        if not self.shares or len(self.shares) != len(self.label_noise):
            raise UsageError(
                f"the stream {self.name} needs a label noise for each share, got {len(self.shares)} shares and {len(self.label_noise)} noises"
            )
        # A sum of shares such as ten times 0.1 may miss 1 by rounding alone.
        if not all(share > 0 for share in self.shares) or not sum(self.shares) <= 1 + 1e-9:
            raise UsageError(
                f"the shares of the stream {self.name} must be positive with a sum of at most 1, got {self.shares}"
            )
        if not all(0 <= noise <= 1 for noise in self.label_noise):
            raise UsageError(f"the label noise of the stream {self.name} must lie in [0, 1], got {self.label_noise}")
        if self.noise_on not in ("arrivals", "all"):
            raise UsageError(f'the stream {self.name} has noise_on "arrivals" or "all", got {self.noise_on!r}')
        if self.tasks == 0:
            object.__setattr__(self, "tasks", len(self.shares))
        check_tasks(self, len(self.shares))

    @classmethod
    def continual(cls, *, noise_on: Literal["arrivals", "all"] = "arrivals") -> "NoisyStages":
        """The ten-stage stream of Lee et al. 2024: ten times 10 %, label noise from 0.5 down to 0 (linearly: our choice).

        Args:
            noise_on: Whose labels are noisy.
        """
        return cls((0.1,) * 10, tuple(0.5 * (9 - stage) / 9 for stage in range(10)), noise_on=noise_on)

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; every example needs a class label."""
        check_request(self, index, seed, endless=False)
        source = check_classes(source, self)
        order = shuffled(len(source.inputs), seed, "arrival order")
        ends = [0, *(min(len(order), round(total * len(order))) for total in accumulate(self.shares))]
        if 0 in (sizes := _sizes(ends)):
            raise UsageError(
                f"the stream {self.name} adds examples in each stage, but of these {len(order)} examples stage {sizes.index(0)} "
                f"with the share {self.shares[sizes.index(0)]} would add none"
            )
        ends = ends[: index + 2] if self.cumulative else ends[index : index + 2]
        targets = source.targets[rows := order[ends[0] : ends[-1]]]
        arrivals = _sizes(ends) if self.cumulative else ()
        task = task_of(source, index, f"stage {index} of {self.tasks}, noisy (seed {seed})", rows, arrivals)
        if self.noise_on == "all" or not self.cumulative:
            return replace(task, targets=self._noisy(targets, source.classes, index, seed))
        parts = [self._noisy(part, source.classes, stage, seed) for stage, part in enumerate(targets.split(arrivals))]
        return replace(task, targets=torch.cat(parts))

    def _noisy(self, labels: Tensor, classes: int, stage: int, seed: int) -> Tensor:
        chosen = shuffled(len(labels), seed, "noisy examples", stage)[: round(self.label_noise[stage] * len(labels))]
        shift = torch.randint(1, classes, (len(chosen),), generator=generator(seed, "noisy labels", stage))
        return labels.index_copy(0, chosen, (labels[chosen] + shift) % classes)


def _arrival_order(stream: Stream, source: Source, examples: int | None, seed: int) -> Tensor:
    return _limited(stream, shuffled(len(source.inputs), seed, "arrival order"), examples)


def _limited(stream: Stream, order: Tensor, examples: int | None) -> Tensor:
    if examples is not None:
        check_enough(stream, len(order), "examples", examples)
    return order[:examples]


def _first_part(stream: Stream, count: int, fraction: float) -> int:
    first = round(fraction * count)
    if not 0 < first < count:
        raise UsageError(
            f"the stream {stream.name} with fraction = {fraction} splits {count} examples into {first} and {count - first}"
        )
    return first


def _sizes(ends: list[int]) -> tuple[int, ...]:
    return tuple(end - begin for begin, end in pairwise(ends))
