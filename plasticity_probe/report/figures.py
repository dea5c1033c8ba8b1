"""What to draw of a trace, as data: pure functions from its tree to figures. Drawing them is `report/draw.py`'s business.

Nothing here knows a probe: panels come from the quantities' own roles, summaries, dimensions and units, so a third party's probe has figures
too.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr
from scipy.special import stdtrit

from plasticity_probe.comparison import number
from plasticity_probe.report.panels import (
    LINEAR,
    LOG,
    Curve,
    Dots,
    Figure,
    HeatMap,
    Level,
    Lines,
    Numbers,
    Panel,
    Points,
    drawable,
    scale_of,
)
from plasticity_probe.report.quantities import Group, Measured, groups, headline_quantities, labelled_quantities
from plasticity_probe.report.spectra import density_figures
from plasticity_probe.report.wording import counted, shortened, told_apart

PANELS = 12
"""The most panels of a figure."""
LABELS = 100
"""The most labels of a panel; the rest goes to further figures."""
LABEL_FIGURES = 5
"""The most figures that the labels of one probe are spread over; what is left out is said in the caption."""


def figures(tree: xr.DataTree) -> list[Figure]:
    """All figures of a trace: for single checkpoints the ratios to fresh networks, then probe by probe series, densities and layers.

    Args:
        tree: As `plasticity_probe.trace.reader.open_trace` returns it.

    Returns:
        Figures in the order of the trace's probes; none where nothing was measured.
    """
    probes = groups(tree)
    found = ratio_figures([group for group in probes if not group.series])
    for group in probes:
        found += [*series_figures(group), *density_figures(group), *label_figures(group)]
    return found


def series_figures(group: Group) -> list[Figure]:
    """The headline quantities of a probe against the task or step, one panel each; none where no run has two checkpoints.

    Args:
        group: A probe's rows.
    """
    if not group.series:
        return []
    quantities = [quantity for quantity in headline_quantities(group) if _known(quantity.values[~group.fresh])]
    own = [q for q in quantities if q.lower is not None] if len(group.runs) == 1 else []
    problems = group.problems("gaps or, where they have numbers, hollow dots")
    caption = " ".join(filter(None, (group.conditions(), _series_words(group, own), problems)))
    count, axis = len(np.unique(group.place[1][~group.fresh])), group.place[0].split(",")[0]
    several = f"{len(group.runs)} runs, {counted(count, axis)}"
    title = f"{shortened(group.label, 60)}: {several if len(group.runs) > 1 else counted(count, 'checkpoint')}"
    panels = [_series_panel(group, quantity) for quantity in quantities]
    return list(split(f"{group.label[:60]}-series", title, panels, caption, PANELS))


def label_figures(group: Group) -> list[Figure]:
    """The quantities of a probe per layer or tensor: heat maps over a series, dots beside a fresh network for one checkpoint.

    Args:
        group: A probe's rows.
    """
    found: list[Figure] = []
    quantities = [q for q in labelled_quantities(group) if q.labels and _known(q.values[~group.fresh])]
    for dim in dict.fromkeys(quantity.dim for quantity in quantities):
        own = [quantity for quantity in quantities if quantity.dim == dim]
        size = len(own[0].labels)
        blocks = [slice(start, min(start + LABELS, size)) for start in range(0, size, LABELS)][:LABEL_FIGURES]
        for block in blocks:
            part = "" if size <= LABELS else f" {block.start + 1} to {block.stop} of {size}"
            title = f"{shortened(group.label, 60)}: each {shortened(dim, 40)}{part}"
            name = f"{group.label[:60]}-{dim[:30]}"
            panels = [panel for q in own for panel in _label_panels(group, q, block)]
            caption = " ".join(filter(None, (group.conditions(), _label_words(group, own), group.problems())))
            found += split(name, title, panels, caption, _fitting(block.stop - block.start))
    return found


def ratio_figures(probes: Sequence[Group]) -> list[Figure]:
    """The headline quantities of single checkpoints as ratios to the mean of fresh networks; none without fresh networks.

    Args:
        probes: Groups whose runs have one checkpoint each.
    """
    lines = [(group, q) for group in probes for q in headline_quantities(group) if _comparable(group, q)]
    found: list[Figure] = []
    for start in range(0, len(lines), LABELS):
        part = lines[start : start + LABELS]
        used = list(dict.fromkeys(group for group, _ in part))
        found.append(
            Figure(
                "checkpoint-and-fresh", "Checkpoint beside fresh networks", (_ratio_panel(part),), _ratio_words(used)
            )
        )
    return found


def interval(values: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Mean and 95 % Student-t interval over runs, ``mean ± t(0.975, n - 1) s / sqrt(n)``, NaN left out.

    Args:
        values: Shape (run, place).

    Returns:
        Mean, lower and upper end, each of shape (place,). The interval is NaN where fewer than two runs have a value.
    """
    n = np.sum(~np.isnan(values), axis=0)
    safe = np.maximum(n, 1)
    mean = np.where(n > 0, np.nansum(values, axis=0) / safe, np.nan)
    squares = np.nansum((values - mean) ** 2, axis=0)
    deviation = np.sqrt(squares / np.maximum(n - 1, 1))
    reach = np.where(n > 1, stdtrit(np.maximum(n - 1, 1), 0.975) * deviation / np.sqrt(safe), np.nan)
    return mean, mean - reach, mean + reach


def _series_panel(group: Group, quantity: Measured) -> Lines:
    axis, _ = group.place
    curves = _run_curves(group, quantity) if len(group.runs) > 1 else [_single_curve(group, quantity)]
    level = _level(group, quantity)
    ends = None if level is None else np.array([level.lower, level.upper])
    scale = scale_of(*(values for curve in curves for values in (curve.y, curve.lower, curve.upper)), ends)
    return Lines(_panel_title(quantity), axis, quantity.axis, tuple(curves), level, scale)


def _single_curve(group: Group, quantity: Measured) -> Curve:
    rows = group.rows_of(group.runs[0])
    x = group.place[1][rows].astype(np.float64)
    lower, upper = (None if ends is None else drawable(ends[rows]) for ends in (quantity.lower, quantity.upper))
    return Curve(
        "checkpoint", "checkpoint", x, drawable(quantity.values[rows]), lower, upper, group.status[rows] != "ok"
    )


def _run_curves(group: Group, quantity: Measured) -> list[Curve]:
    """Each run, then their mean where more than half of the runs have a value that can be relied on: elsewhere it would jump between runs."""
    places = np.unique(group.place[1][~group.fresh])
    table = np.full((len(group.runs), places.size), np.nan)
    curves: list[Curve] = []
    for at, run in enumerate(group.runs):
        rows = group.rows_of(run)
        x, y = group.place[1][rows], drawable(quantity.values[rows])
        doubtful = group.status[rows] != "ok"
        table[at, np.searchsorted(places, x)] = np.where(doubtful, np.nan, y)
        curves.append(Curve("single runs", "run", x.astype(np.float64), y, doubtful=doubtful))
    mean, lower, upper = interval(table)
    enough = np.sum(~np.isnan(table), axis=0) > max(1, len(group.runs) / 2)
    mean, lower, upper = (np.where(enough, values, np.nan) for values in (mean, lower, upper))
    if not enough.any():
        return curves
    label = f"mean of {len(group.runs)} runs, 95 % interval"
    return [*curves, Curve(label, "mean", places.astype(np.float64), mean, lower, upper)]


def _level(group: Group, quantity: Measured) -> Level | None:
    values = drawable(quantity.values[group.fresh])
    values = values[~np.isnan(values)]
    if values.size == 0:
        return None
    label = "fresh network" if group.networks == 1 else f"mean and range of {group.networks} fresh networks"
    return Level(label, float(values.mean()), float(values.min()), float(values.max()))


def _series_words(group: Group, own: Sequence[Measured]) -> str:
    words: list[str] = []
    if len(group.runs) > 1:
        words.append(
            f"Thin lines: single runs; thick line: their mean, where more than half of the {len(group.runs)} runs have a value; band: its 95 % "
            "Student-t interval over runs."
        )
    for kind in dict.fromkeys(quantity.interval for quantity in own):
        names = ", ".join(quantity.name for quantity in own if quantity.interval == kind)
        words.append(f"Band of {names}: {kind}.")
    if group.networks:
        kind = (
            "a fresh network"
            if group.networks == 1
            else f"the mean of {group.networks} fresh networks, band from smallest to largest"
        )
        words.append(f"Dashed: {kind}.")
    return " ".join(words)


def _label_panels(group: Group, quantity: Measured, block: slice) -> Iterator[Panel]:
    labels = told_apart(quantity.labels[block], 40)
    values = drawable(quantity.values[:, block])
    lower, upper = (None if e is None else drawable(e[:, block]) for e in (quantity.lower, quantity.upper))
    if not _known(values[~group.fresh]):
        return
    fresh = values[group.fresh]
    if group.series:
        axis, at = group.place
        places = np.unique(at[~group.fresh])
        columns = np.array([_column_mean(values[(at == place) & ~group.fresh]) for place in places]).T
        reference = _column_mean(fresh) if _known(fresh) else None
        names = tuple(str(place) for place in places.tolist())
        scale = scale_of(columns, reference)
        yield HeatMap(_panel_title(quantity), axis, names, labels, columns, reference, quantity.axis, scale)
        return
    points = [_points("fresh", fresh)] if _known(fresh) else []
    rows = values[~group.fresh]
    if len(rows) == 1 and lower is not None and upper is not None:
        points.append(Points("checkpoint", "checkpoint", rows[0], lower[~group.fresh][0], upper[~group.fresh][0]))
    else:
        points.append(_points("checkpoint", rows))
    scale = scale_of(*(ends for p in points for ends in (p.values, p.lower, p.upper)))
    yield Dots(_panel_title(quantity), quantity.axis, labels, tuple(points), scale)


def _points(kind: str, rows: Numbers) -> Points:
    """The mean of several networks, and a whisker from the smallest to the largest."""
    names = {
        "fresh": ("fresh network", f"mean of {len(rows)} fresh networks"),
        "checkpoint": ("checkpoint", f"mean of {len(rows)} runs"),
    }
    label, role = names[kind][len(rows) > 1], ("fresh" if kind == "fresh" else "checkpoint")
    if len(rows) == 1:
        return Points(label, role, rows[0])
    known = ~np.isnan(rows).all(axis=0)
    lowest, highest = (
        np.where(np.isnan(rows), np.inf, rows).min(axis=0),
        np.where(np.isnan(rows), -np.inf, rows).max(axis=0),
    )
    return Points(label, role, _column_mean(rows), np.where(known, lowest, np.nan), np.where(known, highest, np.nan))


def _label_words(group: Group, own: Sequence[Measured]) -> str:
    if group.series:
        words = [
            f"Each column: {'one checkpoint' if len(group.runs) == 1 else f'the mean of up to {len(group.runs)} runs'}."
        ]
        words += [
            f"Column on its own: {'a fresh network' if group.networks == 1 else f'mean of {group.networks} fresh networks'}."
        ] * bool(group.networks)
        words.append("Grey: no number.")
    else:
        words = [
            f"Whiskers: smallest to largest over {what}."
            for what, count in (("runs", len(group.runs)), ("fresh networks", group.networks))
            if count > 1
        ]
        kinds = (
            dict.fromkeys(quantity.interval for quantity in own if quantity.interval) if len(group.runs) == 1 else {}
        )
        words += [f"Whiskers of the checkpoint: {kind}." for kind in kinds]
    size = len(own[0].labels)
    if size > LABELS * LABEL_FIGURES:
        words.append(f"The first {LABELS * LABEL_FIGURES} of {size} are drawn.")
    return " ".join(words)


def _comparable(group: Group, quantity: Measured) -> bool:
    return _known(quantity.values[group.fresh]) and _known(quantity.values[~group.fresh])


def _ratio_panel(lines: Sequence[tuple[Group, Measured]]) -> Dots:
    runs, networks = max(len(group.runs) for group, _ in lines), max(group.networks for group, _ in lines)
    compared = [_compared(group, quantity) for group, quantity in lines]
    own, low, high, fresh_low, fresh_high = np.array([ratios for ratios, _ in compared]).T
    ones = np.where(np.isnan(own), np.nan, 1.0)
    fresh = "fresh network" if networks == 1 else f"mean of {networks} fresh networks"
    points = (
        Points(fresh, "fresh", ones, *((fresh_low, fresh_high) if networks > 1 else ())),
        Points(
            "checkpoint" if runs == 1 else f"mean of {runs} runs", "checkpoint", own, *((low, high) if runs > 1 else ())
        ),
    )
    labels = tuple(shortened(quantity.meaning, 70) for _, quantity in lines)
    headings = tuple(shortened(group.label, 58) for group, _ in lines)
    notes = tuple(note for _, note in compared)
    scale = LOG if _known(own) else LINEAR
    return Dots("", "ratio to the fresh network", labels, points, scale, headings, notes, 1.0)


def _compared(group: Group, quantity: Measured) -> tuple[list[float], str]:
    """The ratio of the means, the ends over runs and those over fresh networks, each to the fresh mean; and both means as text."""
    values, fresh = (drawable(quantity.values[rows]) for rows in (~group.fresh, group.fresh))
    mean, base = (float(_column_mean(v.reshape(-1, 1))[0]) for v in (values, fresh))
    own = _ratio(mean, base)
    ends = [sorted(_ratio(float(end), base) for end in (np.nanmin(v), np.nanmax(v))) for v in (values, fresh)]
    ratios = [own, *(end if own == own else np.nan for pair in ends for end in pair)]
    return ratios, f"{number(mean)} : {number(base)}"


def _ratio(value: float, base: float) -> float:
    """The quotient, NaN where a logarithmic axis has no place for it."""
    if value == base and base:
        return 1.0
    if value * base <= 0 or np.isnan(value * base):
        return np.nan
    quotient = float(np.exp(np.log(abs(value)) - np.log(abs(base))))
    return quotient if 1e-100 < quotient < 1e100 else np.nan


def _ratio_words(used: Sequence[Group]) -> str:
    same = dict.fromkeys(group.conditions() for group in used)
    conditions = [
        f"{', '.join(shortened(g.label, 40) for g in used if g.conditions() == text)}: {text}" for text in same
    ]
    words = " ".join(same) if len(same) == 1 else " ".join(conditions)
    kinds = [("runs", max(len(g.runs) for g in used)), ("fresh networks", max(g.networks for g in used))]
    whiskers = [f"Whiskers: smallest to largest over {what}." for what, count in kinds if count > 1]
    problems = [f"{shortened(g.label, 40)}: {g.problems()}" for g in used if g.problems()]
    told = "At the right: checkpoint : fresh; where one is zero or the signs differ there is no ratio and no dot."
    return " ".join([words, *whiskers, told, *problems])


def split(name: str, title: str, panels: Sequence[Panel], caption: str, most: int) -> Iterator[Figure]:
    """Panels as figures of at most so many panels each, of about the same size.

    Args:
        name: What the files are called, before it is made safe.
        title: One line above; figures of several say which one they are.
        panels: All panels.
        caption: The caption of each.
        most: The most panels of a figure.
    """
    parts = -(-len(panels) // most)
    size = -(-len(panels) // max(parts, 1))
    for at in range(parts):
        ending = f" ({at + 1} of {parts})" if parts > 1 else ""
        yield Figure(name, title + ending, tuple(panels[at * size : (at + 1) * size]), caption)


def _fitting(labels: int) -> int:
    """How many panels of that many labels make a figure of a readable height: three beside each other."""
    return min(PANELS, 3 * max(1, 60 // labels))


def _panel_title(quantity: Measured) -> str:
    return shortened(quantity.meaning, 100)


def _column_mean(values: Numbers) -> Numbers:
    """Mean over the first axis without NaN; NaN where nothing is left."""
    n = np.sum(~np.isnan(values), axis=0)
    return np.where(n > 0, np.nansum(values, axis=0) / np.maximum(n, 1), np.nan)


def _known(values: Numbers) -> bool:
    return bool((~np.isnan(drawable(values))).any())
