"""Files that are whole, old or new, whenever a process is killed."""

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside its place, flushes it to the disk and renames it, so that its place never holds half of it.

    A process that is killed meanwhile leaves a hidden `.<name>.*.part` beside it.

    Args:
        path: Where; a file that is there is replaced.
        data: All of it.

    Raises:
        OSError: It cannot be written; what was there before is whole.
    """
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)  # already gone unless something went wrong
