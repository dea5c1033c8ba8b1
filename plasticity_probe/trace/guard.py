# pyright: standard
# h5py comes without types.
"""What a file must be before a number is read from it: a trace of this schema, whole, and holding its data itself.

HDF5 can point outside itself (external links, external storage, virtual datasets), load code for filters, and declare far more data than it
holds. A foreign file that does any of this is refused before it is read.
"""

import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from plasticity_probe.errors import TraceError
from plasticity_probe.trace.layout import PROVENANCE, SCHEMA, SCHEMA_VERSION, SESSIONS

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# HDF5 ignores what follows its own end. The mark is the last thing written, so a file that has it is complete; and it guards texts and
# structure, which HDF5's checksums do not cover.
MARK = b"\nplasticity_probe trace sha256 "
_TAIL = len(MARK) + 64 + 1
# A trace of 10 000 rows of 100 quantities over 100 layers has 0.8 GB.
BYTES_LIMIT = 4 << 30
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


def check_bytes(path: Path) -> None:
    """Refuses a file that is no HDF5 file, or whose commit mark does not match its content.

    A file without a mark was written by another program (a subset saved with xarray, say). It is let through to the other checks.

    Raises:
        TraceError: See above.
        OSError: It cannot be read.
    """
    if not path.is_file():
        raise TraceError(f"{path}: expected a trace file, got something that is no regular file")
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            raise TraceError(f"{path}: expected a trace, an HDF5 file; got another kind of file")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        tail = file.read()
        if not tail.startswith(MARK):
            return
        file.seek(0)
        digest, rest = sha256(), size - _TAIL
        while rest and (block := file.read(min(rest, 1 << 20))):
            digest.update(block)
            rest -= len(block)
    if tail != MARK + digest.hexdigest().encode("ascii") + b"\n":
        raise TraceError(
            f"{path}: the content does not match its checksum; the file was damaged, or changed after it was written. Restore it from a copy."
        )


def check_structure(path: Path, file: h5py.File) -> None:
    """Refuses a file that is no trace of a known version, or that HDF5 would have to leave or trust too far to read.

    Raises:
        TraceError: See above.
    """
    if file.attrs.get("schema") != SCHEMA or "schema_version" not in file.attrs:
        raise TraceError(f"{path}: expected a trace (attribute schema = {SCHEMA!r}), got another HDF5 file")
    version = int(np.asarray(file.attrs["schema_version"]).item())
    if version != SCHEMA_VERSION:
        remedy = "upgrade plasticity_probe" if version > SCHEMA_VERSION else "read it with the version that wrote it"
        raise TraceError(f"{path}: expected schema version {SCHEMA_VERSION}, got {version}; {remedy}")
    declared = sum(_declared(path, file, str(name), 0) for name in file)
    if declared > BYTES_LIMIT:
        raise TraceError(f"{path}: it declares {declared} bytes of data, more than the {BYTES_LIMIT} a trace may hold")


def _declared(path: Path, parent: Any, name: str, depth: int) -> int:
    """Bytes of data that an object declares, after refusing what it must not be."""
    where = f"{path}: {parent.name.rstrip('/')}/{name}"
    if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
        raise TraceError(f"{where[:500]!r} is a link to elsewhere; a trace holds its data itself")
    kind = parent.get(name, getclass=True)
    if kind is h5py.Group and depth == 0:
        group = parent[name]
        return sum(_declared(path, group, str(child), 1) for child in group)
    if kind is not h5py.Dataset or (depth == 0 and name not in (PROVENANCE, SESSIONS)):
        raise TraceError(f"{where[:500]!r} has no place in a trace: groups hold datasets, and nothing else")
    data = parent[name]
    if data.external or data.is_virtual:
        raise TraceError(f"{where[:500]!r} takes its data from other files; a trace holds its data itself")
    plan = data.id.get_create_plist()
    if unknown := {plan.get_filter(at)[0] for at in range(plan.get_nfilters())} - _FILTERS:
        raise TraceError(
            f"{where[:500]!r} needs the filters {sorted(unknown)}; a trace uses gzip, shuffle and fletcher32 alone"
        )
    if data.dtype.kind not in "fiO" or (data.dtype.kind == "O" and h5py.check_string_dtype(data.dtype) is None):
        raise TraceError(f"{where[:500]!r} holds {data.dtype}; a trace holds float64, int64 and UTF-8 text")
    return data.size * data.dtype.itemsize
