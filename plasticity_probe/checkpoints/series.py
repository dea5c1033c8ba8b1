"""From paths and folders to an ordered series of checkpoints, and where each stands."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plasticity_probe.errors import CheckpointError

SUFFIXES = frozenset({".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors", ".tar"})
"""File names taken for checkpoints when a folder is given; a file named outright may have any."""


def find_checkpoints(paths: Iterable[str | Path]) -> list[Path]:
    """The checkpoint files of the given files and folders, each once, in the natural order of their names (step2 before step10).

    Args:
        paths: Files, and folders whose checkpoint files are taken, subfolders included.

    Raises:
        CheckpointError: A path does not exist, or a folder holds no checkpoint.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted((p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()), key=_natural)
            if not inside:
                raise CheckpointError(
                    f"expected checkpoints in {path}, but no file there ends in {', '.join(sorted(SUFFIXES))}. Name the files themselves."
                )
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise CheckpointError(f"there is no file or folder {path}. Check the path.")
    return sorted(found, key=_natural) if len(found) > 1 else list(found)


def standing(path: Path, metadata: Mapping[str, Any], index: int) -> tuple[str, int, int]:
    """Where a checkpoint stands: (run, step, task), the last two -1 where unknown.

    The step comes from the file's metadata (step, global_step, then epoch), else from the last number in its name, else it is its index in the
    series. The run comes from the metadata, else from the folder's name.

    Args:
        path: The file.
        metadata: What was found in it beside the weights.
        index: Its place in the series.
    """
    known = (metadata.get(key) for key in ("step", "global_step", "epoch"))
    step = next((int(value) for value in known if isinstance(value, int | float)), None)
    if step is None:
        numbers = re.findall(
            r"(?<![0-9a-zA-Z])\d{1,15}(?![0-9a-zA-Z])|(?<=step)\d{1,15}|(?<=epoch)\d{1,15}|(?<=task)\d{1,15}", path.stem
        )
        step = int(numbers[-1]) if numbers else index
    task = metadata.get("task")
    return str(metadata.get("run") or path.resolve().parent.name), step, int(task) if isinstance(task, int) else -1


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]
