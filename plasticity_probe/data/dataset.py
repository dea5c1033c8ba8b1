"""What a data set is here: named splits of examples as arrays, checked once, on entry.

Pixels stay uint8 until `Split.tensors` turns them into floats, so that the one place that scales and normalises can say what it did.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticity_probe.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and their targets, in a fixed order.

    Attributes:
        inputs: (N, C, H, W) images or any (N, C, ...); uint8 (pixels, 0 to 255) or float32 (used as they are).
        targets: (N,) int64 class labels from 0 on, or float32 values to regress on.
        noisy: (N,) bool, True where the label is known to be wrong; None where nothing is known.

    Raises:
        DataError: Nothing in it, lengths or types that do not fit, values that are not finite, or negative labels.
    """

    inputs: np.ndarray
    targets: np.ndarray
    noisy: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_lengths(self)
        _check_finite("inputs", self.inputs)
        _check_finite("targets", self.targets)
        if self.targets.dtype == np.int64 and (negative := int((self.targets < 0).sum())):
            raise DataError(
                f"class labels start at 0, but {negative} of {len(self)} are negative: remove those examples, or give "
                "floating-point targets if they are values to regress on"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def tensors(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, *, flatten: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The whole split as tensors that share no memory with it.

        uint8 pixels become pixel / 255; float32 inputs are used as they are. With `mean` and `std` each channel (axis 1) then
        becomes (x − mean) / std, as in torchvision's Normalize. Nothing else is ever done: without `mean` and `std` no
        normalisation takes place.

        Args:
            mean: One number per channel, or a single one for all.
            std: The same, positive.
            flatten: Give (N, C·H·W) instead of (N, C, H, W).

        Returns:
            Inputs, float32, and targets, (N,) int64 or float32.

        Raises:
            UsageError: Only one of `mean` and `std` is given.
            DataError: They fit neither the number of channels nor one, or are not finite and positive.
        """
        inputs = torch.from_numpy(self.inputs.astype(np.float32))
        if self.inputs.dtype == np.uint8:
            inputs /= 255
        if (moments := _moments(mean, std, channels=inputs.shape[1])) is not None:
            shape = (1, -1) + (1,) * (inputs.ndim - 2)
            inputs.sub_(moments[0].reshape(shape)).div_(moments[1].reshape(shape))
        return inputs.flatten(1) if flatten else inputs, torch.from_numpy(self.targets.copy())

    def normalisation(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> str:
        """What `tensors` does to the inputs with these arguments, in words for the record."""
        scaled = "pixels scaled to [0, 1]" if self.inputs.dtype == np.uint8 else "inputs as stored"
        if _moments(mean, std, channels=self.inputs.shape[1]) is None or mean is None or std is None:
            return f"{scaled}, not normalised"
        return f"{scaled}, then (x - mean) / std with mean {_numbers(mean)} and std {_numbers(std)}"

    def subset(self, n: int, seed: int) -> "Split":
        """A random subset without replacement, in the order of the split.

        The `n` examples with the smallest numbers of a PCG64 stream are taken: NumPy promises those raw numbers for ever (its
        `Generator.choice` may change), no global state is touched, and with one seed a smaller subset lies within a larger one.

        Args:
            n: How many examples; all of them where there are no more.
            seed: Any integer from 0 on.

        Raises:
            UsageError: `n` below 1 or `seed` below 0.
        """
        if n < 1 or seed < 0:
            raise UsageError(f"a subset takes n >= 1 examples and a seed >= 0, not n = {n} and seed = {seed}")
        if n >= len(self):
            return self
        chosen = np.sort(np.argsort(np.random.PCG64(seed).random_raw(len(self)), kind="stable")[:n])
        return Split(self.inputs[chosen], self.targets[chosen], None if self.noisy is None else self.noisy[chosen])


@dataclass(frozen=True, eq=False)
class DataSet:
    """Splits that belong together.

    Attributes:
        name: What the user calls it.
        splits: "train", also where the source knows of no splits, and "test" or "val" where it has them.
        classes: Names of the classes 0, 1, ...; None where they are unknown or the targets are values to regress on.
        mean: The usual per-channel mean of the [0, 1] pixels, for `Split.tensors`; None where there is no usual one. The
            reader's docstring says where the numbers come from.
        std: The standard deviation that goes with it.
        source: Where it was read from, for the record.

    Raises:
        DataError: No split, splits whose examples differ in shape or type, or labels outside the classes.
    """

    name: str
    splits: Mapping[str, Split]
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str = "memory"

    def __post_init__(self) -> None:
        if not self.splits:
            raise DataError(f"data set {self.name!r} has no split: at least one is needed, such as 'train'")
        _check_alike(self)
        if self.classes is not None:
            for name, split in self.splits.items():
                _check_labels(f"split {name!r} of {self.name!r}", split.targets, self.classes)


@dataclass(frozen=True, eq=False)
class UserLoader:
    """A user's own iterable of batches, untouched.

    Attributes:
        loader: Anything that yields batches, such as a DataLoader.
        name: Where it came from, such as "file.py:factory".
    """

    loader: Iterable[Any]
    name: str


def _check_types(split: Split) -> None:
    for name, array, allowed in (
        ("inputs", split.inputs, ("uint8", "float32")),
        ("targets", split.targets, ("int64", "float32")),
        ("noisy", split.noisy, ("bool",)),
    ):
        if array is not None and (not isinstance(array, np.ndarray) or array.dtype.name not in allowed):
            came = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
            raise DataError(f"{name} must be a NumPy array of {' or '.join(allowed)}, not {came}: convert it first")


def _check_lengths(split: Split) -> None:
    if split.inputs.ndim < 2 or split.targets.ndim != 1:
        raise DataError(
            f"expected inputs (N, ...) with at least two axes and targets (N,), not {split.inputs.shape} and {split.targets.shape}: "
            "give single numbers as x[:, None] and one-hot targets as y.argmax(1)"
        )
    lengths = {"inputs": len(split.inputs), "targets": len(split.targets)}
    if split.noisy is not None:
        if split.noisy.ndim != 1:
            raise DataError(f"noisy marks must have the shape (N,), not {split.noisy.shape}")
        lengths["noisy marks"] = len(split.noisy)
    if len(set(lengths.values())) > 1:
        raise DataError(f"as many of each are needed, but there are {_counts(lengths)}")
    if split.inputs.size == 0:
        raise DataError(f"there is nothing in inputs of shape {split.inputs.shape}: at least one example is needed")


def _check_finite(name: str, array: np.ndarray) -> None:
    if array.dtype != np.float32 or np.isfinite(array).all():
        return
    bad = ~np.isfinite(array)
    examples = int(bad.reshape(len(array), -1).any(1).sum())
    raise DataError(
        f"{int(bad.sum())} of {array.size} values of the {name} are NaN or infinite in float32, in {examples} of {len(array)} "
        "examples: remove or repair those"
    )


def _check_alike(data: DataSet) -> None:
    kinds = {
        name: (split.inputs.shape[1:], split.inputs.dtype.name, split.targets.dtype.name)
        for name, split in data.splits.items()
    }
    if len(set(kinds.values())) > 1:
        each = "; ".join(f"{name}: {shape} {kind}, {target} targets" for name, (shape, kind, target) in kinds.items())
        raise DataError(f"the splits of {data.name!r} must hold examples of one shape and type, but hold {each}")


def _check_labels(where: str, targets: np.ndarray, classes: Sequence[str]) -> None:
    if targets.dtype != np.int64:
        raise DataError(f"{where} has {targets.dtype.name} targets, but class labels are int64")
    if outside := int((targets >= len(classes)).sum()):
        raise DataError(
            f"{outside} of {len(targets)} labels of {where} lie outside 0 to {len(classes) - 1} (the largest is {targets.max()}), "
            f"the range of its {len(classes)} classes: count labels from 0, and name every class"
        )


def _moments(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> tuple[Tensor, Tensor] | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UsageError(f"mean and std go together, but only {'std' if mean is None else 'mean'} was given")
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) not in (1, channels):
            raise DataError(
                f"{name} has {len(numbers)} numbers, but the inputs have {channels} channels: give 1 or {channels}"
            )
    centre, spread = (torch.tensor(list(numbers), dtype=torch.float32) for numbers in (mean, std))
    if not (centre.isfinite().all() and spread.isfinite().all() and (spread > 0).all()):
        raise DataError(f"mean must be finite and std positive, not mean {_numbers(mean)} and std {_numbers(std)}")
    return centre, spread


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _counts(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in lengths.items())
