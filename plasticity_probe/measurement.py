"""What a probe returns: typed, labelled quantities whose annotations are the schema.

A measurement is a frozen dataclass. Each field says in its annotation what it is:

    top: Annotated[Float[Tensor, " pair"], Quantity("largest eigenvalues", units="loss", summary="first")]
    layers: Annotated[tuple[str, ...], Labels("layer")]

The shape string gives the dimensions, `Quantity` the meaning and units, `Labels` names the entries of a dimension. Storage, tables and
figures read this schema (`schema`) and nothing else, so a new probe needs no line in any of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from html import escape
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Summary = Literal["none", "first", "last", "mean", "max", "min"]
Role = Literal["value", "uncertainty", "context"]


class Status(StrEnum):
    """How a measurement ended. Anything but `OK` comes with a message that names likely causes and remedies."""

    OK = "ok"
    NOT_CONVERGED = "not_converged"
    NONFINITE = "nonfinite"
    NOT_APPLICABLE = "not_applicable"
    FAILED = "failed"


@dataclass(frozen=True)
class Quantity:
    """The meaning of one field of a measurement.

    Args:
        meaning: What the number is, in words, as a figure's axis or a file's `long_name` would say it.
        units: Its units; "1" for a pure number.
        summary: How an array shows as one number in a table or a series; "none" keeps it out of both. A scalar always shows itself.
        shown: Whether tables and series show it at all.
        role: "value" for what is measured; "uncertainty" for a standard error or the end of an interval, "context" for a ceiling, a count or
            a setting: those two are shown but never called a finding.
    """

    meaning: str
    units: str = "1"
    summary: Summary = "none"
    shown: bool = True
    role: Role = "value"


@dataclass(frozen=True)
class Labels:
    """Marks a tuple of strings as the names of the entries of a dimension.

    Args:
        dim: The dimension whose entries it names.
    """

    dim: str


@dataclass(frozen=True)
class Field:
    """One field of a measurement, as storage, tables and figures see it.

    Args:
        name: The attribute's name.
        dims: Names of its dimensions; empty for a scalar.
        kind: "number" (stored as float64), "text" (a string) or "labels" (names of a dimension's entries).
        quantity: Its meaning; for labels a quantity made from the dimension's name.
    """

    name: str
    dims: tuple[str, ...]
    kind: Literal["number", "text", "labels"]
    quantity: Quantity


@dataclass(frozen=True)
class Conditions:
    """Under which conditions a measurement was made; every measurement carries them.

    Args:
        examples: Number of examples measured.
        parameters: Number of trainable parameters.
        loss: The per-example loss, and whether it was inferred.
        mode: "eval" or "train": how BatchNorm and dropout behaved.
        dtype: Floating-point type of weights and activations.
        device: Where it ran.
        seed: Seed of the random draws.
        weight_decay: Weight decay is never part of the loss measured here; said so that nobody has to guess.
    """

    examples: int
    parameters: int
    loss: str
    mode: str
    dtype: str
    device: str
    seed: int
    weight_decay: str = "not included"


@dataclass_transform(frozen_default=True, eq_default=False, kw_only_default=True)
def measurement(kind: type[T]) -> type[T]:
    """Makes a class a measurement: a frozen dataclass with keyword fields that compares by identity and prints as a table."""
    return dataclass(frozen=True, eq=False, kw_only=True, repr=False)(kind)


@measurement
class Measurement:
    """The base of all measurements: subclasses add annotated fields and nothing else that is stored.

    Args:
        conditions: How it was measured.
        status: Whether the numbers can be relied on.
        message: What happened, if the status is not `OK`: likely causes and remedies.
    """

    conditions: Conditions
    status: Status = Status.OK
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, strings and lists, with the conditions under "conditions"."""
        values = {field.name: _plain(getattr(self, field.name)) for field in schema(type(self))}
        return {**values, "status": str(self.status), "message": self.message, "conditions": asdict(self.conditions)}

    def __repr__(self) -> str:
        lines = [f"{name:<28} {value:>14}  {meaning}" for name, value, meaning in _rows(self)]
        state = "" if self.status is Status.OK else f"\n  status {self.status}: {self.message}"
        head = f"{type(self).__name__} on {self.conditions.examples} examples, {self.conditions.loss}, {self.conditions.mode} mode"
        return "\n  ".join([head, *lines]) + state

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{escape(name)}</td><td style='text-align:right'>{escape(value)}</td><td>{escape(meaning)}</td></tr>"
            for name, value, meaning in _rows(self)
        )
        state = "" if self.status is Status.OK else f"<p>status {escape(self.status)}: {escape(self.message)}</p>"
        c = self.conditions
        return (
            f"<table><caption>{type(self).__name__}: {c.examples} examples, {escape(c.loss)}, {escape(c.mode)} mode</caption>"
            f"{cells}</table>{state}"
        )


@dataclass(frozen=True)
class Headline:
    """One number that stands for a field in a table or a series.

    Args:
        name: The field's name.
        where: Which entry or summary of an array it is, such as "mean over layers" or "fc1"; empty for a scalar.
        value: The number.
        quantity: Its meaning and units.
    """

    name: str
    where: str
    value: float
    quantity: Quantity


@cache
def schema(kind: type[Measurement]) -> tuple[Field, ...]:
    """The annotated fields of a measurement class, in order of definition.

    Raises:
        TypeError: A field is annotated with neither `Quantity` nor `Labels`, or with a type that cannot be stored.
    """
    common = set(Measurement.__dataclass_fields__)
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_field(kind, name, hints[name]) for name in kind.__dataclass_fields__ if name not in common)


def arrays(measurement: Measurement) -> dict[str, NDArray[Any]]:
    """Every field as an array with the dimensions of its schema: float64 for numbers, str for text and labels."""
    return {field.name: _array(getattr(measurement, field.name), field) for field in schema(type(measurement))}


def headlines(measurement: Measurement) -> list[Headline]:
    """The numbers that stand for a measurement in a table or a series: its scalars and the summaries of its arrays."""
    fields = schema(type(measurement))
    values = arrays(measurement)
    labels = {field.dims[0]: values[field.name] for field in fields if field.kind == "labels"}
    found: list[Headline] = []
    for field in fields:
        if field.kind == "number" and field.quantity.shown and (not field.dims or field.quantity.summary != "none"):
            where, value = summarise(values[field.name], field, labels)
            found.append(Headline(field.name, where, value, field.quantity))
    return found


def summarise(values: NDArray[Any], field: Field, labels: Mapping[str, NDArray[Any]]) -> tuple[str, float]:
    """One number for an array, by its field's summary rule, and the words that say which one it is."""
    if not field.dims:
        return "", float(values)
    rule = field.quantity.summary
    if values.size == 0:
        return rule, float("nan")
    if rule in ("first", "last"):
        at = 0 if rule == "first" else -1
        names = labels.get(field.dims[0])
        return (str(names[at]) if names is not None else rule), float(values.reshape(-1)[at])
    finite = values[~np.isnan(values)]
    reduce = {"mean": np.mean, "max": np.max, "min": np.min}[rule]
    return f"{rule} over {'s, '.join(field.dims)}s", float(reduce(finite)) if finite.size else float("nan")


def _field(kind: type, name: str, hint: Any) -> Field:
    where = f"{kind.__name__}.{name}"
    if get_origin(hint) is not Annotated:
        raise TypeError(f"{where}: expected Annotated[type, Quantity(...)] or Annotated[tuple[str, ...], Labels(...)]")
    base, note = get_args(hint)[:2]
    if isinstance(note, Labels):
        return Field(name, (note.dim,), "labels", Quantity(f"names of the {note.dim}s", shown=False))
    if not isinstance(note, Quantity):
        raise TypeError(f"{where}: expected a Quantity or Labels, got {note!r}")
    if base is str:
        return Field(name, (), "text", note)
    if base in (int, float, bool):
        return Field(name, (), "number", note)
    if hasattr(base, "dim_str"):
        return Field(name, tuple(base.dim_str.split()), "number", note)
    raise TypeError(
        f"{where}: expected str, int, float, bool or a jaxtyping tensor such as Float[Tensor, 'layer'], got {base!r}"
    )


def _array(value: Any, field: Field) -> NDArray[Any]:
    if field.kind != "number":
        return np.array(value, dtype=object)
    plain = value.detach().cpu().double().numpy() if hasattr(value, "detach") else value
    array = np.asarray(plain, dtype=np.float64)
    if array.ndim != len(field.dims):
        raise TypeError(f"{field.name}: expected the dimensions {field.dims}, got an array of shape {array.shape}")
    return array


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value


def _rows(measurement: Measurement) -> Iterator[tuple[str, str, str]]:
    for line in headlines(measurement):
        units = "" if line.quantity.units == "1" else f" [{line.quantity.units}]"
        where = f" ({line.where})" if line.where else ""
        yield line.name, f"{line.value:.6g}", f"{line.quantity.meaning}{units}{where}"
