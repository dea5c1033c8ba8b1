import json
import math
from pathlib import Path

import numpy as np
import pytest

from plasticity_probe.demonstration import (
    EXAMPLES,
    MARKER,
    Demonstration,
    claim,
    closest_of_each_probe,
    demonstrate,
)
from plasticity_probe.errors import TraceError, UsageError
from plasticity_probe.probes.norms import WeightNormsProbe
from plasticity_probe.probes.performance import PerformanceProbe
from plasticity_probe.trace.layout import Row, Variable
from plasticity_probe.training.outcomes import Outcome, read_outcomes


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "demo"


@pytest.fixture(scope="module")
def shown(out: Path) -> Demonstration:
    return demonstrate(out, tasks=2, probes=[WeightNormsProbe(), PerformanceProbe()])


def test_every_checkpoint_and_a_fresh_network_are_measured(shown: Demonstration) -> None:
    rows = [row for row in shown.analysis.rows if row.probe == "weight_norms"]
    assert [(row.network, row.step, row.task) for row in rows] == [
        ("checkpoint", 0, 0),
        ("checkpoint", 400, 1),
        ("checkpoint", 800, 2),
        ("fresh", 0, -1),
    ]
    norms = [float(row.variables["total_l2"].data) for row in rows]
    assert norms[0] < norms[1] < norms[2]
    assert norms[3] != norms[0]
    assert float(rows[0].variables["total_distance"].data) == 0


def test_checkpoints_are_measured_on_a_task_that_none_of_them_learned(shown: Demonstration) -> None:
    assert shown.outcomes[1].accuracy > 0.5
    rows = [row for row in shown.analysis.rows if row.probe == "performance"]
    assert {row.conditions["examples"] for row in rows} == {EXAMPLES}
    standard_error = (0.1 * 0.9 / EXAMPLES) ** 0.5
    for row in rows:
        assert abs(float(row.variables["accuracy"].data) - 0.1) < 4 * standard_error


def test_what_a_task_reached_is_what_its_checkpoint_says(shown: Demonstration, out: Path) -> None:
    assert [o for o in read_outcomes(out / "run") if o.network == "run"] == [*shown.outcomes]
    assert shown.fresh_start.task == 1
    assert "on the first" in shown.findings[0]
    assert "no loss of trainability" in shown.findings[1]
    assert "too few" in shown.findings[2]


def test_a_second_run_repeats_nothing_and_finds_the_same(
    shown: Demonstration, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr("plasticity_probe.training.loop.fit", lambda *_, **__: pytest.fail("trained again"))
    again = demonstrate(out, tasks=2, probes=[WeightNormsProbe(), PerformanceProbe()])
    assert (again.outcomes, again.fresh_start, again.findings) == (shown.outcomes, shown.fresh_start, shown.findings)
    assert not again.analysis.records
    stored = [(row.key, row.seconds, row.variables) for row in shown.analysis.rows]
    assert [(row.key, row.seconds, row.variables) for row in again.analysis.rows] == stored
    assert (out / "notes.txt").read_text() == "mine"


def test_other_settings_in_the_same_folder_are_refused_and_both_are_shown(shown: Demonstration, out: Path) -> None:
    with pytest.raises(UsageError, match=r"tasks: 2 there, 3 now.*--out"):
        demonstrate(out, tasks=3)
    with pytest.raises(UsageError, match="at least one task"):
        demonstrate(out, tasks=0)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no folder of a demonstration"):
        claim(tmp_path, {"tasks": 1})
    with pytest.raises(UsageError, match="no folder of a demonstration"):
        claim(tmp_path / "thesis.tex", {"tasks": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_taken_and_a_marker_of_something_else_refused(tmp_path: Path) -> None:
    claim(tmp_path, {"tasks": 1})
    claim(tmp_path, {"tasks": 1})
    for text in ("{", "[]", json.dumps({"tasks": 1})):
        (tmp_path / MARKER).write_text(text)
        with pytest.raises(UsageError, match="not what a demonstration writes"):
            claim(tmp_path, {"tasks": 1})


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TraceError, match="cannot be used"):
        claim(tmp_path / "file" / "demo", {"tasks": 1})


def row(probe: str, task: int, status: str = "ok", network: str = "checkpoint", **quantities: float) -> Row:
    roles = {"ceiling": "context"}
    variables = {
        name: Variable((), np.array(value), {"long_name": name, "role": roles.get(name, "value")})
        for name, value in quantities.items()
    }
    return Row(probe, "{}", "r", task, task, "f", f"{task}", network, 0, status, "", 0.0, 0.0, 0, variables=variables)


def outcomes(*accuracies: float) -> list[Outcome]:
    same = {"seed": 0, "network": "run", "status": "ok", "step": 0, "updates": 0, "epochs": 0, "first_epoch_loss": 2.3}
    unknown = dict.fromkeys(("loss", "online_loss", "updates_to_threshold", "test_loss", "test_accuracy"), math.nan)
    return [
        Outcome(task=task, name=f"task {task}", accuracy=accuracy, online_accuracy=accuracy, **same, **unknown)  # type: ignore[arg-type]
        for task, accuracy in enumerate(accuracies)
    ]


def test_the_closest_quantity_of_each_probe_is_found_by_ranks() -> None:
    went = outcomes(0.9, 0.7, 0.8, 0.2)
    rows = [row("ranks", t, close=v, far=f, ceiling=v) for t, (v, f) in enumerate([(1e3, 1), (5, 3), (6, 2), (-1, 9)])]
    rows += [row("norms", t, size=float(t)) for t in range(4)]
    rows += [row("ranks", 4, close=0, far=0), row("ranks", 0, network="fresh", close=77, far=77)]
    ranks, norms = closest_of_each_probe(went, rows)
    assert (ranks.probe, ranks.meaning, ranks.first, ranks.last) == ("ranks", "close", 1e3, -1)
    assert ranks.correlation == pytest.approx(1)
    assert norms.correlation == pytest.approx(
        1 - 6 * (9 + 0 + 0 + 9) / (4 * 15)
    )  # Spearman by hand: 1 - 6 sum d^2 / (n (n^2 - 1))


@pytest.mark.parametrize(
    "rows",
    [
        [row("p", t, value=1.0) for t in range(4)],
        [row("p", t, value=float("nan") if t == 2 else t) for t in range(4)],
        [row("p", t, status="not_converged" if t == 2 else "ok", value=t) for t in range(4)],
        [row("performance", t, value=t) for t in range(4)],
        [row("p", t, ceiling=t) for t in range(4)],
    ],
    ids=["constant", "unknown once", "unreliable once", "performance", "no value"],
)
def test_quantities_that_cannot_be_ranked_are_left_out(rows: list[Row]) -> None:
    assert closest_of_each_probe(outcomes(0.9, 0.8, 0.3, 0.1), rows) == []


def test_accuracies_that_do_not_vary_have_no_correlation() -> None:
    assert closest_of_each_probe(outcomes(0.5, 0.5, 0.5), [row("p", t, value=t) for t in range(3)]) == []
    assert not math.isnan(
        closest_of_each_probe(outcomes(0.5, 0.6), [row("p", t, value=t) for t in range(2)])[0].correlation
    )
