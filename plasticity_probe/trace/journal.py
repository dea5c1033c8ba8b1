"""The journal of a trace: rows on their way to the file, each safe on disk before the next one is measured.

`<trace>.journal` begins with `MAGIC` and the schema version as a 32-bit integer. Records follow:

    marker (4 bytes) | length | CRC-32 of the payload | CRC-32 of these two numbers | payload | end mark (1 byte)

All numbers are little-endian. A payload is a JSON header, preceded by its 32-bit length, and the raw float64 arrays it announces. The first
record of each writer is its session (process, host, provenance), all others are rows.

A writer that is killed leaves a prefix of a record at the end: it is dropped, for its row was never confirmed. Anything else that does not
match its checksum is damage and refused, so that no row is lost unnoticed.
"""

import json
import os
import struct
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from plasticity_probe.errors import TraceError, UsageError
from plasticity_probe.trace.layout import SCHEMA_VERSION, Row, Variable

MAGIC = b"\x89PPJ\r\n\x1a\n"
MARKER, END = b"\x1eREC", b"\n"
_VERSION = struct.Struct("<I")
_SIZES = struct.Struct("<II")
_HEAD = struct.Struct("<4sIII")
START = MAGIC + _VERSION.pack(SCHEMA_VERSION)


@dataclass(frozen=True)
class Journal:
    """What a journal holds.

    Args:
        rows: The rows in the order they were committed.
        end: Offset of the first byte after the last whole record.
        torn: Number of bytes after it: a record that was never confirmed.
        holder: Process and host of the last writer, such as "process 123 on host"; empty if unknown.
    """

    rows: tuple[Row, ...] = ()
    end: int = 0
    torn: int = 0
    holder: str = ""


def journal_path(trace: Path) -> Path:
    """Where the journal of a trace lies: beside it."""
    return trace.with_name(trace.name + ".journal")


def framed(payload: bytes) -> bytes:
    """A payload as a record."""
    sizes = _SIZES.pack(len(payload), zlib.crc32(payload))
    return MARKER + sizes + struct.pack("<I", zlib.crc32(sizes)) + payload + END


def session_payload(provenance: str) -> bytes:
    """The record with which each writer introduces itself."""
    host = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    return _payload({"kind": "session", "pid": os.getpid(), "host": host, "provenance": provenance}, [])


def row_payload(row: Row) -> bytes:
    """A row as bytes; its provenance is that of the session before it."""
    header = {name: getattr(row, name) for name in _PLAIN}
    header |= {"kind": "row", "conditions": dict(row.conditions), "labels": dict(row.labels), "variables": {}}
    blocks: list[bytes] = []
    for name, variable in row.variables.items():
        about: dict[str, Any] = {"dims": variable.dims, "shape": variable.data.shape, "attrs": dict(variable.attrs)}
        if variable.kind == "text":
            about["text"] = variable.data.item()
        else:
            blocks.append(variable.data.astype("<f8").tobytes())
        header["variables"][name] = about
    return _payload(header, blocks)


def read_journal(path: Path) -> Journal:
    """Reads a journal without changing it; one that does not exist is empty.

    Raises:
        TraceError: It is no journal, is of a newer version, or is damaged other than by an unfinished last record.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Journal()
    except OSError as error:
        raise TraceError(f"cannot read the journal {path}: {error}") from error
    if START.startswith(data[: len(START)]) and len(data) < len(START):
        return Journal(torn=len(data))
    _check_start(path, data)
    return _records(path, data)


def _check_start(path: Path, data: bytes) -> None:
    if not data.startswith(MAGIC):
        raise TraceError(f"{path}: expected the journal of a trace, got another kind of file; move it away")
    version = _VERSION.unpack_from(data, len(MAGIC))[0]
    if version != SCHEMA_VERSION:
        raise TraceError(
            f"{path}: expected a journal of schema version {SCHEMA_VERSION}, got {version}. Finish it with the version of "
            "plasticity_probe that began it: open the trace there once for writing."
        )


def _records(path: Path, data: bytes) -> Journal:
    rows: list[Row] = []
    at, provenance, holder = len(START), "{}", ""
    while at < len(data):
        payload = _payload_at(path, data, at, len(rows))
        if payload is None:
            break
        try:
            header, arrays = _unpacked(payload)
            if header["kind"] == "session":
                provenance, holder = header["provenance"], f"process {header['pid']} on {header['host']}"
            else:
                rows.append(_row(header, arrays, provenance))
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError, UsageError) as error:
            raise TraceError(f"{path}: record at byte {at} has a right checksum but holds no row: {error}") from error
        at += _HEAD.size + len(payload) + len(END)
    return Journal(tuple(rows), at, len(data) - at, holder)


def _payload_at(path: Path, data: bytes, at: int, intact: int) -> bytes | None:
    """The payload of the record at an offset, or None if what stands there is an unfinished last record."""
    rest = len(data) - at
    if rest < _HEAD.size:
        return None
    marker, length, crc, check = _HEAD.unpack_from(data, at)
    if marker != MARKER or zlib.crc32(_SIZES.pack(length, crc)) != check:
        # After a power failure a file may end in zeros where the last record was to be.
        if len(data[at:].rstrip(b"\0")) < _HEAD.size:
            return None
        raise _damaged(path, at, intact)
    begin = at + _HEAD.size
    payload = data[begin : begin + length]
    whole = rest >= _HEAD.size + length + len(END)
    if whole and zlib.crc32(payload) == crc:
        return payload
    if whole and (data[begin + length : begin + length + 1] != b"\0" or any(data[begin + length :])):
        raise _damaged(path, at, intact)
    return None


def _damaged(path: Path, at: int, intact: int) -> TraceError:
    return TraceError(
        f"{path}: damaged at byte {at}; {intact} rows before it are intact. Restore the journal from a copy, or move it away to go on with "
        "the rows that are in the trace file and measure the others again."
    )


_PLAIN = (
    *("probe", "settings", "run", "step", "task", "checkpoint", "sha256", "network", "replicate"),
    *("status", "message", "seconds", "peak_bytes", "seed"),
)


def _payload(header: dict[str, Any], blocks: list[bytes]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    return b"".join([_VERSION.pack(len(text)), text, *blocks])


def _unpacked(payload: bytes) -> tuple[dict[str, Any], memoryview]:
    size = _VERSION.unpack_from(payload)[0]
    begin = _VERSION.size + size
    return json.loads(payload[_VERSION.size : begin]), memoryview(payload)[begin:]


def _row(header: dict[str, Any], arrays: memoryview, provenance: str) -> Row:
    variables: dict[str, Variable] = {}
    at = 0
    for name, about in header["variables"].items():
        if "text" in about:
            data = np.array(about["text"], dtype=object)
        else:
            size = 8 * prod(about["shape"])
            data = np.frombuffer(arrays[at : at + size], dtype="<f8").reshape(about["shape"])
            at += size
        variables[name] = Variable(tuple(about["dims"]), data, about["attrs"])
    labels = {dim: tuple(names) for dim, names in header["labels"].items()}
    plain = {name: header[name] for name in _PLAIN}
    return Row(**plain, conditions=header["conditions"], labels=labels, variables=variables, provenance=provenance)
