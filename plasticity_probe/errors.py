"""Every error that this package raises on purpose.

    PlasticityProbeError
    ├── UsageError (ValueError)            the caller asked for something that cannot be            exit code 2
    │   ├── UnknownNameError (KeyError)    no probe, model, data set or protocol of that name       exit code 2
    │   └── PlanError                      several such problems, found together before any work    exit code 2
    ├── InputError (ValueError)            what was handed in is refused                            exit code 4
    │   ├── CheckpointError                an unreadable, unsafe or unfitting checkpoint file
    │   ├── DataError                      missing, malformed or mismatching data
    │   └── SubjectError                   a model, loss and data that do not go together
    ├── TraceError (OSError)               a trace cannot be read or written                        exit code 5
    ├── ReportError (OSError)              a report cannot be written                               exit code 5
    ├── RunError (OSError)                 a run folder cannot be read or written                   exit code 5
    └── BudgetError (MemoryError)          the work would exceed the memory or time allowed         exit code 6

A message says what was expected, what came instead and what to do about it. What goes wrong inside one measurement of one checkpoint
(non-finite weights, no convergence) is no exception but a `Status` in its record.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import ClassVar


class PlasticityProbeError(Exception):
    """The root of all errors that this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(PlasticityProbeError, ValueError):
    """The caller asked for something that cannot be."""

    exit_code = 2


class UnknownNameError(UsageError, KeyError):
    """No such name; the message lists near misses and all that exist.

    Args:
        kind: What was looked for, in the singular, such as "probe".
        name: The name that came.
        known: The names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        near = get_close_matches(name, self.known, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        super().__init__(f"there is no {kind} named {name!r}.{hint} Known: {', '.join(self.known) or 'none'}.")

    def __str__(self) -> str:
        return str(self.args[0])


class PlanError(UsageError):
    """Several problems of one request, found together before any work was done.

    Args:
        problems: One sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"- {problem}" for problem in problems) if len(problems) > 1 else problems[0])


class InputError(PlasticityProbeError, ValueError):
    """What was handed in is refused."""

    exit_code = 4


class CheckpointError(InputError):
    """A checkpoint file that cannot be read, is not safe to read, or fits no network."""


class DataError(InputError):
    """Data that is missing, malformed or does not match what it is used for."""


class SubjectError(InputError):
    """A model, a loss and data that do not go together, or do not repeat themselves."""


class TraceError(PlasticityProbeError, OSError):
    """A trace cannot be read or written."""

    exit_code = 5


class ReportError(PlasticityProbeError, OSError):
    """A report cannot be written."""

    exit_code = 5


class RunError(PlasticityProbeError, OSError):
    """A run folder cannot be read or written, or lacks the room that the run needs."""

    exit_code = 5


class BudgetError(PlasticityProbeError, MemoryError):
    """The work would exceed the memory or time allowed."""

    exit_code = 6
