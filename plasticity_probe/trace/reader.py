# pyright: standard
# h5py comes without types.
"""Reads traces, whole or while they are being written, without changing them and without torch."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from plasticity_probe.errors import TraceError
from plasticity_probe.trace.guard import BYTES_LIMIT, check_bytes, check_structure
from plasticity_probe.trace.journal import journal_path, read_journal
from plasticity_probe.trace.layout import (
    ATTRIBUTES,
    COLUMNS,
    LENGTH_OF,
    POSITION_OF,
    PROVENANCE,
    QUANTITIES,
    SESSIONS,
    Key,
    Row,
)
from plasticity_probe.trace.outcome_rows import OUTCOMES
from plasticity_probe.trace.tree import dataset_tree, rows_of

PathLike = str | os.PathLike[str]


def open_trace(path: PathLike | Sequence[PathLike]) -> xr.DataTree:
    """A trace, or several as one, as a tree with one group for each probe label (docs/trace-schema.md).

    Several traces are joined along the rows; the coordinate `trace` says where each row came from, the coordinate `settings` under which
    settings it was measured, for those may differ between files. A measurement found in several is taken from the first. Runs of the same
    name stay one run, unless the files show that they are not: different checkpoints at the same step. Then each file's run is named
    "<path>:<run>", so that two seeds never become one run.

    Args:
        path: The file, or several.

    Returns:
        All of it in memory; the files are closed again.

    Raises:
        TraceError: There is no such trace, or it is damaged, foreign or of a newer version; or the files disagree on the form of a quantity.
    """
    if isinstance(path, str | os.PathLike):
        return dataset_tree(read_rows(path))
    return dataset_tree(*joined_rows(path))


def joined_rows(paths: Iterable[PathLike]) -> tuple[list[Row], list[str]]:
    """The rows of several traces as those of one, joined as `open_trace` says.

    Args:
        paths: The files.

    Returns:
        The rows, and for each the trace it was read from.

    Raises:
        TraceError: There is no such trace, or it is damaged, foreign or of a newer version.
    """
    return _joined({os.fspath(path): read_rows(path) for path in paths})


def read_rows(path: PathLike) -> list[Row]:
    """All rows of a trace, those included that are still in its journal, in the order of measurement.

    Args:
        path: The HDF5 file; where only its journal exists, that is read.

    Raises:
        TraceError: There is no such trace, or it is damaged, foreign or of a newer version.
    """
    trace = Path(path).resolve()
    # The journal goes first: a writer that finishes in between moves its rows into the file, which is read after it.
    journal = read_journal(journal_path(trace))
    stored = read_file(trace)
    if not (trace.exists() or journal.end):
        raise TraceError(f"there is no trace at {os.fspath(path)}; `probe analyze ... --trace FILE` writes one")
    return list({row.key: row for row in (*stored, *journal.rows)}.values())


def read_file(path: Path) -> list[Row]:
    """The rows of the HDF5 file alone; none if it does not exist.

    Raises:
        TraceError: It is damaged, foreign or of a newer version.
    """
    try:
        if not path.exists():
            return []
        check_bytes(path)
        with h5py.File(path, "r") as file:
            check_structure(path, file)
            return rows_of(_Reading(path.stat().st_size).tree(file))
    except TraceError:
        raise
    except Exception as error:  # the parsers of a damaged file raise whatever they like
        raise TraceError(f"{path}: the file is damaged or no trace ({type(error).__name__}: {error})") from error


class _Reading:
    """One file being read. Its texts stay within the limit even if all of them point to the same bytes of the file.

    Args:
        size: Size of the file.
    """

    def __init__(self, size: int) -> None:
        self._block = max(1, BYTES_LIMIT // size)
        self._left = BYTES_LIMIT

    def tree(self, file: Any) -> xr.DataTree:
        groups = {f"/{name}": self._group(file[name]) for name in file if isinstance(file[name], h5py.Group)}
        root = xr.Dataset({PROVENANCE: (SESSIONS, self._texts(file[PROVENANCE]))})
        return xr.DataTree.from_dict({"/": root, **groups})

    def _group(self, group: Any) -> xr.Dataset:
        quantities = str(group.attrs[QUANTITIES])
        lengths = [name for name in group if name.startswith(LENGTH_OF)]
        positions = [name for name in group if name.startswith(POSITION_OF)]
        labels = [name.removeprefix(POSITION_OF) for name in positions]
        names = [name for name in (*COLUMNS, *lengths, *positions, *labels) if name in group]
        coords = {name: self._variable(group[name]) for name in names}
        data = {name: self._variable(group[name]) for name in quantities.split()}
        return xr.Dataset(data, coords, {QUANTITIES: quantities})

    def _variable(self, data: Any) -> tuple[tuple[str, ...], NDArray[Any], dict[str, str]]:
        attrs = {name: unescaped(str(data.attrs[name])) for name in ATTRIBUTES if name in data.attrs}
        scales = [data] if data.is_scale else [data.dims[at][0] for at in range(data.ndim)]
        dims = tuple(str(scale.name).rsplit("/", 1)[1] for scale in scales)
        if data.dtype.kind == "O":
            return dims, self._texts(data), attrs
        return dims, data[()].astype(np.float64 if data.dtype.kind == "f" else np.int64), attrs

    def _texts(self, data: Any) -> NDArray[Any]:
        found: list[str] = []
        for begin in range(0, len(data), self._block):
            texts = data.asstr()[begin : begin + self._block]
            self._left -= sum(map(len, texts))
            if self._left < 0:
                raise TraceError(f"{data.name}: the texts are longer than the {BYTES_LIMIT} bytes a trace may hold")
            found += map(unescaped, texts)
        values = np.empty(len(found), dtype=object)
        values[:] = found
        return values


def unescaped(text: str) -> str:
    """The text that `plasticity_probe.trace.writer.escaped` made storable."""
    return _ESCAPE.sub(lambda found: chr(int(found.group(1), 16)), text)


_ESCAPE = re.compile("\x1a([0-9a-f]{4})")


def _joined(files: dict[str, list[Row]]) -> tuple[list[Row], list[str]]:
    apart = _conflicting(files.values())
    found: dict[Key, tuple[Row, str]] = {}
    for path, rows in files.items():
        for row in rows:
            named = replace(row, run=f"{path}:{row.run}") if row.run in apart else row
            found.setdefault(named.key, (named, path))
    return [row for row, _ in found.values()], [path for _, path in found.values()]


def _conflicting(files: Iterable[list[Row]]) -> set[str]:
    """Names that stand for different runs in different files: they hold different checkpoints at the same step."""
    known: dict[tuple[str, int], set[str]] = {}
    apart: set[str] = set()
    for rows in files:
        own: dict[tuple[str, int], set[str]] = {}
        for row in rows:
            # Outcomes stand at steps whose checkpoint another file may hold; they are no checkpoint.
            if row.step >= 0 and row.network == "checkpoint" and row.probe != OUTCOMES:
                own.setdefault((row.run, row.step), set()).add(row.sha256)
        apart |= {place[0] for place, hashes in own.items() if place in known and not hashes & known[place]}
        for place, hashes in own.items():
            known.setdefault(place, set()).update(hashes)
    return apart
