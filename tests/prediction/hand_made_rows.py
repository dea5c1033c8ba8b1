"""Rows of a trace made by hand: what was measured on a checkpoint, and what became of a task."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from plasticity_probe.trace.layout import Row, Variable
from plasticity_probe.trace.outcome_rows import rows_of_outcomes
from plasticity_probe.training.outcomes import Outcome

NAN = float("nan")
UPDATES = 100
ATTRS = {"long_name": "a rank", "units": "1", "shown": "True", "role": "value"}


def outcome(seed: int, task: int, accuracy: float = 0.5, **changes: object) -> Outcome:
    made = Outcome(
        seed=seed, task=task, name=f"task {task}", network="run", status="ok", step=(task + 1) * UPDATES, updates=UPDATES,
        epochs=1, loss=1.0 - accuracy, accuracy=accuracy, online_loss=1.0, online_accuracy=0.1, first_epoch_loss=2.0,
        updates_to_threshold=NAN, test_loss=NAN, test_accuracy=NAN,
    )  # fmt: skip
    return replace(made, **changes)  # pyright: ignore[reportArgumentType]


def measured(seed: int, task: int, value: float, step: int | None = None, **changes: object) -> Row:
    at = task * UPDATES if step is None else step
    made = Row(
        probe="fisher_rank", settings=json.dumps({"run_sha256": "s", "on": "next"}), run=f"labels seed {seed}", step=at, task=task,
        checkpoint=f"seed_{seed}/step_{at:08d}.safetensors", sha256=f"{seed} {at} {changes.get('checkpoint', '')}",
        network="checkpoint", replicate=0, status="ok", message="", seconds=0.0, peak_bytes=NAN, seed=0,
        variables={
            "rank": Variable((), np.array(value), ATTRS),
            "ceiling": Variable((), np.array(9.0), {**ATTRS, "role": "context"}),
        },
    )  # fmt: skip
    return replace(made, **changes)  # pyright: ignore[reportArgumentType]


def told(outcomes: Sequence[Outcome], configuration: str = "labels", sha: str = "s") -> list[Row]:
    runs = {o.seed: f"{configuration} seed {o.seed}" for o in outcomes}
    return rows_of_outcomes(outcomes, runs, {"run_sha256": sha}, {"configuration": configuration})
