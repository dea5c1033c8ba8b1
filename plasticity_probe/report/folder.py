"""The folder of a report: an older report is replaced file by file, anything else that lies there is never touched."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from plasticity_probe.errors import ReportError

PAGE, VERDICT = "index.html", "verdict.json"
STAGE = ".report-"
"""How the hidden folder begins in which a report lies until all of it is on the disk."""
_OURS = re.compile(r"(figures|tables)/[a-z0-9-]+\.(png|pdf|csv)")


def check_folder(out: Path) -> None:
    """Refuses a place that a report must not be written to, before anything is computed.

    Args:
        out: The folder of the report.

    Raises:
        ReportError: It is no folder, or holds other things than an older report.
    """
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise ReportError(f"expected a folder at {out}, found a file; name another folder with --out")
        held = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(STAGE))
    except OSError as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"the folder {out} cannot be read: {error}; name another one with --out") from error
    if held and _older(out) is None:
        listed = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise ReportError(
            f"expected a new folder, an empty one or that of an older report at {out}, found {listed}; name another folder with --out"
        )


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Writes all files of a report, the page last; those of an older report that the new one does not have are removed.

    Until every file is on the disk an older report is as it was. What an older report did not write is never touched.

    Args:
        out: The folder; made if it does not exist.
        files: Contents by path within the folder, `VERDICT` and `PAGE` among them.

    Raises:
        ReportError: The folder cannot be written, or holds something else.
    """
    check_folder(out)
    stage: Path | None = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        stale = [name for name in _older(out) or () if name not in files]
        stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=out))
        for name, content in files.items():
            _write(stage / name, content)
        # The page stands for the report: it changes when everything it links to is there.
        for name in sorted(files, key=lambda name: (name == PAGE, name == VERDICT)):
            (out / name).parent.mkdir(exist_ok=True)
            os.replace(stage / name, out / name)
        for name in stale:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(
            f"expected to write the report into {out}: {error}; make room or name another folder with --out"
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _older(out: Path) -> list[str] | None:
    """The figures and tables that an older report lists as its own; None where there is no older report."""
    try:
        told = json.loads((out / VERDICT).read_text(encoding="utf-8"))
        if not str(told["schema"]).startswith("plasticity_probe.verdict/") or not (out / PAGE).is_file():
            return None
        return [name for name in map(str, told["files"]) if _OURS.fullmatch(name)]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
