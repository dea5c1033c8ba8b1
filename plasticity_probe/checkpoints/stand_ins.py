"""Inert stand-ins for harmless classes that pickled checkpoints often mention and torch's restricted unpickler refuses.

A pickle names classes and functions to be called. None of those below is called: each name is answered by a small object of our own that
keeps the data and does nothing else. In particular NumPy's own `dtype.__setstate__` and `_reconstruct` never see the file's arguments,
because they trust flags and sizes that a hostile file may choose freely.
"""

import math
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np

_PLAIN_DTYPE = re.compile(r"[biufc]\d{1,2}")


class Unkept:
    """A value that is recognised, left out and harmless: it accepts any arguments and any state."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class NumpyDtype:
    """The description of a NumPy dtype; only booleans and numbers have a meaning here."""

    def __init__(self, code: object = "", *_flags: object) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def numbers(self, data: bytes) -> np.ndarray | None:
        """The numbers that `data` holds, or None where the dtype is no plain number."""
        if not _PLAIN_DTYPE.fullmatch(self.code):
            return None
        return np.frombuffer(data, dtype=np.dtype(self.order + self.code))


class NumpyArray:
    """A NumPy array whose type and shape are known and whose values are left out."""

    def __init__(self, *_arguments: object) -> None:
        self.shape: tuple[int, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.shape = state[1]


def numpy_scalar(dtype: object, data: object = b"") -> bool | int | float | complex | None:
    """The Python number that a pickled NumPy scalar holds; None where it holds something else."""
    raw = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(dtype, NumpyDtype) or not isinstance(raw, bytes):
        return None
    numbers = dtype.numbers(raw)
    return numbers.item() if numbers is not None and math.prod(numbers.shape) == 1 else None


def path_text(*parts: object) -> str:
    """A pickled path as text; no file is touched."""
    return str(PurePosixPath(*map(str, parts)))


def _named(stand_in: Callable[..., Any], *names: str) -> list[tuple[Callable[..., Any], str]]:
    return [(stand_in, name) for name in names]


def stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The stand-ins with the names that they answer, as `torch.serialization.safe_globals` takes them.

    Returns:
        Pairs (stand-in, name in the pickle). The stand-ins are also listed under their own names, because the unpickler
        sets the state only of objects whose type is listed.
    """
    multiarray = ("numpy.core.multiarray", "numpy._core.multiarray")
    path_classes = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
    return [
        *_named(Unkept, "argparse.Namespace", "numpy.ndarray", "types.SimpleNamespace"),
        # A default factory is only named, never called; torch's own unpickler never fills a defaultdict, so a plain dict replaces it.
        *_named(Unkept, *(f"builtins.{name}" for name in ("int", "float", "list", "dict", "str", "bool"))),
        *_named(_empty_dict, "collections.defaultdict"),
        *_named(NumpyDtype, "numpy.dtype"),
        *_named(NumpyArray, "plasticity_probe.checkpoints.stand_ins.NumpyArray"),
        *_named(numpy_scalar, *(f"{module}.scalar" for module in multiarray)),
        *_named(_reconstructed_array, *(f"{module}._reconstruct" for module in multiarray)),
        *_named(path_text, *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in path_classes)),
    ]


def _empty_dict(*_arguments: object) -> dict[Any, Any]:
    return {}


def _reconstructed_array(*_arguments: object) -> NumpyArray:
    return NumpyArray()
