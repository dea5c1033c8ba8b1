"""CIFAR-10 and CIFAR-100 in the official python and binary versions, as folders or as the archives themselves.

Formats: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009), and the data set's page. A binary record is
the label (CIFAR-100: coarse label, fine label), one byte each, then 3072 bytes: red, green, blue plane of 32 × 32 pixels.
"""

import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plasticity_probe.data.arrays import split_of
from plasticity_probe.data.cifar_pickle import read_pickle
from plasticity_probe.data.dataset import DataSet
from plasticity_probe.errors import DataError

PIXELS = 3 * 32 * 32
# The largest official file has 154 MB; an archive whose member claims more is no CIFAR archive.
LARGEST_FILE = 2**28

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Version:
    """One published form of a CIFAR data set.

    Attributes:
        folder: Name of the folder in the archive.
        archive: Name of the archive.
        md5: Its official checksum.
        train: The files of the training split, in order.
        test: The file of the test split.
        meta: The file that names the classes.
        batch: From a file's content and its name in messages to pixels (N, 3072) and labels (N,).
        classes: From the meta file's content and its name to the names of the classes.
    """

    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    meta: str
    batch: Callable[[bytes, str], Batch]
    classes: Callable[[bytes, str], Sequence[str]]

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that is read."""
        return (*self.train, self.test, self.meta)


@dataclass(frozen=True)
class CifarSet:
    """A CIFAR data set.

    Attributes:
        name: Its name here.
        mean: Mean of the training pixels in [0, 1] per channel.
        std: Their standard deviation.
        versions: Its published forms; the binary one, which is no pickle, comes first.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    versions: tuple[Version, ...]


def read_cifar(data: CifarSet, root: Path) -> DataSet | None:
    """Read a CIFAR data set: images (N, 3, 32, 32) uint8 in the official order, labels 0 to 9 or (fine labels) 0 to 99.

    Mean and standard deviation are those of all training pixels, as commonly used. The std of 0.2023, 0.1994, 0.2010 for CIFAR-10
    that is also seen is the mean of each image's own standard deviation; pass it yourself where a checkpoint was trained with it.

    Args:
        data: Which one.
        root: A data root that holds the extracted folder or the archive (which is read in memory, never extracted), in this order
            and binary before python; or the extracted folder itself.

    Returns:
        The data set; None where the root holds no version with all its files.

    Raises:
        DataError: A file is damaged, or a pickle in it names anything but NumPy's array reconstruction.
    """
    for version in data.versions:
        for folder in (root / version.folder, root):
            if all((folder / name).is_file() for name in version.files):
                contents = {name: (folder / name).read_bytes() for name in version.files}
                return _assemble(data, version, contents, folder)
    for version in data.versions:
        if (root / version.archive).is_file():
            return _assemble(data, version, _read_archive(root / version.archive, version), root / version.archive)
    return None


def _assemble(data: CifarSet, version: Version, contents: Mapping[str, bytes], source: Path) -> DataSet:
    classes = tuple(version.classes(contents[version.meta], f"{source}/{version.meta}"))
    splits = {}
    for split, names in (("train", version.train), ("test", (version.test,))):
        batches = [version.batch(contents[name], f"{source}/{name}") for name in names]
        pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        splits[split] = split_of(pixels.reshape(-1, 3, 32, 32), labels, classes=classes, where=f"{source} ({split})")
    return DataSet(data.name, splits, classes, data.mean, data.std, source=str(source))


def _read_archive(path: Path, version: Version) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if (
                    folder == version.folder
                    and name in version.files
                    and member.isfile()
                    and member.size <= LARGEST_FILE
                ):
                    stream = archive.extractfile(member)
                    contents[name] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; fetch it again") from error
    if missing := [name for name in version.files if name not in contents]:
        raise DataError(f"{path} lacks {', '.join(f'{version.folder}/{name}' for name in missing)}: fetch it again")
    return contents


def _binary_batch(label_bytes: int) -> Callable[[bytes, str], Batch]:
    record = label_bytes + PIXELS

    def read(content: bytes, where: str) -> Batch:
        if not content or len(content) % record:
            raise DataError(
                f"{where} has {len(content)} bytes, which is no whole number of {record}-byte records: fetch it again"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, record)
        return records[:, label_bytes:], records[:, label_bytes - 1]

    return read


def _binary_classes(content: bytes, where: str) -> list[str]:
    try:
        return content.decode("utf-8").split()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is no list of class names: {error}; fetch it again") from error


def _python_batch(key: str) -> Callable[[bytes, str], Batch]:
    def read(content: bytes, where: str) -> Batch:
        batch = read_pickle(content, where)
        pixels, labels = batch.get("data"), batch.get(key)
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
            raise DataError(
                f"{where} has no array 'data' of N × {PIXELS}; found: {', '.join(map(str, batch))}; fetch it again"
            )
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise DataError(
                f"{where} has no list {key!r} of integers; found: {', '.join(map(str, batch))}; fetch it again"
            )
        if len(labels) != len(pixels):
            raise DataError(f"{where} has {len(pixels)} images, but {len(labels)} labels: fetch it again")
        return pixels, np.asarray(labels, np.int64)

    return read


def _python_classes(key: str) -> Callable[[bytes, str], list[str]]:
    def read(content: bytes, where: str) -> list[str]:
        names = read_pickle(content, where).get(key)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where} has no list {key!r} of class names: fetch it again")
        return names

    return read


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

CIFAR10 = CifarSet(
    "cifar10",
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
    (
        Version(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            tuple(f"{name}.bin" for name in _BATCHES),
            "test_batch.bin",
            "batches.meta.txt",
            _binary_batch(1),
            _binary_classes,
        ),
        Version(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            _BATCHES,
            "test_batch",
            "batches.meta",
            _python_batch("labels"),
            _python_classes("label_names"),
        ),
    ),
)
CIFAR100 = CifarSet(
    "cifar100",
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
    (
        Version(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            ("train.bin",),
            "test.bin",
            "fine_label_names.txt",
            _binary_batch(2),
            _binary_classes,
        ),
        Version(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            ("train",),
            "test",
            "meta",
            _python_batch("fine_labels"),
            _python_classes("fine_label_names"),
        ),
    ),
)
