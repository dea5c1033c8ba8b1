"""Reading what `torch.save` wrote, the zip format and the older plain-pickle one, without running anything from the file."""

import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from plasticity_probe.checkpoints.refusals import listed, parsing, refused, shown
from plasticity_probe.checkpoints.stand_ins import stand_ins

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5  # magic number, protocol version, system facts, the object, the keys of its storages
_FOLDER = 0x10  # the bit of a zip entry's external attributes that MS-DOS reads as "folder"

MAX_DEPTH = 64
MAX_ENTRIES = 1_000_000


def read_torch_zip(file: IO[bytes], path: Path, *, sha256: str, trust_pickle: bool, max_bytes: int) -> object:
    """The object in a zip file that `torch.save` wrote (the default format since torch 1.6), on the CPU.

    Args:
        file: The open file.
        path: Where it is, for messages.
        sha256: Its checksum, for the message that refuses code.
        trust_pickle: Whether code from the file may run.
        max_bytes: The most bytes that its entries may unfold to.

    Returns:
        What was saved.

    Raises:
        CheckpointError: The file is damaged, is no torch file, unfolds to more than `max_bytes`, or would run code.
    """
    with parsing(path):
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            _check_entries(archive, path, max_bytes)
            record = next(name for name in archive.namelist() if name.lower().endswith("data.pkl"))
            if not trust_pickle:
                with archive.open(record) as pickled:
                    _check_hashing(pickled, path)
        file.seek(0)
        return _load(file, path, sha256, trust_pickle)


def read_torch_legacy(file: IO[bytes], path: Path, *, sha256: str, trust_pickle: bool) -> object:
    """The object in a file of torch before 1.6: consecutive pickles, then the raw storages; arguments as in `read_torch_zip`."""
    with parsing(path):
        if not trust_pickle:
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                _check_hashing(file, path)
        file.seek(0)
        loaded = _load(file, path, sha256, trust_pickle)
        if rest := _bytes_left(file):
            # A damaged list of storages leaves some of them unread: uninitialised memory would pass for weights.
            raise refused("corrupt checkpoint", path, f"{rest} bytes belong to no tensor; fetch or save it again")
        return loaded


def check_nesting(saved: object, path: Path) -> None:
    """Refuses what is nested deeper or holds more entries than a checkpoint does; every container is looked at once.

    Args:
        saved: What the file held.
        path: The file, for messages.

    Raises:
        CheckpointError: More than 64 levels or a million entries (our choice: real checkpoints have under 10 levels and
            some ten thousand entries; the limit exists so that later code may recurse and list freely).
    """
    waiting: list[tuple[object, int]] = [(saved, 1)]
    visited: set[int] = set()
    entries = 0
    while waiting:
        container, depth = waiting.pop()
        if not isinstance(container, Mapping | list | tuple | set) or id(container) in visited:
            continue
        visited.add(id(container))
        entries += len(container)
        if depth > MAX_DEPTH or entries > MAX_ENTRIES:
            limits = (
                f"nested deeper than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_ENTRIES:,} entries"
            )
            raise refused(
                "unsafe checkpoint", path, f"{limits}; save the state dict alone: torch.save(model.state_dict(), ...)"
            )
        items = container.values() if isinstance(container, Mapping) else container
        waiting.extend((item, depth + 1) for item in items)


def _bytes_left(file: IO[bytes]) -> int:
    position = file.tell()
    return file.seek(0, 2) - position


def _check_entries(archive: zipfile.ZipFile, path: Path, max_bytes: int) -> None:
    # torch finds entries whatever their case, so names that differ only by case are one.
    names = [name.lower() for name in archive.namelist()]
    if any(name.endswith("constants.pkl") for name in names):
        remedy = "save the weights instead: torch.save(torch.jit.load(file).state_dict(), ...)"
        raise refused("TorchScript archive", path, f"it holds code, and only weights are read; {remedy}")
    if sum(name.endswith("data.pkl") for name in names) != 1 or len(set(names)) != len(names):
        raise refused(
            "no torch checkpoint", path, f"a zip file without exactly one data.pkl; it holds {listed(names, 5)}"
        )
    # torch leaves the memory of an entry that is marked as a folder unfilled, without an error.
    if folders := [entry.filename for entry in archive.infolist() if entry.is_dir() or entry.external_attr & _FOLDER]:
        raise refused("corrupt checkpoint", path, f"{shown(folders[0])} is marked as a folder; fetch or save it again")
    declared = sum(entry.file_size for entry in archive.infolist())
    if declared > max_bytes:
        detail = f"its entries unfold to {declared:,} bytes, more than the {max_bytes:,} allowed; if that is meant, raise max_bytes"
        raise refused("unsafe checkpoint", path, detail)
    # torch does not compare the checksums that its own files carry, so a flipped bit would pass as a weight.
    if (damaged := archive.testzip()) is not None:
        raise refused(
            "corrupt checkpoint", path, f"the checksum of {shown(damaged)} does not match; fetch or save it again"
        )


def _check_hashing(pickled: IO[bytes], path: Path) -> None:
    """Follows one pickle without executing it and refuses tuples that could not be hashed in bounded time and stack.

    Tuples are the only containers that Python hashes recursively, in C and without a limit: as a dictionary key, one nested 100 000
    deep ends the process, and one that holds itself twice, 60 times over, never ends. Each stack item stands for its (depth, size)
    as a tuple, None for a mark.
    """
    stack: list[tuple[int, int] | None] = []
    memo: dict[object, tuple[int, int] | None] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        items = _popped(stack, opcode)
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name.startswith("TUPLE"):
            depth, size = 1 + max((depth for depth, _ in items), default=0), 1 + sum(size for _, size in items)
            if depth > MAX_DEPTH or size > MAX_ENTRIES:
                limit = f"a tuple nested deeper than {MAX_DEPTH} levels or of more than {MAX_ENTRIES:,} entries"
                raise refused("unsafe checkpoint", path, f"{limit}; no checkpoint needs one")
            stack.append((depth, size))
        else:
            stack.extend(None if slot is pickletools.markobject else (0, 1) for slot in opcode.stack_after)


def _popped(stack: list[tuple[int, int] | None], opcode: pickletools.OpcodeInfo) -> list[tuple[int, int]]:
    """Takes from the stack what the opcode takes: a fixed number of items, or all above a mark, the mark, and a fixed number."""
    fixed, items = list(opcode.stack_before), []
    if pickletools.markobject in fixed:
        fixed = fixed[: fixed.index(pickletools.markobject)]
        while (item := stack.pop()) is not None:
            items.append(item)
    return items + [item for _ in fixed if (item := stack.pop()) is not None]


def _load(file: IO[bytes], path: Path, sha256: str, trust_pickle: bool) -> object:
    with warnings.catch_warnings():
        # torch comments on pickle protocols and storage classes, nothing that a reader could act on.
        warnings.simplefilter("ignore")
        if trust_pickle:
            return torch.load(file, map_location="cpu", weights_only=False)
        with safe_globals(stand_ins()):
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except UnpicklingError as error:
                if not (names := _foreign_globals(file, str(error))):
                    raise
                detail = (
                    f"besides tensors it names code to be run: {listed(names)}. Save the state dict alone, or, only if you trust where "
                    f"the file comes from, read it with --trust-pickle (Python: trust_pickle=True), which would run code from the file "
                    f"(sha256 {sha256})"
                )
                raise refused("unsafe checkpoint", path, detail) from None


def _foreign_globals(file: IO[bytes], message: str) -> list[str]:
    """The globals that a pickle names and that are not allowed: all of them for a zip file, else the one that torch's message names."""
    file.seek(0)
    if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
        file.seek(0)
        return sorted(get_unsafe_globals_in_checkpoint(file))
    return re.findall(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
