"""Outcomes of a training run as rows of its trace, so that a trace alone says what became of every task."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from plasticity_probe.measurement import Role
from plasticity_probe.trace.layout import Row, Variable, canonical
from plasticity_probe.training.outcomes import NUMBERS, OK, Outcome, in_order

OUTCOMES = "outcomes"
"""The label of the group that holds them; no probe may be called so."""
RUN, CONTROL = "checkpoint", "fresh"
"""The column `network`: the network that learned the tasks before, and the newly initialised one trained on a task alone."""
MEANINGS = {
    "loss": ("mean loss on the task's examples at its end", "loss"),
    "accuracy": ("share of the task's examples predicted rightly at its end", "1"),
    "online_loss": ("mean loss of each example before the update on it", "loss"),
    "online_accuracy": ("share of examples predicted rightly before the update on them", "1"),
    "first_epoch_loss": ("mean loss before the update over the first epoch", "loss"),
    "updates_to_threshold": ("updates until the online accuracy of an epoch reached the threshold", "step"),
    "test_loss": ("mean loss on the test examples", "loss"),
    "test_accuracy": ("share of test examples predicted rightly", "1"),
}
_COUNTS = {
    "end_step": ("updates since the run began, at the end of the task", "step"),
    "updates": ("updates on the task", "step"),
    "epochs": ("passes over its examples", "1"),
}


def rows_of_outcomes(
    outcomes: Iterable[Outcome], runs: Mapping[int, str], settings: Mapping[str, Any], conditions: Mapping[str, str]
) -> list[Row]:
    """A row for each task of each run, and for each control.

    Args:
        outcomes: How the tasks went.
        runs: For each seed the name of its run; outcomes of other seeds are left out.
        settings: What is the same for all runs that differ in their seeds alone.
        conditions: What a reader wants to know about the setting, such as the name of the configuration.
    """
    return [_row(o, runs[o.seed], canonical(settings), conditions) for o in in_order(outcomes) if o.seed in runs]


def outcomes_of_rows(rows: Iterable[Row]) -> dict[str, list[Outcome]]:
    """The outcomes that rows hold, by run; rows of other labels are passed over.

    Args:
        rows: Rows of a trace.
    """
    found: dict[str, list[Outcome]] = {}
    for row in rows:
        if row.probe == OUTCOMES and row.variables:
            found.setdefault(row.run, []).append(_outcome(row))
    return {run: list(in_order(own)) for run, own in found.items()}


def _row(outcome: Outcome, run: str, settings: str, conditions: Mapping[str, str]) -> Row:
    counts = {"end_step": outcome.step, "updates": outcome.updates, "epochs": outcome.epochs}
    diverged = outcome.status != OK
    return Row(
        probe=OUTCOMES,
        settings=settings,
        run=run,
        step=outcome.step,
        task=outcome.task,
        checkpoint="",
        sha256=f"{OUTCOMES}:{json.dumps([outcome.task, outcome.name])}",
        network=RUN if outcome.network == "run" else CONTROL,
        replicate=0,
        status="nonfinite" if diverged else "ok",
        message="weights or losses were no longer finite; lower the learning rate or clip the gradient"
        if diverged
        else "",
        seconds=0.0,
        peak_bytes=float("nan"),
        seed=outcome.seed,
        conditions={**conditions, "task_name": outcome.name},
        variables={
            **{name: _number(getattr(outcome, name), *MEANINGS[name], "value") for name in NUMBERS},
            **{name: _number(count, *_COUNTS[name], "context") for name, count in counts.items()},
        },
    )


def _number(value: float, meaning: str, units: str, role: Role) -> Variable:
    return Variable((), np.array(float(value)), {"long_name": meaning, "units": units, "shown": "True", "role": role})


def _outcome(row: Row) -> Outcome:
    numbers = {name: float(row.variables[name].data) for name in (*NUMBERS, *_COUNTS)}
    return Outcome(
        seed=row.seed,
        task=row.task,
        name=str(row.conditions.get("task_name", "")),
        network="run" if row.network == RUN else "control",
        status="ok" if row.status == "ok" else "diverged",
        step=int(numbers.pop("end_step")),
        updates=int(numbers.pop("updates")),
        epochs=int(numbers.pop("epochs")),
        **numbers,
    )
