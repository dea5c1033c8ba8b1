"""The official archives over the network, each verified before it takes its place."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from plasticity_probe.data.cifar import CIFAR10, CIFAR100, CifarSet
from plasticity_probe.data.mnist import FASHION_MNIST, KMNIST, MNIST, IdxSet
from plasticity_probe.errors import DataError, UnknownNameError

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes that are there, and the bytes in all where the server tells."""

TIMEOUT = 60.0
CHUNK = 2**18


@dataclass(frozen=True)
class Remote:
    """One official file.

    Attributes:
        path: Where it goes under a data root; its last part is its name on the mirrors.
        md5: The published checksum (for the mirrors' mistakes; the files are data and never run).
        mirrors: Folders on the network that have it, ending in "/", tried in order.
    """

    path: str
    md5: str
    mirrors: tuple[str, ...]


def _idx_remotes(data: IdxSet, *mirrors: str) -> tuple[Remote, ...]:
    return tuple(Remote(f"{data.folders[0]}/{name}", md5, mirrors) for name, md5 in data.md5.items())


def _cifar_remotes(data: CifarSet) -> tuple[Remote, ...]:
    return (Remote(data.versions[0].archive, data.versions[0].md5, ("https://www.cs.toronto.edu/~kriz/",)),)


REMOTES: Mapping[str, tuple[Remote, ...]] = MappingProxyType(
    {
        "mnist": _idx_remotes(
            MNIST,
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        "fashion_mnist": _idx_remotes(
            FASHION_MNIST,
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        "kmnist": _idx_remotes(
            KMNIST, "https://codh.rois.ac.jp/kmnist/dataset/kmnist/", "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"
        ),
        "cifar10": _cifar_remotes(CIFAR10),
        "cifar100": _cifar_remotes(CIFAR100),
    }
)


def fetch(
    dataset: str, root: Path, base_url: str | None = None, *, progress: Progress | None = None
) -> tuple[Path, ...]:
    """Bring a data set's official files under a data root.

    A file that is there and has the right checksum is kept. Others come into `NAME.part` beside their place; a broken transfer
    leaves it to be resumed, and only a file with the right checksum replaces what was there before. Two processes must not
    fetch the same file at the same time. CIFAR comes in its binary version, which is no pickle.

    Args:
        dataset: One of `REMOTES`.
        root: The data root; made where it does not exist.
        base_url: A mirror of your own in place of the official ones: a folder with the files under their official names.
        progress: Called while bytes come.

    Returns:
        The files, all verified.

    Raises:
        UnknownNameError: No such data set to download.
        DataError: No mirror gave a file with the right checksum; each mirror's reason is listed.
    """
    if dataset not in REMOTES:
        raise UnknownNameError("data set to download", dataset, REMOTES)
    mirrors = None if base_url is None else (base_url.rstrip("/") + "/",)
    return tuple(_fetch_file(remote, root, mirrors or remote.mirrors, progress) for remote in REMOTES[dataset])


def _fetch_file(remote: Remote, root: Path, mirrors: tuple[str, ...], progress: Progress | None) -> Path:
    target = root / remote.path
    if target.is_file() and _md5(target) == remote.md5:
        return target
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"no folder {target.parent} can be made: {error}; choose another --data-root") from error
    failures = []
    for url in (mirror + target.name for mirror in mirrors):
        failure = _try(url, part, remote.md5, progress)
        if failure is None:
            os.replace(part, target)
            return target
        failures.append(f"{url}: {failure}")
    raise DataError(
        f"{target.name} could not be downloaded ({'; '.join(failures)}): try again later, or put the file at {target} yourself"
    )


def _try(url: str, part: Path, md5: str, progress: Progress | None) -> str | None:
    """Fetch into `part`; None when its checksum is right, else what went wrong."""
    failure = None
    # What an earlier run left may be of another file or already too long: then the second try starts afresh.
    for resume in (True, False) if part.exists() else (False,):
        if not resume:
            part.unlink(missing_ok=True)
        try:
            _transfer(url, part, progress)
        except urllib.error.HTTPError as error:
            error.close()
            failure = f"HTTP {error.code} {error.reason}"
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return failure
            continue
        except (OSError, http.client.HTTPException, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        if (came := _md5(part)) == md5:
            return None
        part.unlink()
        failure = f"the md5 checksum must be {md5}, but is {came}"
    return failure


def _transfer(url: str, part: Path, progress: Progress | None) -> None:
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "plasticity_probe"} | ({"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as reply:
        resumed = reply.status == http.HTTPStatus.PARTIAL_CONTENT
        done, length = start if resumed else 0, reply.headers["Content-Length"]
        total = None if length is None else done + int(length)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := reply.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(part.name.removesuffix(".part"), done, total)
    if total is not None and done < total:
        raise ConnectionError(f"the connection broke after {done} of {total} bytes")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
