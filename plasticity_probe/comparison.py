"""Numbers beside their yardstick: the table of an analysis and the plain sentences under it, from the rows of a trace alone."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import cast

import numpy as np

from plasticity_probe.measurement import Field, Quantity, Role, Summary, summarise
from plasticity_probe.trace.layout import Row

STRIKING = 2.0
"""A quantity stands out when it differs from its yardstick by this factor (our choice: far above the scatter of fresh networks)."""
SENTENCES = 6
"""At most this many quantities are put into words; the table has them all."""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        probe: The probe's label.
        name: The quantity's name.
        where: Which entry or summary of an array it is; empty for a scalar.
        meaning: The quantity in words, with its units.
        role: "value", "uncertainty" or "context" (see `Quantity`).
        values: One number for each column of the table.
        intervals: For each column but the ratio, the ends of the number's interval; NaN where none was measured.
    """

    probe: str
    name: str
    where: str
    meaning: str
    role: str
    values: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Table:
    """Quantities by columns: checkpoint, fresh and ratio; for a series its first and last checkpoint, averaged over runs.

    Args:
        columns: Names of the columns.
        lines: The lines, in the order of measurement.
        problems: For every probe that did not end well: label, status, message.
    """

    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    problems: tuple[tuple[str, str, str], ...]


def table(rows: Sequence[Row]) -> Table:
    """The table of an analysis.

    Args:
        rows: Rows of checkpoints and of fresh networks, of one or several probes.
    """
    measured = sorted((row for row in rows if row.network == "checkpoint"), key=lambda row: row.step)
    fresh = [row for row in rows if row.network == "fresh"]
    ends = _ends(measured)
    columns = (*(name for name, _ in ends), *(("fresh", "ratio") if fresh else ("ratio",) if len(ends) > 1 else ()))
    lines: list[Line] = []
    for label in dict.fromkeys(row.probe for row in rows):
        columns_of_rows = [
            [row for row in measured if row.probe == label and _place(row) in places] for _, places in ends
        ]
        columns_of_rows += [[row for row in fresh if row.probe == label]] if fresh else []
        lines += _lines(label, columns_of_rows)
    problems = dict.fromkeys((_who(row), row.status, row.message) for row in rows if row.status != "ok")
    return Table(columns, tuple(lines), tuple(problems))


def findings(rows: Sequence[Row]) -> tuple[str, ...]:
    """What stands out, and what these checkpoints cannot tell, in plain sentences.

    Args:
        rows: Rows of checkpoints and of fresh networks.
    """
    shown = table(rows)
    # On a task still to come, or on random labels, guessing is what to expect.
    expected = any(json.loads(row.settings).get("on") in ("next", "noise") for row in rows)
    found = [*([] if expected else _guessing(shown)), *_striking(shown)]
    found += [f"{label} ended as {status}: {message}" for label, status, message in shown.problems]
    return (*found, *_limits(rows, shown))


def headline_values(row: Row) -> dict[str, tuple[str, float]]:
    """For each quantity of a row that a table shows: which entry or summary it is, and the number."""
    labels = {dim: np.array(names, dtype=object) for dim, names in row.labels.items()}
    found: dict[str, tuple[str, float]] = {}
    for name, variable in row.variables.items():
        quantity = quantity_of(variable.attrs)
        if (
            not quantity.shown
            or variable.data.dtype.kind not in "fiub"
            or (variable.dims and quantity.summary == "none")
        ):
            continue
        found[name] = summarise(variable.data, Field(name, variable.dims, "number", quantity), labels)
    return found


def quantity_of(attrs: Mapping[str, str]) -> Quantity:
    """A stored variable's quantity, from its attributes."""
    return Quantity(
        attrs.get("long_name", ""),
        attrs.get("units", "1"),
        cast(Summary, attrs.get("summary", "none")),
        attrs.get("shown", "True") == "True",
        cast(Role, attrs.get("role", "value")),
    )


def number(value: float) -> str:
    """A number as tables print it: four significant digits, whole numbers whole, a dash where there is none."""
    if math.isnan(value):
        return "–"
    if value == int(value) and abs(value) < 1e6 if math.isfinite(value) else False:
        return str(int(value))
    return f"{value:.4g}"


Place = tuple[str, int, str]


def _place(row: Row) -> Place:
    return row.run, row.step, row.checkpoint


def _ends(measured: Sequence[Row]) -> list[tuple[str, set[Place]]]:
    """The columns of the checkpoints: the only one, or the first and the last of each run; several runs are averaged."""
    runs: dict[str, list[Place]] = {}
    for row in measured:
        runs.setdefault(row.run, []).append(_place(row))
    first, last = {places[0] for places in runs.values()}, {places[-1] for places in runs.values()}
    if first == last:
        return [("checkpoint" if len(runs) == 1 else f"mean of {len(runs)} runs", first)]
    if len(runs) == 1:
        return [(f"step {step}", {(run, step, path)}) for run, step, path in (*first, *last)]
    return [(f"first of {len(runs)} runs", first), (f"last of {len(runs)} runs", last)]


def _lines(label: str, columns: Sequence[Sequence[Row]]) -> Iterable[Line]:
    values = [[headline_values(row) for row in rows] for rows in columns]
    rows = [row for column in columns for row in column if row.variables]
    order = dict.fromkeys(name for column in values for headline in column for name in headline)
    for name in order:
        quantity = quantity_of(next(row for row in rows if name in row.variables).variables[name].attrs)
        where = next(headline[name][0] for column in values for headline in column if name in headline)
        means = [_mean(headline[name][1] for headline in column if name in headline) for column in values]
        ratio = (
            (_ratio(means[-2], means[-1]) if _has_fresh(columns) else _ratio(means[-1], means[0]),)
            if len(means) > 1
            else ()
        )
        units = "" if quantity.units == "1" else f" [{quantity.units}]"
        intervals = tuple((_end(column, name, "lower"), _end(column, name, "upper")) for column in columns)
        yield Line(label, name, where, quantity.meaning + units, quantity.role, (*means, *ratio), intervals)


def _has_fresh(columns: Sequence[Sequence[Row]]) -> bool:
    return bool(columns[-1]) and columns[-1][0].network == "fresh"


def _end(column: Sequence[Row], name: str, end: str) -> float:
    found = [row.variables[f"{name}_{end}"].data for row in column if f"{name}_{end}" in row.variables]
    return _mean(float(value) for value in found if value.ndim == 0)


def _told_apart(line: Line, at: tuple[int, int]) -> bool:
    """Whether two columns differ by more than the intervals of an estimate allow; numbers without intervals always do."""
    (low, high), (base_low, base_high) = (line.intervals[column] for column in at)
    return not (low <= base_high and base_low <= high)


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return fmean(finite) if finite else math.nan


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else (1.0 if value == 0 else math.nan)


def _guessing(shown: Table) -> list[str]:
    accuracy = next((line for line in shown.lines if line.probe == "performance" and line.name == "accuracy"), None)
    if accuracy is None or "fresh" not in shown.columns:
        return []
    at = shown.columns.index("fresh")
    own, fresh = accuracy.values[at - 1], accuracy.values[at]
    if math.isnan(own) or own > 1.5 * fresh:
        return []
    return [
        f"The accuracy of {own:.1%} is about that of an untrained network ({fresh:.1%}): check that model, data and normalisation "
        "(--mean, --std) belong together before reading anything else."
    ]


def _striking(shown: Table) -> list[str]:
    if len(shown.columns) < 2:
        return []
    reference = "a fresh network" if "fresh" in shown.columns else shown.columns[0]
    last = len(shown.columns) - 2
    at = (last - 1, last) if "fresh" in shown.columns else (last, 0)
    measured: list[tuple[float, str]] = []
    for line in shown.lines:
        value, base = (line.values[column] for column in at)
        if line.probe == "performance" or line.role != "value" or math.isnan(value) or math.isnan(base):
            continue
        if not _told_apart(line, at):
            continue
        strength = _strength(value, base)
        if strength >= math.log(STRIKING):
            where = f", {line.where}" if line.where else ""
            subject = f"{_capital(line.meaning)} ({line.probe}{where}): {number(value)}"
            measured.append(
                (
                    strength,
                    f"{subject} against {number(base)} in {reference}{_times(value, base)}.",
                )
            )
    return [text for _, text in sorted(measured, key=lambda entry: -entry[0])[:SENTENCES]]


def _strength(value: float, base: float) -> float:
    if value == base:
        return 0.0
    if value == 0 or base == 0 or value * base < 0:
        # No factor tells how much that is, so it is said after everything that has one.
        return math.log(STRIKING)
    return abs(math.log(value / base))


def _times(value: float, base: float) -> str:
    if value == 0 or base == 0 or value * base < 0:
        return ""
    ratio = abs(value / base)
    return f", {number(ratio)} times as much" if ratio > 1 else f", {number(1 / ratio)} times less"


def _limits(rows: Sequence[Row], shown: Table) -> list[str]:
    places = {_place(row) for row in rows if row.network == "checkpoint"}
    found: list[str] = []
    if len(places) == 1:
        tried = any(row.probe == "trainability" for row in rows)
        found.append(
            "One checkpoint shows a state, not a loss: whether anything changed needs earlier checkpoints of the same run"
            + (
                "."
                if tried
                else ", and whether this network can still learn needs a trial, a copy trained on a new task beside a fresh network (--probes "
                "trainability)."
            )
        )
    else:
        found.append(
            "A series shows what changed together, not what caused it: only many runs, with the outcome measured in each, can tell whether one "
            "of these quantities predicts a loss of plasticity."
        )
    if "fresh" not in shown.columns:
        found.append(
            "Without a fresh network of the same architecture (--fresh 1) nothing says which of these numbers are usual."
        )
    return found


def _who(row: Row) -> str:
    return row.probe if row.network == "checkpoint" else f"{row.probe} (fresh network {row.replicate})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
