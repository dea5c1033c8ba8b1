"""Draws the figures of traces and of training runs with matplotlib. What they share with other figures is `report/canvas.py`'s business."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    MaxNLocator,
)

from plasticity_probe.errors import RunError, TraceError
from plasticity_probe.report.canvas import (
    BLUE,
    DARK,
    GREEN,
    ORANGE,
    STEPS,
    Rendered,
    check_panels,
    course_look,
    framed,
    linear_formatter,
    rendered,
    saved,
    scaled,
    shown,
    ticked,
    wrapped,
)
from plasticity_probe.report.courses import CONTROL, Course, CourseFigure, CoursePanel, run_figures
from plasticity_probe.report.figures import figures
from plasticity_probe.report.geometry import (
    axes_width,
    colour_limits,
    grid_of,
    height_of_lines,
    positions_of,
    ratio_limits,
    spread,
)
from plasticity_probe.report.panels import Curve, Dots, Figure, HeatMap, Lines, Numbers, Panel, Points, Role, Scale
from plasticity_probe.report.wording import file_names, told_apart
from plasticity_probe.trace.reader import open_trace

COLOURS: dict[Role, Any] = {
    "checkpoint": BLUE,
    "run": BLUE,
    "mean": BLUE,
    "last": BLUE,
    "first": GREEN,
    "fresh": ORANGE,
}
WIDTHS: dict[Role, float] = {"run": 0.5, "mean": 1.8, "checkpoint": 1.3, "first": 1.1, "last": 1.1, "fresh": 1.1}
MARKERS: dict[Role, str] = {"checkpoint": "o", "last": "o", "first": "o", "mean": "o", "run": ".", "fresh": "D"}


def draw(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Draws a figure into a PNG file of 200 dots per inch and a PDF file.

    Args:
        figure: What to draw.
        path: Where, without suffix or with either of the two; the folder must exist.

    Returns:
        The PNG and the PDF file.

    Raises:
        TraceError: A file cannot be written.
        UsageError: The figure has no panel.
    """
    return saved(lambda: _laid_out(figure), path)


def render(figure: Figure | CourseFigure) -> Rendered:
    """Renders a figure without writing it.

    Args:
        figure: What to draw.

    Raises:
        UsageError: The figure has no panel.
    """
    return rendered(lambda: _courses_laid_out(figure) if isinstance(figure, CourseFigure) else _laid_out(figure))


def draw_trace(trace: Path, folder: Path | None = None) -> list[Path]:
    """Draws all figures of a trace.

    Args:
        trace: The trace file.
        folder: Where the figures go; `<stem of the trace>-figures` beside it by default. Made if it does not exist.

    Returns:
        The files, a PNG and a PDF for each figure; none where there is nothing to draw.

    Raises:
        TraceError: The trace cannot be read, or a figure cannot be written.
    """
    wanted = figures(open_trace(trace))
    folder = trace.with_name(f"{trace.stem}-figures") if folder is None else folder
    if wanted:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"expected to make the folder {folder} for figures: {error}; name another one") from error
    names = file_names(figure.name for figure in wanted)
    return [path for name, figure in zip(names, wanted, strict=True) for path in draw(figure, folder / name)]


def draw_courses(figure: CourseFigure, path: Path) -> tuple[Path, Path]:
    """Draws courses into a PNG file of 200 dots per inch and a PDF file.

    Args:
        figure: What to draw.
        path: As in `draw`.

    Returns:
        The PNG and the PDF file.

    Raises:
        TraceError: A file cannot be written.
        UsageError: The figure has no panel.
    """
    return saved(lambda: _courses_laid_out(figure), path)


def draw_run(folder: Path) -> list[Path]:
    """Draws the figures of a run folder into its folder `figures`: the score task by task beside newly initialised networks, and the test score.

    Args:
        folder: The run folder, finished or not; figures that are there are replaced.

    Returns:
        The files, a PNG and a PDF for each figure; none where there is nothing to draw.

    Raises:
        RunError: The folder holds no run, it is damaged, or the folder for figures cannot be made.
        TraceError: A figure cannot be written.
    """
    wanted, into = run_figures(folder), folder / "figures"
    if wanted:
        try:
            into.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"expected to make the folder {into} for figures: {error}; move what is there") from error
    names = file_names(figure.name for figure in wanted)
    return [path for name, figure in zip(names, wanted, strict=True) for path in draw_courses(figure, into / name)]


def _laid_out(figure: Figure) -> Canvas:
    """Panels in a grid under the title, the legend under them, the caption at the foot."""
    check_panels(figure.name, figure.panels)
    columns, rows, width, height = grid_of(figure.panels)
    room = axes_width(figure.panels)
    handles = _handles(figure.panels)
    longest = max(map(len, handles), default=0)
    beside = min(max(int(width / (0.057 * longest + 0.45)), 1), 3)
    canvas, upper = framed(figure.title, figure.caption, width, rows * height + 0.15, handles, beside)
    grid = upper.subplots(rows, columns, squeeze=False).ravel()
    for number, (axes, panel) in enumerate(zip(grid, figure.panels, strict=False)):
        axes.set_title(wrapped(panel.title, "panel", int(room * 14)), fontsize=8.5)
        _draw_panel(axes, panel, first=number % columns == 0)
    for axes in grid[len(figure.panels) :]:
        axes.remove()
    return canvas


def _courses_laid_out(figure: CourseFigure) -> Canvas:
    """Panels with the same axes: names at the left and at the foot alone."""
    check_panels(figure.name, figure.panels)
    count = len(figure.panels)
    columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
    rows, width, height = ceil(count / columns), max(5.4, 2.5 * columns + 0.4), 3.2 if count == 1 else 2.3
    looks = _course_handles(figure)
    handles = dict(zip(told_apart(list(looks), int(width * 12)), looks.values(), strict=True))
    longest = max(map(len, handles), default=0)
    beside = min(max(int(width / (0.057 * longest + 0.45)), 1), 4)
    canvas, upper = framed(figure.title, figure.caption, width, rows * height + 0.15, handles, beside)
    grid = upper.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for number, (axes, panel) in enumerate(zip(grid, figure.panels, strict=False)):
        axes.set_title(wrapped(panel.title, "panel", int(width / columns * 12)), fontsize=8.5)
        _draw_courses(axes, panel, figure)
        if number % columns == 0:
            lines = (wrapped(text, "axis", int(height * 14)) for text in (figure.y_label, f"({figure.units})"))
            axes.set_ylabel("\n".join(lines))
        if number + columns >= count:
            axes.set_xlabel(shown(figure.x_label, "axis"))
            axes.tick_params(labelbottom=True)
    for axes in grid[count:]:
        axes.remove()
    return canvas


def _draw_courses(axes: Axes, panel: CoursePanel, figure: CourseFigure) -> None:
    if figure.chance is not None:
        axes.axhline(figure.chance, color=DARK, linestyle=":", linewidth=1)
    for number, course in enumerate(panel.courses):
        _draw_course(axes, course, figure, *_aside(figure, number, len(panel.courses)))
    axes.set_xlim(*figure.x_limits)
    scaled(axes, "y", figure.scale, figure.limits)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(linear_formatter())
    sns.despine(ax=axes)


def _aside(figure: CourseFigure, number: int, count: int) -> tuple[float, float]:
    """How far a run and its control stand beside their task so that whiskers keep apart: all of them, or under bands single controls alone."""
    if not figure.banded:
        step = min(0.03, 0.15 / count)
        return step * (number + 0.5 - count), step * (number + 0.5)
    low, high = figure.x_limits
    room = high - max(float(course.run.x.max(initial=0)) for panel in figure.panels for course in panel.courses)
    return 0.0, min(0.02 * (high - low), room / (count + 1)) * (number + 1)


def _draw_course(axes: Axes, course: Course, figure: CourseFigure, run_aside: float, control_aside: float) -> None:
    """The control, then the run over it."""
    colour, shape = course_look(course.hue)
    for curve, aside in ((course.control, control_aside), (course.run, run_aside)):
        if curve is None:
            continue
        hollow, alone, many = curve.role == "fresh", _alone(curve.y), curve.x.size > 25
        x = np.where(alone | (not figure.banded), curve.x + aside, curve.x)
        every = ceil(curve.x.size / 15) if many else 1
        marked = alone | (~np.isnan(curve.y) & (np.arange(x.size) % every == course.hue % every))
        if curve.lower is not None and curve.upper is not None:
            lower, upper = (np.maximum(ends, figure.limits[0]) for ends in (curve.lower, curve.upper))
            if figure.banded:
                axes.fill_between(x, lower, upper, color=colour, alpha=0.1 if hollow else 0.18, linewidth=0)
            spots = alone if figure.banded else marked
            axes.vlines(x[spots], lower[spots], upper[spots], color=colour, alpha=0.5, linewidth=1.5)
        axes.plot(x, curve.y, color=colour, linestyle="--" if hollow else "-", linewidth=1 if hollow or many else 1.5)
        dot: dict[str, Any] = {"linestyle": "", "marker": shape, "color": colour, "markersize": 5 if many else 3.6}
        face, edge = "white" if hollow else colour, "white" if many and not hollow else colour
        axes.plot(x[marked], curve.y[marked], **dot, markerfacecolor=face, markeredgecolor=edge)


def _course_handles(figure: CourseFigure) -> dict[str, Line2D]:
    """The entries of the legend: each label once, then in grey what dashes and dots are."""
    found: dict[str, Line2D] = {}
    drawn = [course for panel in figure.panels for course in panel.courses]
    for course in sorted(drawn, key=lambda course: course.hue):
        colour, shape = course_look(course.hue)
        found.setdefault(course.label, Line2D([], [], color=colour, marker=shape, markersize=3.6, linewidth=1.5))
    controlled = [course for course in drawn if course.control is not None]
    if controlled:
        one = len(found) == 1
        colour, shape = course_look(controlled[0].hue) if one else (DARK, "o")
        dashes: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "markersize": 3.6, "markerfacecolor": "white"}
        found[CONTROL] = Line2D([], [], color=colour, marker=shape, **dashes)
    if figure.chance is not None:
        found[f"chance level, {figure.chance:.3g}"] = Line2D([], [], color=DARK, linestyle=":", linewidth=1)
    return found


def _draw_panel(axes: Axes, panel: Panel, *, first: bool) -> None:
    match panel:
        case Lines():
            _draw_lines(axes, panel)
        case HeatMap():
            _draw_heat_map(axes, panel, labelled=first)
        case Dots():
            _draw_dots(axes, panel, labelled=first)
    if not isinstance(panel, HeatMap):
        sns.despine(ax=axes)


def _draw_lines(axes: Axes, panel: Lines) -> None:
    if panel.level is not None:
        level = panel.level
        if level.upper > level.lower:
            axes.axhspan(level.lower, level.upper, color=COLOURS["fresh"], alpha=0.18, linewidth=0)
        axes.axhline(level.value, color=COLOURS["fresh"], linestyle="--", linewidth=WIDTHS["fresh"])
    floor = panel.limits[0] * 1e-3 if panel.limits else -np.inf
    for curve in panel.curves:
        _draw_curve(axes, curve, floor, panel.whole)
    scaled(axes, "y", panel.scale, panel.limits)
    axes.set_xlabel(shown(panel.x_label, "axis"))
    axes.set_ylabel(shown(panel.y_label, "axis"))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=panel.whole))
    axes.xaxis.set_major_formatter(linear_formatter())


def _draw_curve(axes: Axes, curve: Curve, floor: float, whole: bool) -> None:
    thin = curve.role == "run"
    colour, shape = (COLOURS[curve.role], MARKERS[curve.role]) if curve.hue is None else course_look(curve.hue)
    y, alone = np.maximum(curve.y, floor), _alone(curve.y)
    if curve.lower is not None and curve.upper is not None:
        lower, upper = np.maximum(curve.lower, floor), np.maximum(curve.upper, floor)
        axes.fill_between(curve.x, lower, upper, color=colour, alpha=0.18, linewidth=0)
        axes.vlines(curve.x[alone], lower[alone], upper[alone], color=colour, alpha=0.4, linewidth=2.5)
    stroke = "--" if curve.role == "fresh" else "-"
    axes.plot(curve.x, y, color=colour, linestyle=stroke, linewidth=WIDTHS[curve.role], alpha=0.5 if thin else 1)
    marked = ~np.isnan(y) if whole and not thin and curve.x.size <= 40 else alone
    if marked.any():
        axes.plot(curve.x[marked], y[marked], linestyle="", marker=shape, markersize=3, color=colour)
    if curve.doubtful is not None and curve.doubtful.any():
        axes.plot(curve.x[curve.doubtful], y[curve.doubtful], **_dot(curve.role, "white"))


def _dot(role: Role, face: Any, size: float = 4) -> dict[str, Any]:
    dot = {"linestyle": "", "marker": MARKERS[role], "markersize": size, "color": COLOURS[role]}
    return {**dot, "markerfacecolor": face}


def _alone(y: Numbers) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Points without a neighbour: no line goes through them."""
    known = np.concatenate([[False], ~np.isnan(y), [False]])
    return known[1:-1] & ~known[:-2] & ~known[2:]


def _draw_heat_map(axes: Axes, panel: HeatMap, *, labelled: bool) -> None:
    low, high = colour_limits(panel)
    look: dict[str, Any] = {
        "cmap": mpl.colormaps["vlag" if low < 0 else "viridis"],
        "norm": _norm(panel.scale, low, high),
    }
    lines, columns = panel.values.shape
    rows, left, ticks, names = np.arange(lines + 1) - 0.5, -0.5, [], []
    if panel.fresh is not None:
        gap, wide = max(0.3, columns / 40), max(1.0, columns / 15)
        left -= gap + wide
        axes.pcolormesh([left, left + wide], rows, np.ma.masked_invalid(panel.fresh[:, None]), **look)
        axes.axvspan(left + wide, -0.5, color="white", zorder=3)
        ticks, names = [left + wide / 2], ["fresh"]
    values, edges = np.ma.masked_invalid(panel.values), np.arange(columns + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, values, rasterized=values.size > 3000, **look)
    axes.set(xlim=(left, columns - 0.5), ylim=(lines - 0.5, -0.5), facecolor="0.8")
    ticks, names = [*ticks, *spread(columns, 8)], [*names, *(panel.columns[at] for at in spread(columns, 8))]
    upright = max(map(len, names)) * len(names) > 22
    axes.set_xticks(ticks, [shown(name, "label") for name in names], rotation=90 if upright else 0)
    axes.set_xlabel(shown(panel.x_label, "axis"))
    _label_axis(axes, panel.labels, np.arange(lines), labelled)
    assert axes.figure is not None
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.03, aspect=height_of_lines(lines) / 0.11)
    bar.set_label(shown(panel.value_label, "axis"), fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    ticked(bar.ax.yaxis, panel.scale, low, high)
    bar.ax.yaxis.get_offset_text().set_fontsize(7)


def _norm(scale: Scale, low: float, high: float) -> Normalize:
    match scale.kind:
        case "log":
            return LogNorm(low, high)
        case "symlog":
            return SymLogNorm(scale.threshold, vmin=low, vmax=high)
        case "linear":
            return Normalize(low, high)


def _draw_dots(axes: Axes, panel: Dots, *, labelled: bool) -> None:
    positions, headings = positions_of(panel)
    across = axes.get_yaxis_transform()
    if panel.reference is not None:
        axes.axvline(panel.reference, color="0.5", linewidth=0.8, zorder=1)
    axes.hlines(positions, 0, 1, color="0.9", linewidth=0.6, zorder=0, transform=across)
    for number, points in enumerate(panel.points):
        _draw_points(axes, points, positions + 0.32 * (number - (len(panel.points) - 1) / 2))
    _label_axis(axes, panel.labels, positions, labelled)
    bold: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 7.5, "fontweight": "bold", "transform": across}
    for position, heading in headings:
        axes.text(-0.02, position, shown(heading, "label"), **bold)
    for position, note in zip(positions, panel.notes, strict=False):
        axes.text(1.02, position, shown(note, "label"), va="center", fontsize=7, color="0.3", transform=across)
    axes.set_ylim(float(positions.max(initial=0)) + 0.7, -0.7)
    scaled(axes, "x", panel.scale, ratio_limits(panel))
    axes.set_xlabel(shown(panel.x_label, "axis"))


def _draw_points(axes: Axes, points: Points, positions: Numbers) -> None:
    if points.lower is not None and points.upper is not None:
        axes.hlines(positions, points.lower, points.upper, color=COLOURS[points.role], alpha=0.45, linewidth=2.2)
    axes.plot(points.values, positions, **_dot(points.role, _face(points.role)))


def _label_axis(axes: Axes, labels: Sequence[str], positions: Numbers, labelled: bool) -> None:
    names = [shown(label, "label") for label in labels] if labelled else []
    axes.yaxis.set_major_locator(FixedLocator([float(at) for at in positions]))
    axes.set_yticks(positions, names or [""] * len(labels), fontsize=6.3 if len(labels) > 40 else 7.2)
    axes.tick_params(axis="y", length=0)


def _handles(panels: Sequence[Panel]) -> dict[str, Line2D]:
    """The entries of the legend: what is labelled alike is drawn alike in all panels."""
    found: dict[str, Line2D] = {}
    for panel in panels:
        if isinstance(panel, Lines):
            for curve in panel.curves:
                handle = _line_handle(curve.role, panel.whole and curve.role != "run")
                if curve.hue is not None:
                    handle.set(**dict(zip(("color", "marker"), course_look(curve.hue), strict=True)))
                found.setdefault(curve.label, handle)
            if panel.level is not None:
                found.setdefault(panel.level.label, _line_handle("fresh", False))
            if any(c.doubtful is not None and (c.doubtful & ~np.isnan(c.y)).any() for c in panel.curves):
                found.setdefault("did not end well", Line2D([], [], **_dot("checkpoint", "white")))
        elif isinstance(panel, Dots):
            for points in panel.points:
                found.setdefault(points.label, Line2D([], [], **_dot(points.role, _face(points.role))))
    return found


def _line_handle(role: Role, marked: bool) -> Line2D:
    stroke, marker = "--" if role == "fresh" else "-", MARKERS[role] if marked else ""
    return Line2D([], [], color=COLOURS[role], linestyle=stroke, linewidth=WIDTHS[role], marker=marker, markersize=3)


def _face(role: Role) -> Any:
    return "white" if role == "fresh" else COLOURS[role]
