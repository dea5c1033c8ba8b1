"""MNIST and the data sets published in its format: four idx files, gzipped or not.

The idx format (LeCun, Cortes and Burges, "The MNIST database of handwritten digits", file format section): two zero bytes, a
type code (8 is uint8), the number of axes, each length as a big-endian uint32, then the values in C order.
"""

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from plasticity_probe.data.arrays import split_of
from plasticity_probe.data.dataset import DataSet
from plasticity_probe.errors import DataError

FILES = MappingProxyType(
    {
        "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    }
)


@dataclass(frozen=True)
class IdxSet:
    """A data set of four idx files.

    Attributes:
        name: Its name here.
        folders: Where under a data root it may lie, torchvision's layout first.
        classes: Names of its ten classes.
        mean: Mean of the training pixels in [0, 1].
        std: Their standard deviation.
        md5: The official checksums of the gzipped files.
    """

    name: str
    folders: tuple[str, ...]
    classes: tuple[str, ...]
    mean: float
    std: float
    md5: Mapping[str, str]


def _md5s(*digests: str) -> Mapping[str, str]:
    return MappingProxyType(dict(zip((name + ".gz" for pair in FILES.values() for name in pair), digests, strict=True)))


MNIST = IdxSet(
    "mnist",
    ("MNIST/raw", "mnist/raw", "mnist"),
    tuple("0123456789"),
    0.1307,
    0.3081,
    _md5s(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
)
FASHION_MNIST = IdxSet(
    "fashion_mnist",
    ("FashionMNIST/raw", "fashion_mnist/raw", "fashion_mnist"),
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    0.2860,
    0.3530,
    _md5s(
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
)
KMNIST = IdxSet(
    "kmnist",
    ("KMNIST/raw", "kmnist/raw", "kmnist"),
    ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    0.1918,
    0.3483,
    _md5s(
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
)
IDX_SETS = (MNIST, FASHION_MNIST, KMNIST)


def read_idx_set(data: IdxSet, root: Path) -> DataSet | None:
    """Read a data set of four idx files: images (N, 1, 28, 28) uint8, labels 0 to 9.

    Mean and standard deviation are those of the training pixels: MNIST as in PyTorch's own MNIST example, FashionMNIST (Xiao et
    al. 2017) and KMNIST (Clanuwat et al. 2018) as commonly used with torchvision's readers.

    Args:
        data: Which one.
        root: A data root, or the folder of the files itself. The three sets share their file names: there a folder that is named
            after another of them, or holds another's official labels, is passed over.

    Returns:
        The data set; None where the root does not hold all four files.

    Raises:
        DataError: A file is damaged.
    """
    for folder in (*(root / sub for sub in data.folders), root):
        found = {name: _locate(folder, name) for names in FILES.values() for name in names}
        paths = {name: path for name, path in found.items() if path is not None}
        if len(paths) == len(found) and not (folder == root and _is_another(data, root, paths)):
            splits = {
                split: split_of(
                    read_idx(paths[images]), read_idx(paths[labels]), classes=data.classes, where=f"{folder} ({split})"
                )
                for split, (images, labels) in FILES.items()
            }
            return DataSet(data.name, splits, data.classes, (data.mean,), (data.std,), source=str(folder))
    return None


def read_idx(path: Path) -> np.ndarray:
    """Read one idx file of uint8 values, gzipped or not.

    Args:
        path: The file; gzip is told by its first two bytes, not by its name.

    Returns:
        The array in the shape that the header declares.

    Raises:
        DataError: Not an idx file of uint8, or shorter or longer than its header says.
    """
    content = _content(path)
    axes = content[3] if len(content) >= 4 else 0
    start = 4 + 4 * axes
    if content[:3] != b"\x00\x00\x08" or axes == 0 or len(content) < start:
        raise DataError(
            f"{path} is no idx file of uint8 values: it starts with {content[:8].hex(' ') or 'nothing'}, not 00 00 08; fetch it again"
        )
    shape = tuple(int(length) for length in np.frombuffer(content, ">u4", axes, 4))
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path} declares {shape}, {math.prod(shape)} values, but holds {len(content) - start}: it is damaged; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch it again") from error


def _locate(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _is_another(data: IdxSet, root: Path, paths: Mapping[str, Path]) -> bool:
    labels = FILES["train"][1]
    digest = hashlib.md5(paths[labels].read_bytes(), usedforsecurity=False).hexdigest()
    others = [other for other in IDX_SETS if other is not data]
    named = {part.lower().replace("-", "").replace("_", "") for part in root.resolve().parts[-2:]}
    return any(digest == other.md5[labels + ".gz"] or other.name.replace("_", "") in named for other in others)
