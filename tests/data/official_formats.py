"""Tiny data sets in the official formats, written byte by byte."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Images:
    pixels: np.ndarray
    labels: np.ndarray


def images(n: int, shape: tuple[int, ...], classes: int, seed: int) -> Images:
    generator = np.random.default_rng(seed)
    return Images(generator.integers(0, 256, (n, *shape), np.uint8), generator.integers(0, classes, n, np.uint8))


def idx_bytes(array: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, train: Images, test: Images, *, zipped: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, part in (("train", train), ("t10k", test)):
        for name, array in (("images-idx3", part.pixels), ("labels-idx1", part.labels)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)


def python2_pickle(content: dict[bytes, object]) -> bytes:
    """Pickle as Python 2 did for the official files: protocol 2, and byte strings as STRING opcodes, which Python 3 never writes."""
    written = io.BytesIO()
    written.write(b"\x80\x02}")
    for key, value in content.items():
        written.write(_string(key))
        if isinstance(value, np.ndarray):
            written.write(
                b"cnumpy.core.multiarray\n_reconstruct\n"
                + b"cnumpy\nndarray\n"
                + b"K\x00\x85"
                + _string(b"b")
                + b"\x87R"
            )
            rows, columns = value.shape
            written.write(b"(K\x01" + b"J" + struct.pack("<i", rows) + b"J" + struct.pack("<i", columns) + b"\x86")
            written.write(b"cnumpy\ndtype\n" + _string(b"u1") + b"K\x00K\x01\x87R")
            written.write(b"(K\x03" + _string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
            written.write(b"\x89" + _string(value.tobytes()) + b"tb")
        elif isinstance(value, list):
            written.write(
                b"]" + b"".join((_string(v) if isinstance(v, bytes) else b"K" + bytes([v])) + b"a" for v in value)
            )
        elif isinstance(value, bytes):
            written.write(_string(value))
        written.write(b"s")
    written.write(b".")
    return written.getvalue()


def _string(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value


def python3_pickle(content: dict[bytes, object], protocol: int = 2) -> bytes:
    return pickle.dumps({key.decode(): value for key, value in content.items()}, protocol)


def cifar10_python(train: Images, test: Images, dump=python2_pickle) -> dict[str, bytes]:
    def batch(name: str, part: Images) -> bytes:
        flat = part.pixels.reshape(len(part.labels), -1)
        return dump({b"batch_label": name.encode(), b"labels": part.labels.tolist(), b"data": flat})

    parts = zip(np.split(train.pixels, 5), np.split(train.labels, 5), strict=True)
    files = {f"data_batch_{i}": batch(f"{i} of 5", Images(*part)) for i, part in enumerate(parts, 1)}
    meta = dump({b"label_names": [b"class%d" % i for i in range(10)]})
    return files | {"test_batch": batch("test", test), "batches.meta": meta}


def cifar10_binary(train: Images, test: Images) -> dict[str, bytes]:
    def records(part: Images) -> bytes:
        pairs = zip(part.labels, part.pixels, strict=True)
        return b"".join(bytes([label]) + pixels.tobytes() for label, pixels in pairs)

    parts = zip(np.split(train.pixels, 5), np.split(train.labels, 5), strict=True)
    files = {f"data_batch_{i}.bin": records(Images(*part)) for i, part in enumerate(parts, 1)}
    names = "".join(f"class{i}\n" for i in range(10)) + "\n"
    return files | {"test_batch.bin": records(test), "batches.meta.txt": names.encode()}


def cifar100_python(train: Images, test: Images, dump=python2_pickle) -> dict[str, bytes]:
    def batch(part: Images) -> bytes:
        coarse = (part.labels // 5).tolist()
        flat = part.pixels.reshape(len(part.labels), -1)
        return dump({b"coarse_labels": coarse, b"fine_labels": part.labels.tolist(), b"data": flat})

    return {
        "train": batch(train),
        "test": batch(test),
        "meta": dump({b"fine_label_names": [b"class%d" % i for i in range(100)]}),
    }


def cifar100_binary(train: Images, test: Images) -> dict[str, bytes]:
    def records(part: Images) -> bytes:
        pairs = zip(part.labels, part.pixels, strict=True)
        return b"".join(bytes([label // 5, label]) + pixels.tobytes() for label, pixels in pairs)

    names = "".join(f"class{i}\n" for i in range(100))
    return {"train.bin": records(train), "test.bin": records(test), "fine_label_names.txt": names.encode()}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
