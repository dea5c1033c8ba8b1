"""One writer at a time: an advisory lock on a file that a killed process gives up by itself."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from plasticity_probe.errors import TraceError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class BusyError(TraceError):
    """Another writer holds the file."""


class LockedFile:
    """A file opened for reading and writing by this process alone; made if need be.

    With flock, the kernel gives the lock back whenever and however the process ends. Where there is no flock (Windows, some cluster file
    systems) a second file `<path>.lock`, made by its creator alone, stands for it; it outlives a killed process and names it.

    Args:
        path: The file.

    Raises:
        BusyError: Another process holds it.
        OSError: It cannot be opened or made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._note: Path | None = None
        self.fd = self._locked()

    def release(self, *, remove: bool) -> None:
        """Gives the file back.

        Args:
            remove: Whether to remove it as well, while nobody else can have it.
        """
        if self._note is None and remove:
            self.path.unlink(missing_ok=True)
        os.close(self.fd)
        if self._note is not None:
            if remove:
                self.path.unlink(missing_ok=True)
            self._note.unlink(missing_ok=True)

    def _locked(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                self._lock(fd)
                # Between opening and locking, the last holder may have removed the file: then this lock guards nothing.
                if _same_file(fd, self.path):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            self._unlock()
            os.close(fd)

    def _lock(self, fd: int) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                raise BusyError(f"{self.path} is being written by another process") from error
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        self._note = self._take_note()

    def _take_note(self) -> Path:
        note = self.path.with_name(self.path.name + ".lock")
        try:
            fd = os.open(note, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError as error:
            holder = note.read_text(errors="replace")[:200] if note.exists() else "a process that has just ended"
            raise BusyError(
                f"{note} says that {holder} is writing; if that process has ended, remove {note}"
            ) from error
        with os.fdopen(fd, "w") as file:
            file.write(f"process {os.getpid()}")
        return note

    def _unlock(self) -> None:
        if self._note is not None:
            self._note.unlink(missing_ok=True)
            self._note = None


def _same_file(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False
