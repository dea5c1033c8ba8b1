"""Streams that train on random subsets of one set of examples: what differs between their networks tells what each example did."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from plasticity_probe.errors import UsageError
from plasticity_probe.training.seeding import generator
from plasticity_probe.training.streams.drawing import (
    check_classes,
    check_request,
    check_shares,
    check_tasks,
    shuffled,
    task_of,
)
from plasticity_probe.training.tasks import Source, Stream, Task


@final
@dataclass(frozen=True)
class RandomSubset(Stream):
    """One task: each seed trains on a random subset of the examples, all subsets of one size (Feldman and Zhang 2020: 70 %).

    What a network predicts of the examples that it was not trained on, beside those that were, tells which examples are memorised
    (`probe.memorized_examples`). All seeds share the examples and their labels, wrong ones included; they differ in which of them
    they see. The subset depends on the seed and the number of examples alone, not on the examples.

    Args:
        share: Share of the examples in each subset, in (0, 1), rounded to whole examples (paper: 0.7).
        label_noise: Share of all examples whose label is replaced, in [0, 1), rounded; by a label drawn uniformly from the other classes, so
            that all of them are wrong (our addition: examples that can only be memorised).
        noise_seed: Seed of the choice of those examples and of their labels, which are the same in all subsets.
        tasks: 1; there for uniformity, and no other number will do.

    Raises:
        UsageError: A share or a noise outside its range, a negative seed, or another number of tasks.
    """

    name: ClassVar[str] = "random-subset"
    source: ClassVar[str] = "Feldman and Zhang 2020, estimator of memorization by random subsets"

    share: float = 0.7
    label_noise: float = 0.0
    noise_seed: int = 0
    tasks: int = 1

    def __post_init__(self) -> None:
        check_shares(self, share=self.share)
        if not 0 <= self.label_noise < 1:
            raise UsageError(f"the label noise of the stream {self.name} must lie in [0, 1), got {self.label_noise}")
        if self.noise_seed < 0:
            raise UsageError(f"the noise seed of the stream {self.name} must be 0 or more, got {self.noise_seed}")
        check_tasks(self, 1)

    def task(self, source: Source | None, index: int, seed: int) -> Task:
        """As `Stream.task`; every example needs a class label. Examples are in the order of the source."""
        check_request(self, index, seed, endless=False)
        source = check_classes(source, self)
        noisy = replace(source, targets=self.labels(source))
        return task_of(noisy, index, f"random subset (seed {seed})", self.rows(len(source.inputs), seed))

    def rows(self, count: int, seed: int) -> Tensor:
        """Which examples a seed trains on: their places, ascending, (round(share * count),) int64.

        Args:
            count: How many examples there are.
            seed: The seed.

        Raises:
            UsageError: The share of so many examples is none or all of them.
        """
        size = round(self.share * count)
        if not 0 < size < count:
            raise UsageError(
                f"the stream {self.name} with share = {self.share} takes {size} of {count} examples, but some must be left out and some "
                "taken; choose another share"
            )
        return shuffled(count, seed, "random subset")[:size].sort().values

    def members(self, count: int, seeds: Iterable[int]) -> Tensor:
        """Which examples each seed trains on, (seed, count) bool.

        Args:
            count: How many examples there are.
            seeds: The seeds.

        Raises:
            UsageError: The share of so many examples is none or all of them.
        """
        chosen = [self.rows(count, seed) for seed in seeds]
        inside = torch.zeros(len(chosen), count, dtype=torch.bool)
        for own, rows in zip(inside, chosen, strict=True):
            own[rows] = True
        return inside

    def wrong(self, count: int) -> Tensor:
        """Which examples have a wrong label, (count,) bool.

        Args:
            count: How many examples there are.
        """
        marks = torch.zeros(count, dtype=torch.bool)
        marks[self._noisy(count)] = True
        return marks

    def labels(self, source: Source) -> Tensor:
        """The labels that are trained on, wrong ones included, (N,) int64.

        Args:
            source: The examples.
        """
        chosen = self._noisy(len(source.targets))
        shift = torch.randint(1, source.classes, (len(chosen),), generator=generator(self.noise_seed, "wrong labels"))
        return source.targets.index_copy(0, chosen, (source.targets[chosen] + shift) % source.classes)

    def _noisy(self, count: int) -> Tensor:
        return shuffled(count, self.noise_seed, "wrongly labelled examples")[: round(self.label_noise * count)]
