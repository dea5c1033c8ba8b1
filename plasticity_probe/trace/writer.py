# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# xarray's types are incomplete.
"""Writes a trace so that no committed row is ever lost: a journal while it grows, one HDF5 file when it is closed.

Appending to compressed HDF5 is not safe against a kill, a full disk or a second writer. So `append` writes each row to a journal and waits
until it is on disk; `close` writes a new HDF5 file beside the old one, from the old one's rows and the journal's, puts it in its place
by renaming, and only then removes the journal. At every moment file and journal together hold every committed row; rows are keyed, so a
row found in both is one row.
"""

import os
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xarray as xr

from plasticity_probe.errors import TraceError
from plasticity_probe.locked_file import BusyError, LockedFile
from plasticity_probe.trace.guard import MARK
from plasticity_probe.trace.journal import (
    START,
    Journal,
    framed,
    journal_path,
    read_journal,
    row_payload,
    session_payload,
)
from plasticity_probe.trace.layout import Key, Row
from plasticity_probe.trace.memory import MemoryTrace
from plasticity_probe.trace.reader import read_file


def open_for_append(
    path: str | os.PathLike[str],
    settings: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    *,
    retry_failed: bool = False,
) -> "TraceWriter":
    """Opens a trace for writing; makes it if there is none, and recovers what an interrupted writer left.

    Args:
        path: The HDF5 file. Its folder must exist; the journal lies beside it.
        settings: For each label that will be measured its settings, as a JSON object.
        provenance: What writes the rows: versions, seeds, revision; plain data.
        retry_failed: Whether rows whose status is not "ok" count as not done.

    Raises:
        TraceError: Another process is writing the trace, it holds a label with other settings, it is not a trace or damaged, or the place
            cannot be written to.
        UsageError: Settings or provenance are no plain data.
    """
    trace = Path(path).resolve()
    memory = MemoryTrace(provenance=provenance, retry_failed=retry_failed)
    file = _locked(trace)
    try:
        stored, journal = read_file(trace), read_journal(file.path)
        for row in (*stored, *journal.rows):
            memory.append(row)
        memory.expect(settings or {})
        return TraceWriter(trace, file, memory, journal)
    except BaseException as error:
        file.release(remove=file.path.stat().st_size <= len(START))
        if isinstance(error, OSError) and not isinstance(error, TraceError):
            raise _unwritable(file.path, error, "The trace is as it was.") from error
        raise


class TraceWriter:
    """A trace open for writing; `open_for_append` makes one. Use it in a `with` statement.

    Args:
        path: The HDF5 file.
        file: Its journal, locked.
        memory: The rows at hand.
        journal: What the journal holds.
    """

    def __init__(self, path: Path, file: LockedFile, memory: MemoryTrace, journal: Journal) -> None:
        self.path = path
        self.notes = _recovery(journal)
        self._file, self._memory = file, memory
        self._end = journal.end
        self._changed = bool(journal.rows)
        self._closed = False
        _stale(path).unlink(missing_ok=True)
        if not self._end:
            self._write(START)
            sync_folder(path.parent)
        self._write(framed(session_payload(memory.provenance)))

    @property
    def rows(self) -> list[Row]:
        """All rows of the trace, in the order of their first measurement."""
        return self._memory.rows

    def done(self, key: Key) -> bool:
        """Whether this measurement was made already; failed ones count unless the trace was opened with `retry_failed`."""
        return self._memory.done(key)

    def append(self, row: Row) -> None:
        """Commits a row: when this returns, it is on disk. A row with the key of an older one takes its place.

        Raises:
            TraceError: The row does not fit the rows of its label, or could not be written; the rows before it are safe.
        """
        if self._closed:
            raise TraceError(f"{self.path}: the trace is closed; open it again to append")
        row = self._memory.checked(row)
        # Sessions name the provenance of the rows after them, so a row from elsewhere brings its own.
        foreign = row.provenance != self._memory.provenance
        payloads = [session_payload(row.provenance)] * foreign + [row_payload(row)]
        payloads += [session_payload(self._memory.provenance)] * foreign
        self._changed = True
        self._write(b"".join(map(framed, payloads)))
        self._memory.keep(row)

    def close(self) -> None:
        """Writes the HDF5 file and removes the journal; the second call does nothing.

        Raises:
            TraceError: The file could not be written. The rows stay in the journal, where reading and the next writer find them.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._changed:
                replace_file(self.path, file_image(self._memory.tree()))
        except OSError as error:
            self._file.release(remove=False)
            kept = f"All {len(self.rows)} rows are safe in {self._file.path} and the file before it; both are read together."
            raise _unwritable(self.path, error, kept) from error
        except BaseException:
            self._file.release(remove=False)
            raise
        self._file.release(remove=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        try:
            os.ftruncate(self._file.fd, self._end)
            os.lseek(self._file.fd, self._end, os.SEEK_SET)
            write_all(self._file.fd, data)
            os.fsync(self._file.fd)
        except OSError as error:
            self._cut_back()
            raise _unwritable(self._file.path, error, f"The {len(self.rows)} rows before it are safe.") from error
        self._end += len(data)

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._file.fd, self._end)
        except OSError:
            # The next write cuts first, and reading drops the unfinished record: nothing is lost by leaving it.
            return


def file_image(tree: xr.DataTree) -> bytes:
    """The HDF5 file of a tree, byte for byte, with the commit mark at its end.

    It is made in memory: an HDF5 library that runs into a full disk may crash the process, a plain write does not.

    Args:
        tree: As `dataset_tree` makes it.
    """
    storable = xr.DataTree.from_dict({node.path: _storable(node.to_dataset(inherit=False)) for node in tree.subtree})
    encoding = {node.path: _encoding(node.to_dataset(inherit=False)) for node in storable.subtree}
    image = bytes(storable.to_netcdf(None, engine="h5netcdf", encoding=encoding))
    return image + MARK + sha256(image).hexdigest().encode("ascii") + b"\n"


def replace_file(path: Path, content: bytes) -> None:
    """Puts a file in the place of another at once: whoever opens it sees the old content or the new one, whole.

    Raises:
        OSError: It could not be written; the old one is untouched.
    """
    fresh = _stale(path)
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        if path.exists():
            shutil.copymode(path, fresh)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_all(fd: int, data: bytes) -> None:
    """Writes all bytes, however many the system takes at once."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_folder(folder: Path) -> None:
    """Makes names in a folder survive a power failure, where the system can."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _locked(trace: Path) -> LockedFile:
    path = journal_path(trace)
    if trace.is_dir():
        raise TraceError(f"{trace} is a folder; name the HDF5 file to write")
    try:
        return LockedFile(path)
    except BusyError as error:
        holder = read_journal(path).holder or "another process"
        raise TraceError(
            f"{trace} is being written by {holder} ({error}). Wait for it, or write to another trace file and open both together."
        ) from error
    except OSError as error:
        raise _unwritable(path, error, "Nothing was written.") from error


def _unwritable(path: Path, error: OSError, kept: str) -> TraceError:
    if not path.parent.is_dir():
        remedy = f"The folder {path.parent} does not exist: make it, or name another."
    else:
        remedy = "Make room or choose a place that can be written to, then run the same command again: it goes on where it stopped."
    return TraceError(f"cannot write {path}: {error.strerror or error}. {kept} {remedy}")


def _recovery(journal: Journal) -> tuple[str, ...]:
    notes: list[str] = []
    if journal.rows:
        notes.append(f"{len(journal.rows)} rows recovered from a run that was interrupted")
    if journal.torn:
        notes.append(f"one unfinished row ({journal.torn} bytes) dropped; it had not been committed")
    return tuple(notes)


def _stale(path: Path) -> Path:
    return path.with_name(path.name + ".part")


# What an HDF5 text cannot hold is written as U+001A and four hexadecimal digits.
_UNSTORABLE = re.compile("[\x00\x1a\ud800-\udfff]")


def escaped(text: str) -> str:
    """A text without what HDF5 cannot hold: NUL, lone surrogates, and U+001A, which stands for them."""
    return _UNSTORABLE.sub(lambda found: f"\x1a{ord(found.group()):04x}", text)


def _storable(group: xr.Dataset) -> xr.Dataset:
    texts = {name: array for name, array in group.variables.items() if array.dtype == object}
    changed = {name: (array.dims, _each(array.values), array.attrs) for name, array in texts.items()}
    made = group.assign_coords({name: value for name, value in changed.items() if name in group.coords})
    made = made.assign({name: value for name, value in changed.items() if name not in group.coords})
    for array in made.variables.values():
        array.attrs = {name: escaped(value) for name, value in array.attrs.items()}
    return made


def _each(values: Any) -> Any:
    made = np.empty(values.shape, dtype=object)
    made[...] = [escaped(text) for text in values.tolist()]
    return made


def _encoding(group: xr.Dataset) -> dict[str, dict[str, Any]]:
    packed = {"zlib": True, "complevel": 4, "shuffle": True, "fletcher32": True}
    numbers = {name: array for name, array in group.variables.items() if array.dtype != object and array.size}
    return {str(name): packed for name in numbers if name not in group.indexes}
