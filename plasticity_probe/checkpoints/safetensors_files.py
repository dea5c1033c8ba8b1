"""Reading and writing safetensors files: tensors and a JSON header, no code; with our metadata they are the package's own format."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from plasticity_probe.checkpoints.refusals import parsing, refused
from plasticity_probe.errors import UsageError
from plasticity_probe.whole_files import write_whole

OWN_KEY = "plasticity_probe"
_TIED_KEY = "plasticity_probe_tied"
_DIGEST_KEY = "plasticity_probe_sha256"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """The tensors of a safetensors file.

    Args:
        path: The file.

    Returns:
        Its tensors, in memory of their own; the metadata of its header; and whether this package wrote it.

    Raises:
        CheckpointError: The file is damaged, or claims to be ours and its metadata or checksum is not what we write.
    """
    with parsing(path), safe_open(path, framework="pt", device="cpu") as file:
        header = dict(file.metadata() or {})
        # A copy, because the file stays mapped otherwise, and a mapped file that somebody shortens ends the process.
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if OWN_KEY not in header:
        return state, header, False
    if header.get(_DIGEST_KEY) != _digest(state, header[OWN_KEY], header.get(_TIED_KEY, "")):
        raise refused(
            "corrupt checkpoint",
            path,
            "its content does not match the checksum written with it; fetch or save it again",
        )
    for alias, name in _object(header.get(_TIED_KEY, ""), path).items():
        if alias in state or name not in state:
            raise refused(
                "corrupt checkpoint", path, "its list of tied tensors does not fit its tensors; fetch or save it again"
            )
        state[alias] = state[name]
    return state, _object(header[OWN_KEY], path), True


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a safetensors file, from its header alone: no tensor is read, so the checksum is not verified either.

    Args:
        path: The file.

    Returns:
        The JSON object of the package's own format; the header's texts of another safetensors file.

    Raises:
        CheckpointError: The file is no safetensors file or damaged, or claims to be ours and its metadata is not what we write.
    """
    path = Path(path)
    with parsing(path), safe_open(path, framework="pt", device="cpu") as file:
        header = dict(file.metadata() or {})
    return _object(header[OWN_KEY], path) if OWN_KEY in header else header


def write_checkpoint(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a checkpoint of the package's own format, whole or not at all.

    The format is one safetensors file. Its header holds, as JSON text, the metadata under "plasticity_probe", the names of tied tensors
    (safetensors stores each memory once), and a checksum of all that, which safetensors lacks. It is written beside `path`, flushed to
    the disk and renamed, so that `path` never holds half a checkpoint.

    Args:
        path: Where to write, usually "*.safetensors"; a file that is there is replaced.
        state: The tensors by name; those that are the same memory stay tied when they are read.
        metadata: What is known about them, as JSON: run, step, task, seed, architecture {"name": ..., its settings ...}, and so on.

    Raises:
        UsageError: The metadata is no JSON.
        CheckpointError: The file cannot be written there.
    """
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        owner = first.setdefault(_memory(tensor, name), name)
        if owner != name:
            tied[name] = owner
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items() if name not in tied}
    try:
        text, names = json.dumps(dict(metadata)), json.dumps(tied)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the metadata of a checkpoint must be JSON (texts, numbers, lists, dictionaries): {error}"
        ) from error
    header = {OWN_KEY: text, _TIED_KEY: names, _DIGEST_KEY: _digest(tensors, text, names)}
    try:
        write_whole(Path(path), save(tensors, header))
    except OSError as error:
        raise refused(
            "cannot be written", Path(path), f"{error.strerror}; choose a folder that exists and has room"
        ) from error


def _memory(tensor: Tensor, name: str) -> tuple[object, ...]:
    if tensor.numel() == 0:
        return (name,)  # empty tensors have no address to compare
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def _digest(state: Mapping[str, Tensor], *texts: str) -> str:
    digest = hashlib.sha256("\0".join(texts).encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _object(text: str, path: Path) -> dict[str, Any]:
    with parsing(path):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise refused(
            "corrupt checkpoint", path, f"its metadata should be a JSON object and is a {type(value).__name__}"
        )
    return value
