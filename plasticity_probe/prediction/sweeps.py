"""Ranks and dormancy at other thresholds than the fixed ones, so that a reader sees whether a verdict hangs on a threshold."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from plasticity_probe.prediction.panel import Numbers
from plasticity_probe.trace.layout import Row

DELTAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Shares of the sum that a threshold rank leaves out (our choice: half a decade apart, around the usual .01)."""
EPSILONS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Cut-offs of the epsilon rank of features (our choice, likewise)."""
DELTA, EPSILON, TAU = 0.01, 0.01, 0.025
"""The thresholds of rows whose settings do not say theirs: the defaults of the probes."""
STEP = 64 * float(np.finfo(np.float64).eps)
"""Rounding of a sum by which a share that is met exactly may look missed."""


@dataclass(frozen=True)
class Swept:
    """One quantity of one measurement at several thresholds.

    Args:
        quantity: "label.quantity".
        symbol: The threshold's name.
        fixed: The threshold that the probe was set to, which the verdict is about.
        values: The quantity by threshold.
    """

    quantity: str
    symbol: str
    fixed: float
    values: Mapping[float, float]


@dataclass(frozen=True, eq=False)
class Sweep:
    """A quantity at several thresholds, over a study.

    Args:
        quantity: "label.quantity", with " on current", " on next" or " on noise" behind it where that differs.
        symbol: The threshold's name.
        fixed: The threshold that the verdict is about.
        thresholds: Ascending.
        values: Shape (threshold, run, task); NaN where there is none.
    """

    quantity: str
    symbol: str
    fixed: float
    thresholds: tuple[float, ...]
    values: Numbers


def threshold_rank(values: Numbers, weights: Numbers | None = None, *, delta: float) -> float:
    """Least number of largest absolute values whose sum is at least ``1 - delta`` of the whole (Kumar et al. 2021; Lewandowski et al. 2023).

    Args:
        values: The spectrum, shape (n,).
        weights: Multiplicities, shape (n,); then the value that crosses the threshold counts in part.
        delta: The share that may be left out, at least 0 and below 1.
    """
    counts = np.ones_like(values) if weights is None else weights
    order = np.argsort(-np.abs(values), kind="stable")
    sizes, counts = np.abs(values)[order], counts[order]
    reached = np.cumsum(sizes * counts)
    if not reached.size or reached[-1] == 0:
        return 0.0
    target = (1 - delta) * reached[-1] * (1 - STEP)
    crossing = int(np.searchsorted(reached, target))
    if weights is None:
        return crossing + 1.0
    before = reached[crossing - 1] if crossing else 0.0
    return float(counts[:crossing].sum() + (target - before) / sizes[crossing])


def swept(row: Row) -> Iterator[Swept]:
    """What a row holds of quantities with a threshold, at every threshold of a sweep.

    Eigenvalues give threshold ranks; the singular values of the last layer's features threshold and epsilon ranks; a sweep of dormancy the
    share of all units; Gauss nodes and weights threshold ranks as shares of the spectrum. The last are without the correction around zero
    that the probe makes, so that at the fixed threshold their association may differ from that of the verdict.

    Args:
        row: A row of a trace.
    """
    if row.status != "ok":
        return
    data = {name: variable.data for name, variable in row.variables.items()}
    settings = json.loads(row.settings)
    delta = float(settings.get("delta", DELTA))
    if {"eigenvalues", "threshold_rank"} <= data.keys():
        yield _ranks(row, delta, [(_known(data["eigenvalues"]), None)])
    if {"singular_values", "rows", "threshold_rank"} <= data.keys() and len(data["rows"]):
        values = _known(data["singular_values"][-1])
        yield _ranks(row, delta, [(values, None)])
        sizes = values / math.sqrt(max(1.0, float(data["rows"][-1])))
        counts = {epsilon: float(np.sum(sizes > epsilon)) for epsilon in EPSILONS}
        yield Swept(f"{row.probe}.epsilon_rank", "ε", float(settings.get("epsilon", EPSILON)), counts)
    if {"dormant_sweep", "units"} <= data.keys() and data["units"].sum() > 0:
        taus = row.labels.get(row.variables["dormant_sweep"].dims[-1], ())
        shares = (data["units"] @ data["dormant_sweep"] / data["units"].sum()).tolist()
        found = {float(tau): share for tau, share in zip(taus, shares, strict=True)}
        yield Swept(f"{row.probe}.total_dormant_fraction", "τ", float(settings.get("tau", TAU)), found)
    if {"nodes", "weights", "threshold_rank"} <= data.keys():
        draws = zip(data["nodes"], data["weights"], strict=True)
        kept = [(nodes[there], weights[there]) for nodes, weights in draws if (there := np.isfinite(nodes)).any()]
        if kept:
            yield _ranks(row, delta, kept)


def _ranks(row: Row, delta: float, spectra: Sequence[tuple[Numbers, Numbers | None]]) -> Swept:
    found = {each: fmean(threshold_rank(*values, delta=each) for values in spectra) for each in DELTAS}
    return Swept(f"{row.probe}.threshold_rank", "δ", delta, found)


def _known(values: Numbers) -> Numbers:
    return values[np.isfinite(values)]
