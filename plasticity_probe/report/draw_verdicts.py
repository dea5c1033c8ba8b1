"""Draws the figures of an assessment with matplotlib: forests, maps of signs, and clouds."""

from math import ceil
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator

from plasticity_probe.prediction.verdict import Verdict
from plasticity_probe.report.canvas import (
    STEPS,
    Rendered,
    check_panels,
    course_look,
    framed,
    linear_formatter,
    rendered,
    scaled,
    shown,
    wrapped,
)
from plasticity_probe.report.geometry import headed, height_of_lines
from plasticity_probe.report.panels import Cloud, Forest, SignMap, VerdictFigure

LOOKS: dict[str, tuple[str, str]] = {
    Verdict.PREDICTS: ("#0072b2", "o"),
    Verdict.ACCOMPANIES: ("#b87400", "^"),
    Verdict.DOES_NOT_PREDICT: ("#555555", "s"),
    Verdict.REFUTED: ("#c44e00", "X"),
    Verdict.INCONCLUSIVE: ("#a64d84", "D"),
    "first": ("#009e73", "s"),
    "last": ("#0072b2", "o"),
    "change": ("#333333", "D"),
    "within": ("#0072b2", "o"),
    "between": ("#c44e00", "^"),
}
"""Colour and marker of each kind of estimate. The colours are told apart with every common colour blindness, and no two share a marker
within a figure (Okabe and Ito 2008; the lighter ones darkened to stand out from white)."""
HOLLOW = {Verdict.INCONCLUSIVE}
LETTER = 0.058
"""Inches of a letter beside an axis."""
LEVEL_LETTERS = 8
"""Longer names of columns are slanted."""


def render(figure: VerdictFigure) -> Rendered:
    """Renders a figure without writing it.

    Args:
        figure: What to draw.

    Raises:
        UsageError: The figure has no panel.
    """
    return rendered(lambda: _laid_out(figure))


def _laid_out(figure: VerdictFigure) -> Canvas:
    check_panels(figure.name, figure.panels)
    first = figure.panels[0]
    if isinstance(first, Forest):
        return _forests(figure, [panel for panel in figure.panels if isinstance(panel, Forest)])
    if isinstance(first, SignMap):
        return _sign_map(figure, first)
    return _clouds(figure, [panel for panel in figure.panels if isinstance(panel, Cloud)])


def _forests(figure: VerdictFigure, panels: list[Forest]) -> Canvas:
    positions, headings = headed(panels[0].labels, panels[0].groups)
    spread = 1.6 if any(panel.beside for panel in panels) else 1.25
    height = 0.75 + spread * height_of_lines(len(positions) + len(headings))
    beside = LETTER * max(map(len, panels[0].labels), default=0)
    notes = LETTER * max((len(note) for panel in panels for note in panel.notes), default=0)
    own = 3.4 if len(panels) > 1 else 4.6
    width = max(6.4, beside + own * len(panels) + notes + 0.3)
    handles = {e.label: _handle(e.look) for panel in panels for e in panel.estimates if (~np.isnan(e.values)).any()}
    shaded = next((panel.shaded for panel in panels if panel.shaded), None)
    if shaded:
        handles[f"of no interest: {shaded[0]:+.1f} to {shaded[1]:+.1f}".replace("-", "−")] = _patch()
    canvas, upper = framed(figure.title, figure.caption, width, height + 0.3, handles, 3 if width < 8 else 5)
    grid = upper.subplots(1, len(panels), squeeze=False).ravel()
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        _draw_forest(axes, panel, labelled=number == 0)
    return canvas


def _draw_forest(axes: Axes, panel: Forest, *, labelled: bool) -> None:
    positions, headings = headed(panel.labels, panel.groups)
    across = axes.get_yaxis_transform()
    if panel.shaded is not None:
        axes.axvspan(*panel.shaded, color="0.93", linewidth=0, zorder=0)
    if panel.reference is not None:
        axes.axvline(panel.reference, color="0.45", linewidth=0.9, zorder=1)
    axes.hlines(positions, 0, 1, color="0.88", linewidth=0.6, zorder=0.5, transform=across)
    for number, estimates in enumerate(panel.estimates):
        aside = 0.3 * (number - (len(panel.estimates) - 1) / 2) if panel.beside else 0.0
        colour, marker = LOOKS[estimates.look]
        axes.hlines(positions + aside, estimates.lower, estimates.upper, color=colour, linewidth=1.5, zorder=2)
        face = "white" if estimates.look in HOLLOW else colour
        edge = colour if estimates.look in HOLLOW else "white"
        dot: dict[str, Any] = {
            "linestyle": "",
            "marker": marker,
            "markersize": 6.5,
            "markeredgewidth": 0.8,
            "zorder": 3,
        }
        axes.plot(estimates.values, positions + aside, markerfacecolor=face, markeredgecolor=edge, **dot)
    axes.yaxis.set_major_locator(FixedLocator([float(at) for at in positions]))
    names = [shown(label, "label") for label in panel.labels] if labelled else [""] * len(panel.labels)
    axes.set_yticks(positions, names, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    bold: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 7.5, "fontweight": "bold", "transform": across}
    for position, heading in headings if labelled else ():
        axes.text(-0.02, position, shown(heading, "label"), **bold)
    for position, note in zip(positions, panel.notes, strict=False):
        axes.text(1.03, position, shown(note, "label"), va="center", fontsize=7, color="0.25", transform=across)
    axes.set_ylim(float(positions.max(initial=0)) + 0.7, float(positions.min(initial=0)) - (1.6 if headings else 0.7))
    axes.set_title(wrapped(panel.title, "panel", 44), fontsize=8.5)
    axes.set_xlabel(wrapped(panel.x_label, "axis", 46))
    if panel.limits is not None:
        axes.set_xlim(*panel.limits)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.xaxis.set_major_formatter(linear_formatter())
    sns.despine(ax=axes, left=True)


def _sign_map(figure: VerdictFigure, panel: SignMap) -> Canvas:
    lines, columns = panel.values.shape
    beside = LETTER * max(map(len, panel.labels), default=0)
    below = max(map(len, panel.columns), default=0)
    slanted = below > LEVEL_LETTERS
    width = max(6.4, beside + 0.55 * columns + 1.2)
    height = 0.8 + 1.3 * height_of_lines(lines) + (0.7 * LETTER * below if slanted else 0.0)
    star = Line2D([], [], linestyle="", marker="*", color="black", markersize=6)
    canvas, upper = framed(figure.title, figure.caption, width, height + 0.3, {"the 95 % interval excludes 0": star}, 3)
    axes = upper.subplots()
    largest = max(0.3, float(np.nanmax(np.abs(panel.values))))
    norm, colours = Normalize(-largest, largest), mpl.colormaps["vlag"]
    edges, rows = np.arange(columns + 1) - 0.5, np.arange(lines + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, np.ma.masked_invalid(panel.values), cmap=colours, norm=norm)
    axes.set_facecolor("0.8")
    for line, column in zip(*np.nonzero(~np.isnan(panel.values)), strict=True):
        value = panel.values[line, column]
        ink = "white" if abs(value) > 0.55 * largest else "0.1"
        text = f"{value:+z.2f}".replace("-", "−").replace("0.", ".") + ("*" if panel.marked[line, column] else "")
        heavy = "bold" if panel.marked[line, column] else "normal"
        axes.text(column, line, text, ha="center", va="center", fontsize=6.6, color=ink, fontweight=heavy)
    if panel.separated is not None:
        axes.axvline(panel.separated + 0.5, color="white", linewidth=4)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(lines - 0.5, -0.5))
    slant: dict[str, Any] = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor", "fontsize": 7.5} if slanted else {}
    )
    axes.set_xticks(range(columns), [shown(name, "label") for name in panel.columns], **slant)
    axes.set_yticks(range(lines), [shown(label, "label") for label in panel.labels], fontsize=7.5)
    axes.tick_params(length=0)
    axes.set_xlabel(shown(panel.x_label, "axis"))
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = upper.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02, aspect=height_of_lines(lines) / 0.09)
    bar.set_label(shown(panel.value_label, "axis"), fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    bar.locator = MaxNLocator(5, steps=STEPS)
    bar.update_ticks()
    return canvas


def _clouds(figure: VerdictFigure, panels: list[Cloud]) -> Canvas:
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows, width = ceil(len(panels) / columns), max(6.4, 3.1 * columns)
    handles: dict[str, Any] = {}
    for trail in sorted((t for panel in panels for t in panel.trails), key=lambda t: t.hue):
        colour, marker = course_look(trail.hue)
        handles.setdefault(trail.label, Line2D([], [], color=colour, marker=marker, markersize=3.6, linewidth=0.8))
    longest = max(map(len, handles), default=0)
    beside = min(max(int(width / (0.057 * longest + 0.45)), 1), 4)
    canvas, upper = framed(figure.title, figure.caption, width, 2.6 * rows + 0.2, handles, beside)
    grid = upper.subplots(rows, columns, squeeze=False).ravel()
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        _draw_cloud(axes, panel, left=number % columns == 0)
    for axes in grid[len(panels) :]:
        axes.remove()
    return canvas


def _draw_cloud(axes: Axes, panel: Cloud, *, left: bool) -> None:
    many = sum(trail.x.size for trail in panel.trails) > 300
    for trail in panel.trails:
        colour, marker = course_look(trail.hue)
        axes.plot(trail.x, trail.y, color=colour, linewidth=0.5, alpha=0.18 if many else 0.35)
        dot: dict[str, Any] = {"linestyle": "", "marker": marker, "markeredgewidth": 0, "alpha": 0.7}
        axes.plot(trail.x, trail.y, color=colour, markersize=2.4 if many else 3.4, **dot)
    axes.set_title(wrapped(panel.title, "panel", 42), fontsize=8)
    scaled(axes, "x", panel.scale, None)
    axes.set_xlabel(wrapped(panel.x_label, "axis", 40))
    axes.set_ylabel(wrapped(panel.y_label, "axis", 32) if left else "")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.yaxis.set_major_formatter(linear_formatter())
    sns.despine(ax=axes)


def _handle(look: str) -> Line2D:
    colour, marker = LOOKS[look]
    face = "white" if look in HOLLOW else colour
    return Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.5, markerfacecolor=face)


def _patch() -> Any:
    return Patch(facecolor="0.93", edgecolor="0.75", linewidth=0.5)
