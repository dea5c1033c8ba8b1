"""How large panels are and where things stand in them, in inches and in lines; no drawing."""

from collections.abc import Sequence
from math import ceil, floor, log10

import numpy as np

from plasticity_probe.report.panels import Dots, HeatMap, Lines, Numbers, Panel

LEAST_WIDTH = 5.4
"""Inches: a single panel is drawn this wide, and titles and captions have room."""
LEAST_HEIGHT = 0.9
LONGEST_LABEL = 72


def grid_of(panels: Sequence[Panel]) -> tuple[int, int, float, float]:
    """Columns and rows of a figure's panels, the width of the figure and the height of a row in inches.

    Args:
        panels: All panels of a figure, of one kind.
    """
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    own, height = (max(sizes) for sizes in zip(*(_size(panel) for panel in panels), strict=True))
    if columns == 1 and isinstance(panels[0], Lines):
        height = 3.0
    names = max(_label_width(panel) for panel in panels)
    return columns, ceil(len(panels) / columns), max(columns * own + names, LEAST_WIDTH), height


def axes_width(panels: Sequence[Panel]) -> float:
    """Inches that a title has above each panel's axes."""
    columns, _, width, _ = grid_of(panels)
    names, decoration = max(_label_width(panel) for panel in panels), 0.75 if isinstance(panels[0], Lines) else 0.25
    return (width - names) / columns - decoration


def height_of_lines(lines: int) -> float:
    """Inches for so many labels: enough for their letters, more where there are few."""
    return max(0.125 * lines if lines > 40 else 0.16 * lines if lines > 15 else 0.2 * lines, LEAST_HEIGHT)


def positions_of(panel: Dots) -> tuple[Numbers, list[tuple[float, str]]]:
    """Where each label of a panel stands, and where the headings stand."""
    return headed(panel.labels, panel.groups)


def headed(labels: Sequence[str], groups: Sequence[str]) -> tuple[Numbers, list[tuple[float, str]]]:
    """Where each label stands, counted downwards, with a line left free for each heading, and where the headings stand.

    Args:
        labels: Names of the lines, from top to bottom.
        groups: For each label the heading it stands under; empty for no headings.
    """
    at, last = 0.0, None
    positions: list[float] = []
    headings: list[tuple[float, str]] = []
    for number in range(len(labels)):
        heading = groups[number] if groups else None
        if heading is not None and heading != last:
            headings.append((at, heading))
            at += 1
        positions.append(at)
        at, last = at + 1, heading
    return np.array(positions), headings


def colour_limits(panel: HeatMap) -> tuple[float, float]:
    """The ends of the colour bar: symmetric where values are negative, and never the same."""
    shown = np.concatenate([panel.values.ravel(), [] if panel.fresh is None else panel.fresh])
    shown = shown[~np.isnan(shown)]
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if low < 0:
        return -largest, largest
    missing = 0.1 * (largest or 1) if high - low <= 1e-9 * largest else 0.0
    return low - missing if low > 0 else 0.0, high + missing


def ratio_limits(panel: Dots) -> tuple[float, float] | None:
    """The ends of a logarithmic axis that has its reference in the middle; None where there is no reference."""
    known = np.concatenate([v for p in panel.points for v in (p.values, p.lower, p.upper) if v is not None])
    known = known[~np.isnan(known)]
    if panel.scale.kind != "log" or panel.reference is None or not known.size:
        return None
    reach = 1.25 * max(2.0, float((known / panel.reference).max()), float((panel.reference / known).max()))
    return panel.reference / reach, panel.reference * reach


def symlog_ticks(low: float, high: float, threshold: float) -> list[float]:
    """Zero and powers of ten beyond the linear part, at most three to either side, so that no two labels meet.

    Args:
        low: Lower end of the axis.
        high: Upper end.
        threshold: Where the linear part ends.
    """
    first, last = ceil(log10(threshold)) + 1, floor(log10(max(abs(low), abs(high), threshold)))
    powers = [10.0**exponent for exponent in range(last, first - 1, -max(1, ceil((last - first + 1) / 3)))]
    return sorted(tick for tick in (0.0, *powers, *(-power for power in powers)) if low <= tick <= high)


def spread(count: int, most: int) -> list[int]:
    """At most so many of 0 .. count - 1, evenly spread from the first on."""
    return list(range(0, count, ceil(count / most)))


def _size(panel: Panel) -> tuple[float, float]:
    """Inches of a panel without the names of its labels, which only the first in a row has."""
    match panel:
        case Lines():
            return (3.3, 2.3) if panel.whole else (4.0, 2.9)
        case HeatMap():
            return 2.7, 1.15 + height_of_lines(len(panel.labels))
        case Dots():
            lines = len(panel.labels) + len(positions_of(panel)[1])
            return 4.2 if panel.notes else 2.7, 1.0 + height_of_lines(lines)


def _label_width(panel: Panel) -> float:
    labels = () if isinstance(panel, Lines) else panel.labels
    return 0.058 * max((min(len(label), LONGEST_LABEL) for label in labels), default=0)
