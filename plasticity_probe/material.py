"""The examples of a study: from a name, a path, a loader or a data set to fixed examples, and what was done to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plasticity_probe import registry
from plasticity_probe.data.dataset import DataSet, Split, UserLoader
from plasticity_probe.data.factories import as_data
from plasticity_probe.data.sources import NAMED, load_data
from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.network.examples import Examples, keep, read_examples

EXAMPLES = 10_000
"""Examples read at most (our choice: the size of the usual test sets). Each probe says on how many of them it measures."""


@dataclass(frozen=True, eq=False)
class Material:
    """The examples of a study.

    Args:
        examples: What every probe measures on, in a random order fixed by the seed.
        training: Examples the network was trained on, where known.
        held_out: Examples it never saw, where known.
        noisy: Marks those of `training` whose label is known to be wrong.
        description: Where the examples come from and what was done to them.
    """

    examples: Examples
    training: Examples | None
    held_out: Examples | None
    noisy: Tensor | None
    description: str


@dataclass(frozen=True, eq=False)
class Reading:
    """How data is read.

    Args:
        split: Which split of a data set; "train" by default, as the papers measure curvature of the training loss.
        mean: Per-channel mean to subtract; none by default.
        std: Per-channel standard deviation to divide by.
        examples: Read at most this many examples of a split.
        seed: Seed of their choice and order.
        held_out: Loader of examples the network never saw; by default the data set's other split.
        noisy: Booleans per training example: True where the label is known to be wrong.
        root: Folder of the named data sets.
        download: Fetch a named data set that is not there.
    """

    split: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    examples: int = EXAMPLES
    seed: int = 0
    held_out: Any = None
    noisy: Tensor | None = None
    root: str | Path | None = None
    download: bool = False


def material(data: Any, how: Reading) -> Material:
    """Reads data.

    Args:
        data: A name, a path or a reference (see `plasticity_probe.data.sources.load_data`), a loader, or a `DataSet`.
        how: Split, normalisation, number and the rest.

    Raises:
        DataError: The data is missing, malformed, or lacks the split.
        UsageError: A loader is asked for what belongs to data sets.
    """
    if isinstance(data, Examples):
        kept = data.take(how.examples)
        return Material(kept, kept, _held_out(how), how.noisy, f"{len(kept)} examples as given")
    found = _found(data, how)
    if isinstance(found, DataSet):
        return _of_dataset(found, how)
    if how.split or how.mean or how.std:
        raise UsageError(
            f"split, mean and std belong to data sets; {found.name} is a loader, so let it split and normalise itself"
        )
    read = read_examples(found.loader, how.examples)
    return Material(
        read, read, _held_out(how), how.noisy, f"{found.name}: {len(read)} examples as the loader gave them"
    )


def _found(data: Any, how: Reading) -> DataSet | UserLoader:
    if not isinstance(data, str | Path):
        return as_data(data, "the given data")
    named = {**NAMED, **registry.load_all(registry.DATA)}
    return load_data(data, root=how.root, download=how.download, named=named)


def _of_dataset(data: DataSet, how: Reading) -> Material:
    name = how.split or ("train" if "train" in data.splits else next(iter(data.splits)))
    if name not in data.splits:
        raise DataError(
            f"{data.name} has no split {name!r}; it has: {', '.join(data.splits)}. Choose one of those with --split."
        )
    kept = {key: _shuffled(part, how) for key, part in data.splits.items()}
    training, marks = kept.get("train", (None, None))
    other = next((key for key in kept if key != "train"), None) if training else None
    chosen, whole = kept[name][0], data.splits[name]
    text = (
        f"{data.name}, {name} split: {len(chosen)} of {len(whole)} examples, {whole.normalisation(how.mean, how.std)}"
    )
    held = _held_out(how) if how.held_out is not None else kept[other][0] if other else None
    return Material(chosen, training, held, how.noisy if how.noisy is not None else marks, text)


def _shuffled(part: Split, how: Reading) -> tuple[Examples, Tensor | None]:
    subset = part.subset(how.examples, how.seed)
    # Files are often sorted by class; probes take the first examples, so these must be a random sample.
    order = torch.randperm(len(subset), generator=torch.Generator().manual_seed(how.seed))
    inputs, targets = subset.tensors(how.mean, how.std)
    marks = torch.from_numpy(subset.noisy)[order] if subset.noisy is not None else None
    return keep([(inputs[order], targets[order])]), marks


def _held_out(how: Reading) -> Examples | None:
    given = how.held_out
    return given if given is None or isinstance(given, Examples) else read_examples(given, how.examples)
