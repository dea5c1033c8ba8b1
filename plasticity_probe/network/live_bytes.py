"""How many bytes of tensors a computation holds at each moment, measured on a few examples and extrapolated to any number of them."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from when they are made until they are freed; those that were there before do not count.

    What a kernel holds only while it runs is not seen.

    Attributes:
        now: Bytes that are held.
        moments: Bytes that were held after each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.moments: list[int] = []
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._seen:
                self._count(storage)
        self.moments.append(self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided
    ]


@dataclass(frozen=True)
class Footprint:
    """Bytes held after each operation of a computation on n examples: fixed + n each.

    Args:
        fixed: The part that does not depend on the number of examples, at each moment.
        each: What every example adds, at each moment.
    """

    fixed: tuple[float, ...]
    each: tuple[float, ...]

    def at_end(self, examples: int) -> float:
        """Bytes held at the end."""
        return self.fixed[-1] + examples * self.each[-1] if self.fixed else 0.0

    def peak(self, examples: int) -> float:
        """The most bytes held at any moment."""
        return max((fixed + examples * each for fixed, each in zip(self.fixed, self.each, strict=True)), default=0.0)


def footprint(few: int, more: int, run: Callable[[int], Sequence[int]]) -> Footprint:
    """Measures a computation on two numbers of examples, between and beyond which every moment is a straight line.

    Args:
        few: The smaller number.
        more: The larger number; the same where there are no more.
        run: The bytes after each operation on so many examples.
    """
    upper = run(more)
    lower = run(few) if few < more else ()
    if len(lower) != len(upper):
        # One number alone, or a network that computes otherwise on fewer examples: then all of it counts as growing.
        return Footprint((0.0,) * len(upper), tuple(bytes / more for bytes in upper))
    each = tuple(max(0.0, (b - a) / (more - few)) for a, b in zip(lower, upper, strict=True))
    return Footprint(tuple(b - more * slope for b, slope in zip(upper, each, strict=True)), each)
