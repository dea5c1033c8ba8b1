import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plasticity_probe import demonstration
from plasticity_probe.demonstration import (
    CONFIGURATIONS,
    MARKER,
    PLAIN,
    REMEDIED,
    Course,
    Demonstration,
    claim,
    course_of,
    demonstrate,
    findings,
    rank_correlation,
)
from plasticity_probe.errors import BudgetError, TraceError, UsageError
from plasticity_probe.probes.norms import WeightNormsProbe
from plasticity_probe.probes.performance import PerformanceProbe
from plasticity_probe.trace.layout import Row
from plasticity_probe.trace.reader import joined_rows
from plasticity_probe.training.outcomes import Outcome, read_outcomes
from plasticity_probe.training.settings import Training
from plasticity_probe.training.summary import Mean, mean_of

PROBES = [WeightNormsProbe(), PerformanceProbe()]
SMALL = {"EXAMPLES": 120, "TRAINING": Training(epochs=(2,), batch=60)}
"""What makes a demonstration a matter of seconds: two updates an epoch, two epochs a task."""


@pytest.fixture(scope="module")
def small() -> object:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(demonstration, name, value)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "demo"


@pytest.fixture(scope="module")
def told() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def shown(small: object, out: Path, told: list[tuple[int, int]]) -> Demonstration:
    return demonstrate(
        out, tasks=3, seeds=2, first_seed=4, probes=PROBES, progress=lambda done, total, _: told.append((done, total))
    )


def stored(shown: Demonstration) -> list[Row]:
    rows, _ = joined_rows([str(trace) for trace in shown.traces])
    return rows


def test_the_checkpoint_at_the_start_of_every_task_is_measured_in_every_run(shown: Demonstration) -> None:
    rows = [row for row in stored(shown) if row.probe == "weight_norms"]
    assert {row.network for row in rows} == {"checkpoint"}
    assert [(row.run, row.step, row.task) for row in rows] == [
        (f"{name} seed {seed}", 4 * task, task) for name in CONFIGURATIONS for seed in (4, 5) for task in range(3)
    ]
    norms = np.array([float(row.variables["total_l2"].data) for row in rows]).reshape(8, 3)
    assert (norms[:, 0] != norms[:, 1]).all()
    assert all(float(row.variables["total_distance"].data) == 0 for row in rows if row.task == 0)
    assert all(float(row.variables["total_distance"].data) > 0 for row in rows if row.task > 0)


def test_each_is_measured_on_the_task_that_comes_next(shown: Demonstration, out: Path) -> None:
    rows = [row for row in stored(shown) if row.probe == "performance"]
    assert {json.loads(row.settings)["on"] for row in rows} == {"next"}
    accuracies = [float(row.variables["accuracy"].data) for row in rows]
    assert max(accuracies) < 0.1 + 4.5 * (0.1 * 0.9 / SMALL["EXAMPLES"]) ** 0.5  # labels that no network has seen yet


def test_the_spectrum_is_measured_in_the_first_run_of_relu_alone(shown: Demonstration) -> None:
    rows = [row for row in stored(shown) if row.probe == "hessian_spectrum"]
    assert [(row.run, row.task, row.status) for row in rows] == [("relu seed 4", task, "ok") for task in range(3)]
    assert "one run alone, the first of relu" in shown.findings[-1]


def test_courses_are_those_of_the_run_folders(shown: Demonstration, out: Path) -> None:
    assert [course.name for course in shown.courses] == [*CONFIGURATIONS]
    for course in shown.courses:
        outcomes = read_outcomes(out / "runs" / course.name)
        assert course == course_of(course.name, outcomes)
        runs = [o.accuracy for o in outcomes if o.network == "run" and o.task == 2]
        fresh = [o.accuracy for o in outcomes if o.network == "control"]
        assert (course.first.count, len(course.by_task)) == (2, 3)
        assert course.last.value == pytest.approx(np.mean(runs))
        assert course.gap.value == pytest.approx(np.mean(fresh) - np.mean(runs))
    assert "No loss of trainability shows" in shown.findings[0]
    assert "at least 5 runs of a configuration and 3 tasks (--seeds, --tasks), here are 2 and 3" in shown.findings[1]


def test_progress_rises_to_the_end(shown: Demonstration, told: list[tuple[int, int]]) -> None:
    assert {total for _, total in told} == {400}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == 400


def test_a_second_run_repeats_nothing_and_finds_the_same(
    shown: Demonstration, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr("plasticity_probe.training.loop.fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("plasticity_probe.analysis.run_probe", lambda *_, **__: pytest.fail("measured again"))
    assert demonstrate(out, tasks=3, seeds=2, first_seed=4, probes=PROBES) == shown
    assert (out / "notes.txt").read_text() == "mine"


def test_other_settings_in_the_same_folder_are_refused_and_both_are_shown(shown: Demonstration, out: Path) -> None:
    with pytest.raises(UsageError, match=r"tasks: 3 there, 4 now; first_seed: 4 there, 0 now.*--out"):
        demonstrate(out, tasks=4, seeds=2)


@pytest.mark.parametrize("wrong", [{"tasks": 0}, {"seeds": 0}, {"first_seed": -1}, {"processes": 0}])
def test_numbers_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least one task, one seed"):
        demonstrate(tmp_path / "demo", **wrong)
    assert not (tmp_path / "demo").exists()


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
    for text in ("{", "[]", json.dumps({"tasks": 1}), json.dumps({"schema": "plasticity_probe.demo/2", "tasks": 1})):
        (tmp_path / MARKER).write_text(text)
        with pytest.raises(UsageError, match="not what a demonstration of this version writes"):
            claim(tmp_path, {"tasks": 1})


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TraceError, match="cannot be used"):
        claim(tmp_path / "file" / "demo", {"tasks": 1})


def outcome(task: int, accuracy: float, seed: int = 0, network: str = "run") -> Outcome:
    same = {"status": "ok", "step": 0, "updates": 0, "epochs": 0, "first_epoch_loss": 2.3}
    unknown = dict.fromkeys(
        ("loss", "online_loss", "online_accuracy", "updates_to_threshold", "test_loss", "test_accuracy"), math.nan
    )
    return Outcome(seed=seed, task=task, name=f"task {task}", network=network, accuracy=accuracy, **same, **unknown)  # type: ignore[arg-type]


def test_a_course_holds_means_over_runs_and_the_gap_seed_by_seed() -> None:
    runs = [outcome(task, accuracy) for task, accuracy in enumerate((0.9, 0.5, 0.2))]
    runs += [outcome(task, accuracy, seed=1) for task, accuracy in enumerate((0.7, 0.8, 0.4))]
    fresh = [outcome(2, 0.8, network="control"), outcome(2, 0.6, seed=1, network="control")]
    found = course_of("relu", [*runs, *fresh])
    assert found.by_task == pytest.approx((0.8, 0.65, 0.3))
    assert found.first == mean_of([0.9, 0.7])
    assert found.gap.value == pytest.approx(0.4)
    assert found.drift == pytest.approx((-1 - 0.5) / 2)  # ranks 3 2 1 and 2 3 1 against 1 2 3
    one = course_of("relu", [*runs[:3], runs[3]])  # the second seed diverged after its first task
    assert one.by_task == pytest.approx((0.8, 0.5, 0.2))
    assert one.drift == -1
    assert math.isnan(one.fresh.value)
    assert not one.lost


def course(name: str, first: float, last: float, fresh: float, half_width: float = 0.01, drift: float = -0.9) -> Course:
    begun, ended, new, gap = (Mean(value, half_width, 10) for value in (first, last, fresh, fresh - last))
    return Course(name, (first, last), begun, ended, new, gap, drift)


def test_a_loss_is_a_notable_and_certain_gap() -> None:
    assert course("a", 0.8, 0.2, 0.8).lost
    assert not course("a", 0.8, 0.76, 0.8).lost
    assert not course("a", 0.8, 0.6, 0.8, half_width=0.3).lost
    assert course("one run", 0.8, 0.2, 0.8, half_width=math.nan).lost


def test_findings_say_who_lost_it_what_the_remedy_costs_and_what_drifts() -> None:
    courses = [course(PLAIN, 0.84, 0.12, 0.82, drift=-0.95), course("tanh", 0.6, 0.35, 0.6)]
    said = findings([*courses, course(REMEDIED, 0.67, 0.71, 0.65, drift=0.2)], 10, 20)
    assert "On task 20 fresh networks do better" in said[0]
    assert "relu 12 % (fresh 82 %), tanh 35 % (fresh 60 %). None shows in relu-l2-init 71 % (fresh 65 %)." in said[0]
    assert "on the first task it fits 17 points less" in said[1]
    assert "In the runs of relu the mere number of the task has a rank correlation of −0.95" in said[2]
    assert not any("Too few" in sentence for sentence in said)
    helpless = findings([*courses, course(REMEDIED, 0.8, 0.1, 0.8)], 10, 20)
    assert not any("remedy" in sentence for sentence in helpless)


@pytest.mark.parametrize(("seeds", "tasks"), [(4, 20), (10, 2), (1, 1)])
def test_too_few_runs_or_tasks_are_said_to_be(seeds: int, tasks: int) -> None:
    said = " ".join(findings([course(PLAIN, 0.8, 0.7, 0.7), course(REMEDIED, 0.8, 0.7, 0.7)], seeds, tasks))
    assert (
        "Too few runs to judge what predicts it: a verdict takes at least 5 runs of a configuration and 3 tasks" in said
    )
    assert f"(--seeds, --tasks), here are {seeds} and {tasks}." in said
    assert ("One task is no sequence" in said) == (tasks == 1)


def test_rank_correlation_goes_by_ranks_and_is_unknown_where_there_are_none() -> None:
    assert rank_correlation([1e3, 5, 6, -1], [0.9, 0.7, 0.8, 0.2]) == pytest.approx(1)
    # by hand: 1 - 6 sum d^2 / (n (n^2 - 1))
    assert rank_correlation(range(4), [0.9, 0.7, 0.8, 0.2]) == pytest.approx(1 - 6 * (9 + 0 + 0 + 9) / (4 * 15))
    assert math.isnan(rank_correlation(range(3), [0.5] * 3))
    assert math.isnan(rank_correlation(range(3), [0.5, math.nan, 0.2]))


PROGRAM = f"""
import os, sys
from pathlib import Path
from plasticity_probe import demonstration as d
from plasticity_probe.training.settings import Training
d.EXAMPLES, d.TRAINING = {SMALL["EXAMPLES"]}, Training(epochs=({{epochs}},), batch=60)
if {{die}} and __name__ == "__mp_main__":
    os._exit(1)
if __name__ == "__main__":
    print(d.demonstrate(Path(sys.argv[1]), tasks=3, seeds=2, first_seed=4, probes=["weight_norms"], processes=2))
"""


def program(folder: Path, epochs: int = 2, die: bool = False) -> list[str]:
    (folder / "program.py").write_text(PROGRAM.format(epochs=epochs, die=die))
    return [sys.executable, str(folder / "program.py"), str(folder / "demo")]


@pytest.mark.slow
def test_two_processes_find_the_same_as_one(shown: Demonstration, tmp_path: Path) -> None:
    done = subprocess.run(program(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(shown.courses) in done.stdout
    assert sorted(p.name for p in (tmp_path / "demo").glob("*.h5")) == sorted(p.name for p in shown.traces)


@pytest.mark.slow
def test_an_interrupt_ends_all_processes_soon(tmp_path: Path) -> None:
    started = subprocess.Popen(
        program(tmp_path, epochs=100_000), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        manifest = tmp_path / "demo" / "runs" / "leaky-relu" / "manifest.json"
        for _ in range(600):
            if manifest.exists():
                break
            time.sleep(0.1)
        time.sleep(1)
        os.killpg(started.pid, signal.SIGINT)
        _, err = started.communicate(timeout=20)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert "KeyboardInterrupt" in err


@pytest.mark.slow
def test_a_killed_process_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    done = subprocess.run(program(tmp_path, die=True), capture_output=True, text=True, check=False)
    assert BudgetError.__name__ in done.stderr
    assert "--jobs 1" in done.stderr
