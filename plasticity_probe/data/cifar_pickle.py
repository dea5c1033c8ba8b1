"""CIFAR's python version without running pickle code.

A pickle may call anything that it can name. This reader gives it four names, as the official files need (NumPy's array
reconstruction and the encoding of byte strings), and behind each stands a plain class of this file: neither NumPy's own
unpickling nor any other code is reachable.
"""

import io
import math
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from plasticity_probe.errors import DataError


def read_pickle(content: bytes, where: str) -> dict[str, Any]:
    """Read a pickled dict of uint8 arrays, lists, numbers and strings.

    Args:
        content: The pickle.
        where: What error messages call it.

    Returns:
        The dict with its keys as str; byte strings in it are decoded as UTF-8, arrays are uint8 and read-only.

    Raises:
        DataError: The pickle names anything but the reconstruction of NumPy arrays, or is damaged. Nothing was run.
    """
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if isinstance(loaded, dict):
            return {_plain(key): _plain(value) for key, value in loaded.items()}
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    # A damaged pickle can end in any exception: the opcodes act on whatever lies on the stack.
    except Exception as error:
        raise DataError(f"{where} is damaged: {type(error).__name__}: {error}; fetch it again") from error
    raise DataError(f"{where} holds a {type(loaded).__name__}, but CIFAR's files hold a dict: fetch it again")


class _Array:
    """Stands for numpy.ndarray and for the function that makes an empty one."""

    def __init__(self, *_: object) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: tuple[object, tuple[int, ...], "_Dtype", bool, bytes]) -> None:
        _, shape, dtype, fortran_order, raw = state
        if (
            not isinstance(dtype, _Dtype)
            or dtype.code != "u1"
            or not isinstance(raw, bytes)
            or len(raw) != math.prod(shape)
        ):
            raise DataError(f"an array of shape {shape} is not uint8 or has another number of bytes: fetch it again")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        """Byte order and fields: of no meaning for uint8."""


class _Encoded(bytes):
    """Stands for _codecs.encode, by which Python 3 writes byte strings in old protocols."""

    def __new__(cls, text: str, codec: str | bytes) -> "_Encoded":
        if codec not in ("latin1", b"latin1"):
            raise DataError(f"byte strings in codec {codec!r}, but only latin1 is expected: fetch it again")
        return super().__new__(cls, text, "latin1")


_ALLOWED: Mapping[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> type:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise DataError(
                f"it asks for {module_name}.{global_name}, which CIFAR's official files do not; nothing was run. If you do not "
                "know why it is there, distrust the file; the binary version of the data set is no pickle at all"
            ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
