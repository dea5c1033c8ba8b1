"""Values that come from files and command lines, checked against the annotations of the dataclasses that they are meant for."""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from plasticity_probe.errors import UsageError


def as_object(entry: Any, what: str) -> Mapping[str, Any]:
    """An entry that should be a JSON object.

    Args:
        entry: What was read.
        what: What it stands for, for the message.

    Raises:
        UsageError: It is none.
    """
    if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in entry):
        raise UsageError(f"{what} should be an object of names and values, got {reprlib.repr(entry)}")
    return entry


def made(kind: Callable[..., Any], what: str, values: Mapping[str, Any]) -> Any:
    """A dataclass from JSON, its values checked for their kind before anything computes with them.

    Args:
        kind: The dataclass.
        what: What it stands for, for messages.
        values: Its values by name; lists stand for tuples, and those left out have their defaults.

    Raises:
        UsageError: Values that it does not have, lacks, or that are of another kind; or whatever it refuses itself.
    """
    parts = {part.name: part for part in dataclasses.fields(kind)}  # type: ignore[arg-type]
    known = f"it has {', '.join(parts)}" if parts else "it has no settings"
    if unknown := [name for name in values if name not in parts]:
        raise UsageError(f"{what} has no {', '.join(map(repr, unknown))}; {known}")
    blank = dataclasses.MISSING
    needed = [name for name, part in parts.items() if part.default is blank and part.default_factory is blank]
    if missing := [name for name in needed if name not in values]:
        raise UsageError(f"{what} needs a value of {', '.join(missing)}; {known}")
    given = {name: tupled(value) for name, value in values.items()}
    check_kinds(kind, given, what)
    return kind(**given)


def tupled(value: Any) -> Any:
    """A value of JSON with tuples in place of its lists, also inside each other.

    Args:
        value: The value.
    """
    return tuple(map(tupled, value)) if isinstance(value, list) else value


def check_kinds(kind: Any, values: Mapping[str, Any], what: str) -> None:
    """Refuses values of another kind than the annotations of a dataclass say, such as a text or true for a number.

    Args:
        kind: The dataclass.
        values: Values of it by name.
        what: What it stands for, for the message.

    Raises:
        UsageError: Naming every value that is of another kind.
    """
    hints = get_type_hints(kind)
    wrong = [
        f"{name} should be {_called(hints[name])}, got {reprlib.repr(value)}"
        for name, value in values.items()
        if not _fits(value, hints[name])
    ]
    if wrong:
        raise UsageError(f"{what} cannot be so: {'; '.join(wrong)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, kinds = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in kinds
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in kinds)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, kinds[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool  # Python takes True for the number 1
    return isinstance(value, (int, float) if hint is float else origin or hint)  # JSON writes 1 for 1.0


def _called(hint: Any) -> str:
    origin, kinds = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, kinds))
    if origin in (Union, UnionType):
        return " or ".join(map(_called, kinds))
    if origin is tuple:
        return f"a list of {_called(kinds[0])}"
    names = {
        NoneType: "none",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Mapping: "an object",
    }
    return names.get(origin or hint) or f"a {hint.__name__}"
