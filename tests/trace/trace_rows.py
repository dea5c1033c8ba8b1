"""Rows for tests: one hand-made kind with every feature, and a hypothesis strategy for groups of ragged and hostile ones."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from plasticity_probe.trace.layout import Row, Variable

HOSTILE = [
    "[/b]<script>alert(1)</script>",
    "\x1b[31mred\x07\r\n\t",
    "nul\x00inside",
    "\x00",
    "ends with nul\x00",
    "\x1a0000",
    "../../etc/passwd",
    "lone \udcff surrogate \ud800",
    "\x1a\udc1a",
    "",
    " ",
    "λ∇²√ 🧠",
    "x" * 10_000,
]
META = {"long_name": "largest eigenvalues", "units": "loss", "summary": "first", "shown": "True", "role": "value"}


def row(step: int = 0, probe: str = "spectrum", **changes: Any) -> Row:
    layers = ("fc1", "fc2", "head")
    made = Row(
        probe=probe,
        settings=json.dumps({"k": 3, "loss": "cross-entropy"}),
        run="seed 0",
        step=step,
        task=step // 10,
        checkpoint=f"runs/step{step}.pt",
        sha256=f"{step:064x}",
        network="checkpoint",
        replicate=0,
        status="ok",
        message="",
        seconds=0.25 + step,
        peak_bytes=float("nan"),
        seed=2**62 + step,
        conditions={"examples": 256, "loss": "cross-entropy", "seed": 2**62 + step, "noise": 0.5},
        labels={"layer": layers},
        variables={
            "top": Variable(("pair",), np.array([3.0, 2.0, float(step)]), META),
            "norm": Variable(("layer",), np.arange(3.0) + step, {"long_name": "norm", "units": "1"}),
            "overlap": Variable(("layer", "pair"), np.arange(9.0).reshape(3, 3) * step),
            "total": Variable((), np.array(step)),
            "choice": Variable((), np.array(f"method {step}")),
        },
    )
    return replace(made, **changes)


def failed(step: int = 0, probe: str = "spectrum", **changes: Any) -> Row:
    nothing: dict[str, Any] = {"labels": {}, "variables": {}, "conditions": {}}
    return row(step, probe, status="failed", message="out of memory", **nothing, **changes)


TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=10)
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
LABELS = st.lists(TEXTS, max_size=5)


@st.composite
def groups(draw: st.DrawFn) -> list[Row]:
    """Rows of one to three probes: ragged, with repeated and hostile labels, and failures."""
    rows: list[Row] = []
    for step in range(draw(st.integers(1, 8))):
        probe = draw(st.sampled_from(["spectrum", "units", "a probe.2"]))
        if draw(st.booleans()) and draw(st.booleans()):
            rows.append(failed(step, probe, seconds=draw(NUMBERS)))
            continue
        layers, pairs = draw(LABELS), draw(st.integers(0, 4))
        numbers = st.lists(NUMBERS, min_size=len(layers) * pairs, max_size=len(layers) * pairs)
        matrix = np.array(draw(numbers), dtype=float).reshape(len(layers), pairs)
        rows.append(
            row(
                step,
                probe,
                run=draw(TEXTS),
                checkpoint=draw(TEXTS),
                message=draw(TEXTS),
                seed=draw(st.integers(-(2**63), 2**63 - 1)),
                labels={"layer": tuple(layers)},
                variables={
                    "matrix": Variable(("layer", "pair"), matrix, META),
                    "swapped": Variable(("pair", "layer"), matrix.T),
                    "total": Variable((), np.array(draw(NUMBERS))),
                    "said": Variable((), np.array(draw(TEXTS), dtype=object)),
                },
            )
        )
    return rows
