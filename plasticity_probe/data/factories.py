"""Data from a user's own function: `pkg.module:factory` or `file.py:factory`."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from plasticity_probe.data.arrays import split_of
from plasticity_probe.data.dataset import DataSet, Split, UserLoader
from plasticity_probe.errors import DataError, UsageError
from plasticity_probe.references import resolve


def read_factory(reference: str) -> DataSet | UserLoader:
    """Import a user's function, call it without arguments, and take what it gives.

    It may give a DataSet, a Split, a pair (x, y) of arrays or tensors, a dict from split names to such pairs or Splits, or any
    iterable of batches such as a DataLoader, which is handed on untouched. Arrays are taken as by `split_of`.

    Args:
        reference: "pkg.module:factory", or "path/to/file.py:factory".

    Raises:
        DataError: No such module, file or function; the function raised; or what it gave is none of these.
    """
    try:
        factory = resolve(reference)
    except UsageError as error:
        raise DataError(str(error)) from error
    try:
        made = factory()
    except Exception as error:
        raise DataError(
            f"{reference} raised {type(error).__name__}: {error}; it is called without arguments"
        ) from error
    return as_data(made, reference)


def as_data(made: Any, name: str) -> DataSet | UserLoader:
    """Take what a user made for data; see `read_factory`.

    Args:
        made: It.
        name: What to call it.

    Raises:
        DataError: It is none of the known forms.
    """
    if isinstance(made, DataSet | UserLoader):
        return made
    if isinstance(made, Split) or _is_pair(made):
        made = {"train": made}
    if isinstance(made, Mapping):
        splits = {str(split): _split(part, f"{name}, split {split!r}") for split, part in made.items()}
        return DataSet(name, splits, source=name)
    if isinstance(made, TorchDataset):
        raise DataError(
            f"{name} gave a {type(made).__name__}, a data set of single examples, but batches are needed: "
            "wrap it as DataLoader(dataset, batch_size=...)"
        )
    if not isinstance(made, Iterable):
        raise DataError(
            f"{name} gave a {type(made).__name__}, but a DataSet, (x, y), a dict of splits or an iterable of batches is expected"
        )
    return UserLoader(made, name)


def _split(part: Any, where: str) -> Split:
    if isinstance(part, Split):
        return part
    if _is_pair(part):
        inputs, targets = (_array(half) for half in part)
        return split_of(inputs, targets, where=where)
    raise DataError(f"{where} is a {type(part).__name__}, but a pair (x, y) of arrays or tensors is expected")


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(half, np.ndarray | torch.Tensor) for half in value)
    )


def _array(value: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    # NumPy has no bfloat16, and inputs become float32 in any case.
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
