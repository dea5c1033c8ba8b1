"""Outcomes stored in a trace come back as they were."""

import math
from dataclasses import replace
from pathlib import Path

from plasticity_probe.trace.layout import canonical
from plasticity_probe.trace.outcome_rows import OUTCOMES, outcomes_of_rows, rows_of_outcomes
from plasticity_probe.trace.reader import open_trace, read_rows
from plasticity_probe.trace.writer import open_for_append
from plasticity_probe.training.outcomes import Outcome

NAN = float("nan")
FIRST = Outcome(
    seed=3, task=0, name="labels 0", network="run", status="ok", step=400, updates=400, epochs=40, loss=0.5, accuracy=0.75,
    online_loss=1.5, online_accuracy=0.25, first_epoch_loss=2.5, updates_to_threshold=NAN, test_loss=NAN, test_accuracy=NAN,
)  # fmt: skip
SECOND = replace(FIRST, task=1, name="labels 1", step=800, accuracy=0.5)
CONTROL = replace(SECOND, network="control", accuracy=0.875)
LOST = replace(FIRST, seed=4, status="diverged", loss=NAN, accuracy=NAN)
RUNS = {3: "labels seed 3", 4: "labels seed 4"}
SETTINGS = {"run_sha256": "abc"}


def same(one: Outcome, other: Outcome) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)) for a, b in pairs)


def test_outcomes_come_back_from_a_file(tmp_path: Path) -> None:
    rows = rows_of_outcomes([CONTROL, SECOND, LOST, FIRST], RUNS, SETTINGS, {"configuration": "labels"})
    path = tmp_path / "t.h5"
    with open_for_append(path, {OUTCOMES: canonical(SETTINGS)}, {"by": "a test"}) as writer:
        for row in rows:
            writer.append(row)
    found = outcomes_of_rows(read_rows(path))
    assert list(found) == ["labels seed 3", "labels seed 4"]
    assert all(map(same, found["labels seed 3"], [FIRST, SECOND, CONTROL]))
    assert same(found["labels seed 4"][0], LOST)
    group = open_trace(path)[OUTCOMES].to_dataset()
    assert group["accuracy"].attrs["long_name"] == "share of the task's examples predicted rightly at its end"
    assert group["status"].values.tolist().count("nonfinite") == 1


def test_outcomes_of_other_seeds_are_left_out() -> None:
    assert {row.run for row in rows_of_outcomes([FIRST, LOST], {4: "four"}, SETTINGS, {})} == {"four"}


def test_each_task_and_each_control_is_a_row_of_its_own() -> None:
    rows = rows_of_outcomes([FIRST, SECOND, CONTROL], RUNS, SETTINGS, {})
    assert len({row.key for row in rows}) == 3
