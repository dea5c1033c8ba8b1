"""Traces made by hand, through the same rows that the toolkit stores."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from plasticity_probe.trace.layout import Row, Variable
from plasticity_probe.trace.tree import dataset_tree

CONDITIONS = {
    "examples": 512,
    "parameters": 1000,
    "loss": "cross-entropy",
    "mode": "eval",
    "dtype": "float32",
    "seed": 0,
}


def number(value: float, meaning: str = "a number", **attrs: str) -> Variable:
    return Variable(
        (), np.array(float(value)), {"long_name": meaning, "units": "1", "shown": "True", "role": "value", **attrs}
    )


def array(dims: tuple[str, ...], values: Any, meaning: str = "numbers", **attrs: str) -> Variable:
    noted = {"long_name": meaning, "units": "1", "summary": "none", "shown": "True", "role": "value", **attrs}
    return Variable(dims, np.asarray(values, dtype=float), noted)


def row(
    probe: str,
    variables: Mapping[str, Variable],
    *,
    run: str = "run",
    step: int = 0,
    task: int = -1,
    fresh: int | None = None,
    status: str = "ok",
    labels: Mapping[str, tuple[str, ...]] | None = None,
    conditions: Mapping[str, str | int | float] = CONDITIONS,
    settings: str = "{}",
) -> Row:
    return Row(
        probe=probe,
        settings=settings,
        run=run,
        step=step,
        task=task,
        checkpoint="c.pt",
        sha256=f"{run}{step}{fresh}",
        network="checkpoint" if fresh is None else "fresh",
        replicate=fresh or 0,
        status=status,
        message="" if status == "ok" else "something happened",
        seconds=1.0,
        peak_bytes=float("nan"),
        seed=0,
        conditions=conditions,
        labels=labels or {},
        variables=variables,
    )


def tree(*rows: Row) -> xr.DataTree:
    return dataset_tree(rows)


def quadrature(
    rng: np.random.Generator, *, draws: int = 3, nodes: int = 40, outlier: float = 10.0
) -> dict[str, Variable]:
    points = np.sort(
        np.concatenate([rng.normal(0, 0.5, (draws, nodes - 3)), outlier * (1 + rng.uniform(0, 1, (draws, 3)))], axis=1)
    )
    weights = np.concatenate([np.ones((draws, nodes - 3)), np.full((draws, 3), 1e-4)], axis=1)
    dims = ("draw", "node")
    shares = weights / weights.sum(axis=1, keepdims=True)
    return {
        "nodes": array(dims, points, "quadrature nodes", units="loss"),
        "weights": array(dims, shares, "share of the eigenvalues at each node"),
    }


def typical(
    places: Sequence[tuple[str, int, int]], *, fresh: int = 0, layers: Sequence[str] = ("fc1", "fc2", "fc3")
) -> xr.DataTree:
    """Probes shaped as the toolkit's own: a spectrum, a rank, norms of tensors, units of layers and the performance."""
    rows: list[Row] = []
    networks = [(*place, None) for place in places] + [("run", -1, -1, replicate) for replicate in range(fresh)]
    for run, step, task, replicate in networks:
        rng = np.random.default_rng(zlib.crc32(f"{run}{step}{task}{replicate}".encode()))
        late = 0.0 if replicate is not None else min(1.0, max(step, task) / 20 if task >= 0 else step / 3000)
        made = {"run": run, "step": step, "task": task, "fresh": replicate}
        trace = 40 + 200 * late + rng.normal()
        spectrum = {
            "top": array(
                ("pair",),
                np.sort(rng.uniform(5, 9, 5))[::-1] * (1 + 40 * late),
                "largest eigenvalue",
                units="loss",
                summary="first",
            ),
            "matrix_trace": number(trace, "sum of all eigenvalues", units="loss"),
            "matrix_trace_sem": number(3.0, "standard error of that sum", units="loss"),
            "threshold_rank": number(
                90 - 60 * late + rng.normal(), "threshold rank: eigenvalues that hold 99 % of the sum"
            ),
            "threshold_rank_lower": number(80 - 60 * late, "threshold rank, lower end of its interval"),
            "threshold_rank_upper": number(100 - 60 * late, "threshold rank, upper end of its interval"),
            "negative_share": number(
                0.1 * (1 - late) + 0.01 * rng.uniform(), "share of negative eigenvalues in the sum of absolute values"
            ),
            "products": number(300, "curvature-vector products spent", shown="False"),
            **quadrature(rng, outlier=5 + 40 * late),
        }
        rows.append(row("hessian_spectrum", spectrum, **made))
        rank = {
            "ceiling": number(512, "largest rank this many examples allow", role="context"),
            "eigenvalues": array(
                ("index",), np.sort(rng.exponential(1, 64))[::-1], "eigenvalues, descending", units="loss"
            ),
            "threshold_rank": number(
                300 - 200 * late + 5 * rng.normal(), "threshold rank: eigenvalues that hold 1 - delta of the sum"
            ),
            "effective_rank": number(
                200 - 150 * late + 5 * rng.normal(), "effective rank: exp of the entropy of the eigenvalues"
            ),
            "stable_rank": number(3 + rng.uniform(), "stable rank of the matrix: sum of squares over largest square"),
        }
        rows.append(row("fisher_rank", rank, **made))
        size, names = len(layers), tuple(layers)
        scales = np.logspace(0, 2, size)
        norms = {
            "total_l2": number(30 + 20 * late + rng.normal(), "L2 norm of all weights"),
            "l2": array(("tensor",), scales * (1 + late) * rng.uniform(0.9, 1.1, size), "L2 norm of the tensor"),
            "mean_absolute": array(
                ("tensor",), 0.02 * rng.uniform(0.9, 1.1, size), "mean absolute weight of the tensor"
            ),
            "spectral": array(
                ("tensor",), rng.uniform(1, 3, size) * (1 + late), "spectral norm of the tensor", summary="max"
            ),
            "spectral_error": array(("tensor",), np.full(size, 0.05), "error bound of the spectral norm"),
        }
        rows.append(row("weight_norms", norms, labels={"tensor": names}, **made))
        units = {
            "dead_fraction": array(
                ("layer",), np.clip(late * rng.uniform(0, 1, size), 0, 1), "share of dead units", summary="mean"
            ),
            "dormant_fraction": array(
                ("layer",), np.clip(late * rng.uniform(0, 1, size), 0, 1), "share of dormant units", summary="mean"
            ),
            "layer_cosine": array(
                ("layer",), rng.uniform(-0.5, 0.5, size), "mean cosine of weights and negative gradient"
            ),
            "total_dead_fraction": number(0.4 * late + 0.02 * rng.uniform(), "share of dead units in the network"),
        }
        rows.append(row("dead_units", units, labels={"layer": names}, **made))
        accuracy = 0.1 if replicate is not None else 0.9 - 0.5 * late + 0.02 * rng.normal()
        performance = {
            "accuracy": number(accuracy, "accuracy"),
            "loss": number(0.3 + 2 * (replicate is not None), "mean loss", units="loss"),
        }
        rows.append(row("performance", performance, **made))
    return tree(*rows)
