# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# xarray's types are incomplete.
"""Rows as an xarray tree, one padded group for each probe label, and back."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from plasticity_probe.errors import TraceError
from plasticity_probe.trace.layout import (
    COLUMNS,
    LENGTH_OF,
    POSITION_OF,
    PROVENANCE,
    QUANTITIES,
    ROW,
    SCHEMA,
    SCHEMA_VERSION,
    SESSIONS,
    Row,
    Variable,
    canonical,
)

Array = NDArray[Any]


@dataclass
class Template:
    """What the rows of one group have in common, learned row by row.

    Args:
        label: The probe's label.
        variables: For each quantity the first variable of that name: its dimensions, kind and meaning.
        labelled: For each dimension, in order of first appearance, whether its entries have names.
    """

    label: str
    variables: dict[str, Variable] = field(default_factory=dict[str, Variable])
    labelled: dict[str, bool] = field(default_factory=dict[str, bool])

    def admit(self, row: Row) -> None:
        """Learns a row.

        Raises:
            TraceError: A quantity changed its dimensions, kind or units, or a dimension got or lost its names. Nothing is learned then.
        """
        for name, variable in row.variables.items():
            first = self.variables.get(name, variable)
            if _form(first) != _form(variable):
                self._refuse(f"{name} is {_form(variable)}", f"{_form(first)}")
            if name in self.labelled:
                self._refuse(f"{name} is a quantity", "a dimension")
        for dim in row.lengths:
            if self.labelled.get(dim, dim in row.labels) != (dim in row.labels):
                self._refuse(f"{dim} has {'' if dim in row.labels else 'no '}labels", "the opposite")
            if dim in self.variables:
                self._refuse(f"{dim} is a dimension", "a quantity")
        for name, variable in row.variables.items():
            self.variables.setdefault(name, variable)
        for dim in row.lengths:
            self.labelled.setdefault(dim, dim in row.labels)

    def _refuse(self, came: str, known: str) -> None:
        raise TraceError(
            f"group {self.label!r}: in this row {came}, in the rows before it was {known}. "
            "Use another label for the probe, or another trace file."
        )


_ABSENT = object()


def dataset_tree(rows: Iterable[Row], sources: Sequence[str] | None = None) -> xr.DataTree:
    """Rows as a tree: one group for each probe label, laid out as docs/trace-schema.md says.

    Args:
        rows: In the order of measurement.
        sources: For each row the trace it was read from; becomes the coordinate `trace`.

    Raises:
        TraceError: Rows of one label disagree on the form of a quantity.
    """
    rows = list(rows)
    sessions = list(dict.fromkeys(row.provenance for row in rows))
    at = {text: number for number, text in enumerate(sessions)}
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        numbers.setdefault(row.probe, []).append(number)
    root = xr.Dataset(
        {PROVENANCE: (SESSIONS, _texts(sessions), {"long_name": "what wrote the rows, as JSON objects"})},
        attrs={"schema": SCHEMA, "schema_version": SCHEMA_VERSION},
    )
    groups: dict[str, xr.Dataset] = {}
    for label, chosen in numbers.items():
        group = _dataset(label, [rows[number] for number in chosen], chosen, at)
        if sources is not None:
            traces = _texts([sources[number] for number in chosen])
            group = group.assign_coords(trace=(ROW, traces, {"long_name": "the trace file the row was read from"}))
        groups[f"/{label}"] = group
    return xr.DataTree.from_dict({"/": root, **groups})


def rows_of(tree: xr.DataTree) -> list[Row]:
    """The rows of a tree made by `dataset_tree`, in the order of measurement; what was padded is cut off again.

    A quantity that the row's measurement did not have (an older version of the probe, say) comes back as NaN or as an empty text.

    Raises:
        TraceError: The tree does not follow the schema.
    """
    sessions = [str(text) for text in tree.to_dataset()[PROVENANCE].values]
    found: list[tuple[int, Row]] = []
    for label, child in tree.children.items():
        group = child.to_dataset(inherit=False)
        if missing := [name for name in COLUMNS if name not in group.variables]:
            raise TraceError(f"group {label!r} lacks {', '.join(missing)}, which every group of a trace has")
        found += zip(group["number"].values.tolist(), _rows(label, group, sessions), strict=True)
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _dataset(label: str, rows: list[Row], numbers: list[int], sessions: Mapping[str, int]) -> xr.Dataset:
    template = Template(label)
    for row in rows:
        template.admit(row)
    unions = {dim: _Union(dim, rows) for dim, labelled in template.labelled.items() if labelled}
    lengths = {dim: [row.lengths.get(dim, -1) for row in rows] for dim in template.labelled}
    sizes = {dim: len(unions[dim].names) if dim in unions else max(found) for dim, found in lengths.items()}
    coords: dict[str, Any] = {}
    for dim, found in lengths.items():
        meaning = f"number of entries of the row along {dim}; -1 if it has none at all"
        coords[LENGTH_OF + dim] = (ROW, np.array(found, dtype=np.int64), {"long_name": meaning})
    for dim, union in unions.items():
        meaning = f"place of each {dim} in the row's own order; -1 where the row has no such {dim}"
        coords[dim] = (dim, _texts(union.names), {"long_name": f"names of the {dim}s"})
        coords[POSITION_OF + dim] = ((ROW, dim), union.positions(rows), {"long_name": meaning})
    data = {name: _variable(name, first, rows, unions, sizes) for name, first in template.variables.items()}
    attrs = {QUANTITIES: " ".join(data), "settings": _shared(row.settings for row in rows)}
    attrs["conditions"] = _shared(canonical(row.conditions) for row in rows)
    return xr.Dataset(data, {**_columns(rows, numbers, sessions), **coords}, attrs)


class _Union:
    """The names of one dimension over all rows, in order of first appearance, and where each row's entries stand among them.

    A name that a row holds twice is two entries: entries are matched by name and by how many times it came before.
    """

    def __init__(self, dim: str, rows: list[Row]) -> None:
        self.dim = dim
        self._at: dict[tuple[str, int], int] = {}
        self._places: dict[tuple[str, ...], Array] = {}
        for row in rows:
            labels = row.labels.get(dim, ())
            if labels not in self._places:
                places = [self._at.setdefault(entry, len(self._at)) for entry in _entries(labels)]
                self._places[labels] = np.array(places, dtype=np.int64)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self._at]

    def places(self, row: Row) -> Array:
        return self._places[row.labels[self.dim]]

    def positions(self, rows: list[Row]) -> Array:
        found = np.full((len(rows), len(self._at)), -1, dtype=np.int64)
        for number, row in enumerate(rows):
            if self.dim in row.labels:
                places = self.places(row)
                found[number, places] = np.arange(len(places))
        return found


def _entries(labels: tuple[str, ...]) -> list[tuple[str, int]]:
    seen: dict[str, int] = {}
    entries: list[tuple[str, int]] = []
    for name in labels:
        entries.append((name, seen.get(name, 0)))
        seen[name] = seen.get(name, 0) + 1
    return entries


def _variable(
    name: str, first: Variable, rows: list[Row], unions: Mapping[str, _Union], sizes: Mapping[str, int]
) -> tuple[tuple[str, ...], Array, dict[str, str]]:
    shape = (len(rows), *(sizes[dim] for dim in first.dims))
    padded: Array = np.full(shape, "", dtype=object) if first.kind == "text" else np.full(shape, np.nan)
    for number, row in enumerate(rows):
        if (variable := row.variables.get(name)) is None:
            continue
        if variable.dims:
            places = [
                unions[dim].places(row) if dim in unions else np.arange(size)
                for dim, size in zip(variable.dims, variable.data.shape, strict=True)
            ]
            padded[number][np.ix_(*places)] = variable.data
        else:
            padded[number] = variable.data.item()
    return (ROW, *first.dims), padded, dict(first.attrs)


def _columns(rows: list[Row], numbers: list[int], sessions: Mapping[str, int]) -> dict[str, Any]:
    derived: dict[str, list[Any]] = {
        "conditions": [canonical(row.conditions) for row in rows],
        "number": numbers,
        "session": [sessions[row.provenance] for row in rows],
        "measured": [int(bool(row.variables or row.labels)) for row in rows],
    }
    found: dict[str, Any] = {}
    for name, column in COLUMNS.items():
        values = derived[name] if name in derived else [getattr(row, name) for row in rows]
        kinds = {"int": np.int64, "float": np.float64}
        array = _texts(values) if column.kind == "text" else np.array(values, dtype=kinds[column.kind])
        found[name] = (ROW, array, dict(column.attrs))
    return found


def _rows(label: str, group: xr.Dataset, sessions: list[str]) -> list[Row]:
    columns = {name: group[name].values.tolist() for name in COLUMNS}
    variables = {name: group[name] for name in group.attrs[QUANTITIES].split()}
    dims = [str(name).removeprefix(LENGTH_OF) for name in group.variables if str(name).startswith(LENGTH_OF)]
    lengths = {dim: group[LENGTH_OF + dim].values.tolist() for dim in dims}
    orders = {dim: _Orders(dim, group) for dim in dims if POSITION_OF + dim in group.variables}
    arrays = {name: array.values for name, array in variables.items()}
    rows: list[Row] = []
    for at in range(len(columns["run"])):
        places = {dim: _places(orders.get(dim), at, found[at]) for dim, found in lengths.items() if found[at] >= 0}
        kept = {
            name: Variable(
                tuple(map(str, array.dims[1:])),
                _cut(arrays[name][at], [places[str(dim)] for dim in array.dims[1:]]),
                cast(dict[str, str], array.attrs),
            )
            for name, array in variables.items()
            if columns["measured"][at] and all(dim in places for dim in array.dims[1:])
        }
        own = {name: values[at] for name, values in columns.items() if name not in _DERIVED}
        rows.append(
            Row(
                probe=label,
                **own,
                conditions=json.loads(columns["conditions"][at]),
                labels={dim: order.labels(at) for dim, order in orders.items() if dim in places},
                variables=kept,
                provenance=sessions[columns["session"][at]],
            )
        )
    return rows


_DERIVED = ("conditions", "number", "session", "measured")


class _Orders:
    """Which entries of a labelled dimension each row has, and in which order."""

    def __init__(self, dim: str, group: xr.Dataset) -> None:
        self._positions = group[POSITION_OF + dim].values
        self._names = group[dim].values
        self._known: dict[bytes, tuple[Array, tuple[str, ...]]] = {}

    def places(self, at: int) -> Array:
        return self._entry(at)[0]

    def labels(self, at: int) -> tuple[str, ...]:
        return self._entry(at)[1]

    def _entry(self, at: int) -> tuple[Array, tuple[str, ...]]:
        positions = self._positions[at]
        key = positions.tobytes()
        if key not in self._known:
            order = np.argsort(positions, kind="stable")[np.count_nonzero(positions < 0) :]
            self._known[key] = order, tuple(self._names[order].tolist())
        return self._known[key]


def _places(order: _Orders | None, at: int, length: int) -> Array:
    return np.arange(length) if order is None else order.places(at)


def _cut(values: Any, places: list[Array]) -> Array:
    return values[np.ix_(*places)] if places else np.array(values, dtype=object if isinstance(values, str) else float)


def _texts(values: Sequence[str]) -> Array:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _shared(texts: Iterable[str]) -> str:
    """The entries that all these JSON objects have in common."""
    objects = [json.loads(text) for text in dict.fromkeys(texts)]
    first = objects[0]
    return canonical(
        {key: first[key] for key in first if all(other.get(key, _ABSENT) == first[key] for other in objects)}
    )


def _form(variable: Variable) -> str:
    return f"{variable.kind} over ({', '.join(variable.dims)}) in units {variable.attrs.get('units', '')!r}"
