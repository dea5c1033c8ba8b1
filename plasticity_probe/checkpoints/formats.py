"""From a checkpoint file to a state dict, without running anything from the file."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plasticity_probe.checkpoints.refusals import listed, parsing, refused, shown
from plasticity_probe.checkpoints.safetensors_files import OWN_KEY, read_safetensors
from plasticity_probe.checkpoints.safetensors_files import write_checkpoint as write_checkpoint
from plasticity_probe.checkpoints.torch_files import (
    LEGACY_MAGIC,
    ZIP_MAGIC,
    check_nesting,
    read_torch_legacy,
    read_torch_zip,
)

# Where training code puts the weights, the live ones before their moving average.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
_AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
_MAX_WRAPPING = 4

_SMALLEST_LIMIT = 256 * 2**20
_LONGEST_HEADER = 100 * 2**20  # the limit of the safetensors format

_FOREIGN = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file; convert its weights to a state dict saved by torch.save or safetensors",
    b"\x93NUMPY": "a NumPy file; convert its weights to a state dict saved by torch.save or safetensors",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"GGUF": "a GGUF file; PyTorch weights are needed",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"<": "a web page or XML; the download probably failed",
    b"\x80": "a plain pickle that torch.save did not write; save a state dict with torch.save or safetensors",
}


@dataclass(frozen=True, eq=False)
class CheckpointFile:
    """What a checkpoint file holds.

    Args:
        path: The file.
        sha256: Its checksum, in hexadecimal.
        size: Its size in bytes.
        format: "plasticity_probe", "safetensors", "torch-zip" or "torch-legacy".
        state: The tensors of the state dict by name, on the CPU, prefixes as in the file.
        metadata: Plain data found beside the weights: the JSON of the package's own format; the header of another safetensors file; the
            numbers and texts beside a wrapped state dict (epoch, step, best_prec1). "unwrapped" names the key that the state dict was
            under, "dropped" its entries that are no tensors.
    """

    path: Path
    sha256: str
    size: int
    format: str
    state: dict[str, Tensor]
    metadata: Mapping[str, Any]


def read_checkpoint(path: str | Path, *, trust_pickle: bool = False, max_bytes: int | None = None) -> CheckpointFile:
    """Reads a checkpoint file of any PyTorch format on the CPU; nothing in it is executed unless `trust_pickle`.

    The format is recognised by content, never by name. Weights that lie under a key such as "state_dict" or "model" are unwrapped;
    moving averages are used only where there is nothing else.

    Args:
        path: The file.
        trust_pickle: Whether code from the file may run, which a whole pickled nn.Module needs. Only for files whose origin you trust.
        max_bytes: The most bytes that the file may unfold to in memory. By default four times its size, at least 256 MiB (our choice:
            torch and safetensors never compress, so an honest file unfolds to its own size).

    Returns:
        The state dict with checksum, format and metadata.

    Raises:
        CheckpointError: The file is missing, empty, damaged, of another format, unsafe, too large, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise refused("no checkpoint", path, _no_file(path))
    try:
        with path.open("rb") as file:
            return _read(file, path, trust_pickle, max_bytes)
    except OSError as error:
        raise refused("no checkpoint", path, f"the file cannot be read: {error.strerror or shown(error)}") from error


def _no_file(path: Path) -> str:
    if path.is_dir():
        return "a folder; name one of the checkpoint files in it (sharded checkpoints are not read: merge the shards first)"
    return "something that is no regular file" if path.exists() else "there is no such file"


def _read(file: BufferedReader, path: Path, trust_pickle: bool, max_bytes: int | None) -> CheckpointFile:
    size = os.fstat(file.fileno()).st_size
    limit = max_bytes if max_bytes is not None else max(_SMALLEST_LIMIT, 4 * size)
    if size > limit:
        raise refused(
            "unsafe checkpoint",
            path,
            f"{size:,} bytes, more than the {limit:,} allowed; if that is meant, raise max_bytes",
        )
    kind = _recognised(file, size, path)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if kind == "safetensors":
        state, metadata, own = read_safetensors(path)
        if not state:
            raise refused("no state dict", path, "the file holds no tensors")
        return CheckpointFile(path, sha256, size, OWN_KEY if own else kind, state, metadata)
    if kind == "torch-zip":
        saved = read_torch_zip(file, path, sha256=sha256, trust_pickle=trust_pickle, max_bytes=limit)
    else:
        saved = read_torch_legacy(file, path, sha256=sha256, trust_pickle=trust_pickle)
    with parsing(path):
        check_nesting(saved, path)
        entries, metadata = _unwrapped(saved, path)
        state = _tensors(entries, metadata, path)
    return CheckpointFile(path, sha256, size, kind, state, metadata)


def _recognised(file: BufferedReader, size: int, path: Path) -> str:
    """The format by content; leaves the file at its start."""
    head = file.read(512)
    file.seek(0)
    if not head:
        raise refused(
            "no checkpoint",
            path,
            "the file is empty; the program that wrote it probably stopped, use an earlier checkpoint",
        )
    if head.startswith(ZIP_MAGIC):
        return "torch-zip"
    if head.startswith(LEGACY_MAGIC):
        return "torch-legacy"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    found = next(
        (meaning for magic, meaning in _FOREIGN.items() if head.startswith(magic)), f"unknown content of {size:,} bytes"
    )
    raise refused("no checkpoint", path, f"expected a file of torch.save or safetensors, found {found}")


def _unwrapped(saved: object, path: Path) -> tuple[Mapping[Any, Any], dict[str, Any]]:
    """The state dict inside what was saved, and the plain values beside it."""
    metadata: dict[str, Any] = {}
    keys: list[str] = []
    for _ in range(_MAX_WRAPPING):
        if isinstance(saved, nn.Module):
            saved = saved.state_dict()
        if not isinstance(saved, Mapping):
            break
        key = next((key for key in (*_WRAPPERS, *_AVERAGES) if _holds_weights(saved.get(key))), None)
        if key is None:
            break
        keys.append(key)
        metadata |= _plain_values(saved)
        saved = saved[key]
    if keys:
        metadata["unwrapped"] = ".".join(keys)
    if not isinstance(saved, Mapping) or not any(isinstance(value, Tensor) for value in saved.values()):
        found = (
            f"a dictionary of {listed(saved, 8)}" if isinstance(saved, Mapping) else f"a {shown(type(saved).__name__)}"
        )
        raise refused(
            "no state dict", path, f"expected tensors by name, bare or under {listed(_WRAPPERS)}, found {found}"
        )
    return saved, metadata


def _holds_weights(value: object, levels: int = _MAX_WRAPPING) -> bool:
    if isinstance(value, nn.Module):
        return True
    if not isinstance(value, Mapping) or levels == 0:
        return False
    return any(isinstance(item, Tensor) for item in value.values()) or any(
        _holds_weights(value.get(key), levels - 1) for key in (*_WRAPPERS, *_AVERAGES)
    )


def _plain_values(saved: Mapping[Any, Any]) -> dict[str, Any]:
    """The numbers and short texts among the entries; a tensor of one number counts as a number."""
    values: dict[str, Any] = {}
    for name, value in saved.items():
        if isinstance(value, Tensor) and not value.is_meta and value.layout is torch.strided and value.numel() == 1:
            value = value.item()
        if isinstance(name, str) and (
            isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 1000)
        ):
            values[name] = value
    return values


def _tensors(entries: Mapping[Any, Any], metadata: dict[str, Any], path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in entries.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            state[name] = _dense(name, value, path)
        else:
            metadata.setdefault("dropped", []).append(shown(name))
    return state


def _dense(name: str, value: Tensor, path: Path) -> Tensor:
    if (
        type(value) not in (Tensor, nn.Parameter)
        or value.layout is not torch.strided
        or value.is_quantized
        or value.is_meta
    ):
        raise refused(
            "unsupported tensor", path, f"{shown(name)} is no dense tensor with values; save a dense state dict"
        )
    # A new tensor on the same memory, without attributes that the file may have set.
    tensor = Tensor.detach(value)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        shape = tuple(tensor.shape)
        raise refused(
            "unsafe checkpoint",
            path,
            f"{shown(name)} declares shape {shape} on {tensor.untyped_storage().nbytes():,} bytes",
        )
    return tensor
