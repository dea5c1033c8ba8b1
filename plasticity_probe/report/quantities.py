"""The numbers of a trace as figures need them: for each probe the places of its rows, its headline quantities and its labelled ones."""

import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from plasticity_probe.measurement import Field, Quantity, Summary, summarise
from plasticity_probe.report.panels import Numbers, drawable
from plasticity_probe.report.wording import plain
from plasticity_probe.trace.layout import LENGTH_OF, POSITION_OF, ROW
from plasticity_probe.trace.outcome_rows import OUTCOMES

NORMAL_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: an estimate and this many standard errors to either side is its 95 % interval."""
UNRELIABLE = ("failed", "nonfinite", "not_applicable")
"""Statuses whose numbers mean nothing; "not_converged" has numbers of a lesser quality."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One quantity over the rows of a group.

    Args:
        name: Its name in the trace.
        meaning: What it is, in words, with the entry or summary that stands for an array.
        units: "1" for a pure number.
        values: Shape (row,), or (row, label) for a labelled quantity; NaN where a row has none.
        lower: Lower end of its own uncertainty, same shape; None where it has none.
        upper: Upper end.
        interval: What that uncertainty is, in words.
        dim: Name of the labelled dimension; empty for a headline quantity.
        labels: Names of its entries.
    """

    name: str
    meaning: str
    units: str
    values: Numbers
    lower: Numbers | None
    upper: Numbers | None
    interval: str
    dim: str = ""
    labels: tuple[str, ...] = ()

    @property
    def axis(self) -> str:
        """Name and units as an axis says them."""
        return self.name if self.units == "1" else f"{self.name} [{self.units}]"


@dataclass(frozen=True, eq=False)
class Group:
    """The rows of one probe label.

    Args:
        label: The probe's label.
        dataset: Its group of the trace.
    """

    label: str
    dataset: xr.Dataset

    @cached_property
    def fresh(self) -> NDArray[np.bool_]:
        """Which rows are of freshly initialised networks."""
        return self._texts("network") == "fresh"

    @cached_property
    def status(self) -> NDArray[np.object_]:
        """How each row ended."""
        return self._texts("status")

    @cached_property
    def run(self) -> NDArray[np.object_]:
        """The run of each row."""
        return self._texts("run")

    @cached_property
    def runs(self) -> tuple[str, ...]:
        """The runs that have checkpoints, in order of appearance."""
        return tuple(dict.fromkeys(self.run[~self.fresh].tolist()))

    @cached_property
    def place(self) -> tuple[str, NDArray[np.int64]]:
        """What the checkpoints are lined up by, and where each row stands on it.

        The task where every checkpoint of a run has a task of its own, else the step, else the order of measurement.
        """
        for name in ("task", "step"):
            at = np.asarray(self.dataset[name].values, dtype=np.int64)
            own = list(zip(self.run[~self.fresh].tolist(), at[~self.fresh].tolist(), strict=True))
            known = bool(own) and min(number for _, number in own) >= 0 and len(set(own)) == len(own)
            if known and (name == "step" or len({number for _, number in own}) > 1):
                return name, at
        return "checkpoint, in order of measurement", self._order()

    @cached_property
    def networks(self) -> int:
        """How many fresh networks there are."""
        return int(self.fresh.sum())

    @cached_property
    def series(self) -> bool:
        """Whether any run has more than one checkpoint."""
        return int((~self.fresh).sum()) > len(self.runs)

    def rows_of(self, run: str) -> NDArray[np.int64]:
        """The rows of a run's checkpoints, in the order of their places."""
        at = np.flatnonzero((self.run == run) & ~self.fresh)
        return at[np.argsort(self.place[1][at], kind="stable")]

    def conditions(self) -> str:
        """On how many examples, in which mode and how else the rows were measured, as one sentence."""
        found = [c for c in map(_object, self._texts("conditions")) if c] if "conditions" in self.dataset else []
        examples, mode, dtype, loss = (_span(found, key) for key in ("examples", "mode", "dtype", "loss"))
        parts = [f"on {examples or 'an unknown number of'} examples", f"in {mode or 'an unknown'} mode"]
        sentence = "Measured " + " ".join(parts) + "".join(f", {part}" for part in (dtype, loss) if part) + "."
        settings = len(set(self._texts("settings").tolist())) if "settings" in self.dataset.coords else 1
        return sentence + (f" Rows of {settings} different settings are drawn together." if settings > 1 else "")

    def problems(self, drawn: str = "those that have numbers are drawn like the others") -> str:
        """How many rows did not end well, and how those are drawn; empty if all did."""
        counts = {
            name: int((self.status == name).sum()) for name in dict.fromkeys(self.status.tolist()) if name != "ok"
        }
        if not counts:
            return ""
        listed = ", ".join(f"{count} {plain(name)[:40]}" for name, count in counts.items())
        return f"{sum(counts.values())} of {len(self.status)} measurements did not end well ({listed}); {drawn}."

    def _texts(self, name: str) -> NDArray[np.object_]:
        return np.array([str(text) for text in self.dataset[name].values.tolist()], dtype=object)

    def _order(self) -> NDArray[np.int64]:
        steps = np.asarray(self.dataset["step"].values, dtype=np.int64)
        order = np.zeros(len(steps), dtype=np.int64)
        for run in self.runs:
            at = np.flatnonzero((self.run == run) & ~self.fresh)
            order[at[np.argsort(steps[at], kind="stable")]] = np.arange(1, len(at) + 1)
        return order


def groups(tree: xr.DataTree) -> list[Group]:
    """The probes of a trace that have rows; outcomes of tasks are no probe's.

    Args:
        tree: As `plasticity_probe.trace.reader.open_trace` returns it.
    """
    found = ((label, child.to_dataset(inherit=False)) for label, child in tree.children.items())
    return [Group(str(label), data) for label, data in found if data.sizes.get(ROW, 0) > 0 and label != OUTCOMES]


def headline_quantities(group: Group) -> list[Measured]:
    """The scalars and summaries that stand for a probe: role "value", shown, uncertainties attached to what they belong to."""
    found: list[Measured] = []
    for name, quantity in _values(group):
        dims = _dims(group, name)
        if dims and quantity.summary == "none":
            continue
        where, values = _summaries(group, name, dims, quantity)
        meaning = f"{plain(quantity.meaning) or name}" + (f" ({plain(where)})" if where else "")
        lower, upper, interval = (None, None, "") if dims else _uncertainty(group, name, values)
        found.append(Measured(name, meaning, plain(quantity.units), _reliable(group, values), lower, upper, interval))
    return found


def labelled_quantities(group: Group) -> list[Measured]:
    """The quantities over one dimension whose entries have names, such as layers and tensors."""
    found: list[Measured] = []
    for name, quantity in _values(group):
        dims = _dims(group, name)
        if len(dims) != 1 or dims[0] not in group.dataset.coords:
            continue
        labels = tuple(plain(label) for label in group.dataset[dims[0]].values.tolist())
        values = _numbers(group, name)
        lower, upper, interval = _uncertainty(group, name, values)
        text = plain(quantity.meaning) or name
        found.append(
            Measured(
                name, text, plain(quantity.units), _reliable(group, values), lower, upper, interval, dims[0], labels
            )
        )
    return found


def _values(group: Group) -> Iterator[tuple[str, Quantity]]:
    """The numeric quantities that are measured values and are shown; an uncertainty of another quantity is none."""
    names = [str(name) for name, array in group.dataset.data_vars.items() if _is_quantity(array)]
    partners = {f"{name}{ending}" for name in names for ending in ("_sem", "_error")}
    partners |= {
        p
        for name in names
        for p in (f"{name}_lower", f"{name}_upper")
        if {f"{name}_lower", f"{name}_upper"} <= {*names}
    }
    for name in names:
        quantity = _quantity(group.dataset[name].attrs)
        if quantity.shown and quantity.role == "value" and name not in partners:
            yield name, quantity


def _is_quantity(array: xr.DataArray) -> bool:
    return array.dims[:1] == (ROW,) and array.dtype.kind in "fiub"


def _quantity(attrs: dict[Hashable, Any]) -> Quantity:
    text = {str(key): str(value) for key, value in attrs.items()}
    summary = text.get("summary", "none")
    role = text.get("role", "value")
    return Quantity(
        text.get("long_name", ""),
        text.get("units", "1") or "1",
        cast(Summary, summary if summary in ("first", "last", "mean", "max", "min") else "none"),
        text.get("shown", "True") == "True",
        cast(Literal["value", "uncertainty", "context"], role),
    )


def _dims(group: Group, name: str) -> tuple[str, ...]:
    return tuple(str(dim) for dim in group.dataset[name].dims[1:])


def _numbers(group: Group, name: str) -> Numbers:
    return drawable(group.dataset[name].values)


def _reliable(group: Group, values: Numbers) -> Numbers:
    return np.where(np.isin(group.status, UNRELIABLE).reshape(-1, *[1] * (values.ndim - 1)), np.nan, values)


def _summaries(group: Group, name: str, dims: tuple[str, ...], quantity: Quantity) -> tuple[str, Numbers]:
    """For each row the number that stands for the quantity, by the same rule as in tables."""
    values = _numbers(group, name)
    if not dims:
        return "", values
    beyond = np.isnan(values) & ~np.isnan(np.asarray(group.dataset[name].values, dtype=np.float64))
    field = Field(name, dims, "number", quantity)
    words: dict[str, None] = {}
    found = np.full(len(values), np.nan)
    for at in range(len(values)):
        places = [_entries(group.dataset, dim, at) for dim in dims]
        own = {dims[0]: group.dataset[dims[0]].values[places[0]]} if dims[0] in group.dataset.coords else {}
        where, found[at] = summarise(values[at][np.ix_(*places)], field, own)
        if quantity.summary in ("mean", "max", "min") and beyond[at].any():
            found[at] = np.nan  # leaving out an infinite entry would make the rest look sound
        if places[0].size:
            words[where] = None
    if quantity.summary in ("first", "last") and dims[0] not in group.dataset.coords:
        return "", found  # an entry without a name: the meaning says which one it is
    return (next(iter(words)) if len(words) == 1 else quantity.summary), found


def _entries(dataset: xr.Dataset, dim: str, row: int) -> NDArray[np.int64]:
    """The entries along a dimension that a row has, in its own order: other rows may have more, or others."""
    if POSITION_OF + dim in dataset.variables:
        positions = dataset[POSITION_OF + dim].values[row]
        return np.argsort(positions, kind="stable")[np.count_nonzero(positions < 0) :]
    length = int(dataset[LENGTH_OF + dim].values[row]) if LENGTH_OF + dim in dataset.variables else dataset.sizes[dim]
    return np.arange(max(length, 0))


def _uncertainty(group: Group, name: str, values: Numbers) -> tuple[Numbers | None, Numbers | None, str]:
    partner = {ending: _partner(group, name, ending) for ending in ("_sem", "_error", "_lower", "_upper")}
    if partner["_sem"] is not None:
        reach = NORMAL_95 * np.abs(partner["_sem"])
        return values - reach, values + reach, "± 1.96 standard errors"
    if partner["_lower"] is not None and partner["_upper"] is not None:
        return partner["_lower"], partner["_upper"], "the interval that the probe reports"
    if partner["_error"] is not None:
        return (
            values - np.abs(partner["_error"]),
            values + np.abs(partner["_error"]),
            "± the error bound that the probe reports",
        )
    return None, None, ""


def _partner(group: Group, name: str, ending: str) -> Numbers | None:
    other = group.dataset.data_vars.get(name + ending)
    if other is None or not _is_quantity(other) or other.dims != group.dataset[name].dims:
        return None
    return drawable(other.values)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _span(conditions: list[dict[str, Any]], key: str) -> str:
    """The value that all rows share, or the values, or from which to which."""
    values = list(dict.fromkeys(plain(c[key])[:60] for c in conditions if key in c))
    if len(values) > 2 and all(value.isdecimal() for value in values):
        return f"{min(map(int, values))} to {max(map(int, values))}"
    return " or ".join(values[:3])
