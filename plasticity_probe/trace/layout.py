"""What a trace holds: its names, its version, and the rows it is made of. docs/trace-schema.md says the same for readers of the file.

A trace has one group for each probe label and in it one row for each measurement of a checkpoint. A `Row` is that measurement as plain
text and NumPy arrays, so that nothing in this folder needs torch.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from math import isnan
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from plasticity_probe.errors import UsageError

SCHEMA = "plasticity_probe trace"
SCHEMA_VERSION = 1

ROW = "row"
PROVENANCE, SESSIONS = "provenance", "sessions"
POSITION_OF, LENGTH_OF = "position_of_", "length_of_"
QUANTITIES = "quantities"
ATTRIBUTES = ("long_name", "units", "summary", "shown", "role")

# Attributes of an HDF5 object hold at most 64 KiB; what goes into one stays well below, so that a row once accepted can be written.
TEXT_LIMIT = 30_000
NAME_LIMIT = 200
COUNT_LIMIT = 256

Kind = Literal["number", "text"]


@dataclass(frozen=True)
class Column:
    """A coordinate that every group has: one value for each row.

    Args:
        kind: How it is stored: "text", "int" (64 bit) or "float" (64 bit).
        attrs: Its meaning and units.
    """

    kind: Literal["text", "int", "float"]
    attrs: Mapping[str, str]


def _column(kind: Literal["text", "int", "float"], meaning: str, units: str | None = None) -> Column:
    return Column(kind, {"long_name": meaning} | ({} if units is None else {"units": units}))


COLUMNS: Mapping[str, Column] = {
    "run": _column("text", "name of the training run"),
    "step": _column("int", "training step of the checkpoint; -1 if unknown"),
    "task": _column("int", "index of the task being learned at that step; -1 if unknown"),
    "checkpoint": _column("text", "path of the checkpoint as it was given"),
    "sha256": _column("text", "SHA-256 of the checkpoint's content"),
    "network": _column("text", "'checkpoint' for the weights in the file, 'fresh' for newly initialised ones"),
    "replicate": _column("int", "number of the repetition"),
    "status": _column("text", "how the measurement ended; 'ok' means that its numbers can be relied on"),
    "message": _column("text", "what happened if the status is not 'ok'"),
    "seconds": _column("float", "duration of the measurement", "s"),
    "peak_bytes": _column("float", "peak memory of the measurement", "byte"),
    "seed": _column("int", "seed of the random draws"),
    "settings": _column("text", "settings of the probe and conditions that make rows comparable, as a JSON object"),
    "conditions": _column("text", "conditions of this measurement, as a JSON object"),
    "number": _column("int", "place of the row among all rows of the trace, in the order of measurement"),
    "session": _column("int", "entry of /provenance that says which program wrote the row"),
    "measured": _column("int", "1 if the row holds quantities, 0 if the measurement gave none"),
}
RESERVED = frozenset({*COLUMNS, ROW, SESSIONS, PROVENANCE, "trace", QUANTITIES})


class Key(NamedTuple):
    """What a row is a measurement of; two rows with the same key are the same measurement made twice.

    Content (`sha256`) counts, not the path. Run and step belong to it because the random draws depend on the step, and because two runs
    that share a checkpoint (their common initialisation, say) each need a row of their own.
    """

    probe: str
    settings: str
    run: str
    step: int
    sha256: str
    network: str
    replicate: int


@dataclass(frozen=True, eq=False)
class Variable:
    """One quantity of a row.

    Args:
        dims: Names of its dimensions, without the row; empty for a scalar.
        data: float64 numbers of that many dimensions, NaN where a number is unknown; or one text, as an array without dimensions.
        attrs: Its meaning: any of `ATTRIBUTES`.

    Raises:
        UsageError: Dimensions, data and attributes do not go together, or could not be stored.
    """

    dims: tuple[str, ...]
    data: NDArray[Any]
    attrs: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        raw = np.asarray(self.data)
        data = np.array(raw, dtype=object if raw.dtype.kind in "OUST" else np.float64)
        if data.dtype == object and (self.dims or not isinstance(data.item(), str)):
            raise UsageError(f"expected numbers, or one text without dimensions; got {raw.dtype} of shape {raw.shape}")
        if data.ndim != len(self.dims):
            raise UsageError(f"expected {len(self.dims)} dimensions {self.dims}, got an array of shape {data.shape}")
        _check_attributes(self.attrs)
        data.setflags(write=False)
        object.__setattr__(self, "dims", tuple(self.dims))
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "attrs", dict(self.attrs))

    @property
    def kind(self) -> Kind:
        """Whether it is stored as float64 or as text."""
        return "text" if self.data.dtype == object else "number"

    def __eq__(self, other: object) -> bool:
        """Same dimensions, meaning and data; NaN equals NaN."""
        if not isinstance(other, Variable):
            return NotImplemented
        same = (self.dims, self.kind, self.attrs) == (other.dims, other.kind, other.attrs)
        return same and np.array_equal(self.data, other.data, equal_nan=self.kind == "number")


@dataclass(frozen=True, eq=False)
class Row:
    """One measurement of one checkpoint by one probe: what a trace stores.

    Args:
        probe: The probe's label, the name of the group.
        settings: JSON object of the probe's settings and of the conditions that make rows comparable; made canonical.
        run: Name of the training run.
        step: Training step; -1 if unknown.
        task: Index of the task; -1 if unknown.
        checkpoint: Path of the checkpoint as it was given.
        sha256: Of the checkpoint's content.
        network: "checkpoint" or "fresh".
        replicate: Number of the repetition.
        status: How it ended, "ok" if its numbers can be relied on.
        message: What happened otherwise.
        seconds: Duration.
        peak_bytes: Peak memory; NaN if unknown.
        seed: Seed of the random draws.
        conditions: How it was measured: names and plain values.
        labels: Names of the entries of a dimension.
        variables: The quantities by name; none if the measurement failed.
        provenance: JSON object on the program that wrote the row; the trace fills it in.

    Raises:
        UsageError: The row could not be stored: a name that is taken or no identifier, lengths that contradict each other, a number
            beyond 64 bits.
    """

    probe: str
    settings: str
    run: str
    step: int
    task: int
    checkpoint: str
    sha256: str
    network: str
    replicate: int
    status: str
    message: str
    seconds: float
    peak_bytes: float
    seed: int
    conditions: Mapping[str, str | int | float] = field(default_factory=dict[str, str | int | float])
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    variables: Mapping[str, Variable] = field(default_factory=dict[str, Variable])
    provenance: str = "{}"

    def __post_init__(self) -> None:
        check_label(self.probe)
        for name in (item.name for item in fields(self) if item.name in COLUMNS and item.name != "conditions"):
            object.__setattr__(self, name, _plain(self.probe, name, getattr(self, name)))
        object.__setattr__(self, "settings", canonical_settings(self.settings))
        object.__setattr__(self, "provenance", canonical_object(self.provenance))
        object.__setattr__(self, "conditions", dict(self.conditions))
        object.__setattr__(self, "labels", {dim: tuple(names) for dim, names in self.labels.items()})
        object.__setattr__(self, "variables", dict(self.variables))
        _check_conditions(self)
        names: list[object] = [name for names in self.labels.values() for name in names]
        if not all(isinstance(name, str) for name in names):
            raise UsageError(f"{self.probe}: expected texts as labels of {list(self.labels)}")
        _check_names(self.probe, self.variables, {*self.labels, *_dims(self.variables.values())})
        _ = self.lengths

    @property
    def key(self) -> Key:
        """What it is a measurement of."""
        return Key(self.probe, self.settings, self.run, self.step, self.sha256, self.network, self.replicate)

    @property
    def lengths(self) -> dict[str, int]:
        """Number of entries of each dimension, in order of first mention: labels first.

        Raises:
            UsageError: Two quantities, or a quantity and the labels, disagree.
        """
        found = {dim: len(names) for dim, names in self.labels.items()}
        for name, variable in self.variables.items():
            for dim, size in zip(variable.dims, variable.data.shape, strict=True):
                if found.setdefault(dim, size) != size:
                    raise UsageError(f"{self.probe}.{name}: expected {found[dim]} entries along {dim}, got {size}")
        return found

    def __eq__(self, other: object) -> bool:
        """All fields are the same; NaN equals NaN."""
        if not isinstance(other, Row):
            return NotImplemented
        return all(_same(getattr(self, item.name), getattr(other, item.name)) for item in fields(self))


def canonical(value: Mapping[str, Any]) -> str:
    """A mapping as JSON in one definite spelling: sorted keys, no spaces, ASCII.

    Raises:
        UsageError: It holds something that is no plain data.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"expected plain data (text, numbers, lists, mappings), got {value!r:.200}: {error}"
        ) from error


@lru_cache(maxsize=4096)
def canonical_object(text: str) -> str:
    """A JSON object in canonical spelling.

    Raises:
        UsageError: The text is no JSON object.
    """
    try:
        value: object = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"expected a JSON object, got {text!r:.200}: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"expected a JSON object, got {text!r:.200}")
    return canonical(cast(dict[str, Any], value))


def canonical_settings(text: str) -> str:
    """Settings in canonical spelling.

    Raises:
        UsageError: The text is no JSON object, or longer than `TEXT_LIMIT`.
    """
    spelled = canonical_object(text)
    if len(spelled) > TEXT_LIMIT:
        raise UsageError(f"expected at most {TEXT_LIMIT} characters of settings, got {len(spelled)}: {spelled[:80]}...")
    return spelled


def check_label(label: str) -> None:
    """Refuses a probe label that cannot name a group.

    Raises:
        UsageError: It is empty, too long, not printable, reserved, starts or ends with a space or a dot, or holds a slash.
    """
    plain = label.isprintable() and label == label.strip(" .") and "/" not in label
    if not (plain and 0 < len(label) <= NAME_LIMIT and label not in RESERVED):
        raise UsageError(
            f"expected as a probe's label up to {NAME_LIMIT} printable characters without a slash, without a space or a dot at "
            f"either end and none of {sorted(RESERVED)}; got {label!r:.300}"
        )


def _plain(probe: str, name: str, value: Any) -> str | int | float:
    kind: str = COLUMNS[name].kind
    if kind == "text" and isinstance(value, str):
        return str(value)
    if kind == "int" and hasattr(value, "__index__") and -(2**63) <= value < 2**63:
        return int(value)
    if kind == "float" and hasattr(value, "__float__"):
        return float(value)
    raise UsageError(f"{probe}: expected {'a 64-bit integer' if kind == 'int' else kind} as {name}, got {value!r:.200}")


def _check_names(probe: str, variables: Iterable[str], dims: set[str]) -> None:
    names = [*variables, *dims]
    if len(names) > COUNT_LIMIT:
        raise UsageError(f"{probe}: expected at most {COUNT_LIMIT} quantities and dimensions, got {len(names)}")
    for name in names:
        if not name.isidentifier() or len(name) > NAME_LIMIT // 2:
            raise UsageError(
                f"{probe}: expected a Python identifier as a quantity's or dimension's name, got {name!r:.300}"
            )
        if name in RESERVED or name.startswith((POSITION_OF, LENGTH_OF)):
            raise UsageError(
                f"{probe}: the name {name!r} is taken by the trace itself; reserved are {sorted(RESERVED)}"
            )
    if both := dims.intersection(variables):
        raise UsageError(f"{probe}: {sorted(both)} name both a quantity and a dimension; rename one")


def _check_attributes(attrs: Mapping[str, str]) -> None:
    for name, value in cast(Mapping[str, object], attrs).items():
        if name not in ATTRIBUTES or not isinstance(value, str) or len(value) > TEXT_LIMIT // 4:
            raise UsageError(f"expected a short text under one of {ATTRIBUTES}, got {name}={value!r:.200}")
    if "since" in attrs.get("units", ""):
        raise UsageError(
            f"units with 'since' are read as dates by netCDF tools; got {attrs['units']!r}, use 's' or 'step'"
        )


def _check_conditions(row: Row) -> None:
    for name, value in cast(Mapping[str, object], row.conditions).items():
        if not isinstance(value, str | int | float):
            raise UsageError(
                f"{row.probe}: expected text or a number as condition {name!r}, got {type(value).__name__}"
            )
    if len(canonical(row.conditions)) > TEXT_LIMIT:
        raise UsageError(f"{row.probe}: expected at most {TEXT_LIMIT} characters of conditions")


def _dims(variables: Iterable[Variable]) -> set[str]:
    return {dim for variable in variables for dim in variable.dims}


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float) and isnan(one) and isnan(other):
        return True
    return bool(one == other)
