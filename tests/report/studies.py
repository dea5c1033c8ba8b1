"""Traces of small studies with known truth, made by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report_traces import array, number

from plasticity_probe.prediction.alignment import Aligned
from plasticity_probe.prediction.assessment import Assessment, assess_aligned
from plasticity_probe.prediction.panel import Panel
from plasticity_probe.trace.layout import Row
from plasticity_probe.trace.outcome_rows import rows_of_outcomes
from plasticity_probe.trace.tree import dataset_tree
from plasticity_probe.trace.writer import file_image, open_for_append, replace_file
from plasticity_probe.training.outcomes import Outcome

NAN = float("nan")
UPDATES = 100
Numbers = np.ndarray[Any, np.dtype[np.float64]]


def rows_of(
    configuration: str,
    outcomes: Numbers | None,
    predictors: Mapping[str, Numbers],
    *,
    fresh: float | None = None,
    meaning: str = "a number",
    status: str = "ok",
    layers: Sequence[str] = ("fc1", "fc2"),
) -> list[Row]:
    """Rows of one configuration: outcomes and predictors of shape (run, task), each "label.quantity"."""
    settings = {"run_sha256": f"sha of {configuration}"}
    found: list[Row] = []
    if outcomes is not None:
        runs = {seed: f"{configuration} seed {seed}" for seed in range(len(outcomes))}
        made = [
            _outcome(seed, task, value, network)
            for seed, own in enumerate(outcomes.tolist())
            for task, accuracy in enumerate(own)
            for network, value in (("run", accuracy), *((("control", fresh),) if fresh is not None and task else ()))
        ]
        found += rows_of_outcomes(
            made, runs, settings, {"configuration": configuration, "protocol": "p", "remedies": "none"}
        )
    for name, values in predictors.items():
        label, quantity = name.split(".")
        for seed, own in enumerate(values.tolist()):
            for task, value in enumerate(own):
                layered = array(("layer",), np.full(len(layers), value), "by layer")
                found.append(
                    Row(
                        probe=label, settings=json.dumps({**settings, "on": "next"}), run=f"{configuration} seed {seed}",
                        step=task * UPDATES, task=task, checkpoint=f"seed_{seed}/step_{task * UPDATES:08d}.safetensors",
                        sha256=f"{configuration} {seed} {task}", network="checkpoint", replicate=0, status=status,
                        message="" if status == "ok" else "something happened", seconds=0.0, peak_bytes=NAN, seed=0,
                        conditions={"examples": 64}, labels={"layer": tuple(layers)},
                        variables={quantity: number(value, meaning), "by_layer": layered},
                    )
                )  # fmt: skip
    return found


def trace_of(path: Path, rows: Sequence[Row]) -> Path:
    if not rows:  # a writer that wrote nothing leaves no file
        replace_file(path, file_image(dataset_tree([])))
    with open_for_append(path) as writer:
        for row in rows:
            writer.append(row)
    return path


def telling(runs: int = 6, tasks: int = 5, effect: float = 0.95, seed: int = 0) -> tuple[Numbers, Numbers, Numbers]:
    """Outcomes, a predictor that sees them coming, and one that only drifts."""
    rng = np.random.default_rng(seed)
    news, noise = rng.standard_normal((2, runs, tasks))
    fall = np.linspace(0, 0.3, tasks)
    return (
        0.9 - fall + 0.02 * news,
        effect * news + np.sqrt(1 - effect**2) * noise,
        5 * fall + 0.01 * rng.standard_normal((runs, tasks)),
    )


def study(
    x: Mapping[str, Numbers], y: Numbers, configurations: int = 1, outcome: str = "trainability", seed: int = 0
) -> Assessment:
    """The verdicts on arrays of shape (run, task)."""
    runs, tasks = y.shape
    panel = Panel(
        tuple(f"configuration {c}" for c in range(configurations)),
        np.repeat(np.arange(configurations), runs // configurations),
        tuple(f"run {r}" for r in range(runs)),
        tuple(range(tasks)),
        x,
        {outcome: y},
    )
    return assess_aligned(Aligned(panel, dict.fromkeys(x, "a meaning"), ()), seed)


def _outcome(seed: int, task: int, accuracy: float, network: Any) -> Outcome:
    return Outcome(
        seed=seed, task=task, name=f"task {task}", network=network, status="ok", step=(task + 1) * UPDATES, updates=UPDATES, epochs=1,
        loss=1.0 - accuracy, accuracy=accuracy, online_loss=1.0, online_accuracy=0.1, first_epoch_loss=2.0, updates_to_threshold=NAN,
        test_loss=NAN, test_accuracy=NAN,
    )  # fmt: skip
