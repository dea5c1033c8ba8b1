"""Where data comes from: a name, a file, a folder or a user's function.

Data root, the folder that holds the named data sets: the `root` argument; else the environment variable PLASTICITY_PROBE_DATA; else the
first of `~/.cache/plasticity_probe` (where downloads go), `~/data` and `./data` that has the data set.
"""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from plasticity_probe.data.arrays import read_npz
from plasticity_probe.data.cifar import CIFAR10, CIFAR100, read_cifar
from plasticity_probe.data.dataset import DataSet, UserLoader
from plasticity_probe.data.digits import read_digits
from plasticity_probe.data.download import REMOTES, Progress, fetch
from plasticity_probe.data.factories import read_factory
from plasticity_probe.data.folders import read_folder
from plasticity_probe.data.mnist import FASHION_MNIST, KMNIST, MNIST, read_idx_set
from plasticity_probe.errors import DataError, UnknownNameError
from plasticity_probe.references import is_reference

ROOT_VARIABLE = "PLASTICITY_PROBE_DATA"
USUAL_ROOTS = ("~/.cache/plasticity_probe", "~/data", "data")

Reader = Callable[[Path], DataSet | None]
"""From a data root to the data set, or None where the root does not hold it whole."""

NAMED: Mapping[str, Reader] = MappingProxyType(
    {
        "digits": read_digits,
        "mnist": partial(read_idx_set, MNIST),
        "fashion_mnist": partial(read_idx_set, FASHION_MNIST),
        "kmnist": partial(read_idx_set, KMNIST),
        "cifar10": partial(read_cifar, CIFAR10),
        "cifar100": partial(read_cifar, CIFAR100),
    }
)


def load_data(
    name: str | Path,
    *,
    root: str | Path | None = None,
    download: bool = False,
    progress: Progress | None = None,
    named: Mapping[str, Reader] = NAMED,
) -> DataSet | UserLoader:
    """Load data by name or place.

    Args:
        name: A name of `named` (write ./mnist for a folder of that name); an .npz file (`arrays.read_npz`); a folder of images
            (`folders.read_folder`); or a function, pkg.module:factory or file.py:factory (`factories.read_factory`).
        root: The data root for named data sets; see the module's docstring.
        download: Fetch a named data set that no data root has, into `root`, else $PLASTICITY_PROBE_DATA, else the first usual root.
        progress: Called while bytes come; see `download.Progress`.
        named: The data sets known by name.

    Returns:
        The data set, or the user's own loader where the function gave one.

    Raises:
        UnknownNameError: Neither a known name nor an existing path.
        DataError: Missing, damaged or malformed data.
    """
    text = str(name)
    if text in named:
        return _load_named(text, named[text], data_roots(root), download, progress)
    path = Path(text).expanduser()
    if path.exists():
        return _load_path(path)
    if is_reference(text):
        return read_factory(text)
    if isinstance(name, Path) or re.search(r"[/\\]|^[~.]|\.(npz|npy|py|gz)$", text):
        raise DataError(
            f"there is no file or folder {path.absolute()}; expected an .npz file, a folder of images or a name: {', '.join(named)}"
        )
    raise UnknownNameError("data set", text, named)


def data_roots(root: str | Path | None = None) -> tuple[Path, ...]:
    """The folders to look in for named data sets, in order.

    Args:
        root: The user's choice; it alone counts where it is given, and after it the environment variable alone.
    """
    chosen = root or os.environ.get(ROOT_VARIABLE)
    return tuple(Path(place).expanduser() for place in ((chosen,) if chosen else USUAL_ROOTS))


def _load_named(name: str, read: Reader, roots: tuple[Path, ...], download: bool, progress: Progress | None) -> DataSet:
    for root in roots:
        if (data := read(root)) is not None:
            return data
    if download and name in REMOTES:
        fetch(name, roots[0], progress=progress)
        if (data := read(roots[0])) is not None:
            return data
    raise DataError(_missing(name, roots))


def _missing(name: str, roots: tuple[Path, ...]) -> str:
    looked = ", ".join(f"{root.absolute()}{'' if root.is_dir() else ' (no such folder)'}" for root in roots)
    remedies = [f"name the folder that holds it with --data-root or ${ROOT_VARIABLE}"]
    if name in REMOTES:
        files = ", ".join(remote.path for remote in REMOTES[name])
        remedies += [
            "fetch it with --download",
            f"or put its official files there: {files} (extracted folders are read too)",
        ]
    return f"no complete data set {name!r} in {looked}: {'; '.join(remedies)}"


def _load_path(path: Path) -> DataSet:
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".npz":
        return read_npz(path)
    hint = f"; name the function in it: {path}:factory" if path.suffix == ".py" else ""
    raise DataError(f"{path} is neither an .npz file nor a folder of images{hint}")
