"""Examples that carry their own number, so that every choice and every order of them can be read off a task."""

import torch
from torch import Tensor

from plasticity_probe.training.tasks import Source

TESTED = 5000
"""Number of the first held-out example."""


def numbered(count: int, classes: int = 4, tested: int = 6, shape: tuple[int, ...] = (1, 2, 3)) -> Source:
    """Example i holds 1000 i + its places 0, 1, ... and the label i modulo the number of classes."""
    return Source(
        *_examples(0, count, classes, shape), *_examples(TESTED, tested, classes, shape), classes, "numbered examples"
    )


def untested(source: Source) -> Source:
    return Source(source.inputs, source.targets, None, None, source.classes, source.description)


def numbers(inputs: Tensor | None) -> list[int]:
    assert inputs is not None
    found = inputs.flatten(1).div(1000, rounding_mode="floor")
    assert torch.equal(found, found[:, :1].expand_as(found))
    return found[:, 0].int().tolist()


def _examples(first: int, count: int, classes: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    index = torch.arange(first, first + count)
    places = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return (1000 * index.reshape(-1, *([1] * len(shape))) + places).double(), index % classes
