"""What a figure consists of: plain frozen data that says what is drawn and nothing about how.

A figure of measurements has panels of three kinds: `Lines` (something against an axis), `HeatMap` (labels by columns) and `Dots` (one line a
label). What stands behind a line is its `Role`; which colour and stroke a role has is `report/draw.py`'s business. A figure of verdicts has
panels of the kinds `Forest`, `SignMap` and `Cloud`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Role = Literal["checkpoint", "run", "mean", "fresh", "first", "last"]

LOG_FROM = 100.0
"""Positive values that span this factor are drawn on a logarithmic axis (our choice: below it a linear axis still shows the small ones)."""
SYMLOG_FROM = 1000.0
"""Values of both signs (or zeros) whose largest exceeds their lower quartile by this factor are drawn on a symmetric log axis (our choice)."""
LARGEST, SMALLEST = 1e140, 1e-140
"""Magnitudes beyond the first are drawn as gaps and those below the second as 0: an axis or a variance of them would overflow."""


@dataclass(frozen=True)
class Scale:
    """How values are laid out along an axis or a colour bar.

    Args:
        kind: "linear", "log", or "symlog" (linear around 0, logarithmic beyond).
        threshold: Where symlog changes from linear to logarithmic.
    """

    kind: Literal["linear", "log", "symlog"] = "linear"
    threshold: float = 1.0


LINEAR, LOG = Scale(), Scale("log")


@dataclass(frozen=True, eq=False)
class Curve:
    """One line, with a band around it where it has one; NaN is a gap.

    Args:
        label: Its entry in the legend; curves of one label share an entry.
        role: What it stands for.
        x: Ascending positions, shape (n,).
        y: Values, shape (n,).
        lower: Lower edge of the band, shape (n,).
        upper: Upper edge.
        doubtful: True where the measurement did not end well, shape (n,); such points are drawn hollow.
        hue: Number of its colour and marker where several settings are told apart; None for the colour of its role.
    """

    label: str
    role: Role
    x: Numbers
    y: Numbers
    lower: Numbers | None = None
    upper: Numbers | None = None
    doubtful: NDArray[np.bool_] | None = None
    hue: int | None = None


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, and a band around it.

    Args:
        label: Its entry in the legend.
        value: Its height.
        lower: Lower edge of the band; `value` where there is none.
        upper: Upper edge.
    """

    label: str
    value: float
    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class Lines:
    """Curves against a common axis.

    Args:
        title: What is shown, in words.
        x_label: Name and units of the horizontal axis.
        y_label: Name and units of the vertical axis.
        curves: In the order of drawing.
        level: What they are compared with.
        scale: Layout of the vertical axis.
        limits: Lower and upper end of the vertical axis; None to fit the data.
        whole: Whether the horizontal axis counts (steps, tasks).
    """

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    level: Level | None = None
    scale: Scale = LINEAR
    limits: tuple[float, float] | None = None
    whole: bool = True


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Values of labels by columns.

    Args:
        title: What is shown, in words.
        x_label: Name of the horizontal axis.
        columns: Names of the columns.
        labels: Names of the lines, from top to bottom.
        values: Shape (labels, columns); NaN where there is none.
        fresh: The same of fresh networks, shape (labels,), as a column of its own; None without.
        value_label: Name and units of the values.
        scale: Layout of the colour bar.
    """

    title: str
    x_label: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    values: Numbers
    fresh: Numbers | None
    value_label: str
    scale: Scale = LINEAR


@dataclass(frozen=True, eq=False)
class Points:
    """One dot a label, with a whisker where it has one.

    Args:
        label: Its entry in the legend; points of one label share an entry.
        role: What it stands for.
        values: Shape (labels,); NaN where there is none.
        lower: Lower end of the whisker, shape (labels,).
        upper: Upper end.
    """

    label: str
    role: Role
    values: Numbers
    lower: Numbers | None = None
    upper: Numbers | None = None


@dataclass(frozen=True, eq=False)
class Dots:
    """One line a label, dots on it.

    Args:
        title: What is shown, in words.
        x_label: Name and units of the horizontal axis.
        labels: Names of the lines, from top to bottom.
        points: Drawn in this order.
        scale: Layout of the horizontal axis.
        groups: For each label the heading it stands under; empty for no headings.
        notes: For each label a remark at the right edge; empty for none.
        reference: Where a vertical line stands; None for none.
    """

    title: str
    x_label: str
    labels: tuple[str, ...]
    points: tuple[Points, ...]
    scale: Scale = LINEAR
    groups: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reference: float | None = None


Panel = Lines | HeatMap | Dots


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure.

    Args:
        name: What its file is called, before it is made safe.
        title: One line above it.
        panels: From left to right, then down.
        caption: On how many examples and in which mode it was measured, and what every band and whisker is.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    caption: str


@dataclass(frozen=True, eq=False)
class Estimates:
    """Estimates of one kind, a dot with its interval each.

    Args:
        label: Their entry in the legend.
        look: Name of their colour and marker.
        values: Shape (labels,); NaN where there is none.
        lower: Lower end of the interval, shape (labels,).
        upper: Upper end.
    """

    label: str
    look: str
    values: Numbers
    lower: Numbers
    upper: Numbers


@dataclass(frozen=True, eq=False)
class Forest:
    """One line a label, estimates with their intervals on it.

    Args:
        title: What sets this panel apart; empty for a single one.
        x_label: Name and units of the horizontal axis.
        labels: Names of the lines, from top to bottom.
        estimates: In the order of drawing.
        beside: Whether estimates of a line stand one under the other; otherwise a line has one.
        groups: For each label the heading it stands under; empty for no headings.
        notes: For each label a remark at the right edge; empty for none.
        reference: Where a vertical line stands; None for none.
        shaded: From where to where the background is shaded; None for nowhere.
        limits: Ends of the horizontal axis; None to fit the data.
    """

    title: str
    x_label: str
    labels: tuple[str, ...]
    estimates: tuple[Estimates, ...]
    beside: bool = False
    groups: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reference: float | None = None
    shaded: tuple[float, float] | None = None
    limits: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class SignMap:
    """Values of labels by columns, of both signs: colours diverge from zero.

    Args:
        title: What sets this panel apart; empty for a single one.
        x_label: Name of the horizontal axis.
        columns: Names of the columns.
        labels: Names of the lines, from top to bottom.
        values: Shape (labels, columns); NaN where there is none.
        marked: Which of them have a mark, same shape.
        value_label: Name and units of the values.
        separated: The column that a line stands behind, to set those before it apart; None for no line.
    """

    title: str
    x_label: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    values: Numbers
    marked: NDArray[np.bool_]
    value_label: str
    separated: int | None = None


@dataclass(frozen=True, eq=False)
class Trail:
    """The way of one run through a plane, from task to task.

    Args:
        label: Its entry in the legend.
        hue: Number of its colour and marker.
        x: Shape (n,).
        y: Same shape.
    """

    label: str
    hue: int
    x: Numbers
    y: Numbers


@dataclass(frozen=True, eq=False)
class Cloud:
    """One quantity against another.

    Args:
        title: What is shown, in words.
        x_label: Name and units of the horizontal axis.
        y_label: Name and units of the vertical axis.
        trails: In the order of drawing.
        scale: Layout of the horizontal axis.
    """

    title: str
    x_label: str
    y_label: str
    trails: tuple[Trail, ...]
    scale: Scale = LINEAR


@dataclass(frozen=True, eq=False)
class VerdictFigure:
    """A figure of what predicts what: panels of one kind, `report/draw_verdicts.py` draws it.

    Args:
        name: What its file is called, before it is made safe.
        title: One line above it.
        panels: From left to right, then down.
        caption: How many runs, configurations and tasks it rests on, its units, and what every interval and mark is.
    """

    name: str
    title: str
    panels: tuple[Forest, ...] | tuple[SignMap, ...] | tuple[Cloud, ...]
    caption: str


def scale_of(*values: Numbers | None) -> Scale:
    """A layout in which all finite values can be told apart: logarithmic where they are positive and span `LOG_FROM`.

    Args:
        values: Arrays of any shape; None and non-finite numbers do not count.
    """
    known = np.concatenate([np.ravel(drawable(v)) for v in values if v is not None] or [np.empty(0)])
    known = known[~np.isnan(known)]
    sizes = np.abs(known[known != 0])
    if sizes.size == 0:
        return LINEAR
    if known.min() > 0:
        return LOG if np.log(known.max()) - np.log(known.min()) >= np.log(LOG_FROM) else LINEAR
    quartile = float(np.quantile(sizes, 0.25))
    wide = np.log(sizes.max()) - np.log(quartile) >= np.log(SYMLOG_FROM)
    return Scale("symlog", quartile) if wide else LINEAR


def drawable(values: Numbers) -> Numbers:
    """Values with NaN for what no axis can hold: infinities and magnitudes above `LARGEST`; those below `SMALLEST` become 0."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(values) <= LARGEST, np.where(np.abs(values) < SMALLEST, 0.0, values), np.nan)
