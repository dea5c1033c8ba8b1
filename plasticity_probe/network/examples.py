"""A fixed set of examples: read once from any loader, kept, hashed and cut into chunks of any size."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from plasticity_probe.errors import DataError, SubjectError

Batch = Any
CPU = torch.device("cpu")

MEMORY_FOR_EXAMPLES = 2 * 1024**3
"""Bytes of examples kept in memory before a loader is read again at every pass (our choice: a tenth of a common workstation)."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples in a fixed order.

    Args:
        read: Yields the batches; calling it again yields the same ones or raises.
        count: Number of examples.
        sha256: Hash of all their tensors, in order.
        sliceable: Whether every tensor of a batch runs over its examples first, so that batches can be cut and joined.
        resident: Whether they are in memory.
        dtype: What floating-point tensors are cast to when they are handed out.
        device: Where they are handed out.
    """

    read: Callable[[], Iterator[Batch]]
    count: int
    sha256: str
    sliceable: bool
    resident: bool
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    def __len__(self) -> int:
        return self.count

    def chunks(self, size: int) -> Iterator[Batch]:
        """Batches of at most `size` examples on the subject's device; as they were read where they cannot be cut."""
        for batch in self.read():
            pieces = _cut(batch, size) if self.sliceable else (batch,)
            for piece in pieces:
                yield place(piece, self.device, self.dtype)

    def take(self, count: int | None) -> "Examples":
        """The first `count` examples; all of them where there are fewer or `count` is None. Whole batches where they cannot be cut."""
        if count is None or count >= self.count:
            return self
        if self.resident and self.sliceable:
            (batch,) = self.read()
            return keep([map_tensors(lambda tensor: tensor[:count], batch)], self.dtype, self.device)
        kept, total = [], 0
        for batch in self.read():
            kept.append(batch if not self.sliceable else next(_cut(batch, count - total)))
            total += batch_size(kept[-1])
            if total >= count:
                break
        return keep(kept, self.dtype, self.device)

    def handed_out_as(self, dtype: torch.dtype, device: torch.device) -> "Examples":
        """The same examples, cast and moved when they are handed out."""
        return replace(self, dtype=dtype, device=device)


def read_examples(loader: Iterable[Batch], limit: int | None = None, memory: int = MEMORY_FOR_EXAMPLES) -> Examples:
    """Reads a loader once.

    Args:
        loader: Any iterable of batches: (inputs, targets), mappings, or anything a custom loss understands.
        limit: Read no more than this many examples.
        memory: Bytes above which examples are not kept but read again at every pass, when they must come out the same.

    Raises:
        DataError: The loader is empty or yields batches without examples.
        SubjectError: The examples do not fit `memory` and the loader cannot be read twice.
    """
    kept: list[Batch] = []
    total = used = 0
    for batch in loader:
        batch = map_tensors(lambda tensor: tensor.detach(), batch)
        size = batch_size(batch)
        if limit is not None and total + size > limit and _sliceable(batch, size):
            batch, size = next(_cut(batch, limit - total)), limit - total
        kept.append(batch)
        total += size
        used += sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
        if used > memory:
            return _reread(loader, limit)
        if limit is not None and total >= limit:
            break
    if total == 0:
        raise DataError(
            "expected at least one example, but the loader is empty. Check the data path, the split, and drop_last."
        )
    return keep(kept)


def keep(batches: list[Batch], dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Examples:
    """Examples kept in memory, joined into one batch where their tensors allow it."""
    sizes = [batch_size(batch) for batch in batches]
    sliceable = all(_sliceable(batch, size) for batch, size in zip(batches, sizes, strict=True)) and _alike(batches)
    held = [_joined(batches)] if sliceable else [map_tensors(torch.clone, batch) for batch in batches]
    return Examples(lambda: iter(held), sum(sizes), _digest(held).hexdigest(), sliceable, True, dtype, device)


def batch_size(batch: Batch) -> int:
    """Number of examples of a batch: the length of its first tensor, or the number of sequences where that is packed.

    Raises:
        DataError: The batch holds no tensor with a first dimension.
    """
    for value in _leaves(batch):
        if isinstance(value, PackedSequence):
            return int(value.batch_sizes[0])
        if value.ndim:
            return len(value)
    raise DataError(
        f"expected a batch that holds tensors with one row per example, got {type(batch).__name__}. Let the loader yield tuples, lists or "
        "mappings of tensors."
    )


def map_tensors(change: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The same nesting of tuples, lists and mappings with every tensor changed; numpy arrays become tensors, the rest stays."""
    if isinstance(batch, Tensor):
        return change(batch)
    if hasattr(batch, "__array__") and not isinstance(batch, str | bytes | int | float):
        return change(torch.as_tensor(batch))
    if isinstance(batch, Mapping):
        return {key: map_tensors(change, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(change, value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(change, value) for value in batch)
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, in the order of its nesting."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: (found.append(tensor), tensor)[1], batch)
    return found


def place(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch on a device, with floating-point tensors cast; integers keep their type."""
    return map_tensors(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype), batch)


def _sliceable(batch: Batch, size: int) -> bool:
    leaves: list[bool] = []

    def visit(value: Any) -> None:
        if isinstance(value, Mapping):
            [visit(entry) for entry in value.values()]
        elif isinstance(value, tuple | list):
            [visit(entry) for entry in value]
        else:
            tensors = tensors_of(value)
            leaves.append(bool(tensors) and all(t.ndim > 0 and len(t) == size for t in tensors))

    visit(batch)
    return all(leaves)


def _leaves(batch: Batch) -> Iterator[Tensor | PackedSequence]:
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        for entry in batch:
            yield from _leaves(entry)
    else:
        yield from [batch] if isinstance(batch, PackedSequence) else tensors_of(batch)


def _alike(batches: list[Batch]) -> bool:
    return len({_layout(batch) for batch in batches}) == 1


def _layout(batch: Batch) -> Any:
    """Keys, nesting, shapes of an example and types: what batches must share for their tensors to be joined one by one."""
    if isinstance(batch, Mapping):
        return tuple((key, _layout(entry)) for key, entry in batch.items())
    if isinstance(batch, tuple | list):
        return tuple(_layout(entry) for entry in batch)
    return tuple((tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors_of(batch))


def _joined(batches: list[Batch]) -> Batch:
    columns = zip(*(tensors_of(batch) for batch in batches), strict=True)
    joined = iter([torch.cat(column).clone() for column in columns])
    return map_tensors(lambda _: next(joined), batches[0])


def _cut(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, batch_size(batch), size):
        yield map_tensors(lambda tensor, start=start: tensor[start : start + size], batch)


def _digest(batches: Iterable[Batch]) -> Any:
    digest = sha256()
    for batch in batches:
        for tensor in tensors_of(batch):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest


def _reread(loader: Iterable[Batch], limit: int | None) -> Examples:
    if isinstance(loader, Iterator):
        raise SubjectError(
            "the examples do not fit the memory allowed for them and the loader can be read only once. Ask for fewer examples, allow more "
            "memory, or pass a loader that can be iterated again, such as a DataLoader."
        )
    first = [
        (batch_size(batch), _digest([batch]).hexdigest(), _sliceable(batch, batch_size(batch)))
        for batch in _limited(loader, limit)
    ]

    def read() -> Iterator[Batch]:
        seen = 0
        for seen, batch in enumerate(_limited(loader, limit), 1):
            if seen > len(first) or _digest([batch]).hexdigest() != first[seen - 1][1]:
                raise SubjectError(_DIFFERS)
            yield batch
        if seen != len(first):
            raise SubjectError(_DIFFERS)

    name = sha256("".join(digest for _, digest, _ in first).encode()).hexdigest()
    return Examples(read, sum(size for size, _, _ in first), name, all(flag for _, _, flag in first), False)


def _limited(loader: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    total = 0
    for batch in loader:
        batch = map_tensors(lambda tensor: tensor.detach(), batch)
        size = batch_size(batch)
        if limit is not None and total + size > limit and _sliceable(batch, size):
            batch, size = next(_cut(batch, limit - total)), limit - total
        total += size
        yield batch
        if limit is not None and total >= limit:
            return


_DIFFERS = (
    "the loader yields other examples at a second pass, so no two quantities would be measured on the same data. Likely causes: shuffle=True, "
    "random augmentation, or drop_last over a shuffled set. Use a fixed order and no augmentation, or ask for so few examples that they are "
    "kept in memory (then shuffling does no harm)."
)
