"""What every drawn figure shares: its frame, its texts, its axes and its files. With the modules that draw it is all that imports matplotlib.

Every text may come from a stranger's file: it is drawn as it is, with neither formulas nor escapes, and shortened. The same figure gives the
same bytes every time, and matplotlib's global state is left alone.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    Formatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    ScalarFormatter,
)

from plasticity_probe.errors import TraceError, UsageError
from plasticity_probe.report.geometry import symlog_ticks
from plasticity_probe.report.panels import Scale
from plasticity_probe.report.wording import plain, power_of_ten, shortened

DPI = 200
STEPS = [1, 2, 2.5, 5, 10]
FONT = "DejaVu Sans"
LONGEST = {"title": 120, "panel": 110, "label": 72, "axis": 80, "legend": 90, "caption": 1500}
"""The most characters of each kind of text."""

_PALETTE: list[Any] = list(sns.color_palette("colorblind"))
BLUE, ORANGE, GREEN = (_PALETTE[at] for at in (0, 1, 2))
HUES: list[Any] = [_PALETTE[at] for at in (0, 3, 2, 4, 9, 1, 5)]
"""Colours of courses: those of the palette that stand out from white paper and from the grey of the chance level."""
SHAPES = "os^DvPX"
"""Markers of courses, as many as colours."""
DARK = "0.35"


@dataclass(frozen=True)
class Rendered:
    """A figure as the bytes of its files.

    Args:
        png: The PNG file, `DPI` dots per inch.
        pdf: The PDF file.
        foot: Height of the caption at its foot, in dots of the PNG file.
    """

    png: bytes
    pdf: bytes
    foot: int


def saved(build: Callable[[], Canvas], path: Path) -> tuple[Path, Path]:
    """Writes the PNG and the PDF file of a figure.

    Args:
        build: Makes the figure.
        path: Where, without suffix or with either of the two.

    Raises:
        TraceError: A file cannot be written.
    """
    stem = path.with_suffix("") if path.suffix in (".png", ".pdf") else path
    paths = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".pdf")
    files = rendered(build)
    for target, content in zip(paths, (files.png, files.pdf), strict=True):
        _write(target, content)
    return paths


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise TraceError(f"expected to write the figure {path}: {error}; name another folder or make room") from error


def rendered(build: Callable[[], Canvas]) -> Rendered:
    """Renders a figure.

    Args:
        build: Makes the figure.
    """
    with style():
        canvas = build()
        png, pdf = BytesIO(), BytesIO()
        canvas.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
        canvas.set_layout_engine("none")  # it is settled; settling it again for the second file would only cost time
        canvas.savefig(pdf, format="pdf", dpi=DPI, metadata={"Creator": None, "Producer": None, "CreationDate": None})
        foot = round(canvas.subfigs[-1].bbox.height) if canvas.subfigs else 0
    return Rendered(png.getvalue(), pdf.getvalue(), foot)


@contextmanager
def style() -> Iterator[None]:
    """Within it, figures look as they shall, whatever a user's own settings are; afterwards those are as they were."""
    own = {
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": [FONT],
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": True,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "legend.fontsize": 8,
        "axes.titlelocation": "left",
        "pdf.fonttype": 42,
        "path.simplify": True,
        "savefig.bbox": None,
        "figure.facecolor": "white",
    }
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's matplotlibrc would make the same figure look different elsewhere
        settings: Any = mpl.rcParams
        settings.update({**sns.plotting_context("paper"), **sns.axes_style("ticks"), **own})
        yield


def check_panels(name: str, panels: Sequence[object]) -> None:
    """Refuses a figure without panels.

    Raises:
        UsageError: There is none.
    """
    if not panels:
        raise UsageError(f"expected a figure with at least one panel, got none in {plain(name)[:60]!r}")


def framed(
    title: str, caption: str, width: float, body: float, handles: Mapping[str, Line2D], columns: int
) -> tuple[Canvas, Any]:
    """A canvas with title, legend and caption, and the part of it that has room for panels of a height of `body` inches."""
    title = wrapped(title, "title", int(width * 12.5))
    caption = wrapped(caption, "caption", int(width * 18.5))
    foot = 0.14 * (caption.count("\n") + 1) + 0.12
    height = body + 0.2 * (title.count("\n") + 1) + 0.2 * ceil(len(handles) / columns)
    canvas = Canvas(figsize=(width, height + foot), dpi=DPI, layout="constrained")
    FigureCanvasAgg(canvas)
    parts: Any = canvas.subfigures(2, 1, height_ratios=[height, foot])
    upper, lower = parts
    upper.suptitle(title, x=0.012, ha="left", fontsize=11)
    if handles:
        names = [shown(label, "legend") for label in handles]
        look: dict[str, Any] = {"ncols": columns, "frameon": False, "fontsize": 7.5}
        upper.legend(list(handles.values()), names, loc="outside lower left", **look)
    lower.text(0.012, 1.0, caption, ha="left", va="top", fontsize=7, color="0.25", linespacing=1.25, wrap=False)
    return canvas, upper


def scaled(axes: Axes, name: str, scale: Scale, limits: tuple[float, float] | None) -> None:
    """Lays out the axis called "x" or "y"."""
    options = {"linthresh": scale.threshold} if scale.kind == "symlog" else {}
    (axes.set_xscale if name == "x" else axes.set_yscale)(scale.kind, **options)
    axis = axes.xaxis if name == "x" else axes.yaxis
    if limits is not None:
        (axes.set_xlim if name == "x" else axes.set_ylim)(*limits)
    ticked(axis, scale, *sorted(axis.get_view_interval()))


def ticked(axis: Any, scale: Scale, low: float, high: float) -> None:
    """Ticks whose labels need no formula: powers of ten in small raised digits."""
    axis.set_minor_locator(NullLocator())
    if scale.kind == "linear":
        axis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axis.set_major_formatter(linear_formatter())
        return
    if scale.kind == "log":
        narrow = low > 0 and high / low < 50
        locator = LogLocator(10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=6)
    else:
        locator = FixedLocator(symlog_ticks(low, high, scale.threshold))
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))


def linear_formatter() -> Formatter:
    """Plain numbers, without offsets and formulas."""
    formatter = ScalarFormatter(useOffset=False, useMathText=False)
    formatter.set_powerlimits((-3, 5))
    return formatter


def course_look(hue: int) -> tuple[Any, str]:
    """Colour and marker: each pair comes once in as many courses as there are pairs."""
    return HUES[hue % len(HUES)], SHAPES[(hue + hue // len(HUES)) % len(SHAPES)]


def wrapped(text: str, kind: str, width: int) -> str:
    """Text that can be drawn, in lines of so many characters."""
    return textwrap.fill(shown(text, kind), max(width, 12), break_long_words=True)


def shown(text: str, kind: str) -> str:
    """Text that can be drawn: one line, shortened, and a replacement for every character the font lacks."""
    known = _characters()
    return "".join(c if ord(c) in known else "\N{REPLACEMENT CHARACTER}" for c in shortened(plain(text), LONGEST[kind]))


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())
