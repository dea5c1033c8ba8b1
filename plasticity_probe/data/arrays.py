"""Arrays of any common type and layout as a `Split`, and NumPy's .npz files as a `DataSet`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from plasticity_probe.data.dataset import DataSet, Split
from plasticity_probe.errors import DataError

SPLITS = ("train", "val", "test")
PAIRS = (("x", "y"), ("images", "labels"), ("inputs", "targets"))
KEYS = "x, y | train_x, train_y, test_x, test_y | x_train, y_train, ... | images, labels | inputs, targets"


def split_of(
    inputs: Any, targets: Any, noisy: Any = None, *, classes: Sequence[str] | None = None, where: str = "the data"
) -> Split:
    """Turn arrays into a split, never guessing where a guess could be wrong.

    Inputs: uint8 stays, any floating type becomes float32; other types are refused, because integers may be pixels, tokens or
    counts. uint8 images (N, H, W) get a channel axis, and (N, H, W, 3) or (N, H, W, 1) with H, W > 3 is moved to (N, C, H, W);
    floating-point arrays keep their layout, which must be channels first.

    Targets: (N,) or (N, 1); integers and booleans become int64, floating-point values float32 to regress on. With `classes`
    the targets are labels, so floating-point values must be whole numbers and become int64.

    Args:
        inputs: (N, ...) array.
        targets: (N,) array, or a list of numbers.
        noisy: (N,) booleans, or integers 0 and 1.
        classes: Names of the classes, if the targets are labels.
        where: What error messages call this.

    Raises:
        DataError: What cannot be turned into a split, and what to do about it.
    """
    try:
        return Split(
            _inputs(np.asarray(inputs)),
            _targets(np.asarray(targets), classes is not None),
            None if noisy is None else _noisy(np.asarray(noisy)),
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def read_npz(path: Path) -> DataSet:
    """Read an .npz file; nothing in it is ever unpickled.

    Keys: `x, y` (one split, called "train"), or per split train, val and test `train_x, train_y` or `x_train, y_train`; `images,
    labels` and `inputs, targets` go in place of `x, y`. Optional: `noisy` (`train_noisy`, `noisy_train`), True where a label
    is known to be wrong, and `classes`, the names of the classes. Other keys are left alone. Layouts and types: see `split_of`.

    Args:
        path: The file.

    Raises:
        DataError: Not an .npz file, damaged, holding Python objects, or without the keys needed (those found are listed).
    """
    with _open(path) as file, _Arrays(path, file) as arrays:
        classes = _classes(arrays)
        pairs = {split: _find_pair(arrays, split) for split in SPLITS}
        splits = {split: _read_split(arrays, split, pair, classes) for split, pair in pairs.items() if pair}
    if not splits:
        raise DataError(f"{path} has none of the expected keys ({KEYS}); found: {', '.join(arrays.keys) or 'none'}")
    return DataSet(path.stem, splits, classes, source=str(path))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error}") from error


class _Arrays:
    """The arrays of an .npz file, read one at a time; every failure is a DataError."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        archive = self._guard(lambda: np.load(file, allow_pickle=False), "it")
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(
                f"{path} holds a single array, but inputs and targets are needed: np.savez(path, x=..., y=...)"
            )
        self._archive = archive
        self.keys = tuple(archive.files)

    def __enter__(self) -> "_Arrays":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def __getitem__(self, key: str) -> np.ndarray:
        return self._guard(lambda: self._archive[key], repr(key))

    def _guard(self, read: Callable[[], Any], what: str) -> Any:
        try:
            return read()
        # On a damaged file NumPy's and zipfile's parsers let a dozen types of exception through.
        except Exception as error:
            hint = (
                "arrays of Python objects are never read; convert them with astype"
                if "allow_pickle" in str(error)
                else "the file may be damaged; write it again with np.savez"
            )
            raise DataError(f"{self.path} is no readable .npz file: {what} failed with {error} ({hint})") from error


def _read_split(arrays: _Arrays, split: str, pair: tuple[str, str], classes: tuple[str, ...] | None) -> Split:
    marks = _find_one(arrays, split, "noisy")
    noisy = None if marks is None else arrays[marks]
    where = f"{arrays.path} ({', '.join(pair)})"
    return split_of(arrays[pair[0]], arrays[pair[1]], noisy, classes=classes, where=where)


def _find_pair(arrays: _Arrays, split: str) -> tuple[str, str] | None:
    pairs = []
    for inputs, targets in PAIRS:
        found = _find_one(arrays, split, inputs), _find_one(arrays, split, targets)
        if found[0] and found[1]:
            pairs.append((found[0], found[1]))
        elif found[0] or found[1]:
            wanted = targets if found[0] else inputs
            raise DataError(
                f"{arrays.path} has {found[0] or found[1]!r} but nothing for {wanted!r} of the same split; "
                f"expected {KEYS}; found: {', '.join(arrays.keys)}"
            )
    if len(pairs) > 1:
        raise DataError(f"{arrays.path} has several arrays for split {split!r}: {pairs}; keep one pair")
    return pairs[0] if pairs else None


def _find_one(arrays: _Arrays, split: str, name: str) -> str | None:
    spellings = [f"{split}_{name}", f"{name}_{split}"] + ([name] if split == "train" else [])
    found = [key for key in spellings if key in arrays.keys]
    if len(found) > 1:
        raise DataError(f"{arrays.path} has {' and '.join(map(repr, found))}, which mean the same: keep one")
    return found[0] if found else None


def _classes(arrays: _Arrays) -> tuple[str, ...] | None:
    if "classes" not in arrays.keys:
        return None
    names = arrays["classes"]
    if names.dtype.kind != "U" or names.ndim != 1:
        raise DataError(f"{arrays.path}: 'classes' must be a list of names, not {names.dtype} of shape {names.shape}")
    return tuple(map(str, names))


def _inputs(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return _channels_first(array)
    if array.dtype.kind == "f":
        return _float32(array)
    raise DataError(
        f"inputs are {array.dtype}, but uint8 pixels or floating-point numbers are expected: convert with astype"
    )


def _channels_first(images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3) and min(images.shape[1:3]) > 3:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images


def _targets(array: np.ndarray, labels: bool) -> np.ndarray:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    if array.dtype.kind != "f":
        raise DataError(
            f"targets are {array.dtype}, but integers (labels) or floating-point numbers are expected: convert with astype"
        )
    if not labels:
        return _float32(array)
    # Beyond 2^53 a float64 holds no fractions, and a cast of infinity is undefined.
    if broken := int((~(np.abs(array) < 2**53) | (array != np.round(array))).sum()):
        raise DataError(
            f"{broken} of {array.size} class labels are no whole numbers: give labels 0, 1, ... as integers"
        )
    return array.astype(np.int64)


def _noisy(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.bool_ or (array.dtype.kind in "iu" and np.isin(array, (0, 1)).all()):
        return array.astype(np.bool_)
    raise DataError(
        f"noisy marks are {array.dtype}, but booleans are expected, True where the label is known to be wrong"
    )


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and Split counts and refuses it
        return array.astype(np.float32, copy=False)
