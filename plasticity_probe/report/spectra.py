"""Figures of spectral densities from the nodes and weights of Lanczos quadratures."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from plasticity_probe.report.panels import LARGEST, LOG, Curve, Figure, Lines, Numbers, Role
from plasticity_probe.report.quantities import UNRELIABLE, Group
from plasticity_probe.report.wording import counted, plain, shortened
from plasticity_probe.trace.layout import ROW

GRID = 2001
"""Points at which a density is computed: 10 or more a bandwidth."""
BANDWIDTH = 0.01
"""Standard deviation of the kernel as a share of the range shown.

Our choice. Ghorbani et al. 2019 take a variance of 1e-5 of the range, 0.003 of it for a range of 1; with the few draws usual for large networks
that shows single nodes instead of a density.
"""
CLOSE_BANDWIDTH = 0.03
"""The same for the close view of the bulk, where few nodes of each draw lie (our choice)."""
BULK = 0.99
"""Share of the eigenvalues that the close view of the bulk holds, half of the rest beyond either end (our choice)."""
CLOSE_VIEW_BELOW = 0.5
"""The bulk is shown on its own where it takes up less than this share of the whole range (our choice)."""
DECADES, CLOSE_DECADES = 10.0, 4.0
"""The vertical axis shows at most this many powers of ten: of the whole spectrum as far down as weights in float64 carry meaning, of the bulk
as far as its own eigenvalues reach (our choice)."""
SHARPEST = 1e-300
"""The narrowest kernel, whose height and its multiples still are numbers in float64 (our choice)."""
NARROWEST = 1e-290
"""The least width of a panel of eigenvalues other than zero, many of the narrowest kernels (our choice)."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The quadratures that one curve shows: one entry a draw, or where several networks are pooled one entry a network.

    Args:
        label: Entry in the legend.
        role: First or last checkpoint, or fresh network.
        quadratures: For each network a list of draws, each a pair (nodes, weights) of arrays without padding.
    """

    label: str
    role: Role
    quadratures: tuple[tuple[tuple[Numbers, Numbers], ...], ...]


def density(nodes: Numbers, weights: Numbers, grid: Numbers, bandwidth: float) -> Numbers:
    """The density of the eigenvalues of one draw, ``sum_i w_i N(t; node_i, bandwidth²)`` (Ghorbani, Krishnan & Xiao 2019).

    Args:
        nodes: Where the mass is, shape (m,).
        weights: Share of the eigenvalues at each node, shape (m,), summing to 1.
        grid: The values t, shape (g,).
        bandwidth: Standard deviation of the kernel, above 0.

    Returns:
        Shape (g,), per unit of the eigenvalues; it integrates to the sum of the weights.
    """
    total = np.zeros(grid.shape)
    bandwidth = max(bandwidth, SHARPEST)
    for start in range(0, nodes.size, 256):
        part = slice(start, start + 256)
        distance = (grid - nodes[part, None]) / bandwidth
        total += weights[part] @ np.exp(-0.5 * distance * distance)
    return total / (bandwidth * np.sqrt(2 * np.pi))


def density_figures(group: Group) -> list[Figure]:
    """The spectral density of the first and the last checkpoint beside a fresh network; none where a group has no quadrature.

    Args:
        group: A probe's rows; any with `nodes` and `weights` over (row, draw, node) has a density.
    """
    spectra = [spectrum for spectrum in _spectra(group) if spectrum.quadratures]
    if not spectra:
        return []
    whole, bulk = _range(spectra, 1.0), _range(spectra, BULK)
    panels, shares = [_panel(group, spectra, whole, "whole spectrum", BANDWIDTH, DECADES)], [(BANDWIDTH, whole)]
    if bulk[1] - bulk[0] < CLOSE_VIEW_BELOW * (whole[1] - whole[0]):
        title = f"the bulk: {100 * BULK:g} % of the eigenvalues"
        panels.append(_panel(group, spectra, bulk, title, CLOSE_BANDWIDTH, CLOSE_DECADES))
        shares.append((CLOSE_BANDWIDTH, bulk))
    label = shortened(group.label, 60)
    name = f"{group.label[:60]}-density"
    return [Figure(name, f"Spectral density: {label}", tuple(panels), _caption(group, spectra, shares))]


def _spectra(group: Group) -> Iterator[Spectrum]:
    nodes, weights = (group.dataset.data_vars.get(name) for name in ("nodes", "weights"))
    if nodes is None or weights is None or nodes.ndim != 3 or nodes.dims != weights.dims or nodes.dims[0] != ROW:
        return
    if nodes.dtype.kind != "f" or weights.dtype.kind != "f":
        return
    draws = {row: _draws(nodes.values[row], weights.values[row]) for row in range(nodes.shape[0])}
    usable = [row for row in draws if draws[row] and group.status[row] not in UNRELIABLE]
    runs = [[row for row in group.rows_of(run).tolist() if row in usable] for run in group.runs]
    axis, at = group.place
    ends: list[tuple[Role, list[int]]] = [("first", [run[0] for run in runs if len(run) > 1])]
    ends += [("last", [run[-1] for run in runs if run]), ("fresh", [row for row in usable if group.fresh[row]])]
    for role, rows in ends:
        label = _name(role, rows, axis, at[rows].tolist(), bool(ends[0][1]))
        yield Spectrum(label, role, tuple(draws[row] for row in rows))


def _draws(nodes: Numbers, weights: Numbers) -> tuple[tuple[Numbers, Numbers], ...]:
    """The draws of one row without padding; a draw with mass at infinity is none."""
    found: list[tuple[Numbers, Numbers]] = []
    for points, shares in zip(nodes, weights, strict=True):
        held = np.isfinite(shares) & (shares > 0) & ~np.isnan(points)
        if held.any() and np.abs(points[held]).max() < LARGEST:
            found.append((points[held], shares[held]))
    return tuple(found)


def _name(role: Role, rows: list[int], axis: str, places: list[int], series: bool) -> str:
    if role == "fresh":
        return "fresh network" if len(rows) == 1 else f"mean of {len(rows)} fresh networks"
    network = f"{role} checkpoint" if series else "checkpoint"
    place = f" ({axis.split(',')[0]} {places[0]})" if len(set(places)) == 1 and places[0] >= 0 and series else ""
    return network + place + ("" if len(rows) == 1 else f", mean of {len(rows)} runs")


def _range(spectra: list[Spectrum], share: float) -> tuple[float, float]:
    """From where to where the middle `share` of each spectrum's eigenvalues lies, taking the widest; never empty."""
    ends: list[tuple[float, float]] = []
    for spectrum in spectra:
        draws = [draw for network in spectrum.quadratures for draw in network]
        nodes, weights = (np.concatenate([draw[part] for draw in draws]) for part in (0, 1))
        order = np.argsort(nodes)
        reached = np.cumsum(weights[order]) / weights.sum()
        inside = (reached >= (1 - share) / 2) & (reached - weights[order] / weights.sum() <= (1 + share) / 2)
        ends.append((nodes[order][inside][0], nodes[order][inside][-1]))
    low, high = float(min(end[0] for end in ends)), float(max(end[1] for end in ends))
    largest = max(abs(low), abs(high))
    least = max(largest * 1e-3, NARROWEST) if largest else 1.0
    missing = max(0.0, least - (high - low)) / 2
    return low - missing, high + missing


def _panel(
    group: Group, spectra: list[Spectrum], ends: tuple[float, float], title: str, share: float, decades: float
) -> Lines:
    width = share * (ends[1] - ends[0])
    grid = np.linspace(ends[0] - 6 * width, ends[1] + 6 * width, GRID)
    curves = tuple(_curve(spectrum, grid, width) for spectrum in spectra)
    units = plain(group.dataset["nodes"].attrs.get("units", "1"))
    x_label = "eigenvalue" + ("" if units in ("", "1") else f" [{units}]")
    per = "" if units in ("", "1") else f" [1/{units}]"
    top = max(float(curve.y.max()) for curve in curves)
    lightest = min(float(w.min()) for s in spectra for draws in s.quadratures for _, w in draws)
    bottom = max(0.1 * lightest / (width * np.sqrt(2 * np.pi)), top * 10**-decades)
    limits = (min(bottom, top * 1e-3), top * 3)
    return Lines(title, x_label, f"density{per}", curves, None, LOG, limits, whole=False)


def _curve(spectrum: Spectrum, grid: Numbers, width: float) -> Curve:
    each = [np.array([density(n, w, grid, width) for n, w in draws]) for draws in spectrum.quadratures]
    pool = each[0] if len(each) == 1 else np.array([network.mean(axis=0) for network in each])
    band = (pool.min(axis=0), pool.max(axis=0)) if len(pool) > 1 else (None, None)
    return Curve(spectrum.label, spectrum.role, grid, pool.mean(axis=0), *band)


def _caption(group: Group, spectra: list[Spectrum], shares: list[tuple[float, tuple[float, float]]]) -> str:
    counts = sorted({len(draws) for spectrum in spectra for draws in spectrum.quadratures})
    draws = counted(counts[0], "draw") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} draws"
    pooled = [len(spectrum.quadratures) > 1 for spectrum in spectra]
    bands = "" if counts[-1] == 1 and not any(pooled) else "Band: smallest to largest over the draws of a network. "
    if any(pooled):
        bands = "Band: smallest to largest over networks where several are averaged" + (
            ", else over draws. " if not all(pooled) and counts[-1] > 1 else ". "
        )
    bandwidth = " and ".join(
        f"{share * (high - low):.3g} ({100 * share:g} % of the range)" for share, (low, high) in shares
    )
    return (
        f"{group.conditions()} Stochastic Lanczos quadrature with {draws} a network, smoothed with a Gaussian kernel of standard deviation "
        f"{bandwidth}; logarithmic vertical axis. {bands}{group.problems()}"
    ).strip()
