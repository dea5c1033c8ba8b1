"""How a checkpoint file is refused: one error for whatever a parser raises, with text from the file made harmless."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from plasticity_probe.errors import CheckpointError


def refused(kind: str, path: Path, detail: str) -> CheckpointError:
    """The error for a file that is refused.

    Args:
        kind: The kind of problem in a few words, such as "corrupt checkpoint".
        path: The file.
        detail: What was expected, what came, and what to do about it.

    Returns:
        An error that says all three.
    """
    return CheckpointError(f"{kind}: {path}: {detail}")


def shown(text: object, limit: int = 120) -> str:
    """Text that came from a file, on one line, without control characters and of bounded length."""
    line = "".join(character if character.isprintable() else " " for character in str(text)[: 4 * limit])
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def listed(names: Iterable[object], limit: int = 10) -> str:
    """The first names of a collection, each shown safely, and how many more there are."""
    every = [shown(name) for name in names]
    rest = len(every) - limit
    return ", ".join(every[:limit]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turns every exception of a parser into a `CheckpointError`.

    Parsers of damaged files raise almost anything (RuntimeError, UnpicklingError, OSError, UnicodeDecodeError, AssertionError,
    EOFError, KeyError, IndexError, TypeError, struct.error, MemoryError, RecursionError …), so no list of types would be complete.

    Args:
        path: The file that is being parsed.

    Raises:
        CheckpointError: In place of whatever exception the block raised.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        detail = f"the file cannot be parsed ({type(error).__name__}: {shown(error)}); it is damaged or incomplete, fetch or save it again"
        raise refused("corrupt checkpoint", path, detail) from error
