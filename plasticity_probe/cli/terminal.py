"""What the terminal shows: tables and progress, with untrusted names as plain text, errors with their exit codes."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Turns the package's errors into a message on stderr and their exit code; an interrupt becomes 130.

    Args:
        command: A command function.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from plasticity_probe.errors import PlasticityProbeError

        try:
            return command(*args, **kwargs)
        except PlasticityProbeError as error:
            typer.echo(f"error: {printable(str(error))}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo(
                "interrupted: what was finished is kept; the same command goes on from there (probe train with --resume, probe analyze where "
                "--trace was given).",
                err=True,
            )
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output went away, as `probe show ... | head` does.
            sys.stderr.close()
            raise typer.Exit(0) from None

    return run


def console() -> "Console":
    """A console on stdout; NO_COLOR, dumb terminals and pipes are honoured."""
    from rich.console import Console

    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=max(made.width, 120))


def print_whole(out: "Console", table: "Table") -> None:
    """Prints a table whose numbers are never cut: one that is wider than the terminal runs on.

    Args:
        out: The console.
        table: The table.
    """
    unbounded = out.options.update(max_width=10_000)
    out.width = max(out.width, out.measure(table, options=unbounded).maximum)
    out.print(table)


def plain(text: str, style: str = "") -> "Text":
    """Text as it is: markup in names has no effect, control characters are shown, not sent."""
    from rich.text import Text

    return Text(printable(text), style=style)


def printable(text: str) -> str:
    """A text without control characters, which could drive a terminal; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr with the time that is left.

    Args:
        quiet: Show none.

    Yields:
        report(done, total, what is being done).
    """
    if quiet:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=printable(text))
